"""What every measured process does: take its turns, time them, and say so in one line of JSON.

Plain Python, for peers' interpreters. With ``--paced`` a process waits for a line on its standard input before each
timed repetition, so that the one that started it can let several processes repeat in turn: a machine that is slow for
a while is then slow for all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

from benchmarks import sizes

READY = "ready"
"""Printed before each paced repetition."""


def options(description: str | None, *, variants: tuple[str, ...] = ()) -> argparse.Namespace:
    """The command line of a measured process, with ``work``, a `sizes.Work`, read from the name."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="work and size, such as sft-s or decode-m-16")
    if variants:
        parser.add_argument("--variant", choices=variants, default=variants[0], help="which of the peer's settings")
    parser.add_argument("--repeats", type=int, default=5, help="timed repetitions")
    parser.add_argument("--warm", type=int, default=1, help="repetitions between the first, which compiles, and these")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a sentence")
    parser.add_argument("--paced", action="store_true", help="wait for a line on standard input before each repetition")
    parser.add_argument("--accelerator", action="store_true", help="use a GPU or TPU, in bfloat16")
    given = parser.parse_args()
    given.work = sizes.work(given.name, quick=given.quick)
    return given


class Clock:
    """Times repetitions between ``start()`` and ``stop()``: a first, some that warm up, and those that count.

    Standard output is kept for the result: what libraries print goes to standard error.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        """Take over standard output."""
        self._given = given
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._times: list[float] = []
        self._began = 0.0
        self.total = 1 + given.warm + given.repeats
        """How many repetitions there are to be."""

    def start(self) -> None:
        """Begin a repetition, when it is this process's turn."""
        if self._given.paced and len(self._times) >= 1 + self._given.warm:
            self._out.write(READY + "\n")
            if not sys.stdin.readline():
                sys.exit("the benchmark that started this has gone")
        self._began = time.perf_counter()

    def stop(self) -> None:
        """End a repetition. All that it computes must be there."""
        self._times.append(time.perf_counter() - self._began)

    def measure(self, once: Callable[[], Any]) -> None:
        """Run and time ``once`` as often as is needed; it returns when all that it computes is there."""
        for _ in range(self.total):
            self.start()
            once()
            self.stop()

    def report(self, *, packages: tuple[str, ...], **facts: Any) -> None:
        """Print the result. ``facts``: tokens and operations of a repetition, and what else is worth knowing.

        ``seconds``, where given, replaces what was timed.
        """
        seconds = facts.pop("seconds", self._times[1 + self._given.warm : self.total])
        record = {
            "name": self._given.name,
            "seconds": [round(s, 7) for s in seconds],
            **facts,
            "first_s": round(self._times[0], 3),
            "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "versions": {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in packages},
        }
        if self._given.json or self._given.paced:
            self._out.write(json.dumps(record) + "\n")
            return
        median = statistics.median(seconds)
        rate = f", {facts['tokens'] / median:.0f} tokens/s" if facts.get("tokens") else ""
        self._out.write(
            f"{self._given.name}: {median:.4g} s{rate}; first {record['first_s']} s, {record['peak_mb']} MB\n"
        )
