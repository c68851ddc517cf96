"""Locks a run folder, so that two processes cannot write to it at the same time; imports only the standard library.

The lock is a ``flock`` on the file ``lock`` in the folder, which the operating system releases when the process ends,
however it ends. The file names the process. On file systems without such locks, a process of the same host that is
still alive counts as the owner.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import sys
import time
from typing import Any

NAME = "lock"

_held: dict[pathlib.Path, int] = {}
"""Descriptors of the lock files of this process, by folder, in the order of locking."""
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class LockedError(RuntimeError):
    """Another process uses the folder; the message names it, as in "sft.py on host a (process 7, since ...)"."""


def acquire(folder: pathlib.Path) -> None:
    """Locks an existing folder until `release_all` or the end of the process.

    Raises:
        LockedError: Another process has locked it.
        OSError: The lock file cannot be written.
    """
    folder = folder.resolve()
    if folder in _held:
        return
    descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        for _ in range(3):  # because `owner` in another process holds the lock for a moment
            if (found := _owner(descriptor, fcntl.LOCK_EX)) is None:
                break
            time.sleep(0.05)
        else:
            raise LockedError(found)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(_this_process()) + "\n").encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    _held[folder] = descriptor


def owner(folder: pathlib.Path) -> str | None:
    """Returns the other process that has locked the folder, in words, or None."""
    if folder.resolve() in _held:
        return None
    try:
        descriptor = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return None
    try:
        return _owner(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def held() -> pathlib.Path | None:
    """Returns the folder that this process has locked last, or None."""
    return next(reversed(_held), None)


def release_all() -> None:
    """Releases all locks of this process."""
    while _held:
        os.close(_held.popitem()[1])


def _release_in_child() -> None:
    """Closes the inherited descriptors in a forked process, which would keep the lock after the death of its parent."""
    while _held:
        with contextlib.suppress(OSError):
            os.close(_held.popitem()[1])


os.register_at_fork(after_in_child=_release_in_child)


def _owner(descriptor: int, mode: int) -> str | None:
    """Locks an open lock file; returns the process that already has locked it, in words, or None."""
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return _describe(_read(descriptor))
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        process = _read(descriptor)
        return _describe(process) if _is_alive(process) else None
    return None


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    program = pathlib.Path(sys.argv[0]).name or "python"
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"program": program, "host": socket.gethostname(), "pid": pid, "started": started, "ticks": _ticks(pid)}


def _read(descriptor: int) -> dict[str, Any]:
    with contextlib.suppress(ValueError, OSError):
        values = json.loads(os.pread(descriptor, 4096, 0))
        if isinstance(values, dict):
            return values
    return {}


def _describe(process: dict[str, Any]) -> str:
    if not process:
        return "another process"
    return "{program} on host {host} (process {pid}, since {started})".format_map(process)


def _is_alive(process: dict[str, Any]) -> bool:
    """Returns whether a process of this host is alive; those of other hosts count as ended."""
    if process.get("host") != socket.gethostname() or process.get("pid") == os.getpid():
        return False
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return process["ticks"] == _ticks(process["pid"])


def _ticks(pid: int) -> str | None:
    """Returns the start time of a process, which distinguishes it from a later one with the same number."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
