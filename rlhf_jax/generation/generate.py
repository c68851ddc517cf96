"""Prompts in, rollout out: prefill and decoding in one program."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax import types
from rlhf_jax.generation import sampling as sampling_lib
from rlhf_jax.lm import cache as kv_cache
from rlhf_jax.lm import config, transformer


class _State(NamedTuple):
    step: jax.Array
    """How many tokens have been drawn."""
    cache: kv_cache.KVCache
    live_B: jax.Array
    """bool, True while a row has not stopped."""
    tokens_BT: jax.Array
    logprobs_BT: jax.Array
    mask_BT: jax.Array


def generate(
    params: types.Params,
    rng_B: jax.Array,
    prompts_BP: jax.Array,
    mask_BP: jax.Array,
    *,
    cfg: config.LMConfig,
    sampling: sampling_lib.Sampling,
    axis_name: str | None = None,
) -> types.Rollout:
    """Answer every prompt with up to ``sampling.max_new_tokens`` tokens; returns a :class:`rlhf_jax.types.Rollout`.

    Prompts are left-padded: the last column of ``mask_BP`` must be real. ``rng_B`` holds a key a row and is consumed:
    token t of row i is drawn with ``fold_in(rng_B[i], t)``, so that a row's sample depends on its own prompt and key
    and on nothing else in the batch. A response ends with the first of ``sampling.stop_ids``, which counts into its
    length and mask, or for lack of room; nothing is ever put into a response that was not drawn. ``logprobs_BT`` are
    those of the distribution drawn from: of ``logits / temperature``, truncated where that is asked for.

    Decoding ends when every row has stopped. Under ``jax.vmap`` give both the same ``axis_name``: all members then
    end together, where a predicate of each member's own would turn every cache write into a scatter.

    Raises ``ValueError`` for shapes that disagree, or where P + T exceeds ``cfg.max_length``.
    """
    _check(rng_B, prompts_BP, mask_BP, cfg, sampling)
    B, P = prompts_BP.shape
    T = sampling.max_new_tokens
    params = transformer.unstack(params, cfg)
    stop_S = jnp.array(sampling.stop_ids, jnp.int32)

    def record(state: _State, hidden_BD: jax.Array) -> _State:
        logits_BV = transformer.logits(params, hidden_BD, cfg=cfg)
        keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(rng_B, state.step)
        drawn_B, logprobs_B = sampling_lib.choose(keys_B, logits_BV, sampling)
        tokens_B = jnp.where(state.live_B, drawn_B, sampling.pad_id)
        stopped_B = jnp.any(tokens_B[:, None] == stop_S[None, :], axis=1)
        return state._replace(
            step=state.step + 1,
            live_B=state.live_B & ~stopped_B,
            tokens_BT=_put(state.tokens_BT, tokens_B, state.step),
            logprobs_BT=_put(state.logprobs_BT, jnp.where(state.live_B, logprobs_B, 0.0), state.step),
            mask_BT=_put(state.mask_BT, state.live_B, state.step),
        )

    def go_on(state: _State) -> jax.Array:
        live = jnp.any(state.live_B)
        if axis_name is not None:
            live = lax.pmax(live.astype(jnp.int32), axis_name) > 0
        return (state.step < T) & live

    def decode(state: _State) -> _State:
        tokens_B1 = lax.dynamic_slice_in_dim(state.tokens_BT, state.step - 1, 1, axis=1)
        mask_B1 = lax.dynamic_slice_in_dim(state.mask_BT, state.step - 1, 1, axis=1)
        out = transformer.forward(params, tokens_B1, cfg=cfg, mask_BL=mask_B1, cache=state.cache)
        return record(state._replace(cache=out.cache), out.hidden_BLD[:, 0])

    # The last token drawn is never read, so its slot is not needed.
    empty = kv_cache.create(cfg, batch=B, slots=P + T - 1)
    prefill = transformer.forward(params, prompts_BP, cfg=cfg, mask_BL=mask_BP, cache=empty)
    state = _State(
        step=jnp.zeros((), jnp.int32),
        cache=prefill.cache,
        live_B=jnp.ones((B,), bool),
        tokens_BT=jnp.full((B, T), sampling.pad_id, jnp.int32),
        logprobs_BT=jnp.zeros((B, T), jnp.float32),
        mask_BT=jnp.zeros((B, T), bool),
    )
    state = lax.while_loop(go_on, decode, record(state, prefill.hidden_BLD[:, -1]))
    return types.Rollout(
        tokens_BL=jnp.concatenate([prompts_BP.astype(jnp.int32), state.tokens_BT], axis=1),
        mask_BL=jnp.concatenate([mask_BP, state.mask_BT], axis=1),
        response_mask_BT=state.mask_BT,
        logprobs_BT=state.logprobs_BT,
        lengths_B=state.mask_BT.sum(axis=1, dtype=jnp.int32),
        finish_B=(~state.live_B).astype(jnp.int32),
    )


def _put(x_BT: jax.Array, column_B: jax.Array, step: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x_BT, column_B[:, None].astype(x_BT.dtype), step, axis=1)


def _check(
    rng_B: jax.Array,
    prompts_BP: jax.Array,
    mask_BP: jax.Array,
    cfg: config.LMConfig,
    sampling: sampling_lib.Sampling,
) -> None:
    if prompts_BP.ndim != 2 or mask_BP.shape != prompts_BP.shape:
        raise ValueError(f"prompts_BP {prompts_BP.shape} and mask_BP {mask_BP.shape} must be one shape of rank 2")
    if mask_BP.dtype != jnp.bool_:
        raise ValueError(f"mask_BP must be bool, got {mask_BP.dtype}")
    keys_shape = rng_B.shape if jnp.issubdtype(rng_B.dtype, jax.dtypes.prng_key) else rng_B.shape[:-1]
    if keys_shape != prompts_BP.shape[:1]:
        raise ValueError(f"rng_B must hold a key a row, {prompts_BP.shape[0]} of them, got shape {rng_B.shape}")
    width = prompts_BP.shape[1] + sampling.max_new_tokens
    if width > cfg.max_length:
        raise ValueError(f"prompts and responses of {width} tokens are longer than cfg.max_length = {cfg.max_length}")
