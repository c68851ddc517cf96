"""Rows of tokens with a teacher's most likely tokens at each position, as records of a `record_file`.

Bai et al. 2022 (A.1) store the 50 most likely tokens of one large teacher, which students of all sizes then learn from.
A record has the tokens of a row without padding, their loss mask, and the ids and log-probabilities of the K tokens at
each position, so that a row of n tokens has ``8 + 5 n + 8 n K`` bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_jax import types

_INT, _FLOAT = np.dtype("<i4"), np.dtype("<f4")


def encode(batch: types.DistillationBatch) -> list[bytes]:
    """Returns a record for each row of a batch of NumPy arrays, with the tokens where ``mask_BL`` is True."""
    records = []
    for tokens_L, mask_L, learnt_L, ids_LK, logprobs_LK in zip(
        batch.tokens_BL, batch.mask_BL, batch.loss_mask_BL, batch.ids_BLK, batch.logprobs_BLK
    ):
        sizes = np.array([mask_L.sum(), ids_LK.shape[-1]], _INT)
        arrays = (
            sizes,
            np.asarray(tokens_L[mask_L], _INT),
            np.asarray(learnt_L[mask_L], np.uint8),
            np.asarray(ids_LK[mask_L], _INT),
            np.asarray(logprobs_LK[mask_L], _FLOAT),
        )
        records.append(b"".join(each.tobytes() for each in arrays))
    return records


def decode(records: Sequence[bytes], *, width: int, pad_id: int) -> types.DistillationBatch:
    """Returns the batch of records, right-padded to ``width`` tokens, with NumPy arrays.

    >>> import numpy as np
    >>> from rlhf_jax import types
    >>> from rlhf_jax.data.stores import teacher_rows
    >>> tokens, mask = np.array([[4, 5, 0]]), np.array([[True, True, False]])
    >>> ids, logprobs = np.ones((1, 3, 2), int), np.log(np.full((1, 3, 2), 0.25))
    >>> batch = types.DistillationBatch(tokens, mask, mask, ids_BLK=ids, logprobs_BLK=logprobs)
    >>> again = teacher_rows.decode(teacher_rows.encode(batch), width=4, pad_id=0)
    >>> again.tokens_BL.tolist(), again.logprobs_BLK.shape
    ([[4, 5, 0, 0]], (1, 4, 2))

    Raises:
        ValueError: A row has more than ``width`` tokens, or the rows differ in K.
    """
    sizes = [np.frombuffer(record, _INT, 2) for record in records]
    B, K = len(records), int(sizes[0][1]) if records else 0
    tokens_BL = np.full((B, width), pad_id, np.int32)
    mask_BL, loss_mask_BL = np.zeros((B, width), bool), np.zeros((B, width), bool)
    ids_BLK, logprobs_BLK = np.zeros((B, width, K), np.int32), np.zeros((B, width, K), np.float32)
    for row, (record, (n, k)) in enumerate(zip(records, sizes)):
        if n > width or k != K:
            raise ValueError(f"a row has {n} tokens and {k} ids per token; expected at most {width} and {K}")
        at = 8
        tokens_BL[row, :n] = np.frombuffer(record, _INT, n, at)
        loss_mask_BL[row, :n] = np.frombuffer(record, np.uint8, n, at + 4 * n)
        ids_BLK[row, :n] = np.frombuffer(record, _INT, n * k, at + 5 * n).reshape(n, k)
        logprobs_BLK[row, :n] = np.frombuffer(record, _FLOAT, n * k, at + 5 * n + 4 * n * k).reshape(n, k)
        mask_BL[row, :n] = True
    return types.DistillationBatch(tokens_BL, mask_BL, loss_mask_BL, ids_BLK=ids_BLK, logprobs_BLK=logprobs_BLK)  # type: ignore[arg-type]
