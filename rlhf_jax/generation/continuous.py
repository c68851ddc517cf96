"""More prompts than slots: a slot whose answer has ended takes the next prompt, inside the compiled loop.

In a batch that is decoded to the end, the longest answer holds all rows. Here B slots decode while N prompts wait::

    while anything is left:
        read the next R prompts into free slots      (prefill, [R, P])
        decode, [B], until R slots are free again, or nothing waits and all have ended

A slot's row of the cache is laid out as :func:`rlhf_jax.generation.generate` lays out its own, prompt in the first P
columns, answer behind it, each row at its own place. At given B, R and P, what a prompt gets therefore does not depend,
to the last bit, on what else is answered, on the slot, or on when its turn came.
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
    """What has been drawn, by prompt."""

    tokens_NT: jax.Array
    logprobs_NT: jax.Array
    values_NT: jax.Array | None
    lengths_N: jax.Array
    stopped_N: jax.Array


class _State(NamedTuple):
    waiting: jax.Array
    """The next prompt to be read; N when none is left."""
    prompt_B: jax.Array
    """Which prompt a slot answers."""
    live_B: jax.Array
    step_B: jax.Array
    """How many tokens a slot's answer has."""
    last_B: jax.Array
    """The last of them, not yet read."""
    tail_BK: jax.Array
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
    """As :func:`rlhf_jax.generation.generate`, for N prompts in ``slots`` rows at a time; rows in the prompts' order.

    The tokens are those that it gives, but where rounding tips a draw that stood on the edge between two tokens.

    Args:
        params: As there, like all that is not named here.
        rng_N: A key a prompt; consumed.
        prompts_NP: Left-padded.
        mask_NP: True at real tokens; the last column must be real.
        cfg: The architecture.
        sampling: How to draw and when to stop.
        slots: B, how many answers are decoded at once.
        refill: R, how many prompts are read at once, and so how many slots must be free before any is; an eighth of
            the slots by default.
        values: Add the scalar head's values.
        limits_N: Tighter limits of single answers.
        axis_name: Of an enclosing vmap.
    """
    decoding.check(rng_N, prompts_NP, mask_NP, sampling, max_length=cfg.max_length)
    (N, P), T = prompts_NP.shape, sampling.max_new_tokens
    B = min(slots, N)
    R = min(refill or max(B // 8, 1), B)
    if slots < 1 or R < 1:
        raise ValueError(f"slots is {slots} and refill {refill}; both must be at least 1")
    params = weights.unstack(params, cfg)
    limit_N = jnp.full((N,), T, jnp.int32) if limits_N is None else jnp.minimum(limits_N, T)

    def write(answers: _Answers, drawn: decoding.Drawn, prompt: jax.Array, step: jax.Array, live: jax.Array):
        # Rows that are not live write to a row that does not exist, which is to say nowhere.
        where = (jnp.where(live, prompt, N), step)
        values_NT = answers.values_NT
        return _Answers(
            tokens_NT=answers.tokens_NT.at[where].set(drawn.tokens_B, mode="drop"),
            logprobs_NT=answers.logprobs_NT.at[where].set(drawn.logprobs_B, mode="drop"),
            values_NT=None if values_NT is None else values_NT.at[where].set(drawn.values_B, mode="drop"),
            lengths_N=answers.lengths_N.at[where[0]].set(step + 1, mode="drop"),
            stopped_N=answers.stopped_N.at[where[0]].set(drawn.stopped_B, mode="drop"),
        )

    def read(state: _State) -> _State:
        """Put the next prompts into free slots, and draw the first token of each answer."""
        slot_R = jnp.argsort(state.live_B, stable=True)[:R]
        prompt_R = state.waiting + jnp.arange(R, dtype=jnp.int32)
        live_R = (prompt_R < N) & ~state.live_B[slot_R]
        prompt_R = jnp.minimum(prompt_R, N - 1)
        mask_RP = mask_NP[prompt_R]
        blank = kv_cache.create(cfg, batch=R, slots=P)
        out = transformer.forward(params, prompts_NP[prompt_R], cfg=cfg, mask_BL=mask_RP, cache=blank)
        zeros_R = jnp.zeros((R,), jnp.int32)
        drawn = decoding.draw(
            params,
            out.hidden_BLD[:, -1],
            rng_N[prompt_R],
            step_B=zeros_R,
            live_B=live_R,
            tail_BK=decoding.no_tail(R, sampling),
            cfg=cfg,
            sampling=sampling,
            values=values,
        )
        to_R = jnp.where(live_R, slot_R, B)

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[to_R].set(new, mode="drop")

        def put_prompt(old_BGSC: jax.Array, new_RGPC: jax.Array) -> jax.Array:
            return old_BGSC.at[to_R, :, :P].set(new_RGPC, mode="drop")

        behind_RT = jnp.zeros((R, T - 1), bool)
        cache = kv_cache.KVCache(
            keys=tuple(map(put_prompt, state.cache.keys, out.cache.keys)),
            values=tuple(map(put_prompt, state.cache.values, out.cache.values)),
            mask_BS=put(state.cache.mask_BS, jnp.concatenate([mask_RP, behind_RT], axis=1)),
            positions_BS=state.cache.positions_BS.at[to_R, :P].set(out.cache.positions_BS, mode="drop"),
            length=put(state.cache.length, jnp.full((R,), P, jnp.int32)),
        )
        return _State(
            waiting=jnp.minimum(state.waiting + jnp.sum(live_R, dtype=jnp.int32), N),
            prompt_B=put(state.prompt_B, prompt_R),
            live_B=put(state.live_B, live_R & ~drawn.stopped_B & (limit_N[prompt_R] > 1)),
            step_B=put(state.step_B, zeros_R + 1),
            last_B=put(state.last_B, drawn.tokens_B),
            tail_BK=put(state.tail_BK, drawn.tail_BK),
            cache=cache,
            answers=write(state.answers, drawn, prompt_R, zeros_R, live_R),
        )

    def decode(state: _State) -> _State:
        """One more token for every live slot."""
        # A slot that has ended stands still: what it writes goes to the same column again.
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
        room = (B - n_live >= R) & (state.waiting < N)
        return decoding.anywhere((n_live > 0) & ~room, axis_name)

    def something_left(state: _State) -> jax.Array:
        return decoding.anywhere((state.waiting < N) | jnp.any(state.live_B), axis_name)

    def turn(state: _State) -> _State:
        return lax.while_loop(keep_decoding, decode, read(state))

    numbers_NT = jnp.zeros((N, T), jnp.float32)
    cache = kv_cache.create(cfg, batch=B, slots=P + T - 1)
    state = _State(
        waiting=jnp.zeros((), jnp.int32),
        prompt_B=jnp.zeros((B,), jnp.int32),
        live_B=jnp.zeros((B,), bool),
        step_B=jnp.zeros((B,), jnp.int32),
        last_B=jnp.full((B,), sampling.pad_id, jnp.int32),
        tail_BK=decoding.no_tail(B, sampling),
        cache=dataclasses.replace(cache, length=jnp.full((B,), P, jnp.int32)),
        answers=_Answers(
            tokens_NT=jnp.full((N, T), sampling.pad_id, jnp.int32),
            logprobs_NT=numbers_NT,
            values_NT=numbers_NT if values else None,
            lengths_N=jnp.zeros((N,), jnp.int32),
            stopped_N=jnp.zeros((N,), bool),
        ),
    )
    answers = lax.while_loop(something_left, turn, state).answers
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
