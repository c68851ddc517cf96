"""Parses the command lines of experiments. Imports neither jax nor the library, so that ``--help`` answers at once."""

from __future__ import annotations

import dataclasses
import pathlib
import signal
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from launch import config_file, setting_checks, settings

S = TypeVar("S", bound=settings.Settings)
T = TypeVar("T")


def answer_help(parse: Callable[[list[str]], Any]) -> None:
    """Prints the help and exits if the command line has ``--help``.

    A command calls this below its settings and above its slow imports.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends quietly when head closes the pipe
        parse(sys.argv[1:])


def parse_as(kind: type[T], arguments: list[str], *, prog: str, doc: str | None, default: T | None = None) -> T:
    """Returns a settings dataclass parsed from the command line; ``doc`` and the fields' docstrings are its help."""
    import tyro  # imported late because use_huge_pages runs all earlier imports twice

    options: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(kind, args=arguments, prog=prog, description=doc, **options)


def parse(
    kind: type[S],
    arguments: list[str],
    *,
    doc: str | None,
    adjust: Callable[[Any], Any] = lambda preset: preset,
) -> S:
    """Returns the checked settings of a run: those of a preset or of the run to resume, overridden by the flags.

    Args:
        kind: The settings class of the command.
        arguments: The command line without the program's name.
        doc: The description that ``--help`` prints.
        adjust: The command's changes to the preset, applied before the flags.

    Returns:
        The settings.

    Raises:
        SettingError: A setting is out of range or conflicts with another.
    """
    resume = settings.peek(arguments, "--resume")
    default = config_file.read_settings(kind, resume) if resume else adjust(kind(**_preset_fields(arguments)))
    parsed = parse_as(kind, arguments, prog=f"{kind.command}.py", doc=doc, default=default)
    # Checkpoints can be restored on any mesh and on any number of hosts.
    free = {"resume": None, "mesh": default.mesh, "hosts": default.hosts}
    if resume and dataclasses.replace(parsed, **free) != dataclasses.replace(default, resume=None):
        raise settings.SettingError(
            f"--resume {resume} uses the settings in its {config_file.NAME}; leave out all flags except --mesh.* and "
            "--hosts.*"
        )
    setting_checks.check(parsed)
    if parsed.model is None:
        return parsed
    if parsed.net != default.net:
        raise settings.SettingError("--net.* sets the size of a new model; leave it out with --model")
    # An absolute path lets the run be resumed from any folder.
    return dataclasses.replace(parsed, model=str(pathlib.Path(parsed.model).absolute()))


def _preset_fields(arguments: list[str]) -> dict[str, Any]:
    flags = {flag: settings.peek(arguments, f"--{flag}") for flag in ("data.path", "model", "published", "preset")}
    preset = settings.preset(
        flags["preset"] or "default",
        dialogues=flags["data.path"] is not None,
        pretrained=flags["model"] is not None,
        published=flags["published"],
    )
    return {field.name: getattr(preset, field.name) for field in dataclasses.fields(settings.Settings)}
