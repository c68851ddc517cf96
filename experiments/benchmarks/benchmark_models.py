"""This library's models for the benchmarks."""

from __future__ import annotations

import functools

import jax
import numpy as np

from benchmarks import workload_sizes
from rlhf_jax import lm, types


def on_accelerator() -> bool:
    """Returns whether JAX runs on a GPU or TPU."""
    return jax.default_backend() != "cpu"


def config(size: workload_sizes.Size) -> lm.LMConfig:
    """Returns a GPT-2 that computes in bfloat16 on an accelerator and in float32 on a CPU."""
    return lm.LMConfig.preset(
        "gpt2",
        vocab_size=size.vocab,
        n_layers=size.layers,
        d_model=size.width,
        n_heads=size.heads,
        max_length=size.positions,
        dtype="bfloat16" if on_accelerator() else "float32",
    )


def init(cfg: lm.LMConfig, seed: int = 0) -> types.Params:
    """Returns random float32 parameters."""
    return jax.jit(functools.partial(lm.init, cfg=cfg))(jax.random.key(seed))


def random_rows(rng: np.random.Generator, cfg: lm.LMConfig, *shape: int) -> np.ndarray:
    """Returns rows of random words, without padding or end tokens."""
    return rng.integers(workload_sizes.FIRST_WORD, cfg.vocab_size, shape, dtype=np.int32)
