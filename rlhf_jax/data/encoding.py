"""Records of `records` into the token rows that the stages train on, in the chat format of any tokenizer.

Each function gives the rows and the places of the records they came from, since prompts that do not fit are dropped and
counted: see `chat.encode_prompts`. Through the places all else that records say comes along::

    rows, kept = encoding.rankings(fmt, found, prompt_width=256, response_width=128, counts=counts)
    margins_B = np.asarray([found[i].margin or 0.0 for i in kept], np.float32)
    subsets = [found[i].metadata.get("subset") for i in kept]
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax import types
from rlhf_jax.data import chat, errors, records, tokenising


class PromptRows(NamedTuple):
    """Prompts, padded on the left."""

    tokens_BP: np.ndarray
    mask_BP: np.ndarray
    """True at real tokens."""


class JudgedRows(NamedTuple):
    """Rows of single answers that were marked good or bad."""

    tokens_BL: np.ndarray
    mask_BL: np.ndarray
    loss_mask_BL: np.ndarray
    """True at the answer with its end token."""
    good_B: np.ndarray
    """bool, True for a thumb up."""


def prompts(
    fmt: chat.ChatFormat, found: Sequence[records.Prompt], *, prompt_width: int, counts: errors.DropCount
) -> tuple[PromptRows, np.ndarray]:
    """Prompts of any records.

    Args:
      fmt: from `chat.chat_format`.
      found: B' records, of any kind.
      prompt_width: P; longer prompts lose their oldest turns.
      counts: see `chat.encode_prompts`.

    Returns:
      ``(rows, kept)``: B rows, and their places in ``found``, int64 ``[B]``, rising.

    Raises:
      DataError: too large a share is dropped.
    """
    ids, kept = _prompt_ids(fmt, found, prompt_width, counts)
    return PromptRows(*tokenising.pad_prompts(ids, width=prompt_width, pad_id=fmt.pad_id)), kept


def demonstrations(
    fmt: chat.ChatFormat,
    found: Sequence[records.Demonstration],
    *,
    prompt_width: int,
    response_width: int,
    counts: errors.DropCount,
) -> tuple[tokenising.Rows, np.ndarray]:
    """Rows for supervised fine-tuning, loss on the answer with its end token.

    Args:
      fmt: from `chat.chat_format`.
      found: B' records.
      prompt_width: P.
      response_width: T; a longer answer is cut, is left without its end token, and counts as truncated.
      counts: see `chat.encode_prompts` and `tokenising.pad_answers`.

    Returns:
      ``(rows, kept)``: rows of L = P + T, and their places in ``found``.

    Raises:
      DataError: too large a share is dropped, or cut.
    """
    ids, kept = _prompt_ids(fmt, found, prompt_width, counts)
    answers = chat.encode_answers(fmt, [found[i].response for i in kept])
    rows = tokenising.demonstration_rows(
        ids, answers, prompt_width=prompt_width, response_width=response_width, pad_id=fmt.pad_id, counts=counts
    )
    return rows, kept


def judged(
    fmt: chat.ChatFormat,
    found: Sequence[records.Judged],
    *,
    prompt_width: int,
    response_width: int,
    counts: errors.DropCount,
) -> tuple[JudgedRows, np.ndarray]:
    """Rows of answers with a thumb up or down, as KTO takes them; all as of `demonstrations`."""
    rows, kept = demonstrations(fmt, found, prompt_width=prompt_width, response_width=response_width, counts=counts)
    return JudgedRows(*rows, good_B=np.asarray([found[i].good for i in kept], np.bool_)), kept


def rankings(
    fmt: chat.ChatFormat,
    found: Sequence[records.Ranking],
    *,
    prompt_width: int,
    response_width: int,
    counts: errors.DropCount,
    answers: int | None = None,
) -> tuple[types.Comparisons, np.ndarray]:
    """Compared answers, all those of a prompt in one batch element, in the order of their record.

    The parsers of `records` put the best first, so that pairs are K = 2 with the chosen answer first. A record with two
    answers that are the same within T tokens and yet of different rank is dropped,
    ``"same answer within the width"``.

    Args:
      fmt: from `chat.chat_format`.
      found: B' records.
      prompt_width: P.
      response_width: T; longer answers are cut and count as truncated, once each.
      counts: see `chat.encode_prompts` and `tokenising.ranking_rows`.
      answers: K; by default the largest number of answers that a record has.

    Returns:
      ``(comparisons, kept)``: NumPy arrays, ``tokens_BKL`` with L = P + T, and their places in ``found``.

    Raises:
      DataError: too large a share is dropped, or cut; a record has more than K answers.
    """
    ids, places = _prompt_ids(fmt, found, prompt_width, counts)
    for i in places:
        if answers is not None and (n := len(found[i].responses)) > answers:
            where = found[i].where or f"record {i + 1}"
            raise errors.DataError(f"{where}: the record has {n} answers, more than the {answers} there is room for")
    rows, kept = ranking_rows(
        fmt,
        ids,
        [found[i] for i in places],
        prompt_width=prompt_width,
        response_width=response_width,
        counts=counts,
        answers=answers,
    )
    return rows, places[kept]


def ranking_rows(
    fmt: chat.ChatFormat,
    ids: Sequence[Sequence[int]],
    found: Sequence[records.Ranking],
    *,
    prompt_width: int,
    response_width: int,
    counts: errors.DropCount,
    answers: int | None = None,
) -> tuple[types.Comparisons, np.ndarray]:
    """`rankings` of records whose prompts are encoded already, and fit: ``ids``, one list a record."""
    flat = iter(chat.encode_answers(fmt, [text for record in found for text in record.responses]))
    told = [list(itertools.islice(flat, len(record.responses))) for record in found]
    stage = counts.stage()
    kept = []
    for i, record in enumerate(found):
        if _contradicts(told[i], record.ranks, response_width):
            stage.drop("same answer within the width")
        else:
            kept.append(i)
    counts.add(stage, records=len(found), source="comparisons")
    rows = tokenising.ranking_rows(
        [ids[i] for i in kept],
        [told[i] for i in kept],
        [found[i].ranks for i in kept],
        prompt_width=prompt_width,
        response_width=response_width,
        pad_id=fmt.pad_id,
        counts=counts,
        most=answers,
    )
    return rows, np.asarray(kept, np.int64)


def _prompt_ids(
    fmt: chat.ChatFormat, found: Sequence[records.Prompt], width: int, counts: errors.DropCount
) -> tuple[list[list[int]], np.ndarray]:
    return chat.encode_prompts(fmt, [record.prompt for record in found], width=width, counts=counts)


def _contradicts(answers: Sequence[Sequence[int]], ranks: Sequence[int], width: int) -> bool:
    rank_of: dict[tuple[int, ...], int] = {}
    return any(rank_of.setdefault(tuple(ids[:width]), rank) != rank for ids, rank in zip(answers, ranks))
