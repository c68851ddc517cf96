"""What the machine can do, measured with nothing around it: matmuls, reading memory, and a decoding step's products."""

from __future__ import annotations

import concurrent.futures
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measured_models, sizes
from benchmarks.train_workloads import Ready

_CORES = os.cpu_count() or 1

Weights = tuple[tuple[jax.Array, ...], ...]


def dtype() -> Any:
    """What the works compute in."""
    return jnp.bfloat16 if measured_models.on_accelerator() else jnp.float32


def matmul(work: sizes.Work) -> Ready:
    """The product of two square matrices, several times in a row: the machine's matmul rate."""
    n, times = work.shapes.matmul, 4
    product = jax.jit(lambda a, b: jnp.matmul(a, b))
    a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype()) for i in range(2))

    def once() -> None:
        for _ in range(times):
            jax.block_until_ready(product(a, b))

    return once, {"operations": times * 2.0 * n**3}


def decode_limit(work: sizes.Work) -> tuple[Callable[[], float], dict[str, float], dict[str, list[float]]]:
    """A function that measures the least seconds of one decoded token of every row, its cost, and the parts it saw.

    The larger of two: what must be read, over the bandwidth; and the operations, over the rate of the step's own
    products. Both come from loops of the same sizes, in memory or cache as they are in decoding.
    """
    shapes, size, B = work.shapes, work.size, work.batch
    cost = sizes.decode_cost(
        size, batch=B, prompt=shapes.prompt, answer=shapes.answer, bytes_each=jnp.dtype(dtype()).itemsize
    )
    operations = 2.0 * B * size.matmul_params
    products = _products(size, B, steps=16)
    reading = _reading(int(cost.bytes))
    parts: dict[str, list[float]] = {"reading_s": [], "products_s": []}

    def once() -> float:
        parts["reading_s"].append(reading())
        parts["products_s"].append(products() * cost.operations / operations)
        return max(parts["reading_s"][-1], parts["products_s"][-1])

    return once, {"tokens": B, "operations": cost.operations, "bytes": cost.bytes}, parts


def _products(size: sizes.Size, batch: int, *, steps: int) -> Callable[[], float]:
    """Seconds of all products of one decoding step, the median of several loops of ``steps`` such steps."""
    D = size.width
    shapes = [(D, D)] * 4 + [(D, 4 * D), (4 * D, D)]
    key = iter(range(10**9))
    weights: Weights = tuple(
        tuple(0.02 * jax.random.normal(jax.random.key(next(key)), shape, dtype()) for shape in shapes)
        for _ in range(size.layers)
    )
    head_DV = 0.02 * jax.random.normal(jax.random.key(next(key)), (D, size.vocab), dtype())

    @jax.jit
    def loop(x_BD: jax.Array, weights: Weights, head_DV: jax.Array) -> jax.Array:
        def step(_: Any, x_BD: jax.Array) -> jax.Array:
            for q, k, v, out, up, down in weights:
                mixed_BD = jnp.maximum(jnp.maximum(x_BD @ q, x_BD @ k), x_BD @ v)
                x_BD = mixed_BD @ out
                x_BD = jnp.maximum(x_BD @ up, 0) @ down
            # A maximum, which no simplification can move to before the product.
            return x_BD + jnp.max(x_BD @ head_DV, axis=1, keepdims=True)

        return jax.lax.fori_loop(0, steps, step, x_BD)

    x_BD = jnp.ones((batch, D), dtype())
    return lambda: _seconds(lambda: jax.block_until_ready(loop(x_BD, weights, head_DV)), repeats=3) / steps


def _reading(size: int) -> Callable[[], float]:
    """Seconds to read so many bytes again and again, by the fastest of several ways."""
    if measured_models.on_accelerator():
        return _scaling(size)
    ways = [_scaling(size), _copying(size), _maximum(size)]
    return lambda: min(way() for way in ways)


def _scaling(size: int) -> Callable[[], float]:
    """An array changed in place by a compiled loop; reading and writing count alike."""
    steps = 16

    @functools.partial(jax.jit, donate_argnums=0)
    def change(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, steps, lambda _, x: x * 1.0001, x)

    x = jnp.ones(max(size // 8, 1), jnp.float32)

    def once() -> None:
        nonlocal x
        x = jax.block_until_ready(change(x))

    return lambda: _seconds(once) / steps


def _copying(size: int) -> Callable[[], float]:
    """Half copied onto the other half, a part on each core."""
    length = max(size // 8 // _CORES, 1)
    pairs = [(np.ones(length, np.float32), np.ones(length, np.float32)) for _ in range(_CORES)]
    pool = concurrent.futures.ThreadPoolExecutor(_CORES)
    return lambda: _seconds(lambda: list(pool.map(lambda pair: np.copyto(*pair), pairs)))


def _maximum(size: int) -> Callable[[], float]:
    """All of it read and nothing written, a part on each core."""
    parts = [np.ones(max(size // 4 // _CORES, 1), np.float32) for _ in range(_CORES)]
    pool = concurrent.futures.ThreadPoolExecutor(_CORES)
    return lambda: _seconds(lambda: list(pool.map(np.max, parts)))


def _seconds(once: Callable[[], Any], *, repeats: int = 7) -> float:
    once()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        once()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
