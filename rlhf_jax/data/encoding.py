"""Encoding of records as the token rows of the training stages, in a tokenizer's chat format.

Records that cannot be encoded, for example because their prompt is too long, are dropped and counted (see
`chat.encode_prompts`). Each function therefore also returns ``kept``, the index of each row's record. Use these indices
to look up other fields of the records::

    rows, kept = encoding.encode_rankings(fmt, rankings, prompt_width=256, response_width=128, counts=counts)
    margins_B = np.asarray([rankings[i].margin or 0.0 for i in kept], np.float32)
    subsets = [rankings[i].metadata.get("subset") for i in kept]
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax import types
from rlhf_jax.data import chat, dialogues, errors, padding, records


class PromptRows(NamedTuple):
    """Left-padded prompts."""

    tokens_BP: np.ndarray
    mask_BP: np.ndarray
    """True at real tokens."""


def encode_prompts(
    fmt: chat.ChatFormat, prompts: Sequence[records.Prompt], *, prompt_width: int, counts: errors.DropCount
) -> tuple[PromptRows, np.ndarray]:
    """Encodes the prompts of records of any kind.

    Args:
        fmt: Chat format from `chat.chat_format`.
        prompts: Records of any kind.
        prompt_width: P; longer prompts lose their oldest turns.
        counts: Counts dropped and truncated prompts; see `chat.encode_prompts`.

    Returns:
        ``(rows, kept)``: B rows, and the indices of their records, int64 ``[B]`` in ascending order.

    Raises:
        DataError: If too many prompts are dropped or truncated.
    """
    ids, kept = _prompt_ids(fmt, prompts, prompt_width, counts)
    return PromptRows(*padding.pad_prompts(ids, width=prompt_width, pad_id=fmt.pad_id)), kept


def encode_demonstrations(
    fmt: chat.ChatFormat,
    demonstrations: Sequence[records.Demonstration],
    *,
    prompt_width: int,
    response_width: int,
    counts: errors.DropCount,
) -> tuple[types.TokenBatch, np.ndarray]:
    """Encodes demonstrations for supervised fine-tuning, with the loss on the answer and its stop token.

    Args:
        fmt: Chat format from `chat.chat_format`.
        demonstrations: Demonstrations or judged answers.
        prompt_width: P; longer prompts lose their oldest turns.
        response_width: T; longer answers are truncated and lose their stop token.
        counts: Counts dropped prompts and truncations; see `chat.encode_prompts` and `padding.pad_answers`.

    Returns:
        ``(rows, kept)``: B rows of L = P + T columns, and the indices of their records, int64 ``[B]`` in ascending
        order.

    Raises:
        DataError: If too many prompts are dropped, or too many prompts or answers are truncated.
    """
    prompt_ids, fitting = _prompt_ids(fmt, demonstrations, prompt_width, counts)
    answers, whole = _answer_ids(fmt, [(demonstrations[i], [demonstrations[i].response]) for i in fitting], counts)
    rows = padding.demonstration_rows(
        [prompt_ids[i] for i in whole],
        [ids for (ids,) in answers],
        prompt_width=prompt_width,
        response_width=response_width,
        pad_id=fmt.pad_id,
        counts=counts,
    )
    return rows, fitting[whole]


def encode_judged(
    fmt: chat.ChatFormat,
    judged: Sequence[records.Judged],
    *,
    prompt_width: int,
    response_width: int,
    counts: errors.DropCount,
) -> tuple[types.Preferences, np.ndarray]:
    """Encodes answers labelled good or bad, for KTO.

    Args:
        fmt: Chat format from `chat.chat_format`.
        judged: Judged answers.
        prompt_width: P; longer prompts lose their oldest turns.
        response_width: T; longer answers are truncated and lose their stop token.
        counts: Counts dropped prompts and truncations; see `chat.encode_prompts` and `padding.pad_answers`.

    Returns:
        ``(preferences, kept)``: `types.Preferences` of NumPy arrays with K = 1 and C = T, and the indices as from
        `encode_demonstrations`. Before training, add KTO's baseline with `train.dpo.mismatched`.

    Raises:
        DataError: If too many prompts are dropped, or too many prompts or answers are truncated.
    """
    rows, kept = encode_demonstrations(
        fmt, judged, prompt_width=prompt_width, response_width=response_width, counts=counts
    )
    preferences: Any = types.Preferences(
        tokens_BKL=rows.tokens_BL[:, None],
        mask_BKL=rows.mask_BL[:, None],
        answer_BKC=rows.loss_mask_BL[:, None, prompt_width:],
        good_BK=np.asarray([[judged[i].good] for i in kept], np.bool_).reshape(-1, 1),
    )
    return preferences, kept


def encode_rankings(
    fmt: chat.ChatFormat,
    rankings: Sequence[records.Ranking],
    *,
    prompt_width: int,
    response_width: int,
    counts: errors.DropCount,
    max_answers: int | None = None,
) -> tuple[types.Comparisons, np.ndarray]:
    """Encodes compared answers, with all answers to a prompt in one batch element.

    Answers keep the order of their record. The parsers of `records` put the best answer first, so the chosen answer of
    a pair is at k = 0. If two answers have different ranks but the same first T tokens, their record is dropped as
    ``"same answer within the width"``.

    Args:
        fmt: Chat format from `chat.chat_format`.
        rankings: Rankings and pairs.
        prompt_width: P; longer prompts lose their oldest turns.
        response_width: T; longer answers are truncated, and each of them is counted.
        counts: Counts dropped records and truncations; see `chat.encode_prompts` and `padding.ranking_rows`.
        max_answers: K; None means the largest number of answers in a record.

    Returns:
        ``(comparisons, kept)``: `types.Comparisons` of NumPy arrays with L = P + T columns, and the indices of the
        records, int64 ``[B]`` in ascending order.

    Raises:
        DataError: If too many records are dropped, too many prompts or answers are truncated, or a record has more than
            K answers.
    """
    prompt_ids, fitting = _prompt_ids(fmt, rankings, prompt_width, counts)
    for i in fitting:
        if max_answers is not None and (n := len(rankings[i].responses)) > max_answers:
            location = rankings[i].location or f"record {i + 1}"
            raise errors.DataError(f"{location}: the record has {n} answers, more than max_answers = {max_answers}")
    rows, kept = ranking_rows(
        fmt,
        prompt_ids,
        [rankings[i] for i in fitting],
        prompt_width=prompt_width,
        response_width=response_width,
        counts=counts,
        max_answers=max_answers,
    )
    return rows, fitting[kept]


def ranking_rows(
    fmt: chat.ChatFormat,
    prompt_ids: Sequence[Sequence[int]],
    rankings: Sequence[records.Ranking],
    *,
    prompt_width: int,
    response_width: int,
    counts: errors.DropCount,
    max_answers: int | None = None,
) -> tuple[types.Comparisons, np.ndarray]:
    """Encodes rankings whose prompts are already encoded; see `encode_rankings`.

    Args:
        fmt: Chat format from `chat.chat_format`.
        prompt_ids: Token ids of each record's prompt, at most P.
        rankings: Rankings and pairs.
        prompt_width: P.
        response_width: T; longer answers are truncated, and each of them is counted.
        counts: Counts dropped records and truncated answers.
        max_answers: K; None means the largest number of answers in a record.

    Returns:
        ``(comparisons, kept)`` as from `encode_rankings`.

    Raises:
        DataError: If too many records are dropped, too many answers are truncated, or a record has more than K answers.
    """
    answers, whole = _answer_ids(fmt, [(record, record.responses) for record in rankings], counts)
    answers_of = dict(zip(whole.tolist(), answers))
    stage = counts.stage()
    kept = []
    for i, ids in answers_of.items():
        if _contradict(ids, rankings[i].ranks, response_width):
            stage.drop("same answer within the width")
        else:
            kept.append(i)
    counts.add(stage, records=len(answers), source="comparisons")
    rows = padding.ranking_rows(
        [prompt_ids[i] for i in kept],
        [answers_of[i] for i in kept],
        [rankings[i].ranks for i in kept],
        prompt_width=prompt_width,
        response_width=response_width,
        pad_id=fmt.pad_id,
        counts=counts,
        max_answers=max_answers,
    )
    return rows, np.asarray(kept, np.int64)


def _prompt_ids(
    fmt: chat.ChatFormat, prompts: Sequence[records.Prompt], width: int, counts: errors.DropCount
) -> tuple[list[list[int]], np.ndarray]:
    tools = [record.tools for record in prompts]
    return chat.encode_prompts(fmt, [record.prompt for record in prompts], width=width, counts=counts, tools=tools)


def _answer_ids(
    fmt: chat.ChatFormat,
    answered: Sequence[tuple[records.Prompt, Sequence[dialogues.Answer]]],
    counts: errors.DropCount,
) -> tuple[list[list[list[int]]], np.ndarray]:
    """Returns the ids of each record's answers, and the indices of the records whose answers can all be encoded."""
    pairs = [(record, answer) for record, answers in answered for answer in answers]
    encoded = iter(
        chat.try_answers(
            fmt,
            [record.prompt for record, _ in pairs],
            [answer for _, answer in pairs],
            tools=[record.tools for record, _ in pairs],
        )
    )
    stage, found = counts.stage(), []
    for i, (record, answers) in enumerate(answered):
        ids = list(itertools.islice(encoded, len(answers)))
        unused = _unused_keys(fmt, record, answers)
        if any(isinstance(each, errors.DataError) for each in ids):
            stage.drop("the chat template does not write the answer after the prompt")
        elif any(unused & set(turn.extra) and not turn.text.strip() for turn in map(dialogues.answer_turn, answers)):
            stage.drop("the chat template does not write tool calls")
        else:
            found.append((i, ids))
            for name in sorted(unused):
                stage.unused[name] = stage.unused.get(name, 0) + 1
            if chat.has_special_token(fmt, [*record.prompt, *map(dialogues.answer_turn, answers)]):
                stage.note("a text contains the spelling of a special token")
    counts.add(stage, records=len(answered), source="answers")
    return [ids for _, ids in found], np.asarray([i for i, _ in found], np.int64)


def _unused_keys(fmt: chat.ChatFormat, record: records.Prompt, answers: Sequence[dialogues.Answer]) -> set[str]:
    """Returns the keys of the messages of a record that the chat template does not use."""
    unused: set[str] = set()
    for answer in answers:
        turns = [*record.prompt, dialogues.answer_turn(answer)]
        if record.tools or any(turn.extra for turn in turns):
            with contextlib.suppress(errors.DataError):
                unused |= chat.unused_keys(fmt, turns, tools=record.tools)
    return unused


def _contradict(answers: Sequence[Sequence[int]], ranks: Sequence[int], width: int) -> bool:
    """Returns whether two answers have the same first ``width`` tokens but different ranks."""
    rank_of: dict[tuple[int, ...], int] = {}
    return any(rank_of.setdefault(tuple(ids[:width]), rank) != rank for ids, rank in zip(answers, ranks))
