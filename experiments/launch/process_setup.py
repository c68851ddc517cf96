"""What a process sets before jax is imported: nothing here imports more than the standard library."""

from __future__ import annotations

import os
import resource
import sys
import time
from typing import NoReturn

_WHEN = "RLHF_JAX_BEGAN"
BEGAN = float(os.environ.pop(_WHEN, None) or time.time())
"""When the command was given, in seconds since 1970."""

_own = [False]

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # torch is not needed, and not missed


def use_huge_pages() -> None:
    """Start over with glibc's huge pages where that is not decided yet: steps run about a third faster on a CPU.

    Only a command calls this, at its very start, and so says that the process is its own.
    """
    _own[0] = True
    if sys.platform == "linux" and os.environ.get("GLIBC_TUNABLES") is None:  # read once, when a process starts
        environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", _WHEN: repr(BEGAN)}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def leave(status: int) -> NoReturn:
    """End the process with a status; in a process that is not the command's own, raise SystemExit.

    When all is closed, nothing is waited for any more: a program that a thread still compiles, or a thread of a save
    that failed, which at times never ends.
    """
    if _own[0]:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)


def peak_memory_mb() -> float:
    """The most memory that this process has held, MiB."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        # Elsewhere than on Linux; there, this would count whatever process started this one, too.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 1024
