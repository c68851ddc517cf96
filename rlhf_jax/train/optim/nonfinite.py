"""Diagnosis of skipped steps: which rows of the batch have non-finite numbers, and a message for the user.

`update.apply_gradients` skips a step with such a number, and one whose batch has nothing to learn from. Inside the
step, `row_metrics` locates the rows; on the host, `explain` turns the metrics into a message.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

DETAILS = ("bad_rows", "bad_row", "bad_update", "empty_batch")
"""Metrics that are logged for skipped steps only."""


@struct.dataclass
class BadRows:
    """The rows of a batch that have a non-finite number. `merge` combines the rows of micro-batches."""

    bad_B: jax.Array
    """bool, True for rows with a non-finite number."""

    def union(self, other: BadRows) -> BadRows:
        """Returns the rows that are in either set."""
        return BadRows(self.bad_B | other.bad_B)


def bad_loss_rows(losses_B: jax.Array) -> BadRows:
    """Returns the rows whose loss is not finite."""
    return BadRows(jax.lax.stop_gradient(~jnp.isfinite(losses_B)))


def bad_token_rows(*arrays_BT: jax.Array | None, where_BT: jax.Array) -> BadRows:
    """Returns the rows with a non-finite number at a token selected by ``where_BT``, ignoring arrays that are None."""
    finite_BT = [jnp.isfinite(jax.lax.stop_gradient(x)) for x in arrays_BT if x is not None]
    return BadRows(jnp.any(where_BT & ~functools.reduce(jnp.logical_and, finite_BT), axis=-1))


def merge(logs_M: Any) -> Any:
    """Merges the metrics of micro-batches, stacked on axis 0: adds numbers and puts `BadRows` in batch order."""

    def leaf(x: Any) -> Any:
        # `update.split` assigns rows to micro-batches with a stride, so swapping the axes restores the batch order.
        return BadRows(jnp.swapaxes(x.bad_B, 0, 1).reshape(-1)) if isinstance(x, BadRows) else jnp.sum(x, axis=0)

    return jax.tree.map(leaf, logs_M, is_leaf=lambda x: isinstance(x, BadRows))


def row_metrics(rows: BadRows, *, axis_name: str | tuple[str, ...] | None = None) -> dict[str, jax.Array]:
    """Returns ``bad_rows``, the number of bad rows, and ``bad_row``, the batch index of the first, or -1 for none."""
    B = rows.bad_B.shape[0]
    first, count = jnp.argmax(rows.bad_B), jnp.sum(rows.bad_B)
    if axis_name is not None:
        devices = jax.lax.axis_size(axis_name)
        first = jnp.where(count > 0, first + B * jax.lax.axis_index(axis_name), B * devices)
        first, count = jax.lax.pmin(first, axis_name), jax.lax.psum(count, axis_name)
    first = jnp.where(count > 0, first, -1)
    return {"bad_rows": count.astype(jnp.float32), "bad_row": first.astype(jnp.float32)}


def explain(floats: Mapping[str, float]) -> str:
    """Returns a clause that says why a step was skipped, given its metrics.

    It names the non-finite losses, gradients and rows, or says that the batch has nothing to learn from.

    Example:
        >>> from rlhf_jax.train.optim import nonfinite
        >>> nonfinite.explain({"loss": float("nan"), "grad_norm": 1.0, "bad_rows": 1.0, "bad_row": 3.0})
        'loss is not finite (row 3 of the batch)'
    """
    if floats.get("empty_batch", 0) > 0:
        return (
            "the batch has nothing to learn from (no token or no pair with a label), and the weights did not change; "
            "check the loss masks, labels and ranks of the data"
        )
    unused = {"ptx_loss"} if floats.get("ptx_coef_per_token") == 0 else set()
    bad = [name for name, number in floats.items() if not math.isfinite(number) and name not in unused]
    parts = [name.removeprefix("grad_norm_") for name in bad if name.startswith("grad_norm_")]
    losses = [name for name in bad if "loss" in name]
    rest = [name for name in bad if name not in losses and not name.startswith("grad_norm")]
    gradients = [f"the {part}'s gradient" for part in parts] or ["the gradient"] * ("grad_norm" in bad)
    names = [*losses, *gradients, *rest[:6]] or ["a number of the update"]
    names += [f"{len(rest) - 6} more"] * (len(rest) > 6)
    subject = f"{', '.join(names[:-1])} and {names[-1]} are" if len(names) > 1 else f"{names[0]} is"
    places = []
    if floats.get("bad_rows", 0) > 0:
        count, first = int(floats["bad_rows"]), int(floats["bad_row"])
        places.append(
            f"row {first} of the batch" if count == 1 else f"{count} rows of the batch, including row {first}"
        )
    if floats.get("bad_update", -1) >= 0:
        places.append(f"first in update {int(floats['bad_update']) + 1}")
    return f"{subject} not finite" + (f" ({', '.join(places)})" if places else "")
