"""Prompts in, rollout out: prefill and decoding in one program."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax import types
from rlhf_jax.generation import decoding
from rlhf_jax.generation import sampling as sampling_lib
from rlhf_jax.lm import cache as kv_cache
from rlhf_jax.lm import config, transformer, weights


class _State(NamedTuple):
    step: jax.Array
    """How many tokens have been drawn."""
    cache: kv_cache.KVCache
    live_B: jax.Array
    """bool, True while a row goes on."""
    stopped_B: jax.Array
    tail_BK: jax.Array
    tokens_BT: jax.Array
    logprobs_BT: jax.Array
    values_BT: jax.Array | None
    mask_BT: jax.Array


def generate(
    params: types.Params,
    rng_B: jax.Array,
    prompts_BP: jax.Array,
    mask_BP: jax.Array,
    *,
    cfg: config.LMConfig,
    sampling: sampling_lib.Sampling,
    n: int = 1,
    values: bool = False,
    limits_B: jax.Array | None = None,
    axis_name: str | None = None,
) -> types.Rollout:
    """Answer every prompt with up to ``sampling.max_new_tokens`` tokens; returns a :class:`rlhf_jax.types.Rollout`.

    Prompts are left-padded: the last column of ``mask_BP`` must be real. ``rng_B`` holds a key a row and is consumed:
    token t of row i is drawn with ``fold_in(rng_B[i], t)``, so that a row's sample depends on its own prompt and key
    and on nothing else in the batch. A response ends with the first of ``sampling.stop_ids``, which counts into its
    length and mask, or with a stop sequence, or for lack of room; nothing is ever put into a response that was not
    drawn. ``logprobs_BT`` are those of the distribution drawn from: of ``logits / temperature``, truncated where that
    is asked for. ``values`` adds the scalar head's value before each token, from the same pass. ``limits_B``, int32 in
    [1, T], are tighter limits of single rows.

    With ``n`` above 1 each prompt is read once and answered n times: row ``b * n + k`` of the result, and of
    ``rng_B``, which then holds ``B * n`` keys, is answer k to prompt b.

    Decoding ends when every row has stopped. Under ``jax.vmap`` give both the same ``axis_name``: all members then
    end together, where a predicate of each member's own would turn every cache write into a scatter.

    Raises ``ValueError`` for shapes that disagree, or where P + T exceeds ``cfg.max_length``.
    """
    check(rng_B, prompts_BP, mask_BP, cfg, sampling, n=n)
    P, T = prompts_BP.shape[1], sampling.max_new_tokens
    B = prompts_BP.shape[0] * n
    params = weights.unstack(params, cfg)
    limit_B = jnp.full((B,), T, jnp.int32) if limits_B is None else jnp.minimum(limits_B, T)

    def record(state: _State, hidden_BD: jax.Array) -> _State:
        drawn = decoding.draw(
            params,
            hidden_BD,
            rng_B,
            step_B=jnp.broadcast_to(state.step, (B,)),
            live_B=state.live_B,
            tail_BK=state.tail_BK,
            cfg=cfg,
            sampling=sampling,
            values=values,
        )
        return state._replace(
            step=state.step + 1,
            live_B=state.live_B & ~drawn.stopped_B & (state.step + 1 < limit_B),
            stopped_B=state.stopped_B | drawn.stopped_B,
            tail_BK=drawn.tail_BK,
            tokens_BT=_put(state.tokens_BT, drawn.tokens_B, state.step),
            logprobs_BT=_put(state.logprobs_BT, drawn.logprobs_B, state.step),
            values_BT=None if state.values_BT is None else _put(state.values_BT, drawn.values_B, state.step),
            mask_BT=_put(state.mask_BT, state.live_B, state.step),
        )

    def go_on(state: _State) -> jax.Array:
        return anywhere(jnp.any(state.live_B), axis_name)

    def decode(state: _State) -> _State:
        tokens_B1 = lax.dynamic_slice_in_dim(state.tokens_BT, state.step - 1, 1, axis=1)
        mask_B1 = lax.dynamic_slice_in_dim(state.mask_BT, state.step - 1, 1, axis=1)
        out = transformer.forward(params, tokens_B1, cfg=cfg, mask_BL=mask_B1, cache=state.cache)
        return record(state._replace(cache=out.cache), out.hidden_BLD[:, 0])

    # The last token drawn is never read, so its slot is not needed.
    empty = kv_cache.create(cfg, batch=B // n, slots=P + T - 1)
    prefill = transformer.forward(params, prompts_BP, cfg=cfg, mask_BL=mask_BP, cache=empty, used_slots=P)
    state = _State(
        step=jnp.zeros((), jnp.int32),
        cache=_repeated(prefill.cache, n),
        live_B=jnp.ones((B,), bool),
        stopped_B=jnp.zeros((B,), bool),
        tail_BK=decoding.no_tail(B, sampling),
        tokens_BT=jnp.full((B, T), sampling.pad_id, jnp.int32),
        logprobs_BT=jnp.zeros((B, T), jnp.float32),
        values_BT=jnp.zeros((B, T), jnp.float32) if values else None,
        mask_BT=jnp.zeros((B, T), bool),
    )
    state = lax.while_loop(go_on, decode, record(state, jnp.repeat(prefill.hidden_BLD[:, -1], n, axis=0)))
    return types.Rollout(
        tokens_BL=jnp.concatenate([jnp.repeat(prompts_BP.astype(jnp.int32), n, axis=0), state.tokens_BT], axis=1),
        mask_BL=jnp.concatenate([jnp.repeat(mask_BP, n, axis=0), state.mask_BT], axis=1),
        response_mask_BT=state.mask_BT,
        logprobs_BT=state.logprobs_BT,
        lengths_B=state.mask_BT.sum(axis=1, dtype=jnp.int32),
        finish_B=state.stopped_B.astype(jnp.int32),
        values_BT=state.values_BT,
    )


def anywhere(live: jax.Array, axis_name: str | None) -> jax.Array:
    """A loop's predicate, made one for all members of a vmap."""
    return live if axis_name is None else lax.pmax(live.astype(jnp.int32), axis_name) > 0


def check(
    rng_B: jax.Array,
    prompts_BP: jax.Array,
    mask_BP: jax.Array,
    cfg: config.LMConfig,
    sampling: sampling_lib.Sampling,
    *,
    n: int = 1,
) -> None:
    """Raise ``ValueError`` for arguments that do not belong together."""
    if prompts_BP.ndim != 2 or mask_BP.shape != prompts_BP.shape:
        raise ValueError(f"prompts_BP {prompts_BP.shape} and mask_BP {mask_BP.shape} must be one shape of rank 2")
    if mask_BP.dtype != jnp.bool_:
        raise ValueError(f"mask_BP must be bool, got {mask_BP.dtype}")
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    keys_shape = rng_B.shape if jnp.issubdtype(rng_B.dtype, jax.dtypes.prng_key) else rng_B.shape[:-1]
    if keys_shape != (prompts_BP.shape[0] * n,):
        raise ValueError(f"rng_B must hold a key a row, {prompts_BP.shape[0] * n} of them, got shape {rng_B.shape}")
    width = prompts_BP.shape[1] + sampling.max_new_tokens
    if width > cfg.max_length:
        raise ValueError(f"prompts and responses of {width} tokens are longer than cfg.max_length = {cfg.max_length}")


def _repeated(cache: kv_cache.KVCache, n: int) -> kv_cache.KVCache:
    if n == 1:
        return cache
    rows = dataclasses.replace(cache, length=None)
    return dataclasses.replace(jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), rows), length=cache.length)


def _put(x_BT: jax.Array, column_B: jax.Array | None, step: jax.Array) -> jax.Array:
    assert column_B is not None
    return lax.dynamic_update_slice_in_dim(x_BT, column_B[:, None].astype(x_BT.dtype), step, axis=1)
