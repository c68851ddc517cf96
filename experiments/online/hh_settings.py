"""Settings that hh.py adds to those of instructgpt.py. Each field's docstring is its ``--help`` text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from constitution import judge_settings
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
    labels: Literal["simulated", "judge", "people"] = "simulated"
    """Who compares the answers: the simulated labelers of the built-in world; a model, given by --judge; or people, for
    whom the run adds the pairs of each round to a comparison store and ends, until it is resumed with the labels."""
    store: str | None = None
    """Comparison store in which people label, which may have other sets. None uses comparisons.sqlite in the run
    folder."""
    least_labels: float = 1.0
    """Least share of the pairs that people must label before a run continues. Pairs without a label are left out."""
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
class HHSettings(judge_settings.JudgeSettings, settings_lib.Settings):
    """Settings of hh.py, in addition to those of instructgpt.py."""

    command: ClassVar[str] = "hh"
    inputs: ClassVar[tuple[str, ...]] = (*settings_lib.Settings.inputs, "judge")

    judge: str | None = None
    """The judge of --online.labels judge: a folder in Hugging Face format, or the address of an interface of OpenAI's
    form, such as http://localhost:8000/v1. None is a simulated judge of harmlessness, with simulated labelers of
    helpfulness."""
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
    yield from _unused_labels(settings)


def _unused_labels(settings: HHSettings) -> Iterator[tuple[Sequence[str], str]]:
    labels, judge = settings.online.labels, settings.judge
    if labels != "people":
        yield ("online.store", "online.least_labels"), f"with --online.labels {labels}"
    of_judge = [field.name for field in dataclasses.fields(judge_settings.JudgeSettings)]
    if labels != "judge":
        yield of_judge, f"with --online.labels {labels}"
    elif judge is None:
        yield ("judge_model", "key_variable", "few_shot", "style"), "without --judge"
    if labels == "judge" and not judge_settings.is_address(judge):
        yield ("judge_model", "key_variable", "think_tokens"), "without an address in --judge"
    elif labels == "judge":
        yield ("style",), "with an address in --judge"
    if labels == "people" or (labels == "judge" and judge is not None):
        names = ("labelers", "spread", "polite_taste", "agreement", "tie_width", "lapse")
        yield [f"world.{name}" for name in names], "without simulated labelers"


def check(settings: HHSettings) -> None:
    """Raises SettingError for settings that are out of range."""
    online, pm = settings.online, settings.pm
    servers = [settings.judge] if settings.judge and judge_settings.is_address(settings.judge) else []
    judge_settings.check(settings, servers)
    if settings.data.path is not None:
        raise SettingError("--data.path is not supported by hh.py, which uses the prompts of the built-in world")
    if not online.sets or online.sets[0] != "base":
        raise SettingError(f"--online.sets is {' '.join(online.sets)}; the first set must be base")
    for name, least in (("pairs", 8), ("rejection", 2), ("held_out", 8)):
        require(getattr(online, name) >= least, settings, f"online.{name}", f"at least {least}")
    require(1 <= online.snapshots <= 10, settings, "online.snapshots", "from 1 to 10")
    require(online.snapshots <= settings.ppo.iterations, settings, "online.snapshots", "at most --ppo.iterations")
    require(0 < online.red_team < 1, settings, "online.red_team", "above 0 and below 1")
    require(0 < online.least_labels <= 1, settings, "online.least_labels", "above 0 and at most 1")
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
