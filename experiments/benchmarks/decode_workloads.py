"""This library's decoding workloads: whole calls, single decoding steps, and answers of very different lengths."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks import benchmark_models, workload_sizes
from benchmarks.train_workloads import PreparedWorkload
from rlhf_jax import generation, types


def generate(workload: workload_sizes.Workload) -> PreparedWorkload:
    """Prepares a call that samples equally long answers from the full distribution."""
    shapes, cfg = workload.shapes, benchmark_models.config(workload.size)
    params, B, P, T = benchmark_models.init(cfg), workload.batch, shapes.prompt, shapes.answer
    sampler = jax.jit(partial(generation.generate, cfg=cfg, sampling=generation.Sampling(max_new_tokens=T)))
    rng, mask_BP = np.random.default_rng(0), np.ones((B, P), bool)
    keys = _keys(B)

    def repetition() -> None:
        jax.block_until_ready(
            sampler(params, next(keys), benchmark_models.random_rows(rng, workload.size, B, P), mask_BP)
        )

    return repetition, {"tokens": B * T}


def token_seconds(workload: workload_sizes.Workload) -> tuple[Callable[[], float], dict[str, float]]:
    """Returns a function that measures the time of a decoding step in seconds, without the prefill.

    The same compiled program decodes a whole answer in one call and a single token in another; the difference is the
    time of the remaining tokens.
    """
    shapes, cfg = workload.shapes, benchmark_models.config(workload.size)
    params, B, P, T = benchmark_models.init(cfg), workload.batch, shapes.prompt, shapes.answer
    sampling = generation.Sampling(max_new_tokens=T)

    @jax.jit
    def sampler(params: Any, keys_B: Any, prompts_BP: Any, mask_BP: Any, limits_B: Any) -> types.Rollout:
        return generation.generate(params, keys_B, prompts_BP, mask_BP, cfg=cfg, sampling=sampling, limits_B=limits_B)

    rng, mask_BP = np.random.default_rng(0), np.ones((B, P), bool)
    keys = _keys(B)

    def seconds(tokens: int) -> float:
        keys_B, prompts_BP = next(keys), benchmark_models.random_rows(rng, workload.size, B, P)
        began = time.perf_counter()
        jax.block_until_ready(sampler(params, keys_B, prompts_BP, mask_BP, np.full((B,), tokens, np.int32)))
        return time.perf_counter() - began

    def seconds_per_token() -> float:
        return (seconds(T) - seconds(1)) / (T - 1)

    return seconds_per_token, {"tokens": B}


def stream(workload: workload_sizes.Workload, *, refilled: bool) -> PreparedWorkload:
    """Prepares answers to many prompts, in refilled slots or consecutive batches.

    One answer in eight is eight times as long as the others.
    """
    shapes, cfg = workload.shapes, benchmark_models.config(workload.size)
    N, B, P, T = shapes.stream_prompts, shapes.stream_slots, shapes.prompt, shapes.long
    params, sampling = benchmark_models.init(cfg), generation.Sampling(max_new_tokens=T)
    limits_N = np.where(np.arange(N) % 8 == 7, T, shapes.short).astype(np.int32)
    limits_N = np.random.default_rng(1).permutation(limits_N)
    rng, mask_NP, keys = np.random.default_rng(0), np.ones((N, P), bool), _keys(N)

    @jax.jit
    def one_batch(params: Any, keys_B: Any, prompts_BP: Any, mask_BP: Any, limits_B: Any) -> types.Rollout:
        return generation.generate(params, keys_B, prompts_BP, mask_BP, cfg=cfg, sampling=sampling, limits_B=limits_B)

    @jax.jit
    def all_prompts(params: Any, keys_N: Any, prompts_NP: Any, mask_NP: Any, limits_N: Any) -> types.Rollout:
        return generation.continuous.generate(
            params, keys_N, prompts_NP, mask_NP, cfg=cfg, sampling=sampling, slots=B, limits_N=limits_N
        )

    def repetition() -> None:
        keys_N, prompts_NP = next(keys), benchmark_models.random_rows(rng, workload.size, N, P)
        if refilled:
            jax.block_until_ready(all_prompts(params, keys_N, prompts_NP, mask_NP, limits_N))
            return
        for i in range(0, N, B):
            part = slice(i, i + B)
            jax.block_until_ready(one_batch(params, keys_N[part], prompts_NP[part], mask_NP[part], limits_N[part]))

    return repetition, {"tokens": float(limits_N.sum())}


def _keys(batch: int) -> Any:
    """Yields a batch of new keys for each call."""
    key, i = jax.random.key(3), 0
    while True:
        yield jax.block_until_ready(jax.random.split(jax.random.fold_in(key, i), batch))
        i += 1
