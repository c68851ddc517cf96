"""Loads reward functions that users write in Python, such as a check of the answer's format."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from launch.run_settings import SettingError

from rlhf_jax.data import errors

Messages = Sequence[dict[str, Any]]
"""A prompt as a list of messages with ``role`` and ``content``."""
Records = Sequence[Mapping[str, Any]]
"""The other columns of each prompt."""
RewardFunction = Callable[[Sequence[Messages], Sequence[str], Records], np.ndarray]
"""``(prompts, responses, records) -> scores_B``."""


def load(text: str, *, flag: str = "--reward") -> RewardFunction:
    """Returns the function that ``text`` names.

    The function receives a list of prompts, each a list of chat messages, and a list with one answer to each, as text.
    If it has a parameter ``records``, it also receives the other columns of each prompt. It must return one finite
    number per answer.

    Args:
        text: ``module:function`` or ``path/to/file.py:function``. Modules are also found in the working directory.
        flag: The flag that error messages name.

    Returns:
        A function that also checks the result, and raises DataError if it is unusable or the function fails.

    Raises:
        SettingError: There is no such module or function.
    """
    function = find(text, flag=flag)
    try:
        with_records = "records" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a function without a signature, such as some written in C
        with_records = False

    def checked(prompts: Sequence[Messages], responses: Sequence[str], records: Records) -> np.ndarray:
        options = {"records": list(records)} if with_records else {}
        try:
            values = function(list(prompts), list(responses), **options)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise errors.DataError(
                f"{flag} {text} failed: {type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
            ) from error
        try:
            scores = np.asarray(values, np.float64)
        except (TypeError, ValueError) as error:
            raise errors.DataError(f"{flag} {text} must return one number per answer: {error}") from error
        if scores.shape != (len(responses),):
            raise errors.DataError(
                f"{flag} {text} returned an array of shape {scores.shape} for {len(responses)} answers; it must return "
                "one number per answer"
            )
        if not np.isfinite(scores).all():
            row = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise errors.DataError(f"{flag} {text} returned {scores[row]} for the answer {responses[row][:200]!r}")
        return scores

    return checked


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
    except Exception as error:  # whatever the user's module raises
        raise SettingError(f"{where}: cannot import {name} ({type(error).__name__}: {error})") from error
