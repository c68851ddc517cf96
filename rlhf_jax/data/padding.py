"""Padding of prompts and answers, given as token ids, to rows in the layout that all training stages use.

Prompts are left-padded to P tokens and answers right-padded to T, so a row has L = P + T columns. Rows are NumPy
arrays, int32 for tokens and bool for masks. `chat` encodes texts as ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax import types
from rlhf_jax.data import errors

Ids = Sequence[int]


def pad_prompts(prompts: Sequence[Ids], *, width: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Left-pads prompts to ``width`` and returns ``(tokens_BP, mask_BP)``.

    Raises:
        DataError: If a prompt is empty or longer than ``width``; `chat.encode_prompts` shortens long prompts.
    """
    tokens_BP, mask_BP = _blank(len(prompts), width, pad_id)
    for row, ids in enumerate(prompts):
        if not 0 < len(ids) <= width:
            raise errors.DataError(f"prompt {row} has {len(ids)} tokens; it must have between 1 and {width}")
        tokens_BP[row, width - len(ids) :] = ids
        mask_BP[row, width - len(ids) :] = True
    return tokens_BP, mask_BP


def pad_answers(
    answers: Sequence[Ids], *, width: int, pad_id: int, counts: errors.DropCount
) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads answers to ``width``. A longer answer is truncated, so it loses its stop token.

    Args:
        answers: Token ids of each answer, including its stop token.
        width: T.
        pad_id: Token id used for padding.
        counts: Counts truncated answers as ``"answer truncated"``.

    Returns:
        ``(tokens_BT, mask_BT)``.

    Raises:
        DataError: If an answer has no tokens, or more answers are truncated than ``counts`` allows.
    """
    stage = counts.stage()
    rows = _fill_answers(answers, width, pad_id, stage)
    counts.add(stage, records=len(answers), source="answers")
    return rows


def demonstration_rows(
    prompts: Sequence[Ids],
    answers: Sequence[Ids],
    *,
    prompt_width: int,
    response_width: int,
    pad_id: int,
    counts: errors.DropCount,
) -> types.TokenBatch:
    """Returns rows for supervised fine-tuning, with the loss on the answer and its stop token only.

    >>> from rlhf_jax.data import errors, padding
    >>> options = dict(prompt_width=3, response_width=2, pad_id=0, counts=errors.DropCount())
    >>> rows = padding.demonstration_rows([[5, 6]], [[7, 1]], **options)
    >>> rows.tokens_BL.tolist(), rows.loss_mask_BL.astype(int).tolist()
    ([[0, 5, 6, 7, 1]], [[0, 0, 0, 1, 1]])

    Args:
        prompts: Token ids of B prompts, such as those from `chat.encode_prompts`.
        answers: Token ids of one answer to each prompt, such as those from `chat.encode_answers`.
        prompt_width: P.
        response_width: T; longer answers are truncated as in `pad_answers`.
        pad_id: Token id used for padding. Masks do not depend on it.
        counts: Counts truncated answers as ``"answer truncated"``.

    Returns:
        `types.TokenBatch` of NumPy arrays, of shape ``[B, P + T]``.

    Raises:
        DataError: If the numbers of prompts and answers differ; see also `pad_prompts` and `pad_answers`.
    """
    _require_equal_lengths(prompts=prompts, answers=answers)
    tokens_BP, mask_BP = pad_prompts(prompts, width=prompt_width, pad_id=pad_id)
    tokens_BT, mask_BT = pad_answers(answers, width=response_width, pad_id=pad_id, counts=counts)
    rows: Any = types.TokenBatch(
        tokens_BL=np.concatenate([tokens_BP, tokens_BT], axis=1),
        mask_BL=np.concatenate([mask_BP, mask_BT], axis=1),
        loss_mask_BL=np.concatenate([np.zeros_like(mask_BP), mask_BT], axis=1),
    )
    return rows


def ranking_rows(
    prompts: Sequence[Ids],
    answers: Sequence[Sequence[Ids]],
    ranks: Sequence[Sequence[int]],
    *,
    prompt_width: int,
    response_width: int,
    pad_id: int,
    counts: errors.DropCount,
    max_answers: int | None = None,
) -> types.Comparisons:
    """Returns rows of ranked answers, with all answers to a prompt in one batch element (InstructGPT, section 3.5).

    Args:
        prompts: Token ids of B prompts.
        answers: Token ids of at least two answers to each prompt. If a prompt has fewer than K answers, the rest of
            its batch element is padding, with ``where_BK`` False and rank 0.
        ranks: Rank of each answer; 1 is best, and equal ranks are ties.
        prompt_width: P.
        response_width: T; longer answers are truncated as in `pad_answers`.
        pad_id: Token id used for padding.
        counts: Counts truncated answers as ``"answer truncated"``.
        max_answers: K; None means the largest number of answers to one prompt.

    Returns:
        `types.Comparisons` of NumPy arrays, with ``tokens_BKL`` of shape ``[B, K, P + T]``.

    Raises:
        DataError: If the numbers of prompts, answers and ranks differ, a prompt has fewer than two answers or more than
            K, or a rank is below 1; see also `pad_prompts` and `pad_answers`.
    """
    _require_equal_lengths(prompts=prompts, answers=answers, ranks=ranks)
    stage = counts.stage()
    most = max(map(len, answers), default=2)
    B, K, L = len(prompts), most if max_answers is None else max_answers, prompt_width + response_width
    if most > K:
        raise errors.DataError(f"a prompt has {most} answers, more than max_answers = {K}")
    tokens_BKL, mask_BKL = _blank((B, K), L, pad_id)
    ranks_BK = np.zeros((B, K), np.int32)
    tokens_BP, mask_BP = pad_prompts(prompts, width=prompt_width, pad_id=pad_id)
    for b, (answers_K, ranks_K) in enumerate(zip(answers, ranks)):
        n = len(answers_K)
        if n < 2 or len(ranks_K) != n or min(ranks_K) < 1:
            raise errors.DataError(
                f"prompt {b} has {n} answers with ranks {list(ranks_K)}; it must have at least two answers, and a rank "
                "of at least 1 for each"
            )
        tokens_KT, mask_KT = _fill_answers(answers_K, response_width, pad_id, stage)
        tokens_BKL[b, :n, :prompt_width], mask_BKL[b, :n, :prompt_width] = tokens_BP[b], mask_BP[b]
        tokens_BKL[b, :n, prompt_width:], mask_BKL[b, :n, prompt_width:] = tokens_KT, mask_KT
        ranks_BK[b, :n] = ranks_K
    counts.add(stage, records=sum(map(len, answers)), source="answers")
    return types.Comparisons(
        tokens_BKL=tokens_BKL,  # pyright: ignore[reportArgumentType]
        mask_BKL=mask_BKL,  # pyright: ignore[reportArgumentType]
        ranks_BK=ranks_BK,  # pyright: ignore[reportArgumentType]
        where_BK=ranks_BK > 0,  # pyright: ignore[reportArgumentType]
    )


def _fill_answers(
    answers: Sequence[Ids], width: int, pad_id: int, counts: errors.DropCount
) -> tuple[np.ndarray, np.ndarray]:
    tokens_BT, mask_BT = _blank(len(answers), width, pad_id)
    for row, ids in enumerate(answers):
        if not len(ids):
            raise errors.DataError(f"answer {row} has no tokens, not even the stop token")
        if len(ids) > width:
            counts.truncate("answer truncated")
        n = min(len(ids), width)
        tokens_BT[row, :n] = ids[:n]
        mask_BT[row, :n] = True
    return tokens_BT, mask_BT


def _blank(batch: int | tuple[int, ...], width: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    shape = (*np.atleast_1d(batch).tolist(), width)
    return np.full(shape, pad_id, np.int32), np.zeros(shape, np.bool_)


def _require_equal_lengths(**lists: Sequence[object]) -> None:
    sizes = {name: len(items) for name, items in lists.items()}
    if len(set(sizes.values())) > 1:
        numbers = ", ".join(f"{n} {name}" for name, n in sizes.items())
        raise errors.DataError(f"the numbers must be equal, but there are {numbers}")
