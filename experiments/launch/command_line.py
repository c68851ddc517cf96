"""The command line of the main job, and of experiments whose settings are its own and some more."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import tyro

from launch import checks, host_agreement, process_setup, run_folder, settings
from rlhf_jax import checkpoint, metrics, parallel
from rlhf_jax.data import errors
from rlhf_jax.distributed import hosts
from rlhf_jax.train import loop

S = TypeVar("S", bound=settings.Settings)

REFUSED = (
    settings.SettingError,
    errors.DataError,
    checkpoint.CheckpointError,
    loop.DivergedError,
    parallel.MeshError,
    hosts.HostsError,
    metrics.LogError,
)
"""What a user can do something about."""


def parse(
    kind: type[S],
    arguments: list[str],
    *,
    prog: str,
    doc: str | None,
    adjust: Callable[[Any], Any] = lambda preset: preset,
) -> S:
    """Settings of ``kind`` from the command line, from the presets or from the run to go on with.

    ``adjust`` is what an experiment changes in its settings as the preset leaves them, its own among them. Exits for
    --help; raises SettingError for what cannot be.
    """
    resume = settings.peek(arguments, "--resume")
    begin = _saved(kind, resume) if resume else adjust(kind(**_fields(_preset(arguments))))
    asked = tyro.cli(kind, args=arguments, default=begin, prog=prog, description=doc)
    # Checkpoints are restored onto any mesh, and any number of hosts.
    anywhere = {"resume": None, "mesh": begin.mesh, "hosts": begin.hosts}
    if resume and dataclasses.replace(asked, **anywhere) != dataclasses.replace(begin, resume=None):
        raise settings.SettingError(
            f"--resume {resume} goes on with the settings of its config.json; give no other setting but --mesh.* and "
            "--hosts.* beside it"
        )
    checks.check(asked)
    if asked.model is None:
        return asked
    if asked.net != begin.net:
        raise settings.SettingError("--net sizes a model made from nothing; leave it out beside --model")
    # Absolute, so that the run can be resumed from anywhere.
    return dataclasses.replace(asked, model=str(pathlib.Path(asked.model).absolute()))


def enter(run: Callable[[Any], Any], read: Callable[[list[str]], Any], arguments: list[str] | None) -> None:
    """Run, and turn what a user can do something about into one line on stderr and an exit status.

    They are 2, something has to be changed first; 3, an alarm; 75, the run was asked to stop.
    """
    with _quiet_threads():  # until the very end: what failed is still being closed while the line is printed
        try:
            with _leaving_on_sigterm():
                asked = read(sys.argv[1:] if arguments is None else arguments)
                with host_agreement.joined(asked, status=_status):
                    run(asked)
        except REFUSED as error:
            print(f"error: {error}", file=sys.stderr)
            process_setup.leave(_status(error))
        except loop.Alarmed as stopped:
            print(f"{stopped}; go on all the same with --resume", file=sys.stderr)
            process_setup.leave(_status(stopped))
        except _Stopped as stopped:
            print("stopped between two stages; go on with --resume", file=sys.stderr)
            process_setup.leave(_status(stopped))
        except loop.Preempted as stopped:
            print(f"{stopped}; go on with --resume", file=sys.stderr)
            process_setup.leave(_status(stopped))


def _status(error: BaseException) -> int:
    """The exit status that an exception ends the process with."""
    known = {REFUSED: 2, (loop.Alarmed,): 3, (loop.Preempted, _Stopped): 75}  # EX_TEMPFAIL: try again later
    return next((status for kinds, status in known.items() if isinstance(error, kinds)), 1)


class _Stopped(BaseException):
    """SIGTERM came where no stage is trained; what is finished is on disk."""


@contextlib.contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    """Outside of `loop.fit`, which finishes its step and saves, SIGTERM ends the run where it is."""

    def leave(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is being closed is closed in peace
        raise _Stopped

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """Reads and writes that failed half way call back a loop that is closed; that they failed has been said."""
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    before = sys.excepthook

    def hook(kind: Any, error: Any, trace: Any) -> None:
        if not (kind is RuntimeError and str(error) == "Event loop is closed"):
            before(kind, error, trace)

    sys.excepthook = hook
    try:
        yield
    finally:
        sys.excepthook = before


def _preset(arguments: list[str]) -> settings.Settings:
    given = {flag: settings.peek(arguments, f"--{flag}") for flag in ("data.path", "model", "published", "preset")}
    return settings.preset(
        given["preset"] or "default",
        dialogues=given["data.path"] is not None,
        started=given["model"] is not None,
        published=given["published"],
    )


def _saved(kind: type[S], resume: str) -> S:
    values = run_folder.saved_values(resume)
    shared = {field.name for field in dataclasses.fields(settings.Settings)}
    own = {field.name: field for field in dataclasses.fields(kind) if field.name not in shared}
    missing = [name for name in own if name not in values]
    if missing:
        raise settings.SettingError(f"--resume {resume} holds another kind of run: its settings lack {missing[0]}")
    mine: dict[str, Any] = {name: _revived(values[name], field) for name, field in own.items()}
    mine |= _fields(settings.from_dict({name: values[name] for name in values if name in shared}))
    mine["hosts"] = settings.Hosts()  # those that go on, not those that began
    return kind(**mine)


def _revived(value: Any, field: dataclasses.Field) -> Any:
    """A value of config.json as the setting that it was: a tuple, or a group of settings."""
    if isinstance(value, dict):
        made: Any = field.default_factory
        return made(**value)
    return tuple(value) if isinstance(value, list) else value


def _fields(known: settings.Settings) -> dict[str, Any]:
    return {field.name: getattr(known, field.name) for field in dataclasses.fields(settings.Settings)}
