"""Packing of several sequences into one row, which reduces padding.

A packed row consists of whole sequences, followed by padding. Segment ids distinguish the sequences of a row: a model
that uses the ids (``lm.forward(..., segments_BL=...)``) processes each sequence independently. Packing is
deterministic.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax import types
from rlhf_jax.data import errors, padding


class Packed(NamedTuple):
    """Packed rows, and the place of each sequence in them."""

    tokens_BL: np.ndarray
    mask_BL: np.ndarray
    """True at real tokens."""
    loss_mask_BL: np.ndarray
    """True at the tokens that contribute to the loss."""
    segments_BL: np.ndarray
    """int32: 1 at the first sequence of a row, 2 at the second, ...; 0 at padding."""
    places: types.Places
    """NumPy arrays with one entry for each sequence; segment 0 marks sequences that are empty or were dropped."""

    @property
    def fill(self) -> float:
        """Fraction of the positions, over all rows, that contain real tokens."""
        return float(self.mask_BL.mean()) if self.mask_BL.size else 1.0


def pack(
    sequences: Sequence[padding.Ids],
    loss_masks: Sequence[Sequence[bool]] | None = None,
    *,
    width: int,
    pad_id: int,
    counts: errors.DropCount,
    truncate: bool = False,
    rows: int | None = None,
) -> Packed:
    """Packs sequences by best fit, longest first; see `best_fit`.

    >>> from rlhf_jax.data import errors, packing
    >>> packed = packing.pack([[5, 6], [7, 8, 9], [3]], width=4, pad_id=0, counts=errors.DropCount())
    >>> packed.tokens_BL.tolist(), packed.segments_BL.tolist()
    ([[7, 8, 9, 3], [5, 6, 0, 0]], [[1, 1, 1, 2], [1, 1, 0, 0]])

    Args:
        sequences: Token ids of N sequences; an empty sequence takes no space.
        loss_masks: For each sequence, a mask of the tokens that contribute to the loss; None means all tokens.
        width: L, the width of a row.
        pad_id: Token id used for padding. Masks do not depend on it.
        counts: Counts sequences that are longer than ``width``, as dropped (``"longer than a row"``) or as truncated
            (``"truncated to the row width"``).
        truncate: Whether to truncate long sequences instead of dropping them.
        rows: Number of rows. Rows that are not needed are empty, so that all batches can have the same shape. None
            means as many rows as needed.

    Returns:
        The packed rows, of shape ``[rows, L]``.

    Raises:
        DataError: If sequences and loss masks differ in number or length, more than ``rows`` rows are needed, or too
            many sequences are longer than ``width``.
    """
    learnt: Sequence[Any] = [np.ones(len(ids), bool) for ids in sequences] if loss_masks is None else loss_masks
    if list(map(len, learnt)) != list(map(len, sequences)):
        raise errors.DataError("sequences and loss masks differ in number or length")
    stage = counts.stage()
    lengths = []
    for ids in sequences:
        if len(ids) > width:
            stage.truncate("truncated to the row width") if truncate else stage.drop("longer than a row")
        lengths.append(len(ids) if len(ids) <= width else width * truncate)
    counts.add(stage, records=len(sequences), source="packed sequences")

    positions = best_fit(lengths, width=width)
    needed = max((row + 1 for (row, _), n in zip(positions, lengths) if n), default=0)
    if rows is not None and needed > rows:
        raise errors.DataError(f"{len(sequences)} sequences need {needed} rows of {width}, more than rows = {rows}")
    shape = (needed if rows is None else rows, width)
    tokens_BL, segments_BL = np.full(shape, pad_id, np.int32), np.zeros(shape, np.int32)
    loss_mask_BL = np.zeros(shape, np.bool_)
    row_N, segment_N, end_N = np.zeros((3, len(sequences)), np.int32)
    # From left to right, because the segments of a row are numbered in that order.
    for i in sorted((i for i, n in enumerate(lengths) if n), key=lambda i: positions[i]):
        (row, start), n = positions[i], lengths[i]
        columns = slice(start, start + n)
        row_N[i], end_N[i] = row, start + n - 1
        segment_N[i] = 1 if start == 0 else segments_BL[row, start - 1] + 1
        tokens_BL[row, columns], loss_mask_BL[row, columns] = sequences[i][:n], learnt[i][:n]
        segments_BL[row, columns] = segment_N[i]
    places = types.Places(row=row_N, segment=segment_N, end=end_N)  # pyright: ignore[reportArgumentType]
    return Packed(tokens_BL, segments_BL > 0, loss_mask_BL, segments_BL, places)


def pack_rows(
    rows: types.TokenBatch, *, width: int, pad_id: int, counts: errors.DropCount, truncate: bool = False
) -> Packed:
    """Packs the real tokens of padded rows.

    Args:
        rows: Padded rows, such as those from `padding.demonstration_rows`; each row becomes one sequence.
        width: L, the width of a packed row.
        pad_id: Token id used for padding.
        counts: Counts sequences that are longer than ``width``; see `pack`.
        truncate: Whether to truncate long sequences instead of dropping them.

    Returns:
        The packed rows.

    Raises:
        DataError: If too many sequences are longer than ``width``.
    """
    sequences = [tokens[mask] for tokens, mask in zip(rows.tokens_BL, rows.mask_BL)]
    loss_masks = [learnt[mask] for learnt, mask in zip(rows.loss_mask_BL, rows.mask_BL)]
    return pack(sequences, loss_masks, width=width, pad_id=pad_id, counts=counts, truncate=truncate)


def pack_comparisons(
    batch: types.Comparisons, *, width: int, pad_id: int, rows: int | None = None, groups: int = 1
) -> types.PackedComparisons:
    """Packs the completions of a batch, each with its prompt. Missing completions and padding are left out.

    Args:
        batch: Comparisons, such as those from `padding.ranking_rows`.
        width: L, the width of a packed row; at least the length of the longest completion with its prompt.
        pad_id: Token id used for padding.
        rows: Total number of rows in all groups, so that all batches can have the same shape; None means as many rows
            as needed.
        groups: Number of micro-batches into which a step divides the batch. The prompts of each micro-batch (a group)
            are packed separately.

    Returns:
        The packed completions, with all other fields of ``batch`` unchanged.

    Raises:
        DataError: If a completion with its prompt is longer than ``width``, or a group needs more than
            ``rows / groups`` rows.
        ValueError: If ``groups`` does not divide the number of prompts or ``rows``.
    """
    tokens_BKL, mask_BKL = np.asarray(batch.tokens_BKL), np.asarray(batch.mask_BKL)
    mask_BKL = mask_BKL & np.asarray(batch.where_BK)[:, :, None]
    packed = _pack_completions(tokens_BKL, mask_BKL, mask_BKL, width=width, pad_id=pad_id, rows=rows, groups=groups)
    return types.PackedComparisons(
        tokens_RL=packed.tokens_BL,  # pyright: ignore[reportArgumentType]
        segments_RL=packed.segments_BL,  # pyright: ignore[reportArgumentType]
        places_BK=packed.places,
        ranks_BK=batch.ranks_BK,
        where_BK=batch.where_BK,
        domain_B=batch.domain_B,
        loss_inputs=batch.loss_inputs,
        groups=groups,
    )


def pack_preferences(
    batch: types.Preferences, *, width: int, pad_id: int, rows: int | None = None, groups: int = 1
) -> types.PackedPreferences:
    """Packs the responses of a batch, each with its prompt; those of ``batch.mismatched`` into rows of their own.

    Args:
        batch: Preferences whose ``answer_BKC`` covers the last C columns.
        width: As in `pack_comparisons`.
        pad_id: Token id used for padding.
        rows: As in `pack_comparisons`; also the number of rows of the mismatched responses.
        groups: As in `pack_comparisons`.

    Returns:
        The packed responses, with all other fields of ``batch`` unchanged.

    Raises:
        DataError: As `pack_comparisons`.
        ValueError: As `pack_comparisons`.
    """
    options: dict[str, Any] = {"width": width, "pad_id": pad_id, "rows": rows, "groups": groups}
    tokens_BKL, answer_BKC = np.asarray(batch.tokens_BKL), np.asarray(batch.answer_BKC)
    mask_BKL = np.ones(tokens_BKL.shape, bool) if batch.mask_BKL is None else np.asarray(batch.mask_BKL)
    before = tokens_BKL.shape[-1] - answer_BKC.shape[-1]
    answer_BKL = np.pad(answer_BKC, [(0, 0), (0, 0), (before, 0)])
    packed = _pack_completions(tokens_BKL, mask_BKL, answer_BKL, **options)
    return types.PackedPreferences(
        tokens_RL=packed.tokens_BL,  # pyright: ignore[reportArgumentType]
        segments_RL=packed.segments_BL,  # pyright: ignore[reportArgumentType]
        answer_RL=packed.loss_mask_BL,  # pyright: ignore[reportArgumentType]
        places_BK=packed.places,
        reference_BK=batch.reference_BK,
        targets_B=batch.targets_B,
        good_BK=batch.good_BK,
        mismatched=None if batch.mismatched is None else pack_preferences(batch.mismatched, **options),
        groups=groups,
    )


def _pack_completions(
    tokens_BKL: np.ndarray,
    mask_BKL: np.ndarray,
    learnt_BKL: np.ndarray,
    *,
    width: int,
    pad_id: int,
    rows: int | None,
    groups: int,
) -> Packed:
    """Packs the real tokens of completions; ``places`` then has the shape ``[B, K]``. See `pack_comparisons`."""
    B, K, _ = tokens_BKL.shape
    if B % groups or (rows or 0) % groups:
        and_rows = "" if rows is None else f", and rows = {rows}"
        raise ValueError(f"groups = {groups} must divide the number of prompts, {B}{and_rows}")

    def pack_group(group: int, rows: int | None) -> Packed:
        indices = [(b, k) for b in range(group, B, groups) for k in range(K)]
        sequences, loss_masks = ([x[at][mask_BKL[at]] for at in indices] for x in (tokens_BKL, learnt_BKL))
        counts = errors.DropCount(max_dropped=0.0)
        return pack(sequences, loss_masks, width=width, pad_id=pad_id, counts=counts, rows=rows)

    per_group = None if rows is None else rows // groups
    parts = [pack_group(group, per_group) for group in range(groups)]
    if rows is None and groups > 1:
        per_group = max(len(part.tokens_BL) for part in parts)
        parts = [pack_group(group, per_group) for group in range(groups)]

    # Rows are assigned to groups round-robin, because a train step divides a batch into micro-batches in this way.
    def interleave(*arrays: np.ndarray) -> np.ndarray:
        return np.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])

    parts = [part._replace(places=jax.tree.map(lambda x: x.reshape(B // groups, K), part.places)) for part in parts]
    return jax.tree.map(interleave, *parts)


def pack_documents(documents: Sequence[padding.Ids], *, width: int, eos_id: int) -> tuple[np.ndarray, int]:
    """Concatenates documents, each followed by ``eos_id``, and divides the result into full rows for pretraining.

    >>> from rlhf_jax.data import packing
    >>> rows, remainder = packing.pack_documents([[5, 6], [7, 8]], width=3, eos_id=1)
    >>> rows.tolist(), remainder
    ([[5, 6, 1], [7, 8, 1]], 0)

    Returns:
        ``(tokens_BL, remainder)``: int32 rows of ``width`` real tokens, and the number of tokens at the end that are
        dropped because they do not fill a row.

    Raises:
        DataError: If a document already ends with ``eos_id``, or the documents do not fill one row.
    """
    pieces = []
    for i, ids in enumerate(documents):
        if len(ids) and ids[-1] == eos_id:
            raise errors.DataError(f"document {i} already ends with eos_id = {eos_id}; remove it from the document")
        pieces.append(np.asarray([*ids, eos_id], np.int32))
    stream = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
    rows, remainder = divmod(len(stream), width)
    if rows == 0:
        raise errors.DataError(f"{len(stream)} tokens do not fill one row of {width}")
    return stream[: rows * width].reshape(rows, width), remainder


def best_fit(lengths: Sequence[int], *, width: int) -> list[tuple[int, int]]:
    """Assigns sequences with the given lengths to rows of ``width`` columns by best fit.

    Sequences are placed from longest to shortest; sequences of the same length keep their order. Each sequence is
    placed in the fullest row that has enough room, or in the first such row if several are equally full. If no row has
    enough room, a new row is started. Sequences of length 0 take no space.

    Returns:
        ``(row, first column)`` for each sequence.

    Raises:
        ValueError: If a sequence is longer than ``width``.
    """
    if max(lengths, default=0) > width:
        raise ValueError(f"a sequence of {max(lengths)} tokens does not fit in rows of {width}")
    room: list[tuple[int, int]] = []  # (columns left, row), sorted
    positions = [(0, 0)] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] == 0:
            break
        at = bisect.bisect_left(room, (lengths[i], 0))
        left, row = room.pop(at) if at < len(room) else (width, len(room))
        positions[i] = (row, width - left)
        bisect.insort(room, (left - lengths[i], row))
    return positions
