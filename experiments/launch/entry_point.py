"""Runs a command. Prints user errors as one line on stderr and sets the exit status."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from launch import config_file, folder_lock, host_agreement, process_setup, settings
from rlhf_jax import checkpoint, metrics, parallel
from rlhf_jax.checkpoint import checkpoints
from rlhf_jax.data import errors
from rlhf_jax.distributed import hosts
from rlhf_jax.train import loop

USER_ERRORS = (
    settings.SettingError,
    errors.DataError,
    checkpoint.CheckpointError,
    loop.DivergedError,
    parallel.MeshError,
    hosts.HostsError,
    metrics.LogError,
)
"""User errors, which are printed without a traceback."""


def execute(
    run: Callable[[Any], Any],
    parse: Callable[[list[str]], Any],
    arguments: list[str] | None,
    *,
    stopped: str | None = None,
) -> None:
    """Parses the command line and runs the command.

    The exit status is 2 for a user error, 3 for an alarm with --on-alarm stop, and 75 for a run stopped by a signal.

    Args:
        run: The command, a function of its settings.
        parse: Returns the settings of a command line.
        arguments: The command line without the program's name; None uses ``sys.argv``.
        stopped: What is printed if a signal stops the run; by default, that --resume continues it.
    """
    with _ignore_closed_event_loops():  # outermost, since a failed save may still be closing when its error is printed
        try:
            with _stop_on_signals():
                parsed = parse(sys.argv[1:] if arguments is None else arguments)
                with host_agreement.join_hosts(parsed, status=_exit_status):
                    run(parsed)
        except (*USER_ERRORS, loop.Alarmed, *_STOPPED, OSError) as error:
            if isinstance(error, OSError) and error.errno not in checkpoints.DISK_ERRORS:
                raise
            print(stopped if stopped and isinstance(error, _STOPPED) else _describe(error), file=sys.stderr)
            process_setup.exit_process(_exit_status(error))
        finally:
            folder_lock.release_all()


def _describe(error: BaseException) -> str:
    if isinstance(error, USER_ERRORS):
        full = isinstance(error, checkpoint.CheckpointError | metrics.LogError) and _NO_SPACE in str(error)
        return f"error: {error}" + (f"; free space and {_RESUME}" if full else "")
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"error: {where}{error.strerror}; correct this and {_again()}"
    if isinstance(error, loop.Alarmed):
        return f"{error}; to continue anyway, use --resume"
    if isinstance(error, loop.Preempted) or _again() == _RESUME:
        folder = folder_lock.held()
        return f"{str(error) or 'stopped'}; {_RESUME}{f' {_short(folder)}' if folder else ''}"
    return process_setup.STOPPED_EARLY if folder_lock.held() is None else f"stopped; {_again()}"


def _short(folder: pathlib.Path) -> str:
    """Returns the path relative to the working directory if it is below it."""
    here = pathlib.Path.cwd().resolve()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


_RESUME = "continue with --resume"
_NO_SPACE = os.strerror(errno.ENOSPC)


def _again() -> str:
    """Returns how to continue the command, which depends on whether it has saved a run that can be resumed."""
    folder = folder_lock.held()
    return _RESUME if folder is not None and config_file.is_run(folder) else "start it again"


def _exit_status(error: BaseException) -> int:
    """Returns the exit status for an exception."""
    statuses = {(*USER_ERRORS, OSError): 2, loop.Alarmed: 3, _STOPPED: 75}  # EX_TEMPFAIL: try again later
    return next((status for kinds, status in statuses.items() if isinstance(error, kinds)), 1)


class _StoppedError(BaseException):
    """Raised when a signal arrives outside a training stage, where all finished stages are saved."""


_STOPPED = (loop.Preempted, _StoppedError, KeyboardInterrupt)


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[None]:
    """Raises `_StoppedError` on SIGTERM and Ctrl-C; within a stage, `loop.fit` instead finishes the step and saves.

    After the first signal, SIGTERM is ignored, so that it does not interrupt the clean-up; another Ctrl-C does. Python
    ignores an exception that a signal raises in a destructor or in a callback of the garbage collector. It is then
    raised again a moment later.
    """

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise _StoppedError("stopped")

    def raise_later(ignored: Any) -> None:
        def again(number: int, frame: Any) -> None:
            raise ignored.exc_type(*ignored.exc_value.args)

        if not isinstance(ignored.exc_value, (_StoppedError, KeyboardInterrupt)):
            return hook(ignored)
        signal.signal(signal.SIGALRM, again)
        signal.setitimer(signal.ITIMER_REAL, 0.01)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    hook, sys.unraisablehook = sys.unraisablehook, raise_later
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in previous.items():
            early = handler is None or handler is process_setup.stop_early
            signal.signal(number, signal.SIG_DFL if early else handler)


@contextlib.contextmanager
def _ignore_closed_event_loops() -> Iterator[None]:
    """Silences "Event loop is closed" errors. They follow a failed read or write that has its own error message."""
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    hook, unraisable_hook = sys.excepthook, sys.unraisablehook

    def is_closed_loop(error: Any) -> bool:
        return type(error) is RuntimeError and str(error) == "Event loop is closed"

    sys.excepthook = lambda kind, error, trace: None if is_closed_loop(error) else hook(kind, error, trace)
    sys.unraisablehook = lambda args: None if is_closed_loop(args.exc_value) else unraisable_hook(args)
    try:
        yield
    finally:
        sys.excepthook, sys.unraisablehook = hook, unraisable_hook
