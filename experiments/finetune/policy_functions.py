"""Reward functions of the user within RL: the columns and tokens that they get, and checks of what they return."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from launch.run_settings import SettingError

from finetune import reward_functions

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
        self._function = reward_functions.find(spec)
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
            raise self._wrong(f"{type(returned).__name__} instead of a list of numbers") from None
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


def _accepted(function: Callable[..., Any]) -> tuple[str, ...]:
    """Returns the names in `OPTIONAL` that the function accepts as keywords."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return ()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(name for name in OPTIONAL if name in parameters and parameters[name].kind in kinds)


def _described(error: BaseException, function: Callable[..., Any]) -> str:
    """Returns the error and the line of the function's file, or else of another file, that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    file = getattr(getattr(inspect.unwrap(function), "__code__", None), "co_filename", None)
    frame = next((each for each in reversed(frames) if each.filename == file), frames[-1])
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    return f'{text} ({frame.filename}, line {frame.lineno}: "{frame.line}")'
