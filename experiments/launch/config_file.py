"""Reads the settings of a run from its config.json, which `run_folder.create` writes."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import typing
from typing import Any, TypeVar

from launch import settings as settings_lib
from launch.settings import SettingError

S = TypeVar("S", bound=settings_lib.RunSettings)

NAME = "config.json"
VERSION = 4
"""Version of the run folder's layout. Runs with a different version, or without a version, are refused."""


TOOLS = ("evaluate", "rewardbench", "compare_runs", "gate")
"""Commands that train no model, whose runs cannot be resumed."""


def check_local(flag: str, path: str | None) -> None:
    """Raises SettingError for an address such as gs://bucket/name, which would be taken for a local folder."""
    if path is not None and "://" in path:
        raise SettingError(
            f"{flag} {path} is not a local folder; mount the bucket and give the folder where it is mounted"
        )


def is_run(folder: pathlib.Path) -> bool:
    """Returns whether the config.json in a folder is that of a run, and not that of a model."""
    return {"command", "version"} <= set(_values(folder))


def tool(folder: pathlib.Path) -> str | None:
    """Returns the command whose output folder this is, if it is one of `TOOLS`."""
    command = _values(folder).get("command")
    return command if command in TOOLS else None


def _values(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the contents of the config.json in a folder, or an empty dict if there is none."""
    try:
        values = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def read(resume: str, *, flag: str = "--resume") -> dict[str, Any]:
    """Returns the contents of config.json in the run folder ``resume``.

    Raises SettingError if the file is missing, unreadable or from a different version.
    """
    check_local(flag, resume)
    path = pathlib.Path(resume) / NAME
    if pathlib.Path(resume).is_file():
        raise SettingError(f"{flag} {resume} is a file; give the folder of a run")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingError(f"{flag} {resume} is not a run folder: {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise SettingError(
            f"{flag} {resume}: {path} is damaged ({error}); restore it or start a new run with --out"
        ) from error
    if isinstance(values, dict) and ("model_type" in values or "architectures" in values):
        run = pathlib.Path(os.path.abspath(resume)).parent
        hint = f"; did you mean {flag} {pathlib.Path(resume).parent}?" if is_run(run) else ""
        raise SettingError(f"{flag} {resume} is the folder of a model, not of a run{hint}")
    if command := tool(pathlib.Path(resume)):
        raise SettingError(f"{flag} {resume} is a run of {command}.py, which cannot be resumed")
    version = values.get("version") if isinstance(values, dict) else None
    if version != VERSION:
        has = "no version" if version is None else f"version {version}"
        raise SettingError(
            f"{flag} {resume} is not a run of this version of rlhf_jax: {path} has {has} instead of version "
            f"{VERSION}; start a new run with --out"
        )
    return values


def read_settings(kind: type[S], resume: str) -> S:
    """Returns the settings, of class ``kind``, with which the run in ``resume`` was started.

    The --hosts settings and --stop-after are not restored. Raises SettingError if `read` does, if the run belongs to
    another command, or if its settings do not fit ``kind``.
    """
    values = read(resume)
    if values["command"] != kind.command:
        raise SettingError(f"--resume {resume} is a run of {values['command']}.py; resume it with that command")
    if "hosts" in values:
        values["hosts"] = dataclasses.asdict(settings_lib.Hosts())
    if "stop_after" in values:
        values["stop_after"] = None
    return from_dict(kind, values)


def from_dict(kind: type[S], values: dict[str, Any]) -> S:
    """Inverts ``dataclasses.asdict``; raises SettingError if ``values`` does not fit the fields of ``kind``."""
    fields = dataclasses.fields(kind)
    if missing := {field.name for field in fields} - set(values):
        raise SettingError(f"{NAME} lacks the setting {min(missing)}; start a new run with --out")
    hints = typing.get_type_hints(kind)
    return kind(**{each.name: _restore(values[each.name], each, hints[each.name]) for each in fields})


def _restore(value: Any, field: dataclasses.Field, kind: Any) -> Any:
    """Converts a JSON value to the type of its field: a group of settings, a tuple or a scalar."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        inner, hints = dataclasses.fields(kind), typing.get_type_hints(kind)
        if not isinstance(value, dict) or set(value) != {each.name for each in inner}:
            raise SettingError(
                f"the settings of {field.name} in {NAME} differ from those of this version; start a new run with --out"
            )
        return kind(**{each.name: _restore(value[each.name], each, hints[each.name]) for each in inner})
    value = tuple(value) if isinstance(value, list) else value
    default = field.default
    expected = (int, float) if isinstance(default, float) else type(default)
    if value is not None and isinstance(default, (str, int, float, tuple)) and not isinstance(value, expected):
        raise SettingError(f"{NAME} has {field.name} = {value!r}, which is not of type {type(default).__name__}")
    return value
