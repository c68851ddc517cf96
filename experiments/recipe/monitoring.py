"""Alarms of reward models and of reinforcement learning: told when they are raised, and kept for the results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from launch.settings import Settings

from rlhf_jax import metrics
from rlhf_jax.train import loop
from rlhf_jax.train import monitor as watch_lib

STAGES = ("reward_model", "heldout_reward_model", "ppo", "ppo_ptx")


def watched(log: metrics.MetricLog, stage: str, settings: Settings, tell: Callable[[str], None]) -> watch_lib.Watch:
    """The run's log of a stage, with alarms that are told, and that stop the run where that was asked for."""
    # Where rollouts are cut off on purpose, the sampler is meant to differ from the policy.
    thresholds = {"max_gap": math.inf} if settings.ppo.correct_sampler else {}
    return watch_lib.Watch(
        loop.StageLog(log, stage),
        warn=tell,
        stop=settings.on_alarm == "stop",
        rows=log.rows(stage),
        **thresholds,
    )


def raised(log: metrics.MetricLog, settings: Settings) -> list[dict[str, Any]]:
    """Every alarm of the run as results.json holds it; read from the rows, so that a resumed run has them all."""
    return [
        {"stage": stage, "step": alarm.step, "name": alarm.name, "message": alarm.message}
        for stage in STAGES
        for alarm in watched(log, stage, settings, lambda text: None).alarms
    ]


def ptx_coef(log: metrics.MetricLog) -> dict[str, float]:
    """PPO-ptx's coefficient in both normalisations (`train.ptx.coefficients`), as means over the run."""
    rows = log.rows("ppo_ptx")
    return {name: statistics.fmean(row[f"ptx_coef_{name}"] for row in rows) for name in ("per_token", "per_sequence")}
