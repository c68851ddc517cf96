"""Process-wide setup that must precede the import of jax; imports only the standard library."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from typing import Any, NoReturn

_START_TIME_VARIABLE = "RLHF_JAX_START_TIME"
START_TIME = float(os.environ.pop(_START_TIME_VARIABLE, None) or time.time())
"""Start time of the command, in seconds since 1970."""

STOPPED_EARLY = "stopped before the run began; start it again"

_owns_process = False

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # hides a warning about torch


def use_huge_pages() -> None:
    """Restarts the process with glibc's huge pages, which make CPU steps about a third faster.

    Does so only on Linux and only if GLIBC_TUNABLES is not set. Also makes `exit_process` end the process immediately,
    and SIGTERM and Ctrl-C during the imports end it without a traceback. Only commands call this function, before their
    slow imports.
    """
    global _owns_process
    _owns_process = True
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop_early)
    if sys.platform == "linux" and os.environ.get("GLIBC_TUNABLES") is None:  # glibc reads it at process start only
        environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", _START_TIME_VARIABLE: repr(START_TIME)}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def stop_early(number: int, frame: Any) -> NoReturn:
    """Ends the process on a signal that arrives before `entry_point.execute` handles signals."""
    print(STOPPED_EARLY, file=sys.stderr)
    exit_process(75)


def exit_process(status: int) -> NoReturn:
    """Ends the process immediately with ``status``, or raises SystemExit if `use_huge_pages` has not been called.

    An immediate exit does not wait for threads that are still compiling, or for the thread of a failed save, which may
    never end.
    """
    if _owns_process:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)


def peak_memory_mb() -> float:
    """Returns the peak resident memory of this process in MiB."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        # For systems without /proc. On Linux, ru_maxrss would include the peak of the parent process.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 1024
