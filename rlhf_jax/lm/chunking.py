"""Computes functions of logits for some columns at a time, so that the logits of all columns never exist at once.

Logits are the largest array of a language model: 2,048 tokens over a vocabulary of 151,936 take 1.25 GB in float32, and
a gradient holds two or three copies. Losses need only a few numbers per token.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax import parallel, types

MAX_BYTES = 2**26
"""Default bound on the size of the float32 logits of one chunk."""

MESH_BYTES = 2**28
"""The bound per device on a mesh, where every chunk gathers the output weights and reduces their gradient."""


def over_columns(fn: Callable[..., Any], *arrays: jax.Array, vocab: int, chunk: int | None = None) -> Any:
    """Returns ``fn(*arrays)``, computed for some columns at a time; the backward pass recomputes each chunk.

    Args:
        fn: Maps arrays ``[b, c, ...]`` to a pytree of ``[b, c, ...]`` and treats each column independently.
        *arrays: ``[B, L, ...]``.
        vocab: Number of floats that ``fn`` computes for each column.
        chunk: Number of columns at a time, of all rows. By default as many as `MAX_BYTES` allows, or some rows of one
            column if not even one column of all rows fits. There is no loop if everything fits.

    Returns:
        ``fn(*arrays)``.

    Raises:
        ValueError: ``chunk`` is below 1.
    """
    B, L = arrays[0].shape[:2]
    rows, columns = part_shape(B, L, vocab=vocab, chunk=chunk)
    if (rows, columns) == (B, L):
        return fn(*arrays)
    rows_n, columns_n = math.ceil(B / rows), math.ceil(L / columns)

    def split(x: jax.Array) -> jax.Array:
        # The last chunk is padded with real columns: the gradient of logits need not be finite at zeros.
        short = [(0, rows * rows_n - B), (0, columns * columns_n - L)]
        x = jnp.pad(x, short + [(0, 0)] * (x.ndim - 2), mode="edge")
        # Rows are interleaved, so that a sharded batch stays sharded in every chunk.
        x = x.reshape(rows, rows_n, columns_n, columns, *x.shape[2:])
        return jnp.moveaxis(x, (1, 2), (0, 1)).reshape(rows_n * columns_n, rows, columns, *x.shape[4:])

    def join(x: jax.Array) -> jax.Array:
        x = x.reshape(rows_n, columns_n, *x.shape[1:])
        return jnp.moveaxis(x, (0, 1), (1, 2)).reshape(rows * rows_n, columns * columns_n, *x.shape[4:])[:B, :L]

    # Without the checkpoint the loop would store the logits of all chunks for the backward pass. A loop body cannot be
    # merged with its own recomputation, so no barriers against that are needed.
    part = jax.checkpoint(lambda args: fn(*args), prevent_cse=False)
    return jax.tree.map(join, lax.map(part, tuple(split(x) for x in arrays)))


def part_shape(B: int, L: int, *, vocab: int, chunk: int | None = None) -> tuple[int, int]:
    """Returns how many rows and columns a chunk has.

    Args:
        B: Rows.
        L: Columns.
        vocab: V, the entries of a logit vector; their bytes limit the size of a chunk.
        chunk: Columns of a chunk, at least 1; None chooses rows and columns by memory, see `over_columns`.

    Returns:
        ``(rows, columns)`` of a chunk, at most ``(B, L)``.

    Raises:
        ValueError: If ``chunk`` is below 1.
    """
    if chunk is not None:
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}; it must be at least 1 column, or None")
        return B, min(chunk, L)
    spread = parallel.num_shards("batch", "length", "vocab")
    fit = max((MAX_BYTES if spread == 1 else MESH_BYTES * spread) // (4 * vocab), 1)
    if fit >= B * L:
        return B, L
    if fit < B:
        return _even(B, fit), 1
    columns = _even(L, fit // B)
    if spread > 1:
        # Chunks of equal size need no padding, which would move columns between devices.
        few = math.ceil(L / columns)
        columns = next((L // parts for parts in range(few, 2 * few) if L % parts == 0), columns)
    return B, columns


def vocab_of(apply: types.ApplyFn, params: types.Params, hidden_BLD: jax.Array) -> int:
    """Returns V of ``apply.logits`` without computing anything."""
    column = jax.ShapeDtypeStruct((1, 1, *hidden_BLD.shape[2:]), hidden_BLD.dtype)
    return jax.eval_shape(functools.partial(apply.logits, params), column).shape[-1]


def _even(n: int, most: int) -> int:
    """Returns the part size that splits ``n`` into the fewest, nearly equal parts of at most ``most``."""
    return math.ceil(n / math.ceil(n / most))
