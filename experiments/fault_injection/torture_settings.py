"""Settings of torture.py and their checks. The docstring of a field is its help text."""

from __future__ import annotations

import dataclasses

from launch.setting_checks import require
from launch.settings import SettingError

STAGES = ("sft", "reward_model", "dpo", "ppo")


@dataclasses.dataclass(frozen=True)
class TortureSettings:
    """Settings of torture.py."""

    kills: int = 100
    """Number of SIGKILLs, divided among the stages."""
    terms: int = 12
    """Number of SIGTERMs, divided among the stages. After each one, the run must save and exit with status 75."""
    flips: int = 100
    """Number of flipped bits. Half are drawn from all bits of a checkpoint, the others each from a random file."""
    truncations: int = 20
    """Number of files truncated to a random length."""
    deletions: int = 20
    """Number of files deleted."""
    stages: tuple[str, ...] = STAGES
    """Stages to interrupt. The newest checkpoint of the last stage is corrupted."""
    steps: int = 60
    """Iterations per run."""
    save_every: int = 4
    """Iterations between checkpoints."""
    jobs: int = 2
    """Number of stages that run concurrently."""
    seed: int = 0
    """Seed of the runs and of the times of interruption, which also depend on the speed of the machine."""
    out: str | None = None
    """Output folder. None uses runs/torture-TIME."""


def check(settings: TortureSettings) -> None:
    """Raises SettingError, naming the flag, for an invalid setting."""
    for names, least in ((("kills", "terms", "flips", "truncations", "deletions"), 0), (("save_every", "jobs"), 1)):
        for name in names:
            require(getattr(settings, name) >= least, settings, name, f"at least {least}")
    if settings.steps < 2 * settings.save_every:
        raise SettingError(
            f"--steps is {settings.steps}; it must be at least twice --save-every, so that there are two checkpoints"
        )
    if not settings.stages or not set(settings.stages) <= set(STAGES):
        raise SettingError(f"--stages is {' '.join(settings.stages)!r}; it must be one or more of {', '.join(STAGES)}")
