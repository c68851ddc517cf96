"""Sampling of responses to a batch of prompts, with prefill and decoding in one program."""

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
    """Number of tokens drawn."""
    cache: kv_cache.KVCache | None
    """None for an `ApplyFn`."""
    live_B: jax.Array
    """bool, True for rows whose response has not ended."""
    stopped_B: jax.Array
    """bool, True for rows that ended at a stop id or sequence."""
    tail_BK: jax.Array
    """The last K tokens of each response; K is ``sampling.longest_stop``."""
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
    cfg: config.LMConfig | types.ApplyFn,
    sampling: sampling_lib.Sampling,
    n: int = 1,
    values: bool = False,
    limits_B: jax.Array | None = None,
    axis_name: str | None = None,
) -> types.Rollout:
    """Samples a response of up to T = ``sampling.max_new_tokens`` tokens to every prompt.

    A response ends with the first stop id or stop sequence that it contains, or at its length limit; no stop token is
    appended at the limit. Token t of row i is drawn with ``fold_in(rng_B[i], t)``, so a response depends only on its
    prompt and its key. Decoding ends when all responses have ended. An `ApplyFn` has no cache, so each token requires a
    forward pass over P + T columns for prompts of width P.

    Args:
        params: Parameters of the model.
        rng_B: Random keys, one for each response; consumed.
        prompts_BP: int32, left-padded prompts.
        mask_BP: bool, True at prompt tokens; the last column must be True in every row.
        cfg: `LMConfig` of the model, or an `ApplyFn` for any other model.
        sampling: Sampling distribution and stop conditions.
        n: Number of responses to each prompt. Row ``b * n + k`` of ``rng_B`` and of the result belongs to response k to
            prompt b. With an `LMConfig`, each prompt is processed only once.
        values: Whether to return the scalar head's value before each token, computed in the same forward pass.
        limits_B: int32 in [1, T], the maximum length of each response; T by default.
        axis_name: Axis of an enclosing ``jax.vmap``. The loop then runs until all members of the axis have finished.
            In a ``jax.vmap`` without ``axis_name``, the loop predicate differs between members, and every cache write
            becomes a scatter, which is much slower.

    Returns:
        A `rlhf_jax.types.Rollout`. ``logprobs_BT`` are log-probabilities under the sampling distribution (see
        :func:`rlhf_jax.generation.log_distribution`).

    Raises:
        ValueError: If a shape or dtype is wrong, ``n`` is less than 1, or P + T exceeds ``cfg.max_length``.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from rlhf_jax import generation, types
        >>> def forward(params, tokens_BL, *, mask_BL=None):  # a bigram model; see lm.LMConfig for a transformer
        ...     return types.LMOutput(params[tokens_BL])
        >>> model = types.ApplyFn(forward, lambda params, hidden_BLD: hidden_BLD)
        >>> params = 9.0 * jnp.roll(jnp.eye(5), 1, axis=1)  # token i is followed by i + 1
        >>> keys = jax.random.split(jax.random.key(0), 1)
        >>> sampling = generation.Sampling(greedy=True, max_new_tokens=6, stop_ids=(4,))
        >>> prompts = jnp.array([[0, 1]])
        >>> generation.generate(params, keys, prompts, prompts >= 0, cfg=model, sampling=sampling).tokens_BL.tolist()
        [[0, 1, 2, 3, 4, 0, 0, 0]]
    """
    decoding.check(rng_B, prompts_BP, mask_BP, sampling, cfg=cfg, n=n)
    P, T = prompts_BP.shape[1], sampling.max_new_tokens
    B = prompts_BP.shape[0] * n
    params = params if isinstance(cfg, types.ApplyFn) else weights.unstack(params, cfg)
    limit_B = jnp.full((B,), T, jnp.int32) if limits_B is None else jnp.minimum(limits_B, T)
    repeated_BP, repeated_mask_BP = (jnp.repeat(x, n, axis=0) for x in (prompts_BP.astype(jnp.int32), mask_BP))

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

    def unfinished(state: _State) -> jax.Array:
        return decoding.any_member(jnp.any(state.live_B), axis_name)

    def decode(state: _State) -> _State:
        if isinstance(cfg, types.ApplyFn):  # without a cache, all columns are processed again
            tokens_BL = jnp.concatenate([repeated_BP, state.tokens_BT], axis=1)
            mask_BL = jnp.concatenate([repeated_mask_BP, state.mask_BT], axis=1)
            hidden_BLD = cfg.forward(params, tokens_BL, mask_BL=mask_BL).hidden_BLD
            return record(state, lax.dynamic_index_in_dim(hidden_BLD, P - 1 + state.step, axis=1, keepdims=False))
        tokens_B1 = lax.dynamic_slice_in_dim(state.tokens_BT, state.step - 1, 1, axis=1)
        mask_B1 = lax.dynamic_slice_in_dim(state.mask_BT, state.step - 1, 1, axis=1)
        out = transformer.forward(params, tokens_B1, cfg=cfg, mask_BL=mask_B1, cache=state.cache)
        return record(state._replace(cache=out.cache), out.hidden_BLD[:, 0])

    state = _State(
        step=jnp.zeros((), jnp.int32),
        cache=None,
        live_B=jnp.ones((B,), bool),
        stopped_B=jnp.zeros((B,), bool),
        tail_BK=decoding.empty_tail(B, sampling),
        tokens_BT=jnp.full((B, T), sampling.pad_id, jnp.int32),
        logprobs_BT=jnp.zeros((B, T), jnp.float32),
        values_BT=jnp.zeros((B, T), jnp.float32) if values else None,
        mask_BT=jnp.zeros((B, T), bool),
    )
    if isinstance(cfg, types.ApplyFn):
        state = decode(state)
    else:
        # The last token is never an input of the model, so the cache has no slot for it.
        empty = kv_cache.create(cfg, batch=B // n, slots=P + T - 1)
        prefill = transformer.forward(params, prompts_BP, cfg=cfg, mask_BL=mask_BP, cache=empty, used_slots=P)
        state = state._replace(cache=_repeated(prefill.cache, n))
        state = record(state, jnp.repeat(prefill.hidden_BLD[:, -1], n, axis=0))
    # All inputs have entered the first token and the rows that are live after it.
    state = decoding.varying_like(state, state.tokens_BT, state.live_B)
    state = lax.while_loop(unfinished, decode, state)
    return types.Rollout(
        tokens_BL=jnp.concatenate([repeated_BP, state.tokens_BT], axis=1),
        mask_BL=jnp.concatenate([repeated_mask_BP, state.mask_BT], axis=1),
        response_mask_BT=state.mask_BT,
        logprobs_BT=state.logprobs_BT,
        lengths_B=state.mask_BT.sum(axis=1, dtype=jnp.int32),
        finish_B=state.stopped_B.astype(jnp.int32),
        values_BT=state.values_BT,
    )


def _repeated(cache: kv_cache.KVCache, n: int) -> kv_cache.KVCache:
    if n == 1:
        return cache
    rows = dataclasses.replace(cache, length=None)
    return dataclasses.replace(jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), rows), length=cache.length)


def _put(x_BT: jax.Array, column_B: jax.Array | None, step: jax.Array) -> jax.Array:
    assert column_B is not None
    return lax.dynamic_update_slice_in_dim(x_BT, column_B[:, None].astype(x_BT.dtype), step, axis=1)
