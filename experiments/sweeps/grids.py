"""The grid of a sweep: which settings vary and over which values. This module imports neither JAX nor the library."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from launch import config_file, setting_checks
from launch.settings import PPO, SettingError, Settings

SWEPT = (
    *("kl_coef", "ptx_coef", "learning_rate", "critic_learning_rate", "clip", "value_clip", "lambda_", "discount"),
    *("missing_stop_score", "reward_clip", "value_coef", "entropy_coef", "kl_loss_coef", "kl_target", "kl_gain", "ema"),
    "max_grad_norm",
)
"""The --ppo settings that can be swept: those that the compiled step takes as inputs."""
DEFAULT_COEFS = (0.01, 0.03, 0.1, 0.3)
SHARED_STAGES = ("pretrain", "sft", "sft_mix", "comparisons", "reward_model", "heldout_reward_model")
SHARED_SETTINGS = (
    *("model", "seed", "data", "template", "world", "compute", "net", "pretrain", "sft", "comparisons"),
    *("reward_model", "ppo.temperature"),
)
"""Settings on which the models before RL depend."""
_WITH_SHARED_STAGES = ("instructgpt", "sweep", "compare")


@dataclasses.dataclass(frozen=True)
class Point:
    """A combination of values."""

    values: dict[str, float]
    """Values by name of the --ppo setting."""

    @property
    def name(self) -> str:
        """The values as text, such as ``kl_coef0.1-ptx_coef1``."""
        return "-".join(f"{name}{value:g}" for name, value in self.values.items())

    def applied_to(self, ppo: PPO, *, ptx_coef: float) -> PPO:
        """Returns the RL settings with these values; the pretraining loss has the weight ``ptx_coef`` by default."""
        return dataclasses.replace(ppo, **{"ptx_coef": ptx_coef} | self.values)


def points(over: Sequence[str], ppo: PPO) -> list[Point]:
    """Returns all combinations of the values in --over, in order; by default, of several KL coefficients.

    Raises:
        SettingError: An entry is not of the form NAME=VALUE,VALUE, or names a setting that cannot be swept.
    """
    if not over:
        return [Point({setting_checks.kl_field(ppo): coef}) for coef in DEFAULT_COEFS]
    axes: dict[str, list[float]] = {}
    for entry in over:
        given, equals, listed = entry.partition("=")
        name = given.removeprefix("--").removeprefix("ppo.").replace("-", "_")
        name = "lambda_" if name == "lambda" else name
        if not equals or not given.removeprefix("--").startswith("ppo.") or name not in SWEPT:
            known = ", ".join(setting_checks.flag_name(f"ppo.{each}").removeprefix("--") for each in SWEPT)
            raise SettingError(f"--over {entry}: give NAME=VALUE,VALUE, where NAME is one of {known}")
        try:
            values = [float(value) for value in listed.split(",")]
        except ValueError:
            raise SettingError(f"--over {entry}: {listed!r} is not a list of numbers, such as 0,0.02,0.2") from None
        if len(set(values)) < len(values) or name in axes:
            raise SettingError(f"--over {entry}: give each setting and each value once")
        axes[name] = values
    return [Point(dict(zip(axes, combination))) for combination in itertools.product(*axes.values())]


def settings_of(run: str) -> dict[str, Any]:
    """Returns the settings of instructgpt.py in the config.json of a run whose models a sweep can use, by field.

    Raises:
        SettingError: The folder is not a run, or the run has no such models.
    """
    values = config_file.read(run, flag="--from-run")
    if values["command"] not in _WITH_SHARED_STAGES:
        commands = ", ".join(f"{name}.py" for name in _WITH_SHARED_STAGES)
        raise SettingError(f"--from-run {run} is a run of {values['command']}.py; give a run of {commands}")
    found = config_file.from_dict(Settings, values)
    return {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
