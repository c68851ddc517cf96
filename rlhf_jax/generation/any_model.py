"""Generation with any model: no cache, so the whole row is read again for every token."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax import types
from rlhf_jax.generation import sampling as sampling_lib


class _State(NamedTuple):
    step: jax.Array
    """How many tokens have been drawn."""
    live_B: jax.Array
    """bool, True while a row has not stopped."""
    tokens_BL: jax.Array
    mask_BL: jax.Array
    logprobs_BT: jax.Array


def generate_with(
    apply: types.ApplyFn,
    params: types.Params,
    rng_B: jax.Array,
    prompts_BP: jax.Array,
    mask_BP: jax.Array,
    *,
    sampling: sampling_lib.Sampling,
    axis_name: str | None = None,
) -> types.Rollout:
    """`generate` of any model: the same contract, and for this library's model the same tokens, but slower.

    All that is asked of the model is that a column's output depends on the real tokens up to it alone: what stands
    where ``mask_BL`` is False, and all that comes later, it must not see. Every token costs a forward pass over P + T
    columns, so this is for small models, for tests, and for a start; a model that is trained for long wants a cache.

    Args:
        apply: the model.
        params: its parameters.
        rng_B: a key a row; token t of row i is drawn with ``fold_in(rng_B[i], t)``.
        prompts_BP: left-padded prompts.
        mask_BP: True at their tokens; the last column must be real.
        sampling: what to draw from, and when to stop.
        axis_name: of a ``jax.vmap`` around this, whose members then end together.

    Raises:
        ValueError: shapes that disagree.
    """
    _check(rng_B, prompts_BP, mask_BP)
    B, P = prompts_BP.shape
    T, longest = sampling.max_new_tokens, sampling.longest_stop
    outside_BK = jnp.full((B, longest), sampling_lib.NOTHING, jnp.int32)

    def go_on(state: _State) -> jax.Array:
        live = jnp.any(state.live_B)
        if axis_name is not None:
            live = lax.pmax(live.astype(jnp.int32), axis_name) > 0
        return (state.step < T) & live

    def draw(state: _State) -> _State:
        hidden_BLD = apply.forward(params, state.tokens_BL, mask_BL=state.mask_BL).hidden_BLD
        last_B1D = lax.dynamic_slice_in_dim(hidden_BLD, P - 1 + state.step, 1, axis=1)
        keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(rng_B, state.step)
        drawn_B, logprobs_B = sampling_lib.choose(
            keys_B, apply.logits(params, last_B1D)[:, 0], sampling, step=state.step
        )
        tokens_B = jnp.where(state.live_B, drawn_B, sampling.pad_id)
        tokens_BL = _put(state.tokens_BL, tokens_B, P + state.step)
        # A stop sequence ends a response only where all of it is the response's own, and not the prompt's.
        responses_BT = jnp.concatenate([outside_BK, tokens_BL[:, P:]], axis=1)
        tail_BK = lax.dynamic_slice_in_dim(responses_BT, state.step + 1, longest, axis=1)
        return _State(
            step=state.step + 1,
            live_B=state.live_B & ~sampling_lib.ends(tail_BK, sampling, length=state.step + 1),
            tokens_BL=tokens_BL,
            mask_BL=_put(state.mask_BL, state.live_B, P + state.step),
            logprobs_BT=_put(state.logprobs_BT, jnp.where(state.live_B, logprobs_B, 0.0), state.step),
        )

    state = _State(
        step=jnp.zeros((), jnp.int32),
        live_B=jnp.ones((B,), bool),
        tokens_BL=jnp.pad(prompts_BP.astype(jnp.int32), ((0, 0), (0, T)), constant_values=sampling.pad_id),
        mask_BL=jnp.pad(mask_BP, ((0, 0), (0, T))),
        logprobs_BT=jnp.zeros((B, T), jnp.float32),
    )
    state = lax.while_loop(go_on, draw, state)
    response_mask_BT = state.mask_BL[:, P:]
    return types.Rollout(
        tokens_BL=state.tokens_BL,
        mask_BL=state.mask_BL,
        response_mask_BT=response_mask_BT,
        logprobs_BT=state.logprobs_BT,
        lengths_B=response_mask_BT.sum(axis=1, dtype=jnp.int32),
        finish_B=(~state.live_B).astype(jnp.int32),
    )


def _put(x_BL: jax.Array, column_B: jax.Array, at: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x_BL, column_B[:, None].astype(x_BL.dtype), at, axis=1)


def _check(rng_B: jax.Array, prompts_BP: jax.Array, mask_BP: jax.Array) -> None:
    if prompts_BP.ndim != 2 or mask_BP.shape != prompts_BP.shape:
        raise ValueError(f"prompts_BP {prompts_BP.shape} and mask_BP {mask_BP.shape} must be one shape of rank 2")
    if mask_BP.dtype != jnp.bool_:
        raise ValueError(f"mask_BP must be bool, got {mask_BP.dtype}")
    keys_shape = rng_B.shape if jnp.issubdtype(rng_B.dtype, jax.dtypes.prng_key) else rng_B.shape[:-1]
    if keys_shape != prompts_BP.shape[:1]:
        raise ValueError(f"rng_B must hold a key a row, {prompts_BP.shape[0]} of them, got shape {rng_B.shape}")
