"""Encoding of conversations as token ids.

The ids are those from ``tokenizer.apply_chat_template``. As in other libraries, the
spelling of a control token in a text becomes that token; the encoders of `encoding` count such records.

A prompt ends where the model replies, and an answer ends with its stop token. If a token spans the start of an answer,
the answer is encoded separately, because the model generates it after the whole prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np

from rlhf_jax.data import dialogues, errors, plain_text
from rlhf_jax.data.chat import rendering
from rlhf_jax.data.chat.formats import ChatFormat

Turns = Sequence[dialogues.Turn]
Tools = Sequence[Mapping[str, Any]]
_USUAL_ROLES = ("user", "assistant", "system", "tool", "function", "ipython")


def messages(turns: Turns) -> list[dict[str, Any]]:
    """Converts turns to the dictionaries that ``apply_chat_template`` accepts: ``role``, ``content`` and other keys."""
    return [{**turn.extra, "role": turn.role, "content": turn.text} for turn in turns]


def encode_prompt(fmt: ChatFormat, turns: Turns, *, tools: Tools = ()) -> list[int]:
    """Returns the ids of a prompt, up to the start of the assistant's answer.

    Raises:
        DataError: If the template rejects the turns, or a word is not in the tokenizer's vocabulary.
    """
    return plain_text.encode_rendered(fmt.tokenizer, [_prompt_text(fmt, turns, tools)])[0]


def encode_answer(fmt: ChatFormat, prompt: Turns, answer: dialogues.Answer, *, tools: Tools = ()) -> list[int]:
    """Returns the ids of the answer to a prompt, with its stop token.

    Args:
        fmt: The chat format.
        prompt: Turns of the prompt.
        answer: The answer.
        tools: Descriptions of tools, for the template.

    Returns:
        The ids, which continue those of `encode_prompt`.

    Raises:
        DataError: See `encode_answers`.
    """
    return encode_answers(fmt, [prompt], [answer], tools=[tools])[0]


def encode_answers(
    fmt: ChatFormat,
    prompts: Sequence[Turns],
    answers: Sequence[dialogues.Answer],
    *,
    tools: Sequence[Tools] | None = None,
) -> list[list[int]]:
    """Returns the ids of answers, each with its stop token.

    Args:
        fmt: The chat format.
        prompts: Turns of the prompt of each answer.
        answers: The answers.
        tools: Descriptions of tools for each prompt.

    Returns:
        The ids of each answer, which continue those of `encode_prompt`.

    Raises:
        DataError: If an answer does not continue its prompt (see `try_answers`), or a word is not in the tokenizer's
            vocabulary.
    """
    encoded = try_answers(fmt, prompts, answers, tools=tools)
    for ids in encoded:
        if isinstance(ids, errors.DataError):
            raise ids
    return cast(list[list[int]], encoded)


def try_answers(
    fmt: ChatFormat,
    prompts: Sequence[Turns],
    answers: Sequence[dialogues.Answer],
    *,
    tools: Sequence[Tools] | None = None,
) -> list[list[int] | errors.DataError]:
    """Returns the ids of answers as from `encode_answers`, or an error for an answer that cannot be encoded.

    The template must write an answer directly after the prompt of `encode_prompt`. With Qwen3's template and
    ``enable_thinking=False``, for example, it does not if the answer contains a thought, because the prompt then ends
    with an empty thought.

    Args:
        fmt: The chat format.
        prompts: Turns of the prompt of each answer.
        answers: The answers.
        tools: Descriptions of tools for each prompt.

    Returns:
        The ids of each answer, or the reason why it cannot be encoded.
    """
    tools = [()] * len(prompts) if tools is None else tools
    parts: list[tuple[str, str] | errors.DataError] = []
    texts: dict[
        int, str
    ] = {}  # the texts of prompts by identity, because the answers to a prompt are often consecutive
    for prompt, answer, described in zip(prompts, answers, tools, strict=True):
        try:
            if id(prompt) not in texts:
                texts = {id(prompt): _prompt_text(fmt, prompt, described)}
            parts.append((texts[id(prompt)], _answer_text(fmt, texts[id(prompt)], prompt, answer, described)))
        except errors.DataError as error:
            parts.append(error)
    usable = [part for part in parts if not isinstance(part, errors.DataError)]
    prompt_texts = dict.fromkeys(prompt for prompt, _ in usable)
    prompt_ids = dict(zip(prompt_texts, plain_text.encode_rendered(fmt.tokenizer, list(prompt_texts))))
    whole = iter(plain_text.encode_rendered(fmt.tokenizer, [prompt + answer for prompt, answer in usable]))
    encoded: list[list[int] | errors.DataError] = []
    for part in parts:
        if isinstance(part, errors.DataError):
            encoded.append(part)
            continue
        before, ids = prompt_ids[part[0]], next(whole)
        if ids[: len(before)] == before:
            encoded.append(ids[len(before) :])
        else:
            encoded.append(plain_text.encode_continuation(fmt.tokenizer, part[1]))
    return encoded


def encode_dialogue(
    fmt: ChatFormat, turns: Turns, *, train_on: Literal["all", "last"] = "all", tools: Tools = ()
) -> tuple[list[int], list[bool]]:
    """Returns the ids of a dialogue, and a loss mask that selects all answers, or only the last if ``train_on="last"``.

    Args:
        fmt: The chat format.
        turns: The turns; the last one must be the assistant's. An answer with ``"weight": 0`` among its further keys is
            not selected.
        train_on: The answers to select.
        tools: Descriptions of tools, for the template.

    Returns:
        ``(ids, loss_mask)``, of the same length. The ids are those of the whole rendering. The mask selects the tokens
        of an answer through its stop token. A token that also contains the end of the prompt is selected only if it
        contains more of the answer than white space.

    Raises:
        DataError: If the dialogue does not end in an assistant turn, the template rejects the turns, or its rendering
            does not show where an answer starts and ends.
    """
    dialogues.split_answer(turns)
    if train_on not in ("all", "last"):
        raise ValueError(f'train_on must be "all" or "last", got {train_on!r}')
    last = len(turns) - 1
    answers = [i for i, turn in enumerate(turns) if turn.role == dialogues.ASSISTANT and turn.extra.get("weight") != 0]
    if train_on == "last":
        answers = [i for i in answers if i == last]
    text, spans = rendering.answer_spans(fmt.renderer, messages(turns), answers, stop=fmt.stop, tools=tools)
    _check_written(text, turns)
    if any(turns[i].extra and not turns[i].text.strip() for i in answers) and "tool_calls" in unused_keys(
        fmt, turns, tools=tools
    ):
        raise errors.DataError("the chat template does not write tool calls, and an answer consists of them")
    ids, offsets = plain_text.encode_with_offsets(fmt.tokenizer, text)
    learnt = np.zeros(len(ids), bool)
    starts, ends = np.asarray(offsets).reshape(-1, 2).T
    for start, end in spans:
        inside = (starts >= start) & (starts < end) & (ends <= end)
        across = [a < start < b and bool(text[start:b].strip()) for a, b in offsets]
        learnt |= inside | np.asarray(across)
    return ids, learnt.tolist()


def encode_prompts(
    fmt: ChatFormat,
    prompts: Sequence[Turns],
    *,
    width: int,
    counts: errors.DropCount,
    tools: Sequence[Tools] | None = None,
) -> tuple[list[list[int]], np.ndarray]:
    """Encodes prompts as at most ``width`` tokens each.

    A longer prompt loses its oldest turns until it fits. The remaining turns are whole and start with a user turn,
    after the system turn if there is one. Assistant turns before the first user turn are always removed. In both cases,
    the prompt is counted as truncated (``"prompt turns dropped"``). A prompt is dropped for one of these reasons:

    - ``"no user turn"``
    - ``"prompt too long"``: the system turn, the last user turn and the turns after it do not fit
    - ``"refused by the chat template"``: the template rejects the turns, for example a system turn

    Args:
        fmt: The chat format.
        prompts: Turns of each prompt.
        width: P, the maximum number of tokens.
        counts: Counts dropped and truncated prompts and limits their shares.
        tools: Descriptions of tools for each prompt.

    Returns:
        ``(ids, kept)``: the ids of the remaining prompts, and their indices in ``prompts``, int64, in ascending order.

    Raises:
        DataError: If too many prompts are dropped or truncated, or a word is not in the tokenizer's vocabulary.
    """
    stage = counts.stage()
    fitting: dict[int, list[int]] = {}
    pending: list[tuple[int, list[int]]] = []  # index of a prompt, and indices of its user turns that can come first
    for i, turns in enumerate(prompts):
        starts = [place for place, turn in enumerate(turns) if turn.role == dialogues.USER]
        if starts:
            pending.append((i, starts))
        else:
            stage.drop("no user turn")
    while pending:
        texts: list[str] = []
        tried: list[tuple[int, list[int]]] = []
        for i, starts in pending:
            kept_turns = [*prompts[i][: _n_system_turns(prompts[i])], *prompts[i][starts[0] :]]
            try:
                texts.append(_prompt_text(fmt, kept_turns, () if tools is None else tools[i]))
            except errors.DataError:
                stage.drop("refused by the chat template")
                continue
            tried.append((i, starts))
        pending = []
        for (i, starts), ids in zip(tried, plain_text.encode_rendered(fmt.tokenizer, texts)):
            if len(ids) > width and len(starts) > 1:
                pending.append((i, starts[1:]))
            elif len(ids) > width:
                stage.drop("prompt too long")
            else:
                fitting[i] = ids
                if starts[0] > _n_system_turns(prompts[i]):
                    stage.truncate("prompt turns dropped")
    counts.add(stage, records=len(prompts), source="prompts")
    kept = sorted(fitting)
    return [fitting[i] for i in kept], np.asarray(kept, np.int64)


def unused_keys(fmt: ChatFormat, turns: Turns, *, tools: Tools = ()) -> set[str]:
    """Returns the keys of messages, other than role and content, without which the rendering is the same.

    Args:
        fmt: The chat format.
        turns: The turns, whose further keys are checked.
        tools: Descriptions of tools; the result contains ``"tools"`` if the template does not use them.

    Raises:
        DataError: If the template rejects the turns.
    """
    whole = messages(turns)
    text = fmt.renderer.render(whole, tools=tools, prompt=False)
    unused = {"tools"} if tools and fmt.renderer.render(whole, prompt=False) == text else set()
    for name in {name for turn in turns for name in turn.extra} - {"weight"}:
        others = [{key: value for key, value in message.items() if key != name} for message in whole]
        if fmt.renderer.render(others, tools=tools, prompt=False) == text:
            unused.add(name)
    return unused


def has_special_token(fmt: ChatFormat, turns: Turns) -> bool:
    """Returns whether a text contains the spelling of a special token, which is encoded as that token."""
    return any(token in turn.text for turn in turns for token in fmt.special_tokens)


def _n_system_turns(turns: Turns) -> int:
    """Returns the number of turns before the first user or assistant turn."""
    return next((i for i, turn in enumerate(turns) if turn.role in (dialogues.USER, dialogues.ASSISTANT)), len(turns))


def _prompt_text(fmt: ChatFormat, turns: Turns, tools: Tools) -> str:
    text = fmt.renderer.render(messages(turns), tools=tools, prompt=True)
    _check_written(text, turns)
    return text


def _check_written(text: str, turns: Turns) -> None:
    """Raises DataError if a turn with an unusual role is missing; some templates leave out roles unknown to them."""
    for turn in turns:
        if turn.role not in _USUAL_ROLES and turn.text.strip() not in text:
            raise errors.DataError(f"the chat template does not write a turn of role {turn.role!r}")


def _answer_text(fmt: ChatFormat, before: str, prompt: Turns, answer: dialogues.Answer, tools: Tools) -> str:
    """Returns the text of an answer to a prompt, whose text is ``before``."""
    turns = messages([*prompt, dialogues.answer_turn(answer)])
    text, ((start, end),) = rendering.answer_spans(
        fmt.renderer, turns, [len(prompt)], stop=fmt.stop, tools=tools, prompts={len(prompt): before}
    )
    if start != len(before) or not text.startswith(before):
        raise errors.DataError(
            "the chat template does not write the answer after its generation prompt: the prompt ends in "
            f"{before[-40:]!r}, the text before the answer in {text[:start][-40:]!r}"
        )
    return text[start:end]
