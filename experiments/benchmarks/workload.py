"""One of this library's works, measured in a process of its own: ``python -m benchmarks.workload sft-s``.

Names: sft-s, sft-m, reward-s, dpo-s, ppo-s; generate-s, generate-m; decode-s-1 and so on, the number being the rows;
stream-s, and static-s, the same batch after batch; matmul-s and limit-s-1, what the machine can do. All work in
float32 on a CPU, and on a GPU or a TPU in bfloat16.

Run it under GLIBC_TUNABLES=glibc.malloc.hugetlb=1, as benchmark.py does.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial

import jax

from benchmarks import decode_workloads, machine_limits, sizes, timing, train_workloads

WORKS: dict[str, Callable[[sizes.Work], train_workloads.Ready]] = {
    "sft": train_workloads.supervised,
    "reward": train_workloads.reward,
    "dpo": train_workloads.dpo,
    "ppo": train_workloads.ppo_iteration,
    "generate": decode_workloads.generate,
    "stream": partial(decode_workloads.stream, refilled=True),
    "static": partial(decode_workloads.stream, refilled=False),
    "matmul": machine_limits.matmul,
}
"""Works whose repetitions are timed from outside."""

SELF_TIMED = ("decode", "limit")
"""Works that measure a part of what they run."""


def main() -> None:
    """Measure the work that the command line names."""
    given = timing.options(__doc__)
    work: sizes.Work = given.work
    if work.kind not in (*WORKS, *SELF_TIMED):
        sys.exit(f"unknown work {given.name!r}: see --help")
    clock, found = timing.Clock(given), {}
    if work.kind in WORKS:
        once, facts = WORKS[work.kind](work)
        clock.measure(once)
    else:
        parts: dict[str, list[float]] = {}
        if work.kind == "decode":
            one_token, facts = decode_workloads.token_seconds(work)
        else:
            one_token, facts, parts = machine_limits.decode_limit(work)
        seconds: list[float] = []
        clock.measure(lambda: seconds.append(one_token()))
        found = {"seconds": seconds[-given.repeats :]}
        facts = facts | {name: statistics.median(values[-given.repeats :]) for name, values in parts.items()}
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if memory:
        found["device_mb"] = round(memory / 2**20)
    clock.report(
        packages=("jax", "jaxlib", "flax"), device=device.device_kind, backend=device.platform, **facts, **found
    )


if __name__ == "__main__":
    main()
