"""Creation of a ``TrainState``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

from rlhf_jax.train.optim import probe

TrainState = train_state.TrainState


def create(
    params: Any,
    tx: optax.GradientTransformation,
    apply_fn: Callable[..., Any] | None = None,
    *,
    check_learning_rate: bool = True,
) -> TrainState:
    """Returns a new ``TrainState`` at step 0.

    The parameters are copied, because a train step donates its state and donation deletes the buffers: a policy and its
    reference, for example, must not share them. ``state.step`` is a strongly typed int32 array, so that the first call,
    later calls and a restored state all use the same compiled program. ``jax.jit(create, static_argnums=(1, 2),
    out_shardings=...)`` creates a sharded state.

    Args:
        params: A nested dict of arrays.
        tx: An optax transformation with unit learning rate; `optim.update.apply_gradients` multiplies its updates by
            the learning rate. Create it once per run, because a new object triggers recompilation of the step.
        apply_fn: Stored in the state for code that expects it there; this library does not use it.
        check_learning_rate: Whether to check that the first update of ``tx`` points against the gradient and is of
            order 1. A transformation whose first update is 0, such as ``optax.MultiSteps``, is not checked.

    Returns:
        The state.

    Raises:
        ValueError: If a parameter is float16, whose gradients would be float16 too, or if ``tx`` does not have unit
            learning rate.

    Example:

        >>> import jax.numpy as jnp
        >>> import optax
        >>> from rlhf_jax.train import state
        >>> tx = optax.chain(optax.scale_by_adam(), optax.scale(-1.0))
        >>> int(state.create({"w": jnp.ones(3)}, tx).step)
        0
    """
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if jnp.dtype(x.dtype) == jnp.float16:
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} is float16, in which small gradients become 0; train in float32 "
                "(or bfloat16), and use float16 only for files"
            )
    if check_learning_rate and (fault := _learning_rate_fault(tx, params)):
        raise ValueError(f"{fault}; to use tx nevertheless, pass check_learning_rate=False")
    params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    state = TrainState.create(apply_fn=apply_fn or _no_apply, params=params, tx=tx)
    return state.replace(step=jnp.zeros((), jnp.int32))


def _learning_rate_fault(tx: optax.GradientTransformation, params: Any) -> str:
    """Returns why the updates of ``tx`` do not have unit learning rate and what to write instead, or an empty string.

    The updates are computed for small arrays with the structure of ``params``, also while ``params`` are traced.
    """
    leaves, structure = jax.tree.flatten(params)
    try:
        first, second = probe.first_updates(tx, structure, tuple(len(x.shape) for x in leaves))
    except Exception:  # for example because the update needs further arguments
        return ""
    size = abs(first)
    if not math.isfinite(first) or first == 0:
        return ""
    if first > 0:
        return (
            "the updates of tx point along the gradient, which increases the loss; append optax.scale(-1.0), as in "
            "optax.chain(optax.scale_by_adam(), optax.scale(-1.0))"
        )
    is_linear = abs(second) < 0.5 * size  # so that a small first update can be due to clipping
    if _SMALLEST < size < _LARGEST or (is_linear and _SMALLEST < abs(second) / probe.SMALL_GRADIENT < _LARGEST):
        return ""
    return (
        f"the updates of tx are about {size:.2g} for a gradient of 1 and must be about 1, because the train step "
        "multiplies them by the learning rate; give the learning rate to the step and write, for example, "
        "optax.adamw(1.0) instead of optax.adamw(1e-2)"
    )


_SMALLEST, _LARGEST = 0.05, 20.0
"""Limits of a first update with unit learning rate; that of Muon with ``consistent_rms=0.2`` is 0.2."""


def _no_apply(*args: Any, **kwargs: Any) -> Any:
    raise TypeError("this TrainState was created without an apply_fn; pass one to state.create")
