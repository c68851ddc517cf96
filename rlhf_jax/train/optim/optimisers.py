"""Optimisers that optax does not have, with unit rate: a step multiplies by a traced learning rate."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax


def scale_by_adam_tf1(*, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-5) -> optax.GradientTransformation:
    """Adam as TensorFlow 1 has it, with which Ziegler 2019 and Stiennon 2020 trained.

    The update is ``sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)``, with the moments ``m`` and ``v`` as they are.
    ``optax.scale_by_adam`` corrects them before it adds eps, which is an eps of ``eps * sqrt(1 - b2^t)`` here: 3 % of
    it in the first step. So its early steps on small gradients are larger. With eps 0 the two are one.

    Like ``optax.scale_by_adam`` this gives the ascent direction with unit rate; chain it with ``optax.scale(-1.0)``.

    Args:
        b1: Decay of the mean of the gradients, in [0, 1).
        b2: Decay of the mean of their squares, in [0, 1).
        eps: Added to the root of the uncorrected second moment, at least 0; 1e-5 in Ziegler's code.

    Returns:
        A transformation whose state is an ``optax.ScaleByAdamState``. Moments and updates are in the dtype of the
        parameters, float32 at least.

    Raises:
        ValueError: for a number out of its range.
    """
    if not (0 <= b1 < 1 and 0 <= b2 < 1 and eps >= 0):
        raise ValueError(f"need 0 <= b1 < 1, 0 <= b2 < 1 and eps >= 0; got {b1}, {b2} and {eps}")

    def init(params: Any) -> optax.ScaleByAdamState:
        def zeros() -> Any:
            return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params)

        return optax.ScaleByAdamState(count=jnp.zeros((), jnp.int32), mu=zeros(), nu=zeros())

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        del params
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g.astype(m.dtype), state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g.astype(v.dtype)), state.nu, updates)
        rate = jnp.sqrt(_one_minus_power(b2, count)) / _one_minus_power(b1, count)
        updates = jax.tree.map(lambda m, v: rate.astype(m.dtype) * m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def _one_minus_power(decay: float, count: Any) -> jax.Array:
    """``1 - decay^count`` without the cancellation, which costs three digits of ``1 - 0.999`` in float32."""
    log = math.log(decay) if decay > 0 else -math.inf
    return -jnp.expm1(count * log)
