"""Reward functions of the user: loading, calling, and checks of what they return."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pathlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from launch.run_settings import SettingError

Scores = list[float] | list[list[float]]
OPTIONAL = ("records", "tokens")


class RewardFunction:
    """A function ``(prompts, answers)`` of the user that returns a number for each answer, or for each of its tokens.

    Args:
        spec: MODULE:FUNCTION or FILE.py:FUNCTION.

    Raises:
        SettingError: There is no such function.

    Attributes:
        name: Name of the function.
        per_token: Whether it returns a number for each token; None before the first call.
        failure: The error of the last call; None if it succeeded.
    """

    def __init__(self, spec: str) -> None:
        """Imports the module and finds the function."""
        self.spec, self.per_token, self.failure = spec, None, None
        self.per_token: bool | None
        self.failure: SettingError | None
        self._function = _load(spec)
        self.name = spec.rpartition(":")[2]
        self._optional = _accepted(self._function)

    def __call__(
        self,
        prompts: Sequence[list[dict[str, Any]]],
        answers: Sequence[str],
        tokens: Sequence[list[str]],
        records: Sequence[Mapping[str, Any]],
    ) -> Scores:
        """Calls the function and returns its numbers.

        Args:
            prompts: Chat messages of each prompt.
            answers: Text of each answer.
            tokens: The tokens of each answer as texts, which a function with the parameter ``tokens`` receives.
            records: Other columns of each prompt, which a function with the parameter ``records`` receives.

        Raises:
            SettingError: The function raised an exception or returned something else; the error is also `failure`.
        """
        optional = {"tokens": tokens, "records": records}
        try:
            try:
                returned = self._function(
                    list(prompts), list(answers), **{name: list(optional[name]) for name in self._optional}
                )
            except Exception as error:
                raise SettingError(f"--reward {self.spec} failed: {_described(error, self._function)}") from error
            return self._checked(returned, [len(each) for each in tokens])
        except SettingError as error:
            self.failure = error
            raise

    def _checked(self, returned: Any, lengths: Sequence[int]) -> Scores:
        try:
            values = [np.asarray(each, np.float32) for each in returned]
        except (TypeError, ValueError):
            raise self._wrong(f"{type(returned).__name__} with something other than numbers") from None
        if len(values) != len(lengths):
            raise self._wrong(f"{len(values)} values for {len(lengths)} answers")
        per_token = any(each.ndim for each in values)
        if self.per_token is not None and per_token != self.per_token:
            raise self._wrong("once numbers for answers and once numbers for tokens")
        for i, (each, length) in enumerate(zip(values, lengths)):
            if per_token and each.shape != (length,):
                raise self._wrong(f"shape {each.shape} for answer {i}, which has {length} tokens")
            if not np.isfinite(each).all():
                raise self._wrong(f"a number that is not finite for answer {i}")
        self.per_token = per_token
        return [each.tolist() for each in values]

    def _wrong(self, what: str) -> SettingError:
        return SettingError(
            f"--reward {self.spec} returned {what}; it must return one finite number for each answer, or for each "
            "answer a list with one for each token"
        )


def _load(spec: str) -> Callable[..., Any]:
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise SettingError(f"--reward is {spec!r}; it must be MODULE:FUNCTION or FILE.py:FUNCTION")
    try:
        module = _load_file(place) if place.endswith(".py") else _import(place)
    except (ImportError, FileNotFoundError) as error:
        where = "" if place.endswith(".py") else "; modules are searched in the working directory and the environment"
        raise SettingError(f"--reward {spec}: cannot import {place}: {error}{where}") from error
    except Exception as error:
        raise SettingError(f"--reward {spec}: importing {place} failed: {_described(error, None)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise SettingError(f"--reward {spec}: {place} has no function {name}")
    return function


def _load_file(path: str) -> Any:
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError("there is no such file")
    spec = importlib.util.spec_from_file_location(f"reward_{pathlib.Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    folder = str(pathlib.Path(path).parent)
    if folder not in sys.path:  # after the library's own modules, so that no file of the user hides one of them
        sys.path.append(folder)
    spec.loader.exec_module(module)
    return module


def _import(name: str) -> Any:
    if (folder := str(pathlib.Path.cwd())) not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def _accepted(function: Callable[..., Any]) -> tuple[str, ...]:
    """Returns the names in `OPTIONAL` that the function accepts as keywords."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return ()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(name for name in OPTIONAL if name in parameters and parameters[name].kind in kinds)


def _described(error: BaseException, function: Callable[..., Any] | None) -> str:
    """Returns the error and the line of the user's code, or else of other code, that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    code = inspect.unwrap(function) if function is not None else None
    file = getattr(getattr(code, "__code__", None), "co_filename", None)
    frame = next((each for each in reversed(frames) if each.filename == file), frames[-1])
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    return f'{text} ({frame.filename}, line {frame.lineno}: "{frame.line}")'
