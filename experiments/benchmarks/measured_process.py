"""The command line, the timing and the report that all measured processes share.

This module imports no JAX, because the interpreters of the peer libraries import it too. With ``--paced``, a process
waits for a line on standard input before each timed repetition, so that its parent can interleave several processes. A
temporary slowdown of the machine then affects all of them.
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

from benchmarks import workload_sizes

READY = "ready"
"""Printed by a paced process before each timed repetition."""


def parse_options(description: str | None, *, variants: tuple[str, ...] = ()) -> argparse.Namespace:
    """Parses the command line of a measured process, including the workload (a `workload_sizes.Workload`)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="Workload and size, such as sft-s or decode-m-16.")
    if variants:
        text = "Trainer settings: plain (float32 on a CPU, no gradient checkpointing) or defaults (those of the peer)."
        parser.add_argument("--variant", choices=variants, default=variants[0], help=text)
    parser.add_argument("--repeats", type=int, default=5, help="Number of timed repetitions.")
    parser.add_argument("--warm", type=int, default=1, help="Untimed repetitions after the first, which compiles.")
    parser.add_argument("--quick", action="store_true", help="Use tiny shapes for a test run.")
    parser.add_argument("--json", action="store_true", help="Print a line of JSON instead of a sentence.")
    parser.add_argument("--paced", action="store_true", help="Wait for a line on stdin before each timed repetition.")
    text = "Make a peer compute in bfloat16 on a GPU or TPU. This library uses an accelerator if there is one."
    parser.add_argument("--accelerator", action="store_true", help=text)
    options = parser.parse_args()
    options.workload = workload_sizes.parse(options.name, quick=options.quick)
    return options


class Clock:
    """Times each repetition from `start` to `stop`, and reports the repetitions after the first and the warmup.

    Only the report is written to standard output; the output of libraries is redirected to standard error.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        """Redirects standard output."""
        self._options = options
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._times: list[float] = []
        self._began = 0.0
        self.total = 1 + options.warm + options.repeats
        """The number of repetitions."""

    def start(self) -> None:
        """Starts a repetition; a paced process first waits for its turn."""
        if self._options.paced and len(self._times) >= 1 + self._options.warm:
            self._out.write(READY + "\n")
            if not sys.stdin.readline():
                sys.exit("the parent process has exited")
        self._began = time.perf_counter()

    def stop(self) -> None:
        """Ends a repetition; its results must be ready."""
        self._times.append(time.perf_counter() - self._began)

    def measure(self, repetition: Callable[[], Any]) -> None:
        """Runs and times all repetitions; ``repetition`` must return when its results are ready."""
        for _ in range(self.total):
            self.start()
            repetition()
            self.stop()

    def report(self, *, packages: tuple[str, ...], **facts: Any) -> None:
        """Prints the report.

        Args:
            packages: Packages whose versions are reported.
            **facts: Further entries, such as the ``tokens`` of a repetition. ``seconds`` replaces the measured times.
        """
        seconds = facts.pop("seconds", self._times[1 + self._options.warm : self.total])
        record = {
            "name": self._options.name,
            "seconds": [round(s, 7) for s in seconds],
            **facts,
            "first_s": round(self._times[0], 3),
            "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "versions": {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in packages},
        }
        if self._options.json or self._options.paced:
            self._out.write(json.dumps(record) + "\n")
            return
        median = statistics.median(seconds)
        rate = f", {facts['tokens'] / median:.0f} tokens/s" if facts.get("tokens") else ""
        self._out.write(
            f"{self._options.name}: {median:.4g} s{rate}; first {record['first_s']} s, {record['peak_mb']} MB\n"
        )
