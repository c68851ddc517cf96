"""What is made of logits, a part of the columns at a time, so that the logits of all columns never exist at once.

Logits are the largest array of a language model: 2,048 tokens over a vocabulary of 151,936 are 1.25 GB in float32, and
a gradient holds them two or three times. What is wanted of them is a few numbers a token.
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
"""How large the float32 logits of one part may be where no ``chunk`` is given; what fits is made at once."""

MESH_BYTES = 2**28
"""The same on a mesh, for each device: every part gathers the output's weights and adds up their gradient."""


def over_columns(fn: Callable[..., Any], *arrays: jax.Array, vocab: int, chunk: int | None = None) -> Any:
    """``fn(*arrays)`` of a part of the columns at a time; the backward pass makes each part again from its inputs.

    Args:
        fn: maps arrays ``[b, c, ...]`` to a pytree of ``[b, c, ...]``, each column by itself.
        *arrays: ``[B, L, ...]``.
        vocab: how many floats ``fn`` makes of a column on its way.
        chunk: columns at a time, of all rows. None: as many as `MAX_BYTES` allow, or fewer rows where not even one
            column of all rows does; everything at once, without a loop, where everything fits.

    Returns:
        What ``fn`` makes of the whole arrays.

    Raises:
        ValueError: ``chunk`` is below 1.
    """
    B, L = arrays[0].shape[:2]
    rows, columns = part_shape(B, L, vocab=vocab, chunk=chunk)
    if (rows, columns) == (B, L):
        return fn(*arrays)
    rows_n, columns_n = math.ceil(B / rows), math.ceil(L / columns)

    def split(x: jax.Array) -> jax.Array:
        # Real columns fill up the last part: the gradient of a model's logits need not be finite at zeros.
        short = [(0, rows * rows_n - B), (0, columns * columns_n - L)]
        x = jnp.pad(x, short + [(0, 0)] * (x.ndim - 2), mode="edge")
        # Rows are dealt out in turn, so that a batch that is spread over devices stays so in every part.
        x = x.reshape(rows, rows_n, columns_n, columns, *x.shape[2:])
        return jnp.moveaxis(x, (1, 2), (0, 1)).reshape(rows_n * columns_n, rows, columns, *x.shape[4:])

    def join(x: jax.Array) -> jax.Array:
        x = x.reshape(rows_n, columns_n, *x.shape[1:])
        return jnp.moveaxis(x, (0, 1), (1, 2)).reshape(rows * rows_n, columns * columns_n, *x.shape[4:])[:B, :L]

    # Without the checkpoint the loop would keep the logits of all parts for the backward pass. Nothing inside a loop
    # can be merged with its own recomputation, so the barriers against that are left out.
    part = jax.checkpoint(lambda args: fn(*args), prevent_cse=False)
    return jax.tree.map(join, lax.map(part, tuple(split(x) for x in arrays)))


def part_shape(B: int, L: int, *, vocab: int, chunk: int | None = None) -> tuple[int, int]:
    """How many rows and columns of ``[B, L]`` are taken at a time; ``(B, L)`` for all. See `over_columns`."""
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
        # Parts that come out even need no filling up, which would move columns between devices.
        few = math.ceil(L / columns)
        columns = next((L // parts for parts in range(few, 2 * few) if L % parts == 0), columns)
    return B, columns


def vocab_of(apply: types.ApplyFn, params: types.Params, hidden_BLD: jax.Array) -> int:
    """V of ``apply.logits``, without computing anything."""
    column = jax.ShapeDtypeStruct((1, 1, *hidden_BLD.shape[2:]), hidden_BLD.dtype)
    return jax.eval_shape(functools.partial(apply.logits, params), column).shape[-1]


def _even(n: int, most: int) -> int:
    """The size of the parts of ``n`` when they are as few as ``most`` allows and as equal as can be."""
    return math.ceil(n / math.ceil(n / most))
