"""Continuous batching: a slot whose response has ended starts the next prompt, inside the compiled loop.

In a static batch, all rows wait for the longest response. Here, B slots decode responses to a queue
of N prompts of width P, and free slots are filled R at a time::

    while prompts are queued or slots are live:
        prefill free slots with the next R prompts, [R, P]
        decode one token per slot, [B], until R slots are free and prompts are queued, or no slot is live

The cache has the same layout as in :func:`rlhf_jax.generation.generate`: in the row of each slot, the prompt fills the
first P columns, and the response follows. Each row has a separate write position. For given B, R and P, a response is
therefore bit-identical regardless of the other prompts, of its slot and of when it starts.
"""

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


class _Answers(NamedTuple):
    """The responses drawn so far, one row per prompt."""

    tokens_NT: jax.Array
    logprobs_NT: jax.Array
    values_NT: jax.Array | None
    lengths_N: jax.Array
    stopped_N: jax.Array


class _State(NamedTuple):
    next_prompt: jax.Array
    """Index of the next queued prompt; N if the queue is empty."""
    prompt_B: jax.Array
    """Index of the prompt that each slot answers."""
    live_B: jax.Array
    """bool, True for slots with a response that has not ended."""
    step_B: jax.Array
    """Number of tokens in each slot's response."""
    last_B: jax.Array
    """The last token of each response, which is the next input of the model."""
    tail_BK: jax.Array
    """The last K tokens of each response; K is ``sampling.longest_stop``."""
    cache: kv_cache.KVCache
    answers: _Answers


def generate(
    params: types.Params,
    rng_N: jax.Array,
    prompts_NP: jax.Array,
    mask_NP: jax.Array,
    *,
    cfg: config.LMConfig,
    sampling: sampling_lib.Sampling,
    slots: int,
    refill: int | None = None,
    values: bool = False,
    limits_N: jax.Array | None = None,
    axis_name: str | None = None,
) -> types.Rollout:
    """Samples a response to each of N prompts, ``slots`` responses at a time.

    The tokens equal those from :func:`rlhf_jax.generation.generate`, unless a rounding error changes which token is
    drawn.

    Args:
        params: Parameters of the model.
        rng_N: One key per prompt; consumed. Token t of response i is drawn with ``fold_in(rng_N[i], t)``.
        prompts_NP: int32, left-padded prompts.
        mask_NP: bool, True at prompt tokens; the last column must be True in every row.
        cfg: Configuration of the model.
        sampling: Sampling distribution and stop conditions.
        slots: B, the number of responses decoded at once; at least 1.
        refill: R, the number of free slots that triggers a prefill, and the maximum number of prompts in each prefill.
            At least 1; None means an eighth of the slots, or 1 if there are fewer than 8.
        values: Whether to return the scalar head's value before each token.
        limits_N: int32 in [1, T], the maximum length of each response; by default, T = ``sampling.max_new_tokens``.
        axis_name: Axis of an enclosing ``jax.vmap``. The loop then runs until all members of the axis have finished.

    Returns:
        A `types.Rollout` with rows in the order of the prompts.

    Raises:
        ValueError: If a shape or dtype is wrong, P + T exceeds ``cfg.max_length``, or ``slots`` or ``refill`` is less
            than 1.
    """
    decoding.check(rng_N, prompts_NP, mask_NP, sampling, cfg=cfg)
    (N, P), T = prompts_NP.shape, sampling.max_new_tokens
    for name, number in (("slots", slots), ("refill", refill)):
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1")
    B = min(slots, N)
    R = min(max(B // 8, 1) if refill is None else refill, B)
    params = weights.unstack(params, cfg)
    limit_N = jnp.full((N,), T, jnp.int32) if limits_N is None else jnp.minimum(limits_N, T)

    def write(answers: _Answers, drawn: decoding.Drawn, prompt: jax.Array, step: jax.Array, live: jax.Array):
        # Slots without a live response write to row N, which does not exist, so the write is dropped.
        index = (jnp.where(live, prompt, N), step)
        values_NT = answers.values_NT
        return _Answers(
            tokens_NT=answers.tokens_NT.at[index].set(drawn.tokens_B, mode="drop"),
            logprobs_NT=answers.logprobs_NT.at[index].set(drawn.logprobs_B, mode="drop"),
            values_NT=None if values_NT is None else values_NT.at[index].set(drawn.values_B, mode="drop"),
            lengths_N=answers.lengths_N.at[index[0]].set(step + 1, mode="drop"),
            stopped_N=answers.stopped_N.at[index[0]].set(drawn.stopped_B, mode="drop"),
        )

    def prefill(state: _State) -> _State:
        """Prefills free slots with the next prompts and draws the first token of each response."""
        slot_R = jnp.argsort(state.live_B, stable=True)[:R]
        prompt_R = state.next_prompt + jnp.arange(R, dtype=jnp.int32)
        live_R = (prompt_R < N) & ~state.live_B[slot_R]
        prompt_R = jnp.minimum(prompt_R, N - 1)
        mask_RP = mask_NP[prompt_R]
        empty = kv_cache.create(cfg, batch=R, slots=P)
        out = transformer.forward(params, prompts_NP[prompt_R], cfg=cfg, mask_BL=mask_RP, cache=empty)
        zeros_R = jnp.zeros((R,), jnp.int32)
        drawn = decoding.draw(
            params,
            out.hidden_BLD[:, -1],
            rng_N[prompt_R],
            step_B=zeros_R,
            live_B=live_R,
            tail_BK=decoding.empty_tail(R, sampling),
            cfg=cfg,
            sampling=sampling,
            values=values,
        )
        to_R = jnp.where(live_R, slot_R, B)

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[to_R].set(new, mode="drop")

        def put_prompt(old_BGSC: jax.Array, new_RGPC: jax.Array) -> jax.Array:
            return old_BGSC.at[to_R, :, :P].set(new_RGPC, mode="drop")

        response_mask_RT = jnp.zeros((R, T - 1), bool)
        cache = kv_cache.KVCache(
            keys=tuple(map(put_prompt, state.cache.keys, out.cache.keys)),
            values=tuple(map(put_prompt, state.cache.values, out.cache.values)),
            mask_BS=put(state.cache.mask_BS, jnp.concatenate([mask_RP, response_mask_RT], axis=1)),
            positions_BS=state.cache.positions_BS.at[to_R, :P].set(out.cache.positions_BS, mode="drop"),
            length=put(state.cache.length, jnp.full((R,), P, jnp.int32)),
        )
        return _State(
            next_prompt=jnp.minimum(state.next_prompt + jnp.sum(live_R, dtype=jnp.int32), N),
            prompt_B=put(state.prompt_B, prompt_R),
            live_B=put(state.live_B, live_R & ~drawn.stopped_B & (limit_N[prompt_R] > 1)),
            step_B=put(state.step_B, zeros_R + 1),
            last_B=put(state.last_B, drawn.tokens_B),
            tail_BK=put(state.tail_BK, drawn.tail_BK),
            cache=cache,
            answers=write(state.answers, drawn, prompt_R, zeros_R, live_R),
        )

    def decode(state: _State) -> _State:
        """Draws the next token of each live slot."""
        # A slot whose response has ended writes padding to column P of the cache; its next response overwrites it.
        length_B = P + jnp.where(state.live_B, state.step_B, 1) - 1
        cache = dataclasses.replace(state.cache, length=length_B)
        out = transformer.forward(params, state.last_B[:, None], cfg=cfg, mask_BL=state.live_B[:, None], cache=cache)
        drawn = decoding.draw(
            params,
            out.hidden_BLD[:, 0],
            rng_N[state.prompt_B],
            step_B=state.step_B,
            live_B=state.live_B,
            tail_BK=state.tail_BK,
            cfg=cfg,
            sampling=sampling,
            values=values,
        )
        answers = write(state.answers, drawn, state.prompt_B, state.step_B, state.live_B)
        step_B = state.step_B + state.live_B
        return state._replace(
            live_B=state.live_B & ~drawn.stopped_B & (step_B < limit_N[state.prompt_B]),
            step_B=step_B,
            last_B=drawn.tokens_B,
            tail_BK=drawn.tail_BK,
            cache=out.cache,
            answers=answers,
        )

    def keep_decoding(state: _State) -> jax.Array:
        n_live = jnp.sum(state.live_B)
        can_refill = (B - n_live >= R) & (state.next_prompt < N)
        return decoding.any_member((n_live > 0) & ~can_refill, axis_name)

    def unfinished(state: _State) -> jax.Array:
        return decoding.any_member((state.next_prompt < N) | jnp.any(state.live_B), axis_name)

    def refill_and_decode(state: _State) -> _State:
        return lax.while_loop(keep_decoding, decode, prefill(state))

    zeros_NT = jnp.zeros((N, T), jnp.float32)
    cache = kv_cache.create(cfg, batch=B, slots=P + T - 1)
    state = _State(
        next_prompt=jnp.zeros((), jnp.int32),
        prompt_B=jnp.zeros((B,), jnp.int32),
        live_B=jnp.zeros((B,), bool),
        step_B=jnp.zeros((B,), jnp.int32),
        last_B=jnp.full((B,), sampling.pad_id, jnp.int32),
        tail_BK=decoding.empty_tail(B, sampling),
        cache=dataclasses.replace(cache, length=jnp.full((B,), P, jnp.int32)),
        answers=_Answers(
            tokens_NT=jnp.full((N, T), sampling.pad_id, jnp.int32),
            logprobs_NT=zeros_NT,
            values_NT=zeros_NT if values else None,
            lengths_N=jnp.zeros((N,), jnp.int32),
            stopped_N=jnp.zeros((N,), bool),
        ),
    )
    state = decoding.varying_like(state, params, rng_N, prompts_NP, mask_NP, limit_N)
    answers = lax.while_loop(unfinished, refill_and_decode, state).answers
    mask_NT = jnp.arange(T)[None, :] < answers.lengths_N[:, None]
    return types.Rollout(
        tokens_BL=jnp.concatenate([prompts_NP.astype(jnp.int32), answers.tokens_NT], axis=1),
        mask_BL=jnp.concatenate([mask_NP, mask_NT], axis=1),
        response_mask_BT=mask_NT,
        logprobs_BT=answers.logprobs_NT,
        lengths_B=answers.lengths_N,
        finish_B=answers.stopped_N.astype(jnp.int32),
        values_BT=answers.values_NT,
    )
