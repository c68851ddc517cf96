"""Scores of answers under a reward model: rows in its own chat format, of limited width, in few compiled programs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from finetune import answers as batching

from rlhf_jax import lm, types
from rlhf_jax.data import chat, dialogues, errors

_CUT = "answer truncated"


class Rows(NamedTuple):
    """The encoded prompts and answers of the records that are not dropped."""

    kept: list[int]
    """Indices of the records."""
    prompts: list[list[int]]
    answers: list[list[list[int]]]
    """Ids of the answers to each prompt."""


def encode(
    fmt: chat.ChatFormat,
    prompts: Sequence[Sequence[dialogues.Turn]],
    answers: Sequence[Sequence[dialogues.Answer]],
    *,
    width: int,
    counts: errors.DropCount,
    tools: Sequence[Sequence[Mapping[str, Any]]] | None = None,
    stopped: Sequence[Sequence[bool]] | None = None,
) -> Rows:
    """Encodes prompts, each with several answers, as rows of at most ``width`` tokens.

    A prompt that does not fit together with the longest of its answers loses its oldest turns. If even its last
    question does not fit, the answers are truncated. Both are counted, and the prompt is the same for all its answers.
    A record is dropped if its last question leaves no room for an answer, or the chat template rejects the prompt or
    one of the answers.

    Args:
        fmt: The chat format.
        prompts: Turns of each prompt.
        answers: The answers to each prompt.
        width: Maximum number of tokens of a prompt with an answer.
        counts: Counts dropped prompts, shortened prompts and truncated answers.
        tools: Descriptions of tools for each prompt.
        stopped: Whether each answer ends with a stop token; by default, all do.

    Raises:
        DataError: Too many records are dropped.
    """
    tools = [()] * len(prompts) if tools is None else tools
    whole, kept = chat.encode_prompts(fmt, prompts, width=sys.maxsize, counts=counts, tools=tools)
    pairs = [(i, answer) for i in kept for answer in answers[i]]
    encoded = iter(
        chat.try_answers(
            fmt, [prompts[i] for i, _ in pairs], [each for _, each in pairs], tools=[tools[i] for i, _ in pairs]
        )
    )
    stage, rows = counts.stage(), Rows([], [], [])
    for i, prompt in zip(kept.tolist(), whole):
        found = [next(encoded) for _ in answers[i]]
        if any(isinstance(ids, errors.DataError) for ids in found):
            stage.drop("the chat template does not write the answer after the prompt")
            continue
        ids_K: list[list[int]] = found  # type: ignore[assignment]
        if stopped is not None:
            ids_K = [ids if ended else ids[:-1] for ids, ended in zip(ids_K, stopped[i], strict=True)]
        longest = max(map(len, ids_K))
        if len(prompt) + longest > width:
            shorter = _shortened(fmt, prompts[i], tools[i], width - longest)
            if shorter is not None:
                prompt = shorter
                stage.truncate("prompt turns dropped")
        room = width - len(prompt)
        if room < 1:
            stage.drop("prompt too long")
            continue
        for ids in ids_K:
            if len(ids) > room:
                stage.truncate(_CUT)
        rows.kept.append(i)
        rows.prompts.append(prompt)
        rows.answers.append([ids[:room] for ids in ids_K])
    counts.add(stage, records=len(kept), source="records")
    return rows


def _shortened(
    fmt: chat.ChatFormat,
    turns: Sequence[dialogues.Turn],
    tools: Sequence[Mapping[str, Any]],
    width: int,
) -> list[int] | None:
    """Returns the prompt without its oldest turns, except system turns, so that it fits or one question is left.

    None means that the prompt has only one question.
    """
    users = [i for i, turn in enumerate(turns) if turn.role == dialogues.USER]
    first = next((i for i, turn in enumerate(turns) if turn.role in (dialogues.USER, dialogues.ASSISTANT)), 0)
    ids = None
    for start in users[1:]:
        ids = chat.encode_prompt(fmt, (*turns[:first], *turns[start:]), tools=tools)
        if len(ids) <= width:
            break
    return ids


def score_batch(params: types.Params, tokens_BL: Any, mask_BL: Any, *, cfg: lm.LMConfig) -> Any:
    """Returns the scores of rows of tokens."""
    return lm.score(params, tokens_BL, cfg=cfg, mask_BL=mask_BL)


def score_rows(
    rows: Sequence[Sequence[int]],
    score: Callable[..., np.ndarray],
    *,
    batch: int,
    max_length: int,
    pad_id: int,
    marks: Sequence[Sequence[bool]] | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Scores rows of different lengths.

    Rows of similar length are batched together and padded to one of a few widths, so that few programs are compiled.

    Args:
        rows: Rows of token ids.
        score: ``(tokens_BL, mask_BL) -> scores_B``; with ``marks``, it also receives ``marks_BL``.
        batch: Number of rows in a batch.
        max_length: Maximum width to which rows are padded.
        pad_id: Id of the padding token.
        marks: Marks of the tokens of each row, such as those of the answer.
        on_progress: Called after each batch with the number of rows scored so far.

    Returns:
        The scores, in the order of ``rows``.
    """
    scores, done = np.zeros(len(rows)), 0
    for indices, width in batching.batches([len(row) for row in rows], size=batch, most=max_length):
        tokens_BL = np.full((batch, width), pad_id, np.int32)
        mask_BL, marks_BL = np.zeros((2, batch, width), bool)
        # The last batch is padded with copies of its first row.
        for b, i in enumerate([*indices, *[indices[0]] * (batch - len(indices))]):
            n = len(rows[i])
            tokens_BL[b, :n], mask_BL[b, :n] = rows[i], True
            if marks is not None:
                marks_BL[b, :n] = marks[i]
        more = () if marks is None else (marks_BL,)
        scores[indices] = np.asarray(score(tokens_BL, mask_BL, *more))[: len(indices)]
        done += len(indices)
        on_progress(done)
    return scores
