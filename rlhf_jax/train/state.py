"""Creation of a ``TrainState``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

TrainState = train_state.TrainState


def create(params: Any, tx: optax.GradientTransformation, apply_fn: Callable[..., Any] | None = None) -> TrainState:
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

    Returns:
        The state.

    Raises:
        ValueError: If a parameter is float16, whose gradients would be float16 too.

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
    params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    state = TrainState.create(apply_fn=apply_fn or _no_apply, params=params, tx=tx)
    return state.replace(step=jnp.zeros((), jnp.int32))


def _no_apply(*args: Any, **kwargs: Any) -> Any:
    raise TypeError("this TrainState was created without an apply_fn; pass one to state.create")
