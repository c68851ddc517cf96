"""Conversations into token ids, in the chat format of any tokenizer.

A prompt ends where an answer begins, an answer ends with its stop token. They are encoded apart from each other, so
that their boundary is the same in training, where an answer is there, and in generation, where it is not.

What a format is comes from a chat template: the tokenizer's own where that says what the assistant speaks, one of
`chat_templates` where it does not. A template that would leave nothing to learn, or leave the stop token unlearnt, is
refused: a model trained with it would never learn to stop.

Texts are never taken for control tokens, whatever somebody typed. Apart from that ids are those of
``tokenizer.apply_chat_template``, without what a template writes behind the last answer, and where no token reaches
across the beginning of an answer, as none does in the families' own tokenizers. The first token comes from the template
alone: what a tokenizer puts in front of plain text is not put there twice.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rlhf_jax.data import dialogues, errors, texts
from rlhf_jax.data.chat import frames as chat_frames
from rlhf_jax.data.chat import templates

if TYPE_CHECKING:
    import transformers

_U, _A = dialogues.USER, dialogues.ASSISTANT
_OPEN, _CLOSE = "{% generation %}", "{% endgeneration %}"


@dataclasses.dataclass(frozen=True, eq=False)
class ChatFormat:
    """How a tokenizer writes conversations; made and checked by `chat_format`."""

    tokenizer: transformers.PreTrainedTokenizerFast
    """With ``template`` as its chat template: what to save beside a model that was trained in this format."""
    template: str
    origin: str
    """Where the template comes from, in words."""
    stop_ids: tuple[int, ...]
    """What ends an answer: first the token that answers are trained to end with, then the tokenizer's EOS."""
    pad_id: int
    """Any id will do, masks being carried everywhere; it is no stop token where the tokenizer has another one."""
    encoder: texts.TextEncoder = dataclasses.field(repr=False)
    control: chat_frames.Tokens = dataclasses.field(repr=False)
    frames: dict[tuple[tuple[str, ...], bool], chat_frames.Frame | errors.DataError] = dataclasses.field(
        default_factory=dict, repr=False
    )
    """Those that were needed so far."""


def messages(turns: Sequence[dialogues.Turn]) -> list[dict[str, str]]:
    """Turns as the ``role``/``content`` dictionaries that ``apply_chat_template`` takes."""
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def chat_format(
    tokenizer: transformers.PreTrainedTokenizerFast, *, model_type: str | None = None, template: str | None = None
) -> ChatFormat:
    """The chat format of a tokenizer, checked on sample dialogues.

    Args:
      tokenizer: is not changed.
      model_type: of the model's ``config.json``; tells families apart that share their control tokens.
      template: used instead of any other.

    Raises:
      DataError: the template marks nothing as the assistant's, leaves the token that ends an answer outside the marks
        or has none, or does not begin an answer where the generation prompt ends; the message says what to add.
    """
    chosen, origin = (template, "given") if template is not None else _choose(tokenizer, model_type)
    if chosen != tokenizer.chat_template:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = chosen
    control = chat_frames.control_tokens(tokenizer, chosen)
    stop = _stop_id(tokenizer, chosen, control)
    eos, pad, unknown = (_id(tokenizer, name) for name in ("eos_token", "pad_token", "unk_token"))
    stop_ids = (stop,) if eos is None or eos == stop else (stop, eos)
    return ChatFormat(
        tokenizer=tokenizer,
        template=chosen,
        origin=origin,
        stop_ids=stop_ids,
        pad_id=next((i for i in (pad, unknown) if i is not None and i not in stop_ids), stop),
        encoder=texts.text_encoder(tokenizer, control.ids),
        control=control,
    )


# ---------------------------------------------------------------------------------------------------------- encoding


def encode_prompt(fmt: ChatFormat, turns: Sequence[dialogues.Turn]) -> list[int]:
    """Ids of a prompt, up to where the assistant's answer begins.

    Raises:
      DataError: the template refuses the roles of the turns, or a word-level tokenizer lacks a word.
    """
    return _join(_encode(fmt, [turns], [_frame(fmt, turns, prompt=True, what="prompt 0")])[0])


def encode_answer(fmt: ChatFormat, text: str) -> list[int]:
    """Ids of an answer with its stop token."""
    return encode_answers(fmt, [text])[0]


def encode_answers(fmt: ChatFormat, answers: Sequence[str]) -> list[list[int]]:
    """Ids of many answers in one call, each ending in its stop token."""
    pair = [dialogues.Turn(_U, ""), dialogues.Turn(_A, "")]
    frame = _up_to_stop(_frame(fmt, pair, prompt=False, what="answer"), turn=1)
    frame = tuple(item for item in frame if item.turn == 1)
    told = [(pair[0], dialogues.Turn(_A, text)) for text in answers]
    return [_join(ids) for ids in _encode(fmt, told, [frame] * len(told))]


def encode_dialogue(
    fmt: ChatFormat, turns: Sequence[dialogues.Turn], *, train_on: Literal["all", "last"] = "all"
) -> tuple[list[int], list[bool]]:
    """Ids of a dialogue and which of them to learn: the answers with their stop tokens, all of them or the last.

    The ids end with the stop token of the last answer, and are `encode_prompt` of all before it and `encode_answer` of
    it. Templates that write earlier answers in another form than the last (Qwen3) have them so here too.

    Returns:
      ``(ids, loss_mask)``, equally long.

    Raises:
      DataError: the dialogue does not end in an assistant turn; see `encode_prompt`.
    """
    dialogues.split_answer(turns)
    last = len(turns) - 1
    frame = _up_to_stop(_frame(fmt, turns, prompt=False, what="the dialogue"), turn=last)
    learnt = _learnt(frame, {last} if train_on == "last" else {i for i, turn in enumerate(turns) if turn.role == _A})
    pieces = _encode(fmt, [turns], [frame])[0]
    return _join(pieces), [on for on, piece in zip(learnt, pieces) for _ in piece]


def encode_prompts(
    fmt: ChatFormat, prompts: Sequence[Sequence[dialogues.Turn]], *, width: int, counts: errors.DropCount
) -> tuple[list[list[int]], np.ndarray]:
    """Encode many prompts, each in at most ``width`` tokens.

    A longer prompt loses its oldest turns until it fits, and starts with a user turn all the same, behind its system
    turn if it has one: text is never cut in the middle. That counts as truncated, ``"prompt turns dropped"``. Where
    the last user turn and what follows it do not fit, the prompt is dropped, ``"prompt too long"``; so is one with
    ``"no user turn"``, and one whose ``"roles are refused"`` by the template.

    Returns:
      ``(ids, kept)``: the prompts that remain, and their places in ``prompts``, int64, rising.

    Raises:
      DataError: too large a share is dropped; a word-level tokenizer lacks a word.
    """
    stage = counts.stage()
    known: dict[tuple[int, str], list[int]] = {}
    fitted: dict[int, list[int]] = {}
    waiting: list[tuple[int, list[int]]] = []  # with the places where a prompt may start, the earliest first
    for i, turns in enumerate(prompts):
        starts = [place for place, turn in enumerate(turns) if turn.role == _U]
        if starts:
            waiting.append((i, starts))
        else:
            stage.drop("no user turn")
    while waiting:
        asked, frames, tried, again = [], [], [], []
        for i, starts in waiting:
            lead = _lead(prompts[i])
            turns = [*prompts[i][:lead], *prompts[i][starts[0] :]]
            try:
                frames.append(_frame(fmt, turns, prompt=True, what=f"prompt {i}"))
            except errors.DataError:
                stage.drop("roles are refused")
                continue
            asked.append(turns)
            tried.append((i, starts))
        for (i, starts), pieces in zip(tried, _encode(fmt, asked, frames, known)):
            ids = _join(pieces)
            if len(ids) > width and len(starts) > 1:
                again.append((i, starts[1:]))
            elif len(ids) > width:
                stage.drop("prompt too long")
            else:
                fitted[i] = ids
                if starts[0] > _lead(prompts[i]):
                    stage.truncate("prompt turns dropped")
        waiting = again
    counts.add(stage, records=len(prompts), source="prompts")
    kept = sorted(fitted)
    return [fitted[i] for i in kept], np.asarray(kept, np.int64)


def _lead(turns: Sequence[dialogues.Turn]) -> int:
    """How many turns stand before the conversation: system turns."""
    return next((i for i, turn in enumerate(turns) if turn.role in (_U, _A)), len(turns))


def _frame(fmt: ChatFormat, turns: Sequence[dialogues.Turn], *, prompt: bool, what: str) -> chat_frames.Frame:
    roles = tuple(turn.role for turn in turns)
    if (roles, prompt) not in fmt.frames:
        try:
            frame = chat_frames.make_frame(fmt.tokenizer, fmt.template, fmt.control, roles, prompt=prompt)
        except errors.DataError as error:
            frame = error
        fmt.frames[roles, prompt] = frame
    frame = fmt.frames[roles, prompt]
    if isinstance(frame, errors.DataError):
        other = [role for role in roles if role not in (_U, _A)]
        held = f"a turn of role {other[0]!r}" if other else f"turns of the roles {', '.join(roles) or 'of nobody'}"
        raise errors.DataError(f"{what} has {held}: {frame}")
    return frame


def _encode(
    fmt: ChatFormat,
    conversations: Sequence[Sequence[dialogues.Turn]],
    frames: Sequence[chat_frames.Frame],
    known: dict[tuple[int, str], list[int]] | None = None,
) -> list[list[list[int]]]:
    """For every conversation, for every item of its frame, the ids. All texts that are not known go in one call."""
    known = {} if known is None else known
    filled = []
    for turns, frame in zip(conversations, frames):
        said = [turn.text for turn in turns]
        filled.append([item.what if isinstance(item.what, int) else item.what.fill(said) for item in frame])
    texts_ = (each for row in filled for each in row if not isinstance(each, int) and each not in known)
    known.update(fmt.encoder(texts_))
    return [[[each] if isinstance(each, int) else known[each] for each in row] for row in filled]


def _join(pieces: Iterable[Sequence[int]]) -> list[int]:
    return [i for piece in pieces for i in piece]


def _stop_place(frame: chat_frames.Frame, turn: int) -> int | None:
    """Where in the frame the first control token behind the text of a turn stands."""
    seen = False
    for place, item in enumerate(frame):
        if isinstance(item.what, int):
            if seen:
                return place
        else:
            seen |= any(isinstance(part, chat_frames.Slot) and part.turn == turn for part in item.what.parts)
    return None


def _up_to_stop(frame: chat_frames.Frame, *, turn: int) -> chat_frames.Frame:
    place = _stop_place(frame, turn)
    assert place is not None  # the gate has seen to it
    return frame[: place + 1]


def _learnt(frame: chat_frames.Frame, turns: Iterable[int]) -> list[bool]:
    """Which items are learnt: those within the marks of the turns, none behind a stop token, as none is ever drawn."""
    learnt = [False] * len(frame)
    for turn in turns:
        stop = _stop_place(frame, turn)
        assert stop is not None
        for place in range(stop + 1):
            learnt[place] |= frame[place].turn == turn
    return learnt


# ---------------------------------------------------------------------------------------------------- choice and gate


def _id(tokenizer: Any, name: str) -> int | None:
    token = getattr(tokenizer, name)
    return None if token is None else tokenizer.backend_tokenizer.token_to_id(str(token))


def _choose(tokenizer: Any, model_type: str | None) -> tuple[str, str]:
    """A template and where it comes from."""
    own = tokenizer.chat_template
    if own is not None and not isinstance(own, str):
        own = tokenizer.get_chat_template()
    if own is not None and chat_frames.MARKED.search(own):
        return own, "the tokenizer's own"

    def has_token(token: str) -> bool:
        return tokenizer.backend_tokenizer.token_to_id(token) is not None

    family = templates.likely(has_token, model_type)
    if own is None:
        if family is not None:
            return family.forms[0], f"{family.name}'s, the tokenizer having none"
        if tokenizer.eos_token_id is None:
            raise errors.DataError("the tokenizer has neither a chat template nor an EOS token for an answer to end in")
        # As the tokenizer begins plain text, so does the template (OPT), since nothing else puts a first token there.
        begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        return templates.plain(bos=begins), "plain names, the tokenizer having none"
    wanted = _samples(tokenizer, own)
    for each in sorted(templates.candidates(has_token), key=lambda each: each is not family):
        for form in each.forms:
            if wanted is not None and _samples(tokenizer, form) == wanted:
                return form, f"{each.name}'s, the same as the tokenizer's own with generation marks"
    if family is not None and family.telling:
        return family.forms[0], f"{family.name}'s; the tokenizer's own has no generation marks and writes otherwise"
    return own, "the tokenizer's own"  # for the gate to refuse


def _samples(tokenizer: Any, template: str) -> list[str] | None:
    """What a template makes of a first and of a second question; None where it refuses them."""
    said = [{"role": role, "content": text} for role, text in ((_U, "one"), (_A, "two"), (_U, "three"))]
    try:
        return [chat_frames.render(tokenizer, template, said[:n], prompt=True)[0] for n in (1, 3)]
    except errors.DataError:
        return None


def _stop_id(tokenizer: Any, template: str, control: chat_frames.Tokens) -> int:
    """The gate: the token that ends every answer, within the marks. Raises DataError for what cannot be trained."""
    if not chat_frames.MARKED.search(template):
        raise errors.DataError(
            f"the chat template has no {_OPEN} marks, so nothing would be learnt: put {_OPEN} where an answer begins "
            f"and {_CLOSE} behind the token that ends it"
        )
    stops = set()
    for roles in ((_U, _A), (_U, _A, _U, _A)):
        frame = chat_frames.make_frame(tokenizer, template, control, roles, prompt=False)
        for turn in range(1, len(roles), 2):
            stops.add(_checked_stop(tokenizer, frame, turn))
        begins = next(place for place, item in enumerate(frame) if item.turn == len(roles) - 1)
        asked = chat_frames.make_frame(tokenizer, template, control, roles[:-1], prompt=True)
        if [item.what for item in asked] != [item.what for item in frame[:begins]]:
            raise errors.DataError(
                f"the chat template begins an answer elsewhere than where its generation prompt ends: {_OPEN} must "
                "stand right behind what add_generation_prompt writes"
            )
    if len(stops) > 1:
        names = " and ".join(sorted(map(repr, tokenizer.convert_ids_to_tokens(list(stops)))))
        raise errors.DataError(f"the chat template ends answers with different tokens, {names}")
    return stops.pop()


def _checked_stop(tokenizer: Any, frame: chat_frames.Frame, turn: int) -> int:
    marked = [item for item in frame if item.turn == turn and not isinstance(item.what, int)]
    if not any(isinstance(part, chat_frames.Slot) for item in marked for part in item.what.parts):  # type: ignore
        raise errors.DataError(
            f"the {_OPEN} marks of the chat template hold no assistant text: put {_OPEN} where an answer begins and "
            f"{_CLOSE} behind the token that ends it"
        )
    place = _stop_place(frame, turn)
    if place is None or frame[place].turn != turn:
        stop = frame[place].what if place is not None else tokenizer.eos_token_id
        name = f"the token {tokenizer.convert_ids_to_tokens(stop)!r}" if stop is not None else "a stop token"
        raise errors.DataError(
            f"the chat template leaves the end of an answer unlearnt: write {name} behind the assistant's text, before "
            f"{_CLOSE}"
        )
    return frame[place].what  # type: ignore[return-value]
