"""Computes functions of logits in chunks of columns, so that large logits are never in memory as a whole.

Logits are the largest array of a language model. For 2,048 tokens and a vocabulary of 151,936, they take 1.24 GB in
float32, and computing a gradient requires two or three copies. Losses need only a few numbers per token.
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
"""Default maximum size of a chunk's float32 logits on one CPU, in bytes."""

DEVICE_BYTES = 2**28
"""Default maximum per device on a GPU, a TPU or a mesh. It is higher to reduce the number of chunks, each of which
reads and writes the gradient of the output weights and, on a mesh, gathers these weights."""


def over_columns(fn: Callable[..., Any], *arrays: jax.Array, vocab: int, chunk: int | None = None) -> Any:
    """Returns ``fn(*arrays)``, computed one chunk of columns at a time; the backward pass recomputes each chunk.

    Args:
        fn: Maps arrays ``[b, c, ...]`` of b rows and c columns to a pytree of arrays ``[b, c, ...]``. It must treat
            rows and columns independently.
        *arrays: Arrays ``[B, L, ...]``.
        vocab: Number of floats that ``fn`` computes for each token, such as V for logits.
        chunk: Number of columns in a chunk; chunks then contain all rows. If None, a chunk has as many columns as
            `MAX_BYTES` or `DEVICE_BYTES` allows, and a single column that is too large is split into chunks of rows.
            If everything fits in one chunk, there is no loop.

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
        # The last chunk is padded with copies of entries, because the gradient of `fn` may not be finite at zeros.
        short = [(0, rows * rows_n - B), (0, columns * columns_n - L)]
        x = jnp.pad(x, short + [(0, 0)] * (x.ndim - 2), mode="edge")
        # Rows are interleaved, so that a sharded batch stays sharded in every chunk.
        x = x.reshape(rows, rows_n, columns_n, columns, *x.shape[2:])
        return jnp.moveaxis(x, (1, 2), (0, 1)).reshape(rows_n * columns_n, rows, columns, *x.shape[4:])

    def join(x: jax.Array) -> jax.Array:
        x = x.reshape(rows_n, columns_n, *x.shape[1:])
        return jnp.moveaxis(x, (0, 1), (1, 2)).reshape(rows * rows_n, columns * columns_n, *x.shape[4:])[:B, :L]

    # Without the checkpoint, the loop would store the logits of all chunks for the backward pass. XLA cannot merge a
    # loop body with its recomputation, so `prevent_cse` is not needed.
    part = jax.checkpoint(lambda args: fn(*args), prevent_cse=False)
    return jax.tree.map(join, lax.map(part, tuple(split(x) for x in arrays)))


def part_shape(B: int, L: int, *, vocab: int, chunk: int | None = None) -> tuple[int, int]:
    """Returns the number of rows and columns in a chunk.

    Args:
        B: Number of rows.
        L: Number of columns.
        vocab: Number of floats computed for each token.
        chunk: Number of columns in a chunk, at least 1; None for the default of `over_columns`.

    Returns:
        ``(rows, columns)``, at most ``(B, L)``.

    Raises:
        ValueError: ``chunk`` is below 1.
    """
    if chunk is not None:
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}; it must be at least 1 column, or None")
        return B, min(chunk, L)
    spread = parallel.num_shards("batch", "length", "vocab")
    one_cpu = spread == 1 and jax.default_backend() == "cpu"
    fit = max((MAX_BYTES if one_cpu else DEVICE_BYTES * spread) // (4 * vocab), 1)
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
    """Returns the number V of logits per token that ``apply.logits`` computes, without running it."""
    column = jax.ShapeDtypeStruct((1, 1, *hidden_BLD.shape[2:]), hidden_BLD.dtype)
    return jax.eval_shape(functools.partial(apply.logits, params), column).shape[-1]


def _even(n: int, most: int) -> int:
    """Returns the largest part's size if ``n`` items are split evenly into the fewest parts of at most ``most``."""
    return math.ceil(n / math.ceil(n / most))
