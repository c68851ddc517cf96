"""Measures the limits of the device: its rate of matrix products and its memory bandwidth."""

from __future__ import annotations

import dataclasses
import os
import platform
from functools import partial
from importlib import metadata

import jax
import jax.numpy as jnp

from benchmarks.accelerator_rows import row_context, training_rows


def limits(context: row_context.Context) -> None:
    """Measures products of two square bfloat16 matrices, and a loop that reads and writes an array."""
    device = jax.devices()[0]
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    context.record(
        "device",
        note=f"{device.device_kind}; Python {platform.python_version()}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
        platform=device.platform,
        backend_version=device.client.platform_version,
        devices=jax.device_count(),
        xla_flags=os.environ.get("XLA_FLAGS", ""),
        shapes=dataclasses.asdict(context.shapes),
        model=dataclasses.asdict(training_rows.model(context.shapes)),
    )
    n, calls = context.shapes.matmul, 10
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    product = jax.jit(jnp.matmul)

    def products() -> None:
        jax.block_until_ready([product(a, b) for _ in range(calls)])

    # Ten times the usual repeats, because the device's clocks need some time to settle under load.
    seconds, times = row_context.seconds(products, repeats=10 * context.shapes.repeats, calls=calls)
    context.record(row_context.MATMUL, 2.0 * n**3 / seconds, "FLOP/s", size=n, **times)

    @partial(jax.jit, donate_argnums=0)
    def scale(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, calls, lambda _, x: x * 1.0001, x)

    x = jnp.ones(context.shapes.copied_bytes // 4, jnp.float32)

    def scaling() -> None:
        nonlocal x
        x = jax.block_until_ready(scale(x))

    seconds, times = row_context.seconds(scaling, repeats=context.shapes.repeats, calls=calls)
    context.record(row_context.BANDWIDTH, 2.0 * x.nbytes / seconds, "B/s", size=x.nbytes, **times)
