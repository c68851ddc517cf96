"""Encoding of conversations as token ids, in the chat format of any tokenizer.

A prompt ends where an answer begins, and an answer ends with its stop token. Prompts and answers are encoded
separately, so a prompt has the same ids in training, where an answer follows, and in generation.

A chat template defines the format. It is the template passed to `chat_format`, if any; otherwise the tokenizer's own
template if that marks the tokens of the assistant (with ``{% generation %}``, see `rendering`); otherwise one from
`templates`. A template is rejected if none of the tokens that it writes would contribute to the loss. It is also
rejected if the stop token would not contribute to the loss, because the model would then never learn to stop.

The ids equal those from ``tokenizer.apply_chat_template``, with three exceptions:

- The text of a turn never becomes a control token, whatever a user types.
- The tokens after the stop token of the last answer are omitted.
- Text before and after the start of an answer is encoded separately, so no token spans this boundary. This makes no
  difference for the tokenizers of the families in `templates`.

Only the template adds a beginning-of-sequence token; the tokenizer does not add another.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rlhf_jax.data import dialogues, errors, plain_text
from rlhf_jax.data.chat import rendering, templates

if TYPE_CHECKING:
    import transformers

_USER, _ASSISTANT = dialogues.USER, dialogues.ASSISTANT
_OPEN, _CLOSE = "{% generation %}", "{% endgeneration %}"


@dataclasses.dataclass(frozen=True, eq=False)
class ChatFormat:
    """The chat format of a tokenizer; created and checked by `chat_format`."""

    tokenizer: transformers.PreTrainedTokenizerFast
    """The tokenizer with ``template`` as its chat template, to be saved with a model trained in this format."""
    template: str
    origin: str
    """Where the template comes from, as a phrase for messages."""
    stop_ids: tuple[int, ...]
    """Ids that end an answer: the token with which answers end in training, the EOS token, and any further ids, without
    duplicates."""
    pad_id: int
    """Token id used for padding: the pad token or the unknown token, whichever first exists and does not end an answer;
    otherwise the first of ``stop_ids``."""
    encoder: plain_text.TextEncoder = dataclasses.field(repr=False)
    control: rendering.ControlTokens = dataclasses.field(repr=False)
    frames: dict[tuple[tuple[str, ...], bool], rendering.Frame | errors.DataError] = dataclasses.field(
        default_factory=dict, repr=False
    )
    """Cache of frames (see `rendering`). A key consists of the roles and whether the generation prompt follows; the
    value is the frame, or the error that `rendering.make_frame` raised."""


def messages(turns: Sequence[dialogues.Turn]) -> list[dict[str, Any]]:
    """Converts turns to the dictionaries that ``apply_chat_template`` accepts: ``role``, ``content`` and other keys."""
    return [{**turn.extra, "role": turn.role, "content": turn.text} for turn in turns]


def chat_format(
    tokenizer: transformers.PreTrainedTokenizerFast,
    *,
    model_type: str | None = None,
    template: str | None = None,
    stop_ids: Iterable[int] = (),
) -> ChatFormat:
    """Returns the chat format of a tokenizer, checked on sample dialogues.

    >>> from rlhf_jax.data import chat, dialogues, tokenizers
    >>> fmt = chat.chat_format(tokenizers.word_level(["the", "cat", "sat"]))
    >>> chat.encode_prompt(fmt, [dialogues.Turn("user", "the cat")])  # <|user|> the cat <|end|> <|assistant|>
    [2, 4, 5, 1, 3]
    >>> chat.encode_answer(fmt, "sat")  # sat <|end|>
    [6, 1]

    Args:
        tokenizer: The tokenizer; it is not modified.
        model_type: ``model_type`` from the model's ``config.json``; it distinguishes model families with the same
            control tokens.
        template: Chat template to use instead of the tokenizer's own template or the template of a family.
        stop_ids: Further ids that end an answer, such as those from `rlhf_jax.lm.load_stop_ids`.

    Returns:
        The format.

    Raises:
        DataError: If the template cannot be used for training. For example, its ``{% generation %}`` marks contain no
            assistant text or exclude the stop token, or answers do not start at the end of the generation prompt. The
            message explains what to change.
    """
    chosen, origin = (template, "given") if template is not None else _choose(tokenizer, model_type)
    if chosen != tokenizer.chat_template:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = chosen
    control = rendering.control_tokens(tokenizer, chosen)
    stop = _check_template(tokenizer, chosen, control)
    eos, pad, unknown = (_id(tokenizer, name) for name in ("eos_token", "pad_token", "unk_token"))
    ends = tuple(dict.fromkeys(i for i in (stop, eos, *stop_ids) if i is not None))
    return ChatFormat(
        tokenizer=tokenizer,
        template=chosen,
        origin=origin,
        stop_ids=ends,
        pad_id=next((i for i in (pad, unknown) if i is not None and i not in ends), stop),
        encoder=plain_text.text_encoder(tokenizer, control.ids),
        control=control,
    )


# ---------------------------------------------------------------------------------------------------------- encoding


def encode_prompt(fmt: ChatFormat, turns: Sequence[dialogues.Turn]) -> list[int]:
    """Returns the ids of a prompt, up to the start of the assistant's answer.

    Raises:
        DataError: If the template rejects the roles of the turns, or a word is not in the tokenizer's vocabulary.
    """
    return _join(_encode(fmt, [turns], [_frame(fmt, turns, prompt=True, name="prompt 0")])[0])


def encode_answer(fmt: ChatFormat, text: str) -> list[int]:
    """Returns the ids of an answer with its stop token."""
    return encode_answers(fmt, [text])[0]


def encode_answers(fmt: ChatFormat, answers: Sequence[str]) -> list[list[int]]:
    """Returns the ids of several answers, each with its stop token."""
    pair = [dialogues.Turn(_USER, ""), dialogues.Turn(_ASSISTANT, "")]
    frame = _up_to_stop(_frame(fmt, pair, prompt=False, name="answer"), turn=1)
    frame = tuple(item for item in frame if item.turn == 1)
    conversations = [(pair[0], dialogues.Turn(_ASSISTANT, text)) for text in answers]
    return [_join(ids) for ids in _encode(fmt, conversations, [frame] * len(conversations))]


def encode_dialogue(
    fmt: ChatFormat, turns: Sequence[dialogues.Turn], *, train_on: Literal["all", "last"] = "all"
) -> tuple[list[int], list[bool]]:
    """Returns the ids of a dialogue, and a loss mask that selects all answers, or only the last if ``train_on="last"``.

    The ids equal `encode_prompt` of the turns before the last answer, followed by `encode_answer` of the last answer.
    Some templates, such as Qwen3's, write earlier answers differently from the last answer; the ids follow the
    template.

    Returns:
        ``(ids, loss_mask)``, of the same length. The mask includes the stop token of each selected answer.

    Raises:
        DataError: If the dialogue does not end in an assistant turn; see also `encode_prompt`.
    """
    dialogues.split_answer(turns)
    last = len(turns) - 1
    frame = _up_to_stop(_frame(fmt, turns, prompt=False, name="the dialogue"), turn=last)
    answers = {last} if train_on == "last" else {i for i, turn in enumerate(turns) if turn.role == _ASSISTANT}
    learnt = _learnt(frame, answers)
    pieces = _encode(fmt, [turns], [frame])[0]
    return _join(pieces), [is_learnt for is_learnt, piece in zip(learnt, pieces) for _ in piece]


def encode_prompts(
    fmt: ChatFormat, prompts: Sequence[Sequence[dialogues.Turn]], *, width: int, counts: errors.DropCount
) -> tuple[list[list[int]], np.ndarray]:
    """Encodes prompts as at most ``width`` tokens each.

    A longer prompt loses its oldest turns until it fits. The remaining turns are whole and start with a user turn,
    after the system turn if there is one. Assistant turns before the first user turn are always removed. In both cases,
    the prompt is counted as truncated (``"prompt turns dropped"``). A prompt is dropped for one of these reasons:

    - ``"no user turn"``
    - ``"prompt too long"``: the system turn, the last user turn and the turns after it do not fit
    - ``"roles are refused"``: the template rejects the roles of the turns

    Args:
        fmt: The chat format.
        prompts: Turns of each prompt.
        width: P, the maximum number of tokens.
        counts: Counts dropped and truncated prompts and limits their shares.

    Returns:
        ``(ids, kept)``: the ids of the remaining prompts, and their indices in ``prompts``, int64, in ascending order.

    Raises:
        DataError: If too many prompts are dropped or truncated, or a word is not in the tokenizer's vocabulary.
    """
    stage = counts.stage()
    known: dict[tuple[int, str], list[int]] = {}
    fitting: dict[int, list[int]] = {}
    pending: list[tuple[int, list[int]]] = []  # index of a prompt, and indices of its user turns that can come first
    for i, turns in enumerate(prompts):
        starts = [place for place, turn in enumerate(turns) if turn.role == _USER]
        if starts:
            pending.append((i, starts))
        else:
            stage.drop("no user turn")
    while pending:
        conversations, frames, tried, retry = [], [], [], []
        for i, starts in pending:
            n_system = _n_system_turns(prompts[i])
            turns = [*prompts[i][:n_system], *prompts[i][starts[0] :]]
            try:
                frames.append(_frame(fmt, turns, prompt=True, name=f"prompt {i}"))
            except errors.DataError:
                stage.drop("roles are refused")
                continue
            conversations.append(turns)
            tried.append((i, starts))
        for (i, starts), pieces in zip(tried, _encode(fmt, conversations, frames, known)):
            ids = _join(pieces)
            if len(ids) > width and len(starts) > 1:
                retry.append((i, starts[1:]))
            elif len(ids) > width:
                stage.drop("prompt too long")
            else:
                fitting[i] = ids
                if starts[0] > _n_system_turns(prompts[i]):
                    stage.truncate("prompt turns dropped")
        pending = retry
    counts.add(stage, records=len(prompts), source="prompts")
    kept = sorted(fitting)
    return [fitting[i] for i in kept], np.asarray(kept, np.int64)


def _n_system_turns(turns: Sequence[dialogues.Turn]) -> int:
    """Returns the number of turns before the first user or assistant turn."""
    return next((i for i, turn in enumerate(turns) if turn.role in (_USER, _ASSISTANT)), len(turns))


def _frame(fmt: ChatFormat, turns: Sequence[dialogues.Turn], *, prompt: bool, name: str) -> rendering.Frame:
    """Returns the frame for the roles of ``turns``; ``name`` describes the turns in error messages."""
    roles = tuple(turn.role for turn in turns)
    if (roles, prompt) not in fmt.frames:
        try:
            frame = rendering.make_frame(fmt.tokenizer, fmt.template, fmt.control, roles, prompt=prompt)
        except errors.DataError as error:
            frame = error
        fmt.frames[roles, prompt] = frame
    frame = fmt.frames[roles, prompt]
    if isinstance(frame, errors.DataError):
        other = [role for role in roles if role not in (_USER, _ASSISTANT)]
        problem = f"a turn of role {other[0]!r}" if other else f"the roles {', '.join(roles)}" if roles else "no turns"
        raise errors.DataError(f"{name} has {problem}: {frame}")
    return frame


def _encode(
    fmt: ChatFormat,
    conversations: Sequence[Sequence[dialogues.Turn]],
    frames: Sequence[rendering.Frame],
    known: dict[tuple[int, str], list[int]] | None = None,
) -> list[list[list[int]]]:
    """Returns the ids of each item in each conversation's frame.

    ``known`` maps ``(place, text)`` to ids. All texts that it lacks are encoded together and added to it.
    """
    known = {} if known is None else known
    filled = []
    for turns, frame in zip(conversations, frames):
        contents = [turn.text for turn in turns]
        filled.append(
            [item.content if isinstance(item.content, int) else item.content.fill(contents) for item in frame]
        )
    new_texts = (entry for row in filled for entry in row if not isinstance(entry, int) and entry not in known)
    known.update(fmt.encoder(new_texts))
    return [[[entry] if isinstance(entry, int) else known[entry] for entry in row] for row in filled]


def _join(pieces: Iterable[Sequence[int]]) -> list[int]:
    return [i for piece in pieces for i in piece]


def _stop_index(frame: rendering.Frame, turn: int) -> int | None:
    """Returns the index in the frame of the first control token after the text of a turn, or None."""
    seen = False
    for index, item in enumerate(frame):
        if isinstance(item.content, int):
            if seen:
                return index
        else:
            seen |= any(isinstance(part, rendering.Slot) and part.turn == turn for part in item.content.parts)
    return None


def _up_to_stop(frame: rendering.Frame, *, turn: int) -> rendering.Frame:
    index = _stop_index(frame, turn)
    assert index is not None  # guaranteed by _check_template
    return frame[: index + 1]


def _learnt(frame: rendering.Frame, turns: Iterable[int]) -> list[bool]:
    """Returns a mask that is True at items inside the generation marks of a turn in ``turns``, up to its stop token."""
    learnt = [False] * len(frame)
    for turn in turns:
        stop = _stop_index(frame, turn)
        assert stop is not None
        for index in range(stop + 1):
            learnt[index] |= frame[index].turn == turn
    return learnt


# ---------------------------------------------------------------------------------- choice and check of the template


def _id(tokenizer: Any, name: str) -> int | None:
    token = getattr(tokenizer, name)
    return None if token is None else tokenizer.backend_tokenizer.token_to_id(str(token))


def _choose(tokenizer: Any, model_type: str | None) -> tuple[str, str]:
    """Returns a template and a description of its origin."""
    own = tokenizer.chat_template
    if own is not None and not isinstance(own, str):
        own = tokenizer.get_chat_template()
    if own is not None and rendering.MARKED.search(own):
        return own, "the tokenizer's own"

    def has_token(token: str) -> bool:
        return tokenizer.backend_tokenizer.token_to_id(token) is not None

    family = templates.likely(has_token, model_type)
    if own is None:
        if family is not None:
            return family.forms[0], f"{family.name}'s, because the tokenizer has none"
        if tokenizer.eos_token_id is None:
            raise errors.DataError("the tokenizer has neither a chat template nor an EOS token to end an answer with")
        # If the tokenizer adds a BOS token to plain text, as OPT's does, the template must add it, because texts are
        # encoded without it.
        begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        return templates.plain(bos=begins), "plain text with User: and Assistant:, because the tokenizer has none"
    wanted = _sample_prompts(tokenizer, own)
    for candidate in sorted(templates.candidates(has_token), key=lambda candidate: candidate is not family):
        for form in candidate.forms:
            if wanted is not None and _sample_prompts(tokenizer, form) == wanted:
                return form, f"{candidate.name}'s, equal to the tokenizer's own but with generation marks"
    if family is not None and family.unambiguous:
        return family.forms[0], f"{family.name}'s; the tokenizer's own has no generation marks and differs from it"
    return own, "the tokenizer's own"  # _check_template rejects it, because it has no marks


def _sample_prompts(tokenizer: Any, template: str) -> list[str] | None:
    """Renders a prompt with one question and a prompt with two questions; returns None if the template rejects them."""
    turns = [{"role": role, "content": text} for role, text in ((_USER, "one"), (_ASSISTANT, "two"), (_USER, "three"))]
    try:
        return [rendering.render(tokenizer, template, turns[:n], prompt=True)[0] for n in (1, 3)]
    except errors.DataError:
        return None


def _check_template(tokenizer: Any, template: str, control: rendering.ControlTokens) -> int:
    """Returns the id of the token that ends every answer; raises DataError if the template is unusable."""
    if not rendering.MARKED.search(template):
        raise errors.DataError(
            f"the chat template has no {_OPEN} marks, so no token would contribute to the loss: put {_OPEN} before the "
            f"text of an answer and {_CLOSE} after the token that ends it"
        )
    stops = set()
    for roles in ((_USER, _ASSISTANT), (_USER, _ASSISTANT, _USER, _ASSISTANT)):
        frame = rendering.make_frame(tokenizer, template, control, roles, prompt=False)
        for turn in range(1, len(roles), 2):
            stops.add(_checked_stop(tokenizer, frame, turn))
        start = next(index for index, item in enumerate(frame) if item.turn == len(roles) - 1)
        prompt_frame = rendering.make_frame(tokenizer, template, control, roles[:-1], prompt=True)
        if [item.content for item in prompt_frame] != [item.content for item in frame[:start]]:
            raise errors.DataError(
                f"the chat template does not start an answer at the end of its generation prompt: put {_OPEN} "
                "directly after the text that add_generation_prompt adds"
            )
    if len(stops) > 1:
        names = " and ".join(sorted(map(repr, tokenizer.convert_ids_to_tokens(list(stops)))))
        raise errors.DataError(
            f"the chat template ends answers with different tokens ({names}): end all answers with the same token"
        )
    return stops.pop()


def _checked_stop(tokenizer: Any, frame: rendering.Frame, turn: int) -> int:
    """Returns the id of the token that ends one answer; raises DataError if it is missing or outside the marks."""
    marked = [item for item in frame if item.turn == turn and not isinstance(item.content, int)]
    if not any(isinstance(part, rendering.Slot) for item in marked for part in item.content.parts):  # type: ignore
        raise errors.DataError(
            f"the {_OPEN} marks of the chat template contain no assistant text: put {_OPEN} before the text of an "
            f"answer and {_CLOSE} after the token that ends it"
        )
    index = _stop_index(frame, turn)
    if index is None or frame[index].turn != turn:
        stop = frame[index].content if index is not None else tokenizer.eos_token_id
        name = f"the token {tokenizer.convert_ids_to_tokens(stop)!r}" if stop is not None else "a stop token"
        raise errors.DataError(
            f"the chat template excludes the end of an answer from the loss: put {name} after the assistant's text "
            f"and before {_CLOSE}"
        )
    return frame[index].content  # type: ignore[return-value]
