"""Measures the machine's limits: its matmul rate and the minimum time of a decoding step."""

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

from benchmarks import benchmark_models, workload_sizes

_CORES = os.cpu_count() or 1

Weights = tuple[tuple[jax.Array, ...], ...]


def dtype() -> Any:
    """Returns the dtype that the workloads compute in."""
    return jnp.bfloat16 if benchmark_models.on_accelerator() else jnp.float32


def matmul(workload: workload_sizes.Workload) -> tuple[Callable[[], Any], dict[str, float]]:
    """Prepares four products of two square matrices, which measure the machine's matmul rate."""
    n, times = workload.shapes.matmul, 4
    product = jax.jit(lambda a, b: jnp.matmul(a, b))
    a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype()) for i in range(2))

    def repetition() -> None:
        for _ in range(times):
            jax.block_until_ready(product(a, b))

    return repetition, {"operations": times * 2.0 * n**3}


def decode_limit(
    workload: workload_sizes.Workload,
) -> tuple[Callable[[], float], dict[str, float], dict[str, list[float]]]:
    """Prepares the measurement of the minimum time of a decoding step.

    This time is the larger of two times: the bytes that must be read, divided by the bandwidth, and the FLOPs, divided
    by the rate of the step's own matrix products. Bandwidth and rate are measured on arrays of the step's sizes, so
    that memory and caches are used as in decoding.

    Returns:
        A function that measures the minimum seconds; the cost of the step; and lists in which the function collects
        both times.
    """
    shapes, size, B = workload.shapes, workload.size, workload.batch
    cost = workload_sizes.decode_cost(
        size, batch=B, prompt=shapes.prompt, answer=shapes.answer, bytes_each=jnp.dtype(dtype()).itemsize
    )
    product_flops = 2.0 * B * size.matmul_params
    products = _products(size, B, steps=16)
    reading = _reading(int(cost.bytes))
    parts: dict[str, list[float]] = {"reading_s": [], "products_s": []}

    def least_seconds() -> float:
        parts["reading_s"].append(reading())
        parts["products_s"].append(products() * cost.flops / product_flops)
        return max(parts["reading_s"][-1], parts["products_s"][-1])

    return least_seconds, {"tokens": B, "operations": cost.flops, "bytes": cost.bytes}, parts


def _products(size: workload_sizes.Size, batch: int, *, steps: int) -> Callable[[], float]:
    """Returns a function that measures the seconds of a decoding step's products, as a mean over ``steps`` steps."""
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
            # With a sum instead of a maximum, the compiler could sum the columns of head_DV first and skip the product.
            return x_BD + jnp.max(x_BD @ head_DV, axis=1, keepdims=True)

        return jax.lax.fori_loop(0, steps, step, x_BD)

    x_BD = jnp.ones((batch, D), dtype())
    return lambda: _seconds(lambda: jax.block_until_ready(loop(x_BD, weights, head_DV)), repeats=3) / steps


def _reading(size: int) -> Callable[[], float]:
    """Returns a function that measures the seconds to read ``size`` bytes with the fastest method."""
    if benchmark_models.on_accelerator():
        return _scaling(size)
    methods = [_scaling(size), _copying(size), _maximum(size)]
    return lambda: min(seconds() for seconds in methods)


def _scaling(size: int) -> Callable[[], float]:
    """Returns a function that measures the seconds to scale ``size / 2`` bytes in place, which moves ``size`` bytes."""
    steps = 16

    @functools.partial(jax.jit, donate_argnums=0)
    def scale(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, steps, lambda _, x: x * 1.0001, x)

    x = jnp.ones(max(size // 8, 1), jnp.float32)

    def repetition() -> None:
        nonlocal x
        x = jax.block_until_ready(scale(x))

    return lambda: _seconds(repetition) / steps


def _copying(size: int) -> Callable[[], float]:
    """Returns a function that measures the seconds to copy ``size / 2`` bytes on all cores, moving ``size`` bytes."""
    length = max(size // 8 // _CORES, 1)
    pairs = [(np.ones(length, np.float32), np.ones(length, np.float32)) for _ in range(_CORES)]
    pool = concurrent.futures.ThreadPoolExecutor(_CORES)
    return lambda: _seconds(lambda: list(pool.map(lambda pair: np.copyto(*pair), pairs)))


def _maximum(size: int) -> Callable[[], float]:
    """Returns a function that measures the seconds to read ``size`` bytes on all cores, without writing."""
    parts = [np.ones(max(size // 4 // _CORES, 1), np.float32) for _ in range(_CORES)]
    pool = concurrent.futures.ThreadPoolExecutor(_CORES)
    return lambda: _seconds(lambda: list(pool.map(np.max, parts)))


def _seconds(repetition: Callable[[], Any], *, repeats: int = 7) -> float:
    repetition()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        repetition()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
