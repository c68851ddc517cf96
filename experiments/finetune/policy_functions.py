"""Reward functions of the user within RL: the columns and tokens that they get, and checks of what they return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        SettingError: There is no such function, or it has other parameters.

    Attributes:
        name: Name of the function.
        per_token: Whether it returns a number for each token; None before the first call.
        failure: The error of the last call; None if it succeeded.
    """

    def __init__(self, spec: str) -> None:
        """Imports the module, finds the function and checks its parameters."""
        self.per_token: bool | None = None
        self.failure: SettingError | None = None
        self._where = f"--reward {spec}"
        self._function = reward_functions.find(spec)
        self.name = spec.rpartition(":")[2]
        self._optional = reward_functions.accepted(self._function, OPTIONAL, where=self._where)

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
            values = reward_functions.call(self._function, prompts, answers, options, where=self._where, tokens=True)
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
        return reward_functions.unusable(what, where=self._where, tokens=True)
