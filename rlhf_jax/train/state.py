"""Building a TrainState."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

TrainState = train_state.TrainState


def create(params: Any, tx: optax.GradientTransformation, apply_fn: Callable[..., Any] | None = None) -> TrainState:
    """A fresh ``TrainState`` at step 0.

    The parameters are copied: steps donate their state, and a buffer that two states share (a policy and its
    reference, a reward model and the SFT model it starts from) would be gone for the other one. The step is a strongly
    typed int32 array, so that the first step compiles for the same types as every later one and as a restored state.

    Args:
        params: A nested dict of arrays. Other containers fail later, in flax's ``apply_gradients``.
        tx: An optax transform with unit learning rate (`step.apply_gradients` multiplies its updates). Build it once
            for a run: a new one is a new static argument and compiles the step again.
        apply_fn: Kept in the state for code that looks for it there; the library itself does not.

    Under ``jax.jit(create, static_argnums=(1, 2), out_shardings=...)`` it makes a state that is sharded from the start.
    """
    params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    state = TrainState.create(apply_fn=apply_fn or _no_apply, params=params, tx=tx)
    return state.replace(step=jnp.zeros((), jnp.int32))


def _no_apply(*args: Any, **kwargs: Any) -> Any:
    raise TypeError("this TrainState was built without an apply_fn")
