"""Parses the command lines of experiments; imports neither jax nor the library, so that ``--help`` is fast."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import pathlib
import signal
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from launch import config_file, setting_checks, settings

S = TypeVar("S", bound=settings.Settings)
T = TypeVar("T")
R = TypeVar("R", bound=settings.RunSettings)

_LENGTHS = {"steps", "epochs", "iterations"}
"""Names of settings of how long a model is trained."""
_HELP = {"-h", "--help"}


def answer_help(parse: Callable[[list[str]], Any]) -> None:
    """Prints the help and exits if the command line contains ``--help``.

    Commands call this after they define their settings and before their slow imports.
    """
    if _HELP & set(sys.argv[1:]):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a closed pipe, as in `--help | head`, ends the process silently
        parse(sys.argv[1:])


def parse_as(kind: type[T], arguments: list[str], *, prog: str, doc: str | None, default: T | None = None) -> T:
    """Returns a settings dataclass parsed from the command line; ``doc`` and the fields' docstrings form the help."""
    import tyro  # imported late, because use_huge_pages restarts the process and thus repeats all earlier imports

    if _HELP & set(arguments):
        _set_field_help(kind)
    options: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(kind, args=arguments, prog=prog, description=_join_lines(doc or ""), **options)


def _join_lines(text: str) -> str:
    """Joins the lines of each paragraph that is not indented."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(each if "\n " in f"\n{each}" else " ".join(each.split("\n")) for each in paragraphs)


def _set_field_help(kind: type) -> None:
    """Sets the help text of each field to its docstring on one line, since tyro would keep the line breaks."""
    helps: dict[str, str] = {}
    for cls in reversed([each for each in kind.__mro__ if dataclasses.is_dataclass(each)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(definition, ast.ClassDef)
        for pair in itertools.pairwise(definition.body):
            match pair:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    helps[name] = " ".join(text.split())
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in helps:
            field.metadata = types.MappingProxyType({"help": helps[field.name]})
        if dataclasses.is_dataclass(hints[field.name]):
            _set_field_help(hints[field.name])


def parse(
    kind: type[S],
    arguments: list[str],
    *,
    doc: str | None,
    adjust: Callable[[Any], Any] = lambda preset: preset,
    unused: Callable[[S], setting_checks.Unused] = lambda parsed: setting_checks.unused_ppo([parsed.ppo]),
    runs: Callable[[S], Sequence[settings.PPO]] = lambda parsed: [parsed.ppo],
) -> S:
    """Parses and checks the settings of a command.

    The flags override the settings of the preset or, with --resume, the --mesh and --hosts settings of the resumed run.

    Args:
        kind: The settings class of the command.
        arguments: The command line without the program's name.
        doc: The description that ``--help`` prints.
        adjust: Changes the preset for the command, before the flags are applied.
        unused: Returns the settings that have no effect on the run. They are refused if they differ from the preset.
        runs: Returns the settings of the command's RL runs.

    Returns:
        The settings.

    Raises:
        SettingError: A setting is out of range or conflicts with another, or the run cannot be resumed.
    """
    resume = settings.peek(arguments, "--resume")
    default = config_file.read_settings(kind, resume) if resume else adjust(kind(**_preset_fields(arguments)))
    stops = ["stop_after"] if hasattr(default, "stop_after") else []
    parsed = _parse_or_resume(kind, arguments, doc=doc, default=default, resume=resume, free=("mesh", "hosts", *stops))
    setting_checks.check_used(parsed, default, unused(parsed))
    setting_checks.check(parsed, runs=runs(parsed))
    setting_checks.check_log(parsed)
    return with_absolute_paths(parsed)


def parse_stage(
    kind: type[R],
    arguments: list[str],
    *,
    doc: str | None,
    check: Callable[[R], None] = lambda parsed: None,
    preset: R | None = None,
) -> R:
    """Parses and checks the settings of a command that does not extend those of instructgpt.py.

    Args:
        kind: The settings class of the command.
        arguments: The command line without the program's name.
        doc: The description that ``--help`` prints.
        check: Raises SettingError for settings that are out of range; those of `StageSettings` are checked anyway.
        preset: The settings before flags are applied; None uses the defaults of ``kind``.

    Returns:
        The settings.

    Raises:
        SettingError: A setting is out of range or conflicts with another, or the run cannot be resumed.
    """
    resume = settings.peek(arguments, "--resume")
    default = config_file.read_settings(kind, resume) if resume else preset
    parsed = _parse_or_resume(kind, arguments, doc=doc, default=default, resume=resume, free=("mesh",))
    setting_checks.check_stage(parsed)
    setting_checks.check_log(parsed)
    check(parsed)
    return with_absolute_paths(parsed)


def _parse_or_resume(
    kind: type[T], arguments: list[str], *, doc: str | None, default: Any, resume: str | None, free: Sequence[str]
) -> T:
    """Parses the command line. With --resume, only the settings in ``free`` may differ from ``default``.

    They may because a checkpoint can be restored on any mesh and number of hosts.
    """
    parsed: Any = parse_as(kind, arguments, prog=f"{kind.command}.py", doc=doc, default=default)  # type: ignore
    if resume:
        same = {"resume": None} | {name: getattr(default, name) for name in free}
        if dataclasses.replace(parsed, **same) != dataclasses.replace(default, resume=None):
            groups = [dataclasses.is_dataclass(getattr(default, name)) for name in free]
            flags = " and ".join(setting_checks.flag_name(name) + ".*" * group for name, group in zip(free, groups))
            changed = [
                name
                for name in setting_checks.field_names(default)
                if name.partition(".")[0] not in same
                and setting_checks.value_of(parsed, name) != setting_checks.value_of(default, name)
            ]
            more = "; to train for longer, start a new run whose model is the folder of this run"
            raise settings.SettingError(
                f"--resume {resume} takes all settings from its {config_file.NAME}; leave out "
                f"{' and '.join(map(setting_checks.flag_name, changed))} (only {flags} may differ)"
                f"{more if {name.rpartition('.')[2] for name in changed} & _LENGTHS else ''}"
            )
    return parsed


def with_absolute_paths(parsed: R) -> R:
    """Makes the paths of models and data absolute, so that the run can be resumed from any working directory."""

    def absolute(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(absolute, value))
        path = pathlib.Path(value)
        known = "://" not in value and (path.exists() or any(c in value for c in "*?["))
        return str(path.absolute()) if known else value

    for name in parsed.inputs:
        group, _, last = name.rpartition(".")
        holder = getattr(parsed, group) if group else parsed
        if (value := getattr(holder, last)) is not None:
            changed: Any = dataclasses.replace(holder, **{last: absolute(value)})
            parsed = dataclasses.replace(parsed, **{group: changed}) if group else changed
    return parsed


def _preset_fields(arguments: list[str]) -> dict[str, Any]:
    flags = {flag: settings.peek(arguments, f"--{flag}") for flag in ("data.path", "model", "published", "preset")}
    preset = settings.preset(
        flags["preset"] or "default",
        dialogues=flags["data.path"] is not None,
        pretrained=flags["model"] is not None and not settings.is_architecture(flags["model"]),
        published=flags["published"],
    )
    return {field.name: getattr(preset, field.name) for field in dataclasses.fields(settings.Settings)}
