"""The model of Tunix that is nearest to the measured one, and the timing of its trainers."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3 import model as llama3

from benchmarks import sizes, timing

PACKAGES = ("google-tunix", "jax", "flax")


def make(size: sizes.Size, *, bfloat16: bool, seed: int = 0) -> llama3.Llama3:
    """Tunix has no GPT-2: a Llama of the same width, depth, heads and vocabulary, and as many matmul parameters.

    Its mlp kernels are zero when it is made, and would stay so; all kernels are drawn anew.
    """
    cfg = llama3.ModelConfig(
        num_layers=size.layers,
        vocab_size=size.vocab,
        embed_dim=size.width,
        hidden_dim=size.gated_mlp,
        num_heads=size.heads,
        head_dim=size.width // size.heads,
        num_kv_heads=size.heads,
        rope_theta=500_000,
        norm_eps=1e-5,
        weight_tying=True,
    )
    model = llama3.Llama3(cfg, rngs=nnx.Rngs(seed))
    key = jax.random.key(seed + 1)

    def draw(path: Any, leaf: jax.Array) -> jax.Array:
        dtype = jnp.bfloat16 if bfloat16 else leaf.dtype
        if leaf.ndim == 1:
            return leaf.astype(dtype)
        own = jax.random.fold_in(key, zlib.crc32(str(path).encode()))
        return 0.02 * jax.random.normal(own, leaf.shape, dtype)

    nnx.update(model, jax.tree_util.tree_map_with_path(draw, nnx.state(model, nnx.Param)))
    return model


def optimizer() -> optax.GradientTransformation:
    """Adam, gradients clipped to norm 1."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-4))


def rows(rng: np.random.Generator, size: sizes.Size, *shape: int) -> np.ndarray:
    """Random words."""
    return rng.integers(sizes.FIRST_WORD, size.vocab, shape)


def timed(clock: timing.Clock, batch: Callable[[], Any], model: nnx.Module) -> Iterator[Any]:
    """Batches for a trainer; from one request to the next is a step, which is waited for."""
    for i in range(clock.total):
        if i:
            jax.block_until_ready(nnx.state(model, nnx.Param))
            clock.stop()
        clock.start()
        yield batch()
    jax.block_until_ready(nnx.state(model, nnx.Param))
    clock.stop()
