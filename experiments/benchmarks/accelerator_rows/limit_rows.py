"""Measures the limits of the device: its rate of matrix products and its memory bandwidth."""

from __future__ import annotations

import platform
from functools import partial
from importlib import metadata

import jax
import jax.numpy as jnp

from benchmarks.accelerator_rows import row_context

MATMUL = "matrix products"
BANDWIDTH = "memory bandwidth"


def limits(context: row_context.Context) -> None:
    """Measures products of two square bfloat16 matrices, and a loop that reads and writes an array."""
    device = jax.devices()[0]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "flax", "optax"))
    context.record("device", note=f"{device.device_kind}; Python {platform.python_version()}, {versions}")
    n, calls = context.shapes.matmul, 10
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    product = jax.jit(jnp.matmul)

    def products() -> None:
        jax.block_until_ready([product(a, b) for _ in range(calls)])

    seconds, _ = row_context.seconds(products, repeats=context.shapes.repeats, calls=calls)
    context.record(MATMUL, 2.0 * n**3 / seconds, "FLOP/s", size=n)

    @partial(jax.jit, donate_argnums=0)
    def scale(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, calls, lambda _, x: x * 1.0001, x)

    x = jnp.ones(context.shapes.copied_bytes // 4, jnp.float32)

    def scaling() -> None:
        nonlocal x
        x = jax.block_until_ready(scale(x))

    seconds, _ = row_context.seconds(scaling, repeats=context.shapes.repeats, calls=calls)
    context.record(BANDWIDTH, 2.0 * x.nbytes / seconds, "B/s", size=x.nbytes)
