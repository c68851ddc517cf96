"""Comparisons in other shapes: cleaned, as independent pairs, with control tokens. NumPy in, NumPy out."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from rlhf_jax import types
from rlhf_jax.data import errors


def informative(batch: types.Comparisons, counts: errors.DropCount) -> types.Comparisons:
    """The prompts that teach an order, without answers that stand there twice.

    An answer that is the same, token by token, as an earlier one of its prompt is taken out (its rank says the same
    again, or contradicts); counted as truncated, ``"answer repeated"``. Then a prompt is dropped, and counted:
    ``"fewer than two answers"`` or ``"all answers tied"``.

    Raises:
      DataError: more prompts are dropped than ``counts`` allows, or none is left.
    """
    batch = jax.tree.map(np.asarray, batch)
    tokens_BKL, mask_BKL, ranks_BK = (np.asarray(x) for x in (batch.tokens_BKL, batch.mask_BKL, batch.ranks_BK))
    where_BK = np.array(batch.where_BK)
    stage, kept = counts.stage(), []
    for b in range(len(where_BK)):
        seen: set[bytes] = set()
        for k in np.flatnonzero(where_BK[b]):
            said = tokens_BKL[b, k][mask_BKL[b, k]].tobytes()
            if said in seen:
                where_BK[b, k] = False
                stage.truncate("answer repeated")
            seen.add(said)
        ranks = ranks_BK[b][where_BK[b]]
        if len(ranks) < 2:
            stage.drop("fewer than two answers")
        elif (ranks == ranks[0]).all():
            stage.drop("all answers tied")
        else:
            kept.append(b)
    counts.add(stage, records=len(where_BK), source="comparisons")
    if not kept:
        raise errors.DataError(f"none of {len(where_BK)} comparisons says which answer is better ({stage.report()})")
    cleaned = batch.replace(where_BK=where_BK, ranks_BK=np.where(where_BK, ranks_BK, 0))  # type: ignore[attr-defined]
    return jax.tree.map(lambda x: x[kept], cleaned)


def pair_rows(batch: types.Comparisons) -> types.Comparisons:
    """Each pair of a prompt as a row of its own, K = 2, the better answer first: the baseline of InstructGPT 3.5.

    Shuffled into batches, the answers of a prompt then come back in one row after another, each of them K - 1 times in
    an epoch, which is what the paper found to overfit. Ties and missing answers are in no row. Domains and loss inputs
    go with their prompt. Rows are in the order of prompts, then of the better answer, then of the worse.
    """
    ranks_BK, where_BK = np.asarray(batch.ranks_BK), np.asarray(batch.where_BK)
    both_BKK = where_BK[:, :, None] & where_BK[:, None, :]
    b, better, worse = np.nonzero(both_BKK & (ranks_BK[:, :, None] < ranks_BK[:, None, :]))
    places = np.stack([better, worse], axis=1)
    of_prompt = jax.tree.map(lambda x: np.asarray(x)[b], (batch.domain_B, batch.loss_inputs))
    shape = (len(b), 2)
    made: Any = types.Comparisons(
        np.asarray(batch.tokens_BKL)[b[:, None], places],  # type: ignore[arg-type]
        np.asarray(batch.mask_BKL)[b[:, None], places],  # type: ignore[arg-type]
        np.broadcast_to(np.array([1, 2], np.int32), shape).copy(),  # type: ignore[arg-type]
        np.ones(shape, bool),  # type: ignore[arg-type]
        *of_prompt,
    )
    return made


def with_control(batch: types.Comparisons, *, good_id: int, bad_id: int, column: int) -> types.Comparisons:
    """The binarised form of preference-model pretraining (Askell 2021): each pair becomes two of one answer each.

    ``A > B`` says that A marked GOOD is better than A marked BAD, and that B marked BAD is better than B marked GOOD.
    The mark is a control token put in at ``column``, where the answer begins, so that rows are one token wider. Of a
    prompt with more than two answers every pair becomes two.

    Args:
      batch: rows of prompts, left-padded, and answers.
      good_id: id of the control token GOOD.
      bad_id: id of BAD.
      column: P, the width of the prompts.
    """
    pairs = pair_rows(batch)
    tokens_BKL, mask_BKL = (np.repeat(x, 2, axis=1) for x in (pairs.tokens_BKL, pairs.mask_BKL))  # A A B B
    marks = np.broadcast_to(
        np.array([good_id, bad_id, bad_id, good_id], np.int32)[None, :, None], (*tokens_BKL.shape[:2], 1)
    )
    tokens_BKL = np.concatenate([tokens_BKL[:, :, :column], marks, tokens_BKL[:, :, column:]], axis=2)
    there = np.ones_like(marks, bool)
    mask_BKL = np.concatenate([mask_BKL[:, :, :column], there, mask_BKL[:, :, column:]], axis=2)
    n, _, L = tokens_BKL.shape
    of_prompt = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), (pairs.domain_B, pairs.loss_inputs))
    made: Any = types.Comparisons(
        tokens_BKL.reshape(2 * n, 2, L),  # type: ignore[arg-type]
        mask_BKL.reshape(2 * n, 2, L),  # type: ignore[arg-type]
        np.repeat(np.asarray(pairs.ranks_BK), 2, axis=0),  # type: ignore[arg-type]
        np.ones((2 * n, 2), bool),  # type: ignore[arg-type]
        *of_prompt,
    )
    return made
