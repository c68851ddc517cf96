"""The folder of a run: what was asked for, what has been logged, and where it goes on after a kill."""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from launch import settings as settings_lib
from launch.settings import SettingError, Settings
from rlhf_jax import checkpoint, metrics
from rlhf_jax.checkpoint import atomic
from rlhf_jax.data import errors, sources
from rlhf_jax.distributed import hosts

CONFIG, RESULTS, INCIDENTS = "config.json", "results.json", "incidents.jsonl"
MODEL_FILES = "model_files"
DATA_FILE = "data_file"
"""Beside the settings in config.json."""


class RunFolder:
    """One run's files: config.json, metrics.jsonl, tensorboard/, checkpoints/, and at the end results and models.

    incidents.jsonl is there where something went wrong and was overcome.

    Attributes:
        say: ``say(stage, text)`` shows what `note` writes down; on stderr by default.
    """

    def __init__(self, path: pathlib.Path, log: metrics.MetricLog | None = None) -> None:
        """Use an existing folder; `create` makes one."""
        self.path = path
        self.log = metrics.MetricLog(path) if log is None else log
        self.say: Callable[[str, str], None] = lambda stage, text: print(f"{stage}: {text}", file=sys.stderr)

    def checkpoints(self, stage: str) -> checkpoint.Checkpoints:
        """Where a stage saves and goes on from; what is wrong with what is there is noted."""
        return checkpoint.Checkpoints(self.path / "checkpoints" / stage, warn=partial(self.note, stage))

    def note(self, stage: str, text: str) -> None:
        """Say it, and keep it for the results; what a resumed run comes upon again is kept once, by the first host."""
        if not hosts.current().first:
            return
        self.say(stage, text)
        incident = {"stage": stage, "text": text}
        if incident not in self.incidents():
            with (self.path / INCIDENTS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(incident) + "\n")

    def incidents(self) -> list[dict[str, str]]:
        """What was noted, in this process and in earlier ones; a line that a kill has torn is left out."""
        path = self.path / INCIDENTS
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def write_json(self, name: str, values: Any) -> None:
        """Write a JSON file whole or not at all."""
        write_json(self.path / name, values)


def write_json(path: pathlib.Path, values: Any) -> None:
    """Write a JSON file whole or not at all; NaN is refused rather than written as something JSON has not."""
    atomic.replace_file(path, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())


def finite(values: Any) -> Any:
    """The same with null for NaN and infinity, which JSON does not have (the slope of perfectly separated pairs)."""
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def free_path(settings: Settings, *, kind: str = "instructgpt") -> pathlib.Path:
    """Where a new run goes; raises SettingError if something is there. Nothing is made."""
    return free_folder(settings.out, kind=f"{kind}-{settings.preset}-seed-{settings.seed}")


def free_folder(out: str | None, *, kind: str) -> pathlib.Path:
    """``out``, or a new name below runs/ that begins with ``kind``; see `free_path`."""
    path = pathlib.Path(out or f"runs/{kind}-{time.strftime('%Y%m%d-%H%M%S')}")
    if path.exists() and not path.is_dir():
        raise SettingError(f"--out {path} is a file; it must be a folder")
    if path.is_dir() and any(path.iterdir()):
        holds = "another run (--resume goes on with it)" if (path / CONFIG).exists() else "other files"
        raise SettingError(f"--out {path} holds {holds}; give a new or empty folder")
    return path


def create(path: pathlib.Path, settings: Settings, *, model_files: str | None = None) -> RunFolder:
    """Make the folder of a new run; raises SettingError if it cannot be made.

    ``model_files``: the fingerprint of the model that the run starts from.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_json(
            path / CONFIG, settings_lib.as_dict(settings) | {MODEL_FILES: model_files, DATA_FILE: data_digest(settings)}
        )
    except OSError as error:
        raise SettingError(f"--out {path} cannot be written: {error.strerror}") from error
    return RunFolder(path)


def same_model(resume: str, settings: Settings, model_files: str) -> None:
    """Raise SettingError if the model that a run started from is not what it was."""
    if saved_values(resume).get(MODEL_FILES) != model_files:
        raise SettingError(f"--resume {resume} cannot go on: the files in {settings.model} have changed since it began")


def same_data(resume: str, settings: Settings) -> None:
    """Raise SettingError if the file that a run learns from is not what it was."""
    if saved_values(resume).get(DATA_FILE) != data_digest(settings):
        raise SettingError(f"--resume {resume} cannot go on: {settings.data.path} has changed since it began")


def data_digest(settings: Settings) -> str | None:
    """Of the data files together; None where there are none, or none that can be read, which their reader will say."""
    if settings.data.path is None:
        return None
    digest = hashlib.sha256()
    try:
        for path in sources.expand_paths(settings.data.path):
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    except (OSError, errors.DataError):
        return None
    return digest.hexdigest()


def saved_values(resume: str) -> dict[str, Any]:
    """What config.json of a run holds; raises SettingError if there is none."""
    path = pathlib.Path(resume) / CONFIG
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingError(f"--resume {resume} holds no run: there is no {path}") from None
    except (OSError, ValueError) as error:
        raise SettingError(f"--resume {resume}: {path} cannot be read ({error})") from error


def finished_results(resume: str) -> dict[str, Any] | None:
    """What a finished run wrote, or None if it is not finished; results.json is the last file that a run writes."""
    path = pathlib.Path(resume) / RESULTS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
