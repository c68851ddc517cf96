"""Steps that were not finite: which rows of the batch were at fault, and what a user is told.

`step.apply_gradients` leaves such a step out. What stands here says why: inside the step as numbers beside its other
metrics (`numbers`), and on the host in words (`explain`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

DETAILS = ("bad_rows", "bad_row", "bad_update")
"""Metrics that mean something in a step that was skipped, and are logged there alone."""


@struct.dataclass
class Rows:
    """Which rows of a batch had a number that was not finite, ``[B]``; merged over micro-batches by `merge`."""

    bad_B: jax.Array

    def either(self, other: Rows) -> Rows:
        """Rows that are among these or the others."""
        return Rows(self.bad_B | other.bad_B)


def of_losses(losses_B: jax.Array) -> Rows:
    """Rows whose own loss is not finite."""
    return Rows(jax.lax.stop_gradient(~jnp.isfinite(losses_B)))


def of_tokens(*numbers_BT: jax.Array | None, where_BT: jax.Array) -> Rows:
    """Rows that have such a number at a token that counts, in any of the arrays that are there."""
    fine_BT = [jnp.isfinite(jax.lax.stop_gradient(x)) for x in numbers_BT if x is not None]
    return Rows(jnp.any(where_BT & ~functools.reduce(jnp.logical_and, fine_BT), axis=-1))


def merge(logs_M: Any) -> Any:
    """The metrics of a batch from those of its micro-batches, stacked on a first axis: rows in their order, sums."""

    def one(x: Any) -> Any:
        # `step.split` deals rows out in turn.
        return Rows(jnp.swapaxes(x.bad_B, 0, 1).reshape(-1)) if isinstance(x, Rows) else jnp.sum(x, axis=0)

    return jax.tree.map(one, logs_M, is_leaf=lambda x: isinstance(x, Rows))


def numbers(rows: Rows, *, axis_name: str | tuple[str, ...] | None = None) -> dict[str, jax.Array]:
    """``bad_rows``, how many there are, and ``bad_row``, the place of the first in the whole batch (-1: none)."""
    B = rows.bad_B.shape[0]
    first, count = jnp.argmax(rows.bad_B), jnp.sum(rows.bad_B)
    if axis_name is not None:
        devices = jax.lax.axis_size(axis_name)
        first = jnp.where(count > 0, first + B * jax.lax.axis_index(axis_name), B * devices)
        first, count = jax.lax.pmin(first, axis_name), jax.lax.psum(count, axis_name)
    first = jnp.where(count > 0, first, -1)
    return {"bad_rows": count.astype(jnp.float32), "bad_row": first.astype(jnp.float32)}


def explain(floats: Mapping[str, float]) -> str:
    """What was not finite in a skipped step, and in which rows, from its metrics: losses first, then gradients."""
    bad = [name for name, number in floats.items() if not math.isfinite(number)]
    parts = [name.removeprefix("grad_norm_") for name in bad if name.startswith("grad_norm_")]
    losses = [name for name in bad if "loss" in name]
    rest = [name for name in bad if name not in losses and not name.startswith("grad_norm")]
    gradient = ["the gradient of " + " and ".join(parts)] if parts else ["the gradient"] * ("grad_norm" in bad)
    told = ", ".join([*losses, *gradient, *rest[:6]]) or "a number of the update"
    told += f" and {len(rest) - 6} more" if len(rest) > 6 else ""
    where = []
    if floats.get("bad_rows", 0) > 0:
        count, first = int(floats["bad_rows"]), int(floats["bad_row"])
        where.append(f"row {first} of the batch" if count == 1 else f"{count} rows of the batch from row {first} on")
    if floats.get("bad_update", -1) >= 0:
        where.append(f"first in update {int(floats['bad_update']) + 1}")
    return f"{told} not finite" + (f" ({', '.join(where)})" if where else "")
