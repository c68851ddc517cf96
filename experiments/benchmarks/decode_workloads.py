"""This library's decoding workloads: whole calls, single decoding steps, and answers of very different lengths."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks import benchmark_models
from benchmarks.train_workloads import Repetition
from rlhf_jax import generation, lm, types


def generate(cfg: lm.LMConfig, *, batch: int, prompt: int, answer: int) -> Repetition:
    """Prepares a call that samples equally long answers from the full distribution."""
    params, B, P, T = benchmark_models.init(cfg), batch, prompt, answer
    sampler = jax.jit(partial(generation.generate, cfg=cfg, sampling=generation.Sampling(max_new_tokens=T)))
    rng, mask_BP = np.random.default_rng(0), np.ones((B, P), bool)
    keys = _keys(B)

    def repetition() -> None:
        jax.block_until_ready(sampler(params, next(keys), benchmark_models.random_rows(rng, cfg, B, P), mask_BP))

    return repetition


def call_seconds(cfg: lm.LMConfig, *, batch: int, prompt: int, answer: int) -> Callable[[int], float]:
    """Returns a function ``seconds(tokens)`` that times the sampling of ``tokens`` tokens for each row.

    All calls run the same compiled program.
    """
    params, B, P = benchmark_models.init(cfg), batch, prompt
    sampling = generation.Sampling(max_new_tokens=answer)

    @jax.jit
    def sampler(params: Any, keys_B: Any, prompts_BP: Any, mask_BP: Any, limits_B: Any) -> types.Rollout:
        return generation.generate(params, keys_B, prompts_BP, mask_BP, cfg=cfg, sampling=sampling, limits_B=limits_B)

    rng, mask_BP = np.random.default_rng(0), np.ones((B, P), bool)
    keys = _keys(B)

    def seconds(tokens: int) -> float:
        keys_B, prompts_BP = next(keys), benchmark_models.random_rows(rng, cfg, B, P)
        began = time.perf_counter()
        jax.block_until_ready(sampler(params, keys_B, prompts_BP, mask_BP, np.full((B,), tokens, np.int32)))
        return time.perf_counter() - began

    return seconds


def skewed_lengths(prompts: int, short: int) -> np.ndarray:
    """Returns the lengths of the answers in random order: ``short``, or eight times ``short`` for one in eight."""
    lengths_N = np.where(np.arange(prompts) % 8 == 7, 8 * short, short).astype(np.int32)
    return np.random.default_rng(1).permutation(lengths_N)


def stream(cfg: lm.LMConfig, *, prompts: int, slots: int, prompt: int, short: int, refilled: bool) -> Repetition:
    """Prepares sampling for many prompts, in refilled slots or consecutive batches; answers have `skewed_lengths`."""
    N, B, P, T = prompts, slots, prompt, 8 * short
    params, sampling = benchmark_models.init(cfg), generation.Sampling(max_new_tokens=T)
    limits_N = skewed_lengths(N, short)
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
        keys_N, prompts_NP = next(keys), benchmark_models.random_rows(rng, cfg, N, P)
        if refilled:
            jax.block_until_ready(all_prompts(params, keys_N, prompts_NP, mask_NP, limits_N))
            return
        for i in range(0, N, B):
            part = slice(i, i + B)
            jax.block_until_ready(one_batch(params, keys_N[part], prompts_NP[part], mask_NP[part], limits_N[part]))

    return repetition


def _keys(batch: int) -> Any:
    """Yields a batch of new keys for each call."""
    key, i = jax.random.key(3), 0
    while True:
        yield jax.block_until_ready(jax.random.split(jax.random.fold_in(key, i), batch))
        i += 1
