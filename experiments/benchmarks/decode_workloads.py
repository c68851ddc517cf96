"""This library's decoding: whole calls, the time of a token, and answers of very different lengths."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks import measured_models, sizes
from benchmarks.train_workloads import Ready
from rlhf_jax import generation, types


def generate(work: sizes.Work) -> Ready:
    """Answers to a batch of prompts, all of the same length, drawn from the whole distribution."""
    shapes, cfg = work.shapes, measured_models.config(work.size)
    params, B, P, T = measured_models.init(cfg), work.batch, shapes.prompt, shapes.answer
    sampler = jax.jit(partial(generation.generate, cfg=cfg, sampling=generation.Sampling(max_new_tokens=T)))
    rng, mask_BP = np.random.default_rng(0), np.ones((B, P), bool)
    keys = _keys(B)

    def once() -> None:
        jax.block_until_ready(sampler(params, next(keys), measured_models.random_rows(rng, work.size, B, P), mask_BP))

    return once, {"tokens": B * T}


def token_seconds(work: sizes.Work) -> tuple[Callable[[], float], dict[str, float]]:
    """A function that measures the seconds of one decoded token of every row, the prompts' reading left out.

    One program decodes the whole answer and one token of it; the difference is what the other tokens took.
    """
    shapes, cfg = work.shapes, measured_models.config(work.size)
    params, B, P, T = measured_models.init(cfg), work.batch, shapes.prompt, shapes.answer
    how = generation.Sampling(max_new_tokens=T)

    @jax.jit
    def sampler(params: Any, keys_B: Any, prompts_BP: Any, mask_BP: Any, limits_B: Any) -> types.Rollout:
        return generation.generate(params, keys_B, prompts_BP, mask_BP, cfg=cfg, sampling=how, limits_B=limits_B)

    rng, mask_BP = np.random.default_rng(0), np.ones((B, P), bool)
    keys = _keys(B)

    def seconds(tokens: int) -> float:
        keys_B, prompts_BP = next(keys), measured_models.random_rows(rng, work.size, B, P)
        began = time.perf_counter()
        jax.block_until_ready(sampler(params, keys_B, prompts_BP, mask_BP, np.full((B,), tokens, np.int32)))
        return time.perf_counter() - began

    def once() -> float:
        return (seconds(T) - seconds(1)) / (T - 1)

    return once, {"tokens": B}


def stream(work: sizes.Work, *, refilled: bool) -> Ready:
    """Many prompts, every eighth answer eight times as long: refilled slots, or batch after batch."""
    shapes, cfg = work.shapes, measured_models.config(work.size)
    N, B, P, T = shapes.stream_prompts, shapes.stream_slots, shapes.prompt, shapes.long
    params, how = measured_models.init(cfg), generation.Sampling(max_new_tokens=T)
    limits_N = np.where(np.arange(N) % 8 == 7, T, shapes.short).astype(np.int32)
    limits_N = np.random.default_rng(1).permutation(limits_N)
    rng, mask_NP, keys = np.random.default_rng(0), np.ones((N, P), bool), _keys(N)

    @jax.jit
    def one_batch(params: Any, keys_B: Any, prompts_BP: Any, mask_BP: Any, limits_B: Any) -> types.Rollout:
        return generation.generate(params, keys_B, prompts_BP, mask_BP, cfg=cfg, sampling=how, limits_B=limits_B)

    @jax.jit
    def all_prompts(params: Any, keys_N: Any, prompts_NP: Any, mask_NP: Any, limits_N: Any) -> types.Rollout:
        return generation.continuous.generate(
            params, keys_N, prompts_NP, mask_NP, cfg=cfg, sampling=how, slots=B, limits_N=limits_N
        )

    def once() -> None:
        keys_N, prompts_NP = next(keys), measured_models.random_rows(rng, work.size, N, P)
        if refilled:
            jax.block_until_ready(all_prompts(params, keys_N, prompts_NP, mask_NP, limits_N))
            return
        for i in range(0, N, B):
            part = slice(i, i + B)
            jax.block_until_ready(one_batch(params, keys_N[part], prompts_NP[part], mask_NP[part], limits_N[part]))

    return once, {"tokens": float(limits_N.sum())}


def _keys(batch: int) -> Any:
    """New keys for every call, made ahead so that they cost the call nothing but an index."""
    key, i = jax.random.key(3), 0
    while True:
        yield jax.block_until_ready(jax.random.split(jax.random.fold_in(key, i), batch))
        i += 1
