"""One of this library's works, measured in a process of its own: ``python experiments/benchmarks/work.py sft-s``.

Names: sft-s, sft-m, reward-s, dpo-s, ppo-s; generate-s, generate-m; decode-s-1 and so on, the number being the rows;
stream-s, and static-s, the same batch after batch; matmul-s and limit-s-1, what the machine can do. All work in
float32 on a CPU, and on a GPU or a TPU in bfloat16.

Run it under GLIBC_TUNABLES=glibc.malloc.hugetlb=1, as run.py does.
"""

from __future__ import annotations

import pathlib
import statistics
import sys
from collections.abc import Callable
from functools import partial

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[2])]

import jax  # noqa: E402
from suite import child, decoding, limits, sizes, training  # noqa: E402

WORKS: dict[str, Callable[[sizes.Work], training.Ready]] = {
    "sft": training.supervised,
    "reward": training.reward,
    "dpo": training.dpo,
    "ppo": training.ppo_iteration,
    "generate": decoding.generate,
    "stream": partial(decoding.stream, refilled=True),
    "static": partial(decoding.stream, refilled=False),
    "matmul": limits.matmul,
}
"""Works whose repetitions are timed from outside."""

SELF_TIMED = ("decode", "limit")
"""Works that measure a part of what they run."""


def main() -> None:
    """Measure the work that the command line names."""
    given = child.options(__doc__)
    work: sizes.Work = given.work
    if work.kind not in (*WORKS, *SELF_TIMED):
        sys.exit(f"unknown work {given.name!r}: see --help")
    clock, found = child.Clock(given), {}
    if work.kind in WORKS:
        once, facts = WORKS[work.kind](work)
        clock.measure(once)
    else:
        parts: dict[str, list[float]] = {}
        if work.kind == "decode":
            one_token, facts = decoding.token_seconds(work)
        else:
            one_token, facts, parts = limits.decode_limit(work)
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
