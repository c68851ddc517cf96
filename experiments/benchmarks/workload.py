"""Measures one of this library's workloads in a separate process: ``python -m benchmarks.workload sft-s``.

The workloads are

    sft-s, sft-m, reward-s, dpo-s, ppo-s    training steps; s and m are the sizes of the model
    generate-s, generate-m                  sampling of equally long answers
    decode-s-1, decode-m-16, ...            a decoding step; the number is the number of rows
    stream-s, static-s                      answers of different lengths, in refilled slots or in consecutive batches
    matmul-s, limit-s-1, ...                limits of the machine

Workloads compute in float32 on a CPU and in bfloat16 on a GPU or TPU. To use huge pages, as benchmark.py does, set
GLIBC_TUNABLES=glibc.malloc.hugetlb=1.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from benchmarks import (
    benchmark_models,
    decode_workloads,
    machine_limits,
    measured_process,
    train_workloads,
    workload_sizes,
)

Prepared = tuple[Callable[[], Any], dict[str, float]]
"""A function that runs one repetition, and the number of ``tokens``, FLOPs (``operations``) or both per repetition."""


def _micro_batches(workload: workload_sizes.Workload) -> int:
    """Returns the number of micro-batches. On a CPU, two are faster for model S, because each fits in the caches."""
    return 2 if workload.size_name == "s" and jax.default_backend() == "cpu" else 1


def _supervised(workload: workload_sizes.Workload) -> Prepared:
    shapes, size = workload.shapes, workload.size
    repetition = train_workloads.supervised(
        benchmark_models.config(size), rows=shapes.rows, length=shapes.length, micro_batches=_micro_batches(workload)
    )
    operations = workload_sizes.training_flops(size, rows=shapes.rows, length=shapes.length)
    return repetition, {"tokens": shapes.rows * shapes.length, "operations": operations}


def _reward(workload: workload_sizes.Workload) -> Prepared:
    shapes, size, rows = workload.shapes, workload.size, 2 * workload.shapes.rows
    repetition = train_workloads.reward(
        benchmark_models.config(size), pairs=shapes.rows, length=shapes.length, micro_batches=_micro_batches(workload)
    )
    operations = workload_sizes.training_flops(size, rows=rows, length=shapes.length, params=size.trunk_params)
    return repetition, {"tokens": rows * shapes.length, "operations": operations}


def _dpo(workload: workload_sizes.Workload) -> Prepared:
    shapes, size, rows = workload.shapes, workload.size, 2 * workload.shapes.rows
    repetition = train_workloads.dpo(
        benchmark_models.config(size),
        pairs=shapes.rows,
        prompt=shapes.dpo_prompt,
        length=shapes.length,
        micro_batches=_micro_batches(workload),
    )
    # The reference's forward pass costs a third of the policy's forward and backward passes.
    operations = 4 / 3 * workload_sizes.training_flops(size, rows=rows, length=shapes.length)
    return repetition, {"tokens": rows * shapes.length, "operations": operations}


def _ppo(workload: workload_sizes.Workload) -> Prepared:
    shapes = workload.shapes
    repetition = train_workloads.ppo_iteration(
        benchmark_models.config(workload.size),
        samples=shapes.ppo_samples,
        prompt=shapes.ppo_prompt,
        answer=shapes.ppo_answer,
        epochs=shapes.ppo_epochs,
        minibatches=shapes.ppo_minibatches,
    )
    return repetition, {"tokens": shapes.ppo_samples * shapes.ppo_answer}


def _generate(workload: workload_sizes.Workload) -> Prepared:
    shapes, cfg = workload.shapes, benchmark_models.config(workload.size)
    repetition = decode_workloads.generate(cfg, batch=workload.batch, prompt=shapes.prompt, answer=shapes.answer)
    return repetition, {"tokens": workload.batch * shapes.answer}


def _stream(workload: workload_sizes.Workload, *, refilled: bool) -> Prepared:
    shapes, cfg = workload.shapes, benchmark_models.config(workload.size)
    repetition = decode_workloads.stream(
        cfg,
        prompts=shapes.stream_prompts,
        slots=shapes.stream_slots,
        prompt=shapes.prompt,
        short=shapes.short,
        refilled=refilled,
    )
    return repetition, {"tokens": float(decode_workloads.skewed_lengths(shapes.stream_prompts, shapes.short).sum())}


WORKLOADS: dict[str, Callable[[workload_sizes.Workload], Prepared]] = {
    "sft": _supervised,
    "reward": _reward,
    "dpo": _dpo,
    "ppo": _ppo,
    "generate": _generate,
    "stream": partial(_stream, refilled=True),
    "static": partial(_stream, refilled=False),
    "matmul": machine_limits.matmul,
}
"""Workloads whose repetitions are timed as a whole."""

SELF_TIMED = ("decode", "limit")
"""Workloads that time a part of each repetition themselves."""


def main() -> None:
    """Measures the workload that the command line names."""
    options = measured_process.parse_options(__doc__)
    workload: workload_sizes.Workload = options.workload
    if workload.kind not in (*WORKLOADS, *SELF_TIMED):
        sys.exit(f"unknown workload {options.name!r}; see --help")
    clock, extra = measured_process.Clock(options), {}
    if workload.kind in WORKLOADS:
        repetition, facts = WORKLOADS[workload.kind](workload)
        clock.measure(repetition)
    else:
        parts: dict[str, list[float]] = {}
        if workload.kind == "decode":
            shapes, cfg = workload.shapes, benchmark_models.config(workload.size)
            sizes = {"batch": workload.batch, "prompt": shapes.prompt, "answer": shapes.answer}
            call_seconds, facts, T = (
                decode_workloads.call_seconds(cfg, **sizes),
                {"tokens": workload.batch},
                shapes.answer,
            )

            def token_seconds() -> float:
                # Both calls include the prefill.
                return (call_seconds(T) - call_seconds(1)) / (T - 1)

        else:
            token_seconds, facts, parts = machine_limits.decode_limit(workload)
        seconds: list[float] = []
        clock.measure(lambda: seconds.append(token_seconds()))
        extra = {"seconds": seconds[-options.repeats :]}
        facts = facts | {name: statistics.median(values[-options.repeats :]) for name, values in parts.items()}
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if memory:
        extra["device_mb"] = round(memory / 2**20)
    clock.report(
        packages=("jax", "jaxlib", "flax"), device=device.device_kind, backend=device.platform, **facts, **extra
    )


if __name__ == "__main__":
    main()
