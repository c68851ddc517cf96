"""The Tunix model closest to the measured GPT-2, and the timing of Tunix's trainers."""

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

from benchmarks import measured_process, workload_sizes

PACKAGES = ("google-tunix", "jax", "flax")


def make(size: workload_sizes.Size, *, bfloat16: bool, seed: int = 0) -> llama3.Llama3:
    """Returns a Llama with the width, depth, heads and vocabulary of a GPT-2, and about as many matmul parameters.

    Tunix has no GPT-2. All kernels are initialised again, because Tunix initialises the MLP kernels to zero.
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
        leaf_key = jax.random.fold_in(key, zlib.crc32(str(path).encode()))
        return 0.02 * jax.random.normal(leaf_key, leaf.shape, dtype)

    nnx.update(model, jax.tree_util.tree_map_with_path(draw, nnx.state(model, nnx.Param)))
    return model


def optimizer() -> optax.GradientTransformation:
    """Returns Adam with gradients clipped to norm 1."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-4))


def rows(rng: np.random.Generator, size: workload_sizes.Size, *shape: int) -> np.ndarray:
    """Returns rows of random words."""
    return rng.integers(workload_sizes.FIRST_WORD, size.vocab, shape)


def timed(clock: measured_process.Clock, batch: Callable[[], Any], model: nnx.Module) -> Iterator[Any]:
    """Yields batches to a trainer and times each step, from one request for a batch to the next."""
    for i in range(clock.total):
        if i:
            jax.block_until_ready(nnx.state(model, nnx.Param))
            clock.stop()
        clock.start()
        yield batch()
    jax.block_until_ready(nnx.state(model, nnx.Param))
    clock.stop()
