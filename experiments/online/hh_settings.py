"""Settings that hh.py adds to those of instructgpt.py. Each field's docstring is its ``--help`` text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from launch import setting_checks
from launch import settings as settings_lib
from launch.setting_checks import require
from launch.settings import SettingError


@dataclasses.dataclass(frozen=True)
class Online:
    """The rounds. Each collects a comparison set, merges it with those of earlier rounds, and trains a preference model
    and a policy from scratch."""

    sets: tuple[Literal["base", "rejection", "online"], ...] = ("base", "rejection", "online")
    """Whose answers are compared in each round: `base` for the SFT model's, `rejection` for the best of several of the
    SFT model's answers by the latest preference model, `online` for those of the latest policy, its snapshots and the
    policies of earlier rounds."""
    pairs: int = 4000
    """Number of labelled pairs in each round."""
    red_team: float = 0.3
    """Share of the pairs, and of the prompts of RL, that are requests for help with harm."""
    rejection: int = 4
    """Number of answers from which rejection sampling chooses (16 in HH)."""
    snapshots: int = 2
    """Number of snapshots of each policy whose answers are compared; the last is the final policy."""
    held_out: int = 300
    """Number of held-out pairs of each domain in each round, on which preference models are evaluated."""
    static: bool = True
    """Also train a preference model on as many pairs of the SFT model's answers as all rounds have, and a policy with
    it, for comparison (HH Figure 16)."""


@dataclasses.dataclass(frozen=True)
class PreferenceModel:
    """The preference models. --reward-model.learning-rate applies as well."""

    batch: int = 32
    """Pairs per step."""
    harmless_weight: float = 1.0
    """Weight of a harmlessness pair in the loss, that of a helpfulness pair being 1 (lambda in HH 5.1.2, from 1 to
    10)."""
    separate: bool = False
    """Train one head for helpfulness and one for harmlessness, each on its own pairs. The reward of RL is the weighted
    sum of their scores, each scaled to standard deviation 1."""
    score_weights: tuple[float, float] = (1.0, 1.0)
    """Weights of the helpfulness and the harmlessness score with --pm.separate."""


@dataclasses.dataclass(frozen=True)
class HHSettings(settings_lib.Settings):
    """Settings of hh.py, in addition to those of instructgpt.py."""

    command: ClassVar[str] = "hh"

    online: Online = dataclasses.field(default_factory=Online)
    pm: PreferenceModel = dataclasses.field(default_factory=PreferenceModel)


KL_COEF = 0.01
"""The KL coefficient unless a paper's settings are used. It is 0.001 in HH."""
SMOKE: dict[str, dict[str, Any]] = {
    "online": {"pairs": 96, "rejection": 4, "held_out": 32},
    "pm": {"batch": 16},
}
"""What the smoke preset changes."""


def unused(settings: HHSettings) -> Iterator[tuple[Sequence[str], str]]:
    """Yields the settings that have no effect on the run, and why."""
    yield ("comparisons", "reward_model.batch", "reward_model.heldout"), "on hh.py, which uses --online.* and --pm.*"
    yield ("sft.epochs",), "on hh.py, which trains only the SFT model with pretraining rows"
    yield ("hosts",), "on hh.py, which runs on a single host"
    names = ("temperature", "best_of", "best_of_prompts", "skills", "pretraining_rows", "transcripts", "split")
    yield [f"evaluation.{name}" for name in names], "on hh.py, which samples one answer to each held-out prompt"
    why = "on hh.py, which trains without a pretraining loss"
    yield from setting_checks.unused_ppo([settings.ppo], ptx=False, why=why)
    if not settings.pm.separate:
        yield ("pm.score_weights",), "without --pm.separate"
    if "rejection" not in settings.online.sets:
        yield ("online.rejection",), "without rejection in --online.sets"


def check(settings: HHSettings) -> None:
    """Raises SettingError for settings that are out of range."""
    online, pm = settings.online, settings.pm
    if settings.data.path is not None:
        raise SettingError("--data.path is not supported by hh.py, whose labelers need the built-in world")
    if not online.sets or online.sets[0] != "base":
        raise SettingError(f"--online.sets is {' '.join(online.sets)}; the first set must be base")
    for name, least in (("pairs", 8), ("rejection", 2), ("held_out", 8)):
        require(getattr(online, name) >= least, settings, f"online.{name}", f"at least {least}")
    require(1 <= online.snapshots <= 10, settings, "online.snapshots", "from 1 to 10")
    require(online.snapshots <= settings.ppo.iterations, settings, "online.snapshots", "at most --ppo.iterations")
    require(0 < online.red_team < 1, settings, "online.red_team", "above 0 and below 1")
    require(pm.batch >= 1, settings, "pm.batch", "at least 1")
    require(pm.harmless_weight > 0, settings, "pm.harmless_weight", "above 0")
    require(min(pm.score_weights) >= 0 < max(pm.score_weights), settings, "pm.score_weights", "at least 0, not both 0")


def accept(task: Any) -> None:
    """Raises SettingError if the model does not have the tokenizer of the built-in world."""
    if not task.in_world_words:
        raise SettingError(
            "--model has another tokenizer than the built-in world, whose prompts hh.py uses; give a model of "
            "instructgpt.py, or see docs/algorithms/iterated_online.md for rounds with a model of your own"
        )
