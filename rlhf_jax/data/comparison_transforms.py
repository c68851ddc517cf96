"""Transforms of comparison batches, as NumPy arrays: cleaning, splitting into pairs, and adding control tokens."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from rlhf_jax import types
from rlhf_jax.data import errors


def drop_uninformative(batch: types.Comparisons, counts: errors.DropCount) -> types.Comparisons:
    """Drops repeated answers, and then prompts whose remaining answers do not differ in rank.

    An answer is dropped if it has the same tokens as an earlier answer to the same prompt; ``counts.truncated`` counts
    such answers as ``"answer repeated"``. A prompt is dropped as ``"fewer than two answers"`` or as ``"all answers
    tied"``.

    Raises:
        DataError: If more prompts are dropped than ``counts`` allows, or no prompt is left.
    """
    batch = jax.tree.map(np.asarray, batch)
    tokens_BKL, mask_BKL, ranks_BK = (np.asarray(x) for x in (batch.tokens_BKL, batch.mask_BKL, batch.ranks_BK))
    where_BK = np.array(batch.where_BK)
    stage, kept = counts.stage(), []
    for b in range(len(where_BK)):
        seen: set[bytes] = set()
        for k in np.flatnonzero(where_BK[b]):
            answer = tokens_BKL[b, k][mask_BKL[b, k]].tobytes()
            if answer in seen:
                where_BK[b, k] = False
                stage.truncate("answer repeated")
            seen.add(answer)
        ranks = ranks_BK[b][where_BK[b]]
        if len(ranks) < 2:
            stage.drop("fewer than two answers")
        elif (ranks == ranks[0]).all():
            stage.drop("all answers tied")
        else:
            kept.append(b)
    counts.add(stage, records=len(where_BK), source="comparisons")
    if not kept:
        raise errors.DataError(
            f"none of the {len(where_BK)} prompts has two different answers with different ranks ({stage.report()})"
        )
    cleaned = batch.replace(where_BK=where_BK, ranks_BK=np.where(where_BK, ranks_BK, 0))  # type: ignore[attr-defined]
    return jax.tree.map(lambda x: x[kept], cleaned)


def split_into_pairs(batch: types.Comparisons) -> types.Comparisons:
    """Returns each pair of answers to a prompt as a separate batch element with K = 2 and the better answer first.

    Section 3.5 of InstructGPT advises against this form: each of K answers appears in K - 1 pairs, and a model trained
    on the shuffled pairs overfits. Ties and missing answers form no pairs. Each pair keeps the domain and the loss
    inputs of its prompt. Pairs are ordered by prompt, then better answer, then worse answer.

    >>> import numpy as np
    >>> from rlhf_jax import types
    >>> from rlhf_jax.data import comparison_transforms
    >>> tokens = np.array([[[7], [8], [9]]])
    >>> batch = types.Comparisons(tokens, tokens > 0, np.array([[1, 3, 2]]), np.ones((1, 3), bool))
    >>> comparison_transforms.split_into_pairs(batch).tokens_BKL[:, :, 0].tolist()
    [[7, 8], [7, 9], [9, 8]]
    """
    ranks_BK, where_BK = np.asarray(batch.ranks_BK), np.asarray(batch.where_BK)
    both_BKK = where_BK[:, :, None] & where_BK[:, None, :]
    b, better, worse = np.nonzero(both_BKK & (ranks_BK[:, :, None] < ranks_BK[:, None, :]))
    places = np.stack([better, worse], axis=1)
    of_prompt = jax.tree.map(lambda x: np.asarray(x)[b], (batch.domain_B, batch.loss_inputs))
    shape = (len(b), 2)
    pairs: Any = types.Comparisons(
        np.asarray(batch.tokens_BKL)[b[:, None], places],  # type: ignore[arg-type]
        np.asarray(batch.mask_BKL)[b[:, None], places],  # type: ignore[arg-type]
        np.broadcast_to(np.array([1, 2], np.int32), shape).copy(),  # type: ignore[arg-type]
        np.ones(shape, bool),  # type: ignore[arg-type]
        *of_prompt,
    )
    return pairs


def preferences(batch: types.Comparisons, *, prompt_width: int) -> types.Preferences:
    """Returns each pair of answers to a prompt as an element of a DPO batch, with the better answer first.

    Pairs have the order of `split_into_pairs`.

    >>> import numpy as np
    >>> from rlhf_jax import types
    >>> from rlhf_jax.data import comparison_transforms
    >>> tokens_BKL = np.array([[[5, 6, 0], [5, 7, 8]]])
    >>> batch = types.Comparisons(tokens_BKL, tokens_BKL > 0, np.array([[2, 1]]), np.ones((1, 2), bool))
    >>> comparison_transforms.preferences(batch, prompt_width=1).answer_BKC.astype(int).tolist()
    [[[1, 1], [1, 0]]]

    Args:
        batch: Comparisons of padded rows.
        prompt_width: P.

    Returns:
        `types.Preferences` of NumPy arrays with K = 2 and C = L - P.
    """
    pairs = split_into_pairs(batch)
    return types.Preferences(pairs.tokens_BKL, pairs.mask_BKL, pairs.mask_BKL[..., prompt_width:])


def add_control_tokens(batch: types.Comparisons, *, good_id: int, bad_id: int, column: int) -> types.Comparisons:
    """Converts pairs to the binarised form that preference-model pretraining uses (Askell et al. 2021).

    The pair ``A > B`` becomes two pairs: "A marked GOOD is better than A marked BAD" and "B marked BAD is better than B
    marked GOOD". The mark is a control token inserted at ``column``, where the answer begins, so each row becomes one
    column wider.

    Args:
        batch: Comparisons with left-padded prompts. If a prompt has more than two answers, all their pairs are used.
        good_id: Id of the control token GOOD.
        bad_id: Id of the control token BAD.
        column: P, the width of the prompts.

    Returns:
        Comparisons with K = 2 and L + 1 columns; the better answer comes first. The two pairs made from an original
        pair are adjacent, and the original pairs are in the order of `split_into_pairs`.
    """
    pairs = split_into_pairs(batch)
    tokens_BKL, mask_BKL = (np.repeat(x, 2, axis=1) for x in (pairs.tokens_BKL, pairs.mask_BKL))  # answers A, A, B, B
    marks = np.broadcast_to(
        np.array([good_id, bad_id, bad_id, good_id], np.int32)[None, :, None], (*tokens_BKL.shape[:2], 1)
    )
    tokens_BKL = np.concatenate([tokens_BKL[:, :, :column], marks, tokens_BKL[:, :, column:]], axis=2)
    mark_mask = np.ones_like(marks, bool)
    mask_BKL = np.concatenate([mask_BKL[:, :, :column], mark_mask, mask_BKL[:, :, column:]], axis=2)
    n, _, L = tokens_BKL.shape
    of_prompt = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), (pairs.domain_B, pairs.loss_inputs))
    marked: Any = types.Comparisons(
        tokens_BKL.reshape(2 * n, 2, L),  # type: ignore[arg-type]
        mask_BKL.reshape(2 * n, 2, L),  # type: ignore[arg-type]
        np.repeat(np.asarray(pairs.ranks_BK), 2, axis=0),  # type: ignore[arg-type]
        np.ones((2 * n, 2), bool),  # type: ignore[arg-type]
        *of_prompt,
    )
    return marked
