"""The folder of a run: its files and incidents, and the checks before the run is resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import shutil
import stat
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from launch import config_file, elapsed_time, folder_lock, initial_model, setting_checks
from launch.run_settings import RunSettings, SettingError
from rlhf_jax import atomic, checkpoint, metrics, sinks
from rlhf_jax.data import errors, files, sources
from rlhf_jax.distributed import hosts

RESULTS, INCIDENTS = "results.json", "incidents.jsonl"
PROGRAMS = "programs"
"""Name of the folder of compiled programs beside a run folder."""
INPUTS = "input_digests"
"""Key of the digests of models and data files in config.json."""


class RunFolder:
    """The files of a run: config.json, metrics.jsonl, tensorboard/, checkpoints/ and, at the end, results and models.

    incidents.jsonl lists problems from which the run recovered, if any.

    Attributes:
        elapsed: The time that all processes of the run have taken.
        print_note: ``print_note(stage, text)`` prints an incident that `note` saves; by default, to stderr.
    """

    def __init__(self, path: pathlib.Path, log: metrics.MetricLog | None = None) -> None:
        """Opens an existing folder. `create` makes a new one."""
        self.path = path
        self.elapsed = elapsed_time.ElapsedTime(path)
        self.log = metrics.MetricLog(path) if log is None else log
        self.print_note: Callable[[str, str], None] = lambda stage, text: print(f"{stage}: {text}", file=sys.stderr)

    def checkpoints(self, stage: str) -> checkpoint.Checkpoints:
        """Returns the checkpoints of a stage. Warnings, such as those about damaged checkpoints, are incidents."""
        return checkpoint.Checkpoints(self.path / "checkpoints" / stage, warn=partial(self.note, stage))

    def note(self, stage: str, text: str) -> None:
        """Prints an incident and, if it is new, saves it. Only the first host does this."""
        if not hosts.current().first:
            return
        self.print_note(stage, text)
        incident = {"stage": stage, "text": text}
        if incident not in self.incidents():
            atomic.append_line(self.path / INCIDENTS, incident)

    def incidents(self) -> list[dict[str, str]]:
        """Returns all incidents of the run. Lines that an interrupted process left incomplete are skipped."""
        path, incidents = self.path / INCIDENTS, []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):
                incidents.append(json.loads(line))
        return incidents

    def write_json(self, name: str, values: Any) -> None:
        """Writes a JSON file atomically."""
        write_json(self.path / name, values)


def write_json(path: pathlib.Path, values: Any) -> None:
    """Writes a JSON file atomically; raises ValueError for NaN or infinity, which JSON cannot represent."""
    atomic.replace_file(path, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())


def finite(values: Any) -> Any:
    """Replaces NaN and infinity, such as the calibration slope of perfectly separated pairs, with None."""
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def free_path(settings: RunSettings, *, kind: str | None = None) -> pathlib.Path:
    """Returns the path of a new run's folder without creating it; raises SettingError if it is in use.

    Without --out, the folder's name begins with ``kind``, which defaults to the name of the command.
    """
    return free_folder(settings.out, kind=settings.folder_name(kind))


def free_folder(out: str | None, *, kind: str) -> pathlib.Path:
    """Returns ``out`` or, if it is None, a new path runs/KIND-TIME; raises SettingError if the path is in use."""
    config_file.check_local("--out", out)
    path = pathlib.Path(out or f"runs/{kind}-{time.strftime('%Y%m%d-%H%M%S')}")
    existing = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not existing.is_dir():
        raise SettingError(f"--out {path}: {existing} is a file; give a new or empty folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise SettingError(f"--out {path}: this process may not write in {existing}; give another folder")
    if path.is_dir() and any(each.name != folder_lock.NAME for each in path.iterdir()):
        _refuse_if_used(f"--out {path}", folder_lock.owner(path))
        if _has_only_begun(path):
            return path
        content = "a run (resume it with --resume)" if config_file.is_run(path) else "files"
        raise SettingError(f"--out {path} already contains {content}; give a new or empty folder")
    return path


_BEGINNING = (
    config_file.NAME,
    elapsed_time.NAME,
    INCIDENTS,
    metrics.FILE_NAME,
    "tensorboard",
    "samples.jsonl",
    "checkpoints",
)


def _has_only_begun(path: pathlib.Path) -> bool:
    """Returns whether a folder has a run that ended before its first checkpoint, for example by a wrong setting.

    Nothing is lost if a new run replaces it.
    """
    names = {each.name for each in path.iterdir()} - {folder_lock.NAME}
    saved = any(each.is_file() for each in (path / "checkpoints").rglob("*"))
    return config_file.is_run(path) and names <= set(_BEGINNING) and not saved


def create(path: pathlib.Path, settings: RunSettings) -> RunFolder:
    """Creates and locks the folder of a new run; raises SettingError if that fails."""
    extra = {"version": config_file.VERSION, "command": settings.command, INPUTS: input_digests(settings)}
    create_folder(path, dataclasses.asdict(settings) | extra)
    return _open(path, settings)


def _open(path: pathlib.Path, settings: RunSettings) -> RunFolder:
    if settings.reuse_programs:
        reuse_programs(path)
    return RunFolder(path, open_log(path, settings))


def reuse_programs(path: pathlib.Path) -> None:
    """Sets JAX's compilation cache to a folder beside the run folder ``path``, unless a cache is already set.

    JAX runs cached programs without checking them, so the folder is used only if nobody else can write to it.
    """
    folder = path.absolute().parent / PROGRAMS
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022:
            jax.config.update("jax_compilation_cache_dir", str(folder))


def open_log(path: pathlib.Path, settings: RunSettings) -> metrics.MetricLog:
    """Opens the log of a run with the sinks that --log selects."""
    config = dataclasses.asdict(settings) | {"command": settings.command}
    made = {
        "tensorboard": sinks.TensorBoard,
        "wandb": partial(sinks.Wandb, config=config),
        "trackio": partial(sinks.Trackio, config=config),
    }
    return metrics.MetricLog(path, sinks=[made[name] for name in dict.fromkeys(settings.log)])


def create_folder(path: pathlib.Path, config: dict[str, Any]) -> None:
    """Creates and locks a folder with the config.json ``config``; raises SettingError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock(f"--out {path}", path)
        free_folder(str(path), kind="")  # another process may have used it before it was locked
        for name in _BEGINNING if _has_only_begun(path) else ():
            shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink(missing_ok=True)
        write_json(path / config_file.NAME, config)
    except OSError as error:
        # Special file systems, such as /proc, call a folder that cannot be created missing.
        why = "no folder can be created there" if isinstance(error, FileNotFoundError) else error.strerror
        raise SettingError(f"cannot write to --out {path}: {why}; give another folder") from error


def resume(path: pathlib.Path, settings: RunSettings) -> RunFolder:
    """Locks and opens the folder of a run to resume; raises SettingError if that fails."""
    lock(f"--resume {path}", path)
    return _open(path, settings)


def lock(flag: str, path: pathlib.Path) -> None:
    """Locks a folder until the process ends; raises SettingError, which begins with ``flag``, if that fails."""
    try:
        folder_lock.acquire(path)
    except folder_lock.LockedError as error:
        _refuse_if_used(flag, str(error))
    except OSError as error:
        raise SettingError(
            f"{flag}: cannot write to the folder: {error.strerror}; free space or change the permissions"
        ) from error


def _refuse_if_used(flag: str, owner: str | None) -> None:
    if owner is not None:
        advice = "wait until it ends or stop it" if flag.startswith("--resume") else "give a new or empty folder"
        raise SettingError(f"{flag} is in use by {owner}; {advice}")


def check_inputs_unchanged(resume: str, settings: RunSettings) -> None:
    """Raises SettingError if a model, a data file or code of the run to resume has changed since the run started."""
    saved, now = config_file.read(resume)[INPUTS], input_digests(settings)
    for name, digests in now.items():
        if saved.get(name, digests) == digests:  # runs of earlier versions have no digests of code
            continue
        value = setting_checks.value_of(settings, name)
        if isinstance(value, tuple):
            value = next(each for each, old, new in zip(value, saved[name], digests) if old != new)
        value = str(value).rpartition(":")[0] if name in settings.functions else str(value)
        files = [] if name in settings.functions and not value.endswith(".py") else _paths(value)
        if missing := next((each for each in files if not pathlib.Path(each).exists()), None):
            raise SettingError(f"--resume {resume}: {missing} does not exist; restore it or start a new run with --out")
        what = f"the files in {value} have" if pathlib.Path(value).is_dir() else f"{value} has"
        raise SettingError(
            f"--resume {resume}: {what} changed since the run started; restore "
            f"{'them' if what.endswith('have') else 'it'} or start a new run with --out"
        )


def _paths(source: str) -> list[str]:
    """Returns the files of a source, or the source itself if a pattern matches no file."""
    try:
        return [os.fspath(path) for path in sources.expand_paths(source)]
    except errors.DataError:
        return [source]


def input_digests(settings: RunSettings) -> dict[str, Any]:
    """Returns a digest of each model folder, data file and file of functions, by name of the setting."""

    def digest(path: Any) -> Any:
        if isinstance(path, tuple):
            return [digest(each) for each in path]
        if path is None:
            return None
        return initial_model.fingerprint(path) if pathlib.Path(path).is_dir() else data_digest(path)

    functions = {
        name: [_code_digest(each) for each in setting_checks.value_of(settings, name)] for name in settings.functions
    }
    return {name: digest(setting_checks.value_of(settings, name)) for name in settings.inputs} | functions


def _code_digest(function: str) -> str | None:
    """Returns a digest of the file of MODULE:FUNCTION or FILE.py:FUNCTION, but not of the modules that it imports."""
    module = function.rpartition(":")[0]
    if module.endswith(".py"):
        return data_digest(module)
    spec = None
    with contextlib.suppress(Exception):  # reported when the module is imported
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        spec = importlib.util.find_spec(module)
    return data_digest(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def data_digest(source: str) -> str | None:
    """Returns a SHA-256 of data files, or None if one of them cannot be read."""
    digest = hashlib.sha256()
    try:
        for path in sources.expand_paths(source):
            if files.is_sqlite(os.fspath(path)):  # its bytes can change although its records do not
                for raw in sources.raw_records(path):
                    digest.update(json.dumps(raw.fields, sort_keys=True).encode())
                continue
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    except (OSError, errors.DataError):  # reported when the file is parsed
        return None
    return digest.hexdigest()


def finished_results(resume: str) -> dict[str, Any] | None:
    """Returns the contents of results.json, the last file that a run writes; None if the run is not finished.

    A run that stopped at --stop-after is not finished.
    """
    path = pathlib.Path(resume) / RESULTS
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return None if not results or "stopped_after" in results else results
