"""Measures one of this library's workloads in a separate process: ``python -m benchmarks.workload sft-s``.

The workloads are

    sft-s, sft-m, reward-s, dpo-s, ppo-s    training steps; s and m are the sizes of the model
    generate-s, generate-m                  sampling of equally long answers
    decode-s-1, decode-m-16, ...            a decoding step; the number is the number of rows
    stream-s, static-s                      answers of different lengths, in refilled slots or in consecutive batches
    matmul-s, limit-s-1, ...                limits of the machine

Workloads compute in float32 on a CPU and in bfloat16 on a GPU or TPU. Set GLIBC_TUNABLES=glibc.malloc.hugetlb=1, as
benchmark.py does.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial

import jax

from benchmarks import decode_workloads, machine_limits, measured_process, train_workloads, workload_sizes

WORKLOADS: dict[str, Callable[[workload_sizes.Workload], train_workloads.PreparedWorkload]] = {
    "sft": train_workloads.supervised,
    "reward": train_workloads.reward,
    "dpo": train_workloads.dpo,
    "ppo": train_workloads.ppo_iteration,
    "generate": decode_workloads.generate,
    "stream": partial(decode_workloads.stream, refilled=True),
    "static": partial(decode_workloads.stream, refilled=False),
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
            token_seconds, facts = decode_workloads.token_seconds(workload)
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
