"""Loads reward functions that users write in Python, such as a check of the answer's format."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from launch.run_settings import SettingError

from rlhf_jax.data import errors

Messages = Sequence[dict[str, Any]]
"""A prompt as a list of messages with ``role`` and ``content``."""
Records = Sequence[Mapping[str, Any]]
"""The other columns of each prompt."""
ScoreAnswers = Callable[[Sequence[Messages], Sequence[str], Records], np.ndarray]
"""``(prompts, answers, records) -> scores_B``; `reads_records` tells whether it uses the records."""
Scores = list[float] | list[list[float]]
"""A number for each answer, or for each of its tokens."""


def load(text: str, *, flag: str = "--reward") -> ScoreAnswers:
    """Returns the function that ``text`` names.

    The function receives a list of prompts, each a list of chat messages, and a list with one answer to each, as text.
    If it has a parameter ``records``, it also receives the other columns of each prompt. It must return one finite
    number per answer.

    Args:
        text: ``module:function`` or ``path/to/file.py:function``. Modules are also found in the working directory.
        flag: The flag that error messages name.

    Returns:
        A function that also checks the result, and raises SettingError if it is unusable or the function fails.

    Raises:
        SettingError: There is no such module or function, or it cannot be called with these lists.
    """
    where, function = f"{flag} {text}", find(text, flag=flag)
    optional = accepted(function, ("records",), where=where)

    def checked(prompts: Sequence[Messages], answers: Sequence[str], records: Records) -> np.ndarray:
        options = {"records": records} if optional else {}
        values = call(function, prompts, answers, options, where=where)
        scores = np.zeros(len(values))
        for row, value in enumerate(values):
            if value.ndim or not np.isfinite(value):
                raise unusable(f"{_shown(value)} for the answer {answers[row][:200]!r}", where=where)
            scores[row] = value
        return scores

    setattr(checked, "reads_records", bool(optional))  # noqa: B010
    return checked


def note_of_read_columns(functions: Iterable[Any], counts: errors.DropCount, prompts: Iterable[Any]) -> str:
    """Returns a line about the columns with text that only the functions receive, which are then no longer unused.

    The line is empty if there are no such columns, or if no function has a parameter ``records``.

    Args:
        functions: Functions of `load`, or `RewardFunction`.
        counts: The counts of the prompts that were read.
        prompts: The records of the prompts.
    """
    if not any(each.reads_records for each in functions):
        return ""
    names = sorted(set(counts.unused) & {name for each in prompts for name in each.metadata})
    for name in names:
        del counts.unused[name]
    return f"kept for the reward functions, not shown to the model: {', '.join(map(repr, names))}" if names else ""


class RewardFunction:
    """A function for RL, which returns a number for each answer, or for each of its tokens.

    It gets the lists that `load` describes and, if it has a parameter ``tokens``, the tokens of each answer as texts. A
    token that is only a part of a character is the replacement character.

    Args:
        spec: MODULE:FUNCTION or FILE.py:FUNCTION.

    Raises:
        SettingError: There is no such function, or it has other parameters.

    Attributes:
        name: Name of the function.
        reads_records: Whether it has the parameter ``records``.
        per_token: Whether it returns a number for each token; None before the first call.
        failure: The error of the last call; None if it succeeded.
    """

    def __init__(self, spec: str) -> None:
        """Imports the module, finds the function and checks its parameters."""
        self.per_token: bool | None = None
        self.failure: SettingError | None = None
        self._where = f"--reward {spec}"
        self._function = find(spec)
        self.name = spec.rpartition(":")[2]
        self._optional = accepted(self._function, ("records", "tokens"), where=self._where)
        self.reads_records = "records" in self._optional

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
        every = {"tokens": tokens, "records": records}
        options = {name: every[name] for name in self._optional}
        try:
            values = call(self._function, prompts, answers, options, where=self._where, tokens=True)
            return self._checked(values, [len(each) for each in tokens])
        except SettingError as error:
            self.failure = error
            raise

    def _checked(self, values: Sequence[np.ndarray], lengths: Sequence[int]) -> Scores:
        per_token = any(each.ndim for each in values)
        if self.per_token is not None and per_token != self.per_token:
            raise self._wrong("once numbers for answers and once numbers for tokens")
        for i, (each, length) in enumerate(zip(values, lengths)):
            if per_token and each.shape != (length,):
                raise self._wrong(f"shape {each.shape} for answer {i}, which has {length} tokens")
            if not np.isfinite(each).all():
                shown = f"{each}" if not each.ndim else "a number that is not finite"
                raise self._wrong(f"{shown} for answer {i}")
        self.per_token = per_token
        return [each.tolist() for each in values]

    def _wrong(self, what: str) -> SettingError:
        return unusable(what, where=self._where, tokens=True)


def accepted(function: Callable[..., Any], optional: Sequence[str], *, where: str) -> tuple[str, ...]:
    """Returns which of the names in ``optional`` the function accepts as keywords.

    Raises:
        SettingError: The function cannot be called with prompts, answers and these keywords.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a function without a signature, such as some written in C
        return ()
    parameters = signature.parameters
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = tuple(name for name in optional if name in parameters and parameters[name].kind in kinds)
    wrong = "it is a coroutine function" if inspect.iscoroutinefunction(function) else None
    try:
        signature.bind([], [], **dict.fromkeys(names))
    except TypeError as error:
        wrong = str(error)
    if wrong is None:
        return names
    name = getattr(function, "__name__", type(function).__name__)
    raise SettingError(
        f"{where} cannot be used: {wrong}; it is {name}{signature}, but is called with (prompts, answers), two lists "
        f"of equal length, and with {' and '.join(optional)} if it has "
        f"{'such parameters' if len(optional) > 1 else 'such a parameter'}"
    )


def call(
    function: Callable[..., Any],
    prompts: Sequence[Messages],
    answers: Sequence[str],
    options: Mapping[str, Sequence[Any]],
    *,
    where: str,
    tokens: bool = False,
) -> list[np.ndarray]:
    """Calls a user's function and returns its value for each answer as an array.

    Args:
        function: The function.
        prompts: Prompts as chat messages.
        answers: Texts of the answers.
        options: Further lists, by the names of the parameters that receive them.
        where: Beginning of error messages, such as ``--reward rewards.py:score``.
        tokens: Whether error messages say that tokens may have numbers.

    Raises:
        SettingError: The function failed, or did not return one value that consists of numbers for each answer.
    """
    given = errors.counted(len(answers), "answers")
    try:
        returned = function(list(prompts), list(answers), **{name: list(value) for name, value in options.items()})
        is_list = hasattr(returned, "__iter__") and not isinstance(returned, str | bytes | Mapping)
        values = list(returned) if is_list and getattr(returned, "shape", None) != () else None
    except (Exception, SystemExit) as error:
        columns = _columns(error, options.get("records", ()))
        raise SettingError(f"{where} failed on {given}: {_described(error, function)}{columns}") from error
    if values is None:
        raise unusable(f"{_shown(returned)} for {given}", where=where, tokens=tokens)
    if len(values) != len(answers):
        raise unusable(f"{errors.counted(len(values), 'values')} for {given}", where=where, tokens=tokens)
    arrays = []
    for i, value in enumerate(values):
        if value is None or (isinstance(value, list | tuple) and any(each is None for each in value)):
            what = "None" if value is None else "a list with None"
            raise unusable(f"{what} for answer {i}", where=where, tokens=tokens)
        try:
            arrays.append(np.asarray(value, np.float32))
        except (TypeError, ValueError):
            raise unusable(f"{_shown(value)} for answer {i}", where=where, tokens=tokens) from None
    return arrays


def unusable(what: str, *, where: str, tokens: bool = False) -> SettingError:
    """Returns the error for a function that returned ``what``; ``tokens`` is whether tokens may have numbers."""
    more = ", or for each answer a list with one for each token" if tokens else ""
    return SettingError(f"{where} returned {what}; it must return one finite number for each answer{more}")


def _shown(value: Any) -> str:
    """Returns a value in words, such as ``nan``, ``the str 'a'`` or ``an array of shape (2, 3)``."""
    shape = getattr(value, "shape", None)
    if shape:
        return f"an array of shape {tuple(shape)}"
    if value is None or shape == () or isinstance(value, float | int):
        return str(value)
    return f"the {type(value).__name__} {repr(value)[:80]}"


def _columns(error: BaseException, records: Records) -> str:
    """Returns the columns of the prompts, to be added to the error about a missing one."""
    if not isinstance(error, KeyError) or not records or all(error.args[0] in each for each in records):
        return ""
    names = sorted({repr(name) for each in records for name in each})
    return f"; the columns of the prompts are {', '.join(names)}" if names else "; the prompts have no other columns"


def _described(error: BaseException, function: Callable[..., Any]) -> str:
    """Returns the error and the line of the user's code that raised it, which is unknown if the call itself failed."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is the call
    file = getattr(getattr(inspect.unwrap(function), "__code__", None), "co_filename", None)
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    if not frames:
        return text
    frame = next((each for each in reversed(frames) if each.filename == file), frames[-1])
    return f'{text} ({frame.filename}, line {frame.lineno}: "{frame.line}")'


def find(text: str, *, flag: str = "--reward") -> Callable[..., Any]:
    """Returns the function that ``text`` names, as in `load`, without checks of its results."""
    module_name, colon, name = text.rpartition(":")
    if not colon or not module_name or not name:
        raise SettingError(f"{flag} is {text!r}; it must have the form module:function or path/to/file.py:function")
    function = getattr(_import(module_name, f"{flag} {text}"), name, None)
    if not callable(function):
        raise SettingError(f"{flag} {text}: {module_name} has no function {name}")
    return function


def _import(name: str, where: str) -> Any:
    """Imports a module by its name or by the path of its file."""
    try:
        if name.endswith(".py"):
            path = pathlib.Path(name)
            if not path.is_file():
                raise SettingError(f"{where}: {name} does not exist")
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules.setdefault(path.stem, module)
            spec.loader.exec_module(module)
            return module
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        return importlib.import_module(name)
    except SettingError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        raise SettingError(f"{where}: cannot import {name} ({type(error).__name__}: {error})") from error
