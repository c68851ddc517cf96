"""Settings of constitutional.py in the built-in world. The docstring of a field is its help text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from launch import setting_checks
from launch import settings as settings_lib
from launch.setting_checks import require

PRINCIPLES = 16
"""Number of principles of `feedback.HARMLESSNESS`, which is not imported here so that ``--help`` is fast."""


@dataclasses.dataclass(frozen=True)
class Revision:
    """Critiques and revisions of the answers of the helpful-only policy."""

    prompts: int = 1000
    """Number of red-team prompts that are answered and revised."""
    rounds: int = 4
    """Number of revisions of each answer. SL-CAI is trained on all of them."""
    critique: bool = True
    """Ask for a critique before each revision. --revision.no-critique revises directly."""
    principles: int = PRINCIPLES
    """Number of principles, of which one is sampled for each revision and each comparison."""
    helpful_prompts: int = 1000
    """Number of benign prompts, for each of which SL-CAI is also trained on two answers of the helpful-only policy."""
    miss: float = 0.15
    """Probability that the simulated editor overlooks the flaws of an answer."""
    fail: float = 0.15
    """Probability that the simulated editor leaves an answer as it is although it has seen a flaw."""


@dataclasses.dataclass(frozen=True)
class Judge:
    """The simulated judge of harmlessness, and how its labels are used."""

    pairs: int = 1500
    """Number of red-team prompts to which two answers of SL-CAI are compared. A fifth as many held-out prompts measure
    the agreement of the judge with the gold harmlessness."""
    strength: float = 4.0
    """Squared signal-to-noise ratio of the judge. It is right about a pair that differs by 1 in gold harmlessness with
    probability Phi(sqrt(strength) / 2): 0.84 for 4."""
    overconfidence: float = 1.0
    """Factor of the judge's log-odds. 1 is calibrated; larger values imitate a chain of thought."""
    position_bias: float = 0.5
    """Log-odds by which the judge prefers the first place. Both orders are asked and averaged."""
    labels: Literal["soft", "hard"] = "soft"
    """Whether the preference model is trained on the judge's probabilities or on the preferred answers."""
    clamp: tuple[float, float] = (0.0, 1.0)
    """Bounds of the judge's probabilities, such as 0.4 0.6 for an overconfident judge."""


@dataclasses.dataclass(frozen=True)
class ConstitutionalSettings(settings_lib.Settings):
    """Settings of constitutional.py, in addition to those of instructgpt.py."""

    command: ClassVar[str] = "constitutional"

    revision: Revision = dataclasses.field(default_factory=Revision)
    judge: Judge = dataclasses.field(default_factory=Judge)
    red_team: float = 0.5
    """Share of the red-team prompts in RL and in the evaluation."""


def adjust(preset: Any) -> Any:
    """Returns the preset of the command."""
    if preset.preset == "smoke":
        return dataclasses.replace(
            preset,
            comparisons=dataclasses.replace(preset.comparisons, min_k=4, max_k=4),
            revision=Revision(prompts=96, helpful_prompts=96),
            judge=Judge(pairs=128),
        )
    comparisons = dataclasses.replace(preset.comparisons, prompts=2000)
    ppo = dataclasses.replace(preset.ppo, iterations=20)
    return dataclasses.replace(preset, comparisons=comparisons, ppo=ppo)


def unused(settings: ConstitutionalSettings) -> Iterator[tuple[Sequence[str], str]]:
    """Yields the settings that have no effect on the run, and why."""
    own = "on constitutional.py"
    yield ("sft.mix", "sft.mix_epochs"), f"{own}, which has no SFT model with pretraining text"
    names = ("best_of", "best_of_prompts", "skills", "pretraining_rows")
    yield [f"evaluation.{name}" for name in names], f"{own}, which does not measure this"
    yield ("reward_model.heldout",), f"{own}, which trains one preference model"
    yield ("hosts",), f"{own}, which runs on a single host"
    yield from setting_checks.unused_ppo([settings.ppo], ptx=False, why=f"{own}, which trains without pretraining text")


def check(settings: ConstitutionalSettings) -> None:
    """Raises SettingError for the first setting that is out of range or not supported."""
    if settings.model is not None or settings.data.path is not None:
        flag = "--model" if settings.model is not None else "--data.path"
        other = "--data.path" if settings.model is not None else "--model"
        raise settings_lib.SettingError(
            f"{flag} without {other}: give both to revise and compare answers of your own model, or neither for the "
            "built-in world"
        )
    if settings.published is not None:
        raise settings_lib.SettingError("--published selects settings of InstructGPT's recipe; leave it out")
    for name in ("revision.prompts", "revision.rounds", "revision.helpful_prompts", "judge.pairs"):
        require(setting_checks.value_of(settings, name) >= 1, settings, name, "at least 1")
    require(1 <= settings.revision.principles <= PRINCIPLES, settings, "revision.principles", f"from 1 to {PRINCIPLES}")
    for name in ("revision.miss", "revision.fail"):
        require(0 <= setting_checks.value_of(settings, name) < 1, settings, name, "at least 0 and below 1")
    for name in ("judge.strength", "judge.overconfidence"):
        require(setting_checks.value_of(settings, name) > 0, settings, name, "positive")
    low, high = settings.judge.clamp
    require(0 <= low <= 0.5 <= high <= 1, settings, "judge.clamp", "two numbers from 0 to 1 around 0.5")
    require(0 < settings.red_team < 1, settings, "red_team", "above 0 and below 1")
    n = settings.evaluation.prompts
    if not 0 < round(settings.red_team * n) < n:
        raise settings_lib.SettingError(
            f"--evaluation.prompts {n} with --red-team {settings.red_team:g} has no red-team or no benign prompt; give "
            "more prompts"
        )
