"""Sequences of different lengths side by side in rows of one width, so that little of a batch is padding.

A packed row holds whole sequences, one after the other from its first column on, and padding at its end. Segment ids
tell them apart: a model that honours them (``lm.forward(..., segments_BL=...)``) reads each as if it were alone.

Everything is a pure function of its arguments: the same sequences give the same rows in every run.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax import types
from rlhf_jax.data import errors, tokenising


class Packed(NamedTuple):
    """Packed rows, and where each sequence went."""

    tokens_BL: np.ndarray
    mask_BL: np.ndarray
    """True at real tokens."""
    loss_mask_BL: np.ndarray
    """True at the tokens to be learnt."""
    segments_BL: np.ndarray
    """int32: 1 at the first sequence of a row, 2 at the second, ...; 0 at padding."""
    places: types.Places
    """``[N]`` of NumPy arrays, in the order of the sequences; segment 0 where one was left out."""

    @property
    def fill(self) -> float:
        """Share of the rows that is real tokens; the rest is what packing could not avoid."""
        return float(self.mask_BL.mean()) if self.mask_BL.size else 1.0


def pack(
    sequences: Sequence[tokenising.Ids],
    loss_masks: Sequence[Sequence[bool]] | None = None,
    *,
    width: int,
    pad_id: int,
    counts: errors.DropCount,
    truncate: bool = False,
    rows: int | None = None,
) -> Packed:
    """Pack whole sequences by best fit, the longest first: each goes where the least room is left behind it.

    Args:
      sequences: token ids; an empty one is in no row.
      loss_masks: for each sequence which of its tokens are learnt; None: all.
      width: L.
      pad_id: the id at padding, which no mask is derived from.
      counts: counts sequences longer than ``width``: dropped, ``"longer than a row"``, or truncated, ``"cut at the
        width of a row"``.
      truncate: cut a long sequence at its end instead of leaving it out.
      rows: how many rows to make, the last of them empty if need be, so that batches have one shape; None: as many as
        it takes.

    Raises:
      DataError: unequal numbers or lengths of sequences and loss masks; more rows are needed than ``rows``; more
        sequences are long than ``counts`` allows.
    """
    learnt: Sequence[Any] = [np.ones(len(ids), bool) for ids in sequences] if loss_masks is None else loss_masks
    if list(map(len, learnt)) != list(map(len, sequences)):
        raise errors.DataError("sequences and loss masks differ in number or length")
    stage = counts.stage()
    lengths = []
    for ids in sequences:
        if len(ids) > width:
            stage.truncate("cut at the width of a row") if truncate else stage.drop("longer than a row")
        lengths.append(len(ids) if len(ids) <= width else width * truncate)
    counts.add(stage, records=len(sequences), source="packed sequences")

    placed = best_fit(lengths, width=width)
    needed = max((row + 1 for (row, _), n in zip(placed, lengths) if n), default=0)
    if rows is not None and needed > rows:
        raise errors.DataError(f"{len(sequences)} sequences fill {needed} rows of {width}, more than rows = {rows}")
    shape = (needed if rows is None else rows, width)
    tokens_BL, segments_BL = np.full(shape, pad_id, np.int32), np.zeros(shape, np.int32)
    loss_mask_BL = np.zeros(shape, np.bool_)
    row_N, segment_N, end_N = np.zeros((3, len(sequences)), np.int32)
    # From left to right, so that a row's segments are numbered as they stand.
    for i in sorted((i for i, n in enumerate(lengths) if n), key=lambda i: placed[i]):
        (row, start), n = placed[i], lengths[i]
        columns = slice(start, start + n)
        row_N[i], end_N[i] = row, start + n - 1
        segment_N[i] = 1 if start == 0 else segments_BL[row, start - 1] + 1
        tokens_BL[row, columns], loss_mask_BL[row, columns] = sequences[i][:n], learnt[i][:n]
        segments_BL[row, columns] = segment_N[i]
    places = types.Places(row=row_N, segment=segment_N, end=end_N)  # pyright: ignore[reportArgumentType]
    return Packed(tokens_BL, segments_BL > 0, loss_mask_BL, segments_BL, places)


def pack_rows(
    rows: tokenising.Rows, *, width: int, pad_id: int, counts: errors.DropCount, truncate: bool = False
) -> Packed:
    """`pack` the real tokens of padded rows, such as `tokenising.demonstration_rows` makes."""
    sequences = [tokens[mask] for tokens, mask in zip(rows.tokens_BL, rows.mask_BL)]
    loss_masks = [learnt[mask] for learnt, mask in zip(rows.loss_mask_BL, rows.mask_BL)]
    return pack(sequences, loss_masks, width=width, pad_id=pad_id, counts=counts, truncate=truncate)


def pack_comparisons(
    batch: types.Comparisons, *, width: int, pad_id: int, rows: int | None = None, groups: int = 1
) -> types.PackedComparisons:
    """Pack the completions of a batch, in which ones that are missing and padding then cost nothing.

    Args:
      batch: such as `tokenising.ranking_rows` makes.
      width: of the packed rows, at least that of the longest completion.
      pad_id: the id at padding.
      rows: how many rows to make, of all groups together, so that batches have one shape; None: as many as it takes.
      groups: into how many micro-batches a step will divide this batch; each is packed by itself.

    Raises:
      DataError: a completion is longer than ``width``, or more rows are needed than ``rows``.
      ValueError: ``groups`` does not divide the prompts or ``rows``.
    """
    B, K = batch.where_BK.shape
    if B % groups or (rows or 0) % groups:
        raise ValueError(f"{groups} groups do not divide {B} prompts and {rows} rows")
    tokens_BKL, mask_BKL = np.asarray(batch.tokens_BKL), np.asarray(batch.mask_BKL)
    mask_BKL = mask_BKL & np.asarray(batch.where_BK)[:, :, None]

    def packed(group: int, rows: int | None) -> Packed:
        mine = [(b, k) for b in range(group, B, groups) for k in range(K)]
        sequences = [tokens_BKL[at][mask_BKL[at]] for at in mine]
        return pack(sequences, width=width, pad_id=pad_id, counts=errors.DropCount(max_dropped=0.0), rows=rows)

    per_group = None if rows is None else rows // groups
    parts = [packed(group, per_group) for group in range(groups)]
    if rows is None and groups > 1:
        per_group = max(len(part.tokens_BL) for part in parts)
        parts = [packed(group, per_group) for group in range(groups)]

    # Dealt out in turn, as `train.step.split` divides a batch.
    def dealt(arrays: list[np.ndarray]) -> np.ndarray:
        return np.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])

    def placed(name: str) -> np.ndarray:
        return dealt([getattr(part.places, name).reshape(B // groups, K) for part in parts])

    return types.PackedComparisons(
        tokens_RL=dealt([part.tokens_BL for part in parts]),  # pyright: ignore[reportArgumentType]
        segments_RL=dealt([part.segments_BL for part in parts]),  # pyright: ignore[reportArgumentType]
        places_BK=types.Places(**{name: placed(name) for name in ("row", "segment", "end")}),  # pyright: ignore
        ranks_BK=batch.ranks_BK,
        where_BK=batch.where_BK,
        domain_B=batch.domain_B,
        loss_inputs=batch.loss_inputs,
        groups=groups,
    )


def best_fit(lengths: Sequence[int], *, width: int) -> list[tuple[int, int]]:
    """Place pieces of these lengths in rows of ``width``: ``(row, first column)`` of each.

    The longest first, equal ones in their order; each in the row with the least room that holds it, of equal ones the
    first. Pieces of length 0 take no room. Raises ValueError for a piece longer than ``width``.
    """
    if max(lengths, default=0) > width:
        raise ValueError(f"a piece of {max(lengths)} does not fit in rows of {width}")
    room: list[tuple[int, int]] = []  # (columns left, row), sorted
    placed = [(0, 0)] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] == 0:
            break
        at = bisect.bisect_left(room, (lengths[i], 0))
        left, row = room.pop(at) if at < len(room) else (width, len(room))
        placed[i] = (row, width - left)
        bisect.insort(room, (left - lengths[i], row))
    return placed
