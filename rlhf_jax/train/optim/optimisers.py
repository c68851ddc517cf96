"""Optimisers that optax lacks. Their learning rate is 1; train steps multiply the updates by the actual one."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax


def scale_by_adam_tf1(*, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-5) -> optax.GradientTransformation:
    """Returns Adam as implemented in TensorFlow 1 and used by the code of Ziegler 2019.

    The update is ``sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)``, with uncorrected moments ``m`` and ``v``.
    ``optax.scale_by_adam`` corrects the moments before it adds eps, which is equivalent to adding ``eps * sqrt(1 -
    b2^t)`` in this formula; with b2 = 0.999, this is 3 % of eps in the first step. For small gradients, the early
    updates of optax are therefore larger. With eps = 0, both produce equal updates.

    The updates point in the ascent direction, as those of ``optax.scale_by_adam`` do; chain with ``optax.scale(-1.0)``.

    Args:
        b1: Decay rate of the mean of the gradients, in [0, 1).
        b2: Decay rate of the mean of the squared gradients, in [0, 1).
        eps: Added to the square root of the uncorrected second moment; at least 0 (1e-5 in Ziegler's code).

    Returns:
        A transformation whose state is an ``optax.ScaleByAdamState``. Moments and updates have the dtype of the
        parameters, but at least float32.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from rlhf_jax.train.optim import optimisers
        >>> tx = optax.chain(optimisers.scale_by_adam_tf1(eps=1e-3), optax.scale(-1.0))
        >>> updates, _ = tx.update(jnp.array(0.1), tx.init(jnp.array(0.0)))
        >>> print(round(float(updates), 4))
        -0.7597
    """
    if not (0 <= b1 < 1 and 0 <= b2 < 1 and eps >= 0):
        raise ValueError(f"scale_by_adam_tf1 needs 0 <= b1 < 1, 0 <= b2 < 1 and eps >= 0; got {b1}, {b2} and {eps}")

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
    """Returns ``1 - decay^count`` without cancellation, which would cost three digits of ``1 - 0.999`` in float32."""
    log = math.log(decay) if decay > 0 else -math.inf
    return -jnp.expm1(count * log)
