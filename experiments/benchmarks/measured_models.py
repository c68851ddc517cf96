"""The measured models as this library has them."""

from __future__ import annotations

import functools

import jax
import numpy as np

from benchmarks import sizes
from rlhf_jax import lm, types


def on_accelerator() -> bool:
    """Whether there is a GPU or a TPU."""
    return jax.default_backend() != "cpu"


def config(size: sizes.Size) -> lm.LMConfig:
    """GPT-2 of a size, computing in bfloat16 where that is what the hardware is for."""
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
    """Random parameters, float32."""
    return jax.jit(functools.partial(lm.init, cfg=cfg))(jax.random.key(seed))


def random_rows(rng: np.random.Generator, size: sizes.Size, *shape: int) -> np.ndarray:
    """Random words; neither padding nor an end is among them."""
    return rng.integers(sizes.FIRST_WORD, size.vocab, shape, dtype=np.int32)
