"""Alarms of reward models and RL: printed when they are raised, and read back from the log for the results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from launch.settings import Settings

from rlhf_jax import metrics
from rlhf_jax.train import loop, monitor

STAGES = ("reward_model", "heldout_reward_model", "ppo", "ppo_ptx")


def watch_stage(
    log: metrics.MetricLog, stage: str, settings: Settings, print_alarm: Callable[[str], None]
) -> monitor.Watch:
    """Returns the log of a stage with alarms, which stop the run with --on-alarm stop.

    Args:
        log: The run's log; its earlier rows of the stage are checked too.
        stage: The stage's name.
        settings: The settings of the run.
        print_alarm: Called with the text of every new alarm.

    Returns:
        A ``log`` for `loop.fit`.
    """
    # With truncated rollouts the sampler differs from the policy on purpose.
    thresholds = {"max_gap": math.inf} if settings.ppo.correct_sampler else {}
    return monitor.Watch(
        loop.StageLog(log, stage),
        warn=print_alarm,
        stop=settings.on_alarm == "stop",
        rows=log.rows(stage),
        **thresholds,
    )


def raised_alarms(log: metrics.MetricLog, settings: Settings) -> list[dict[str, Any]]:
    """Returns every alarm of the run, including those from before it was resumed, in the format of results.json."""
    return [
        {"stage": stage, "step": alarm.step, "name": alarm.name, "message": alarm.message}
        for stage in STAGES
        for alarm in watch_stage(log, stage, settings, lambda text: None).alarms
    ]


def ptx_coef(log: metrics.MetricLog) -> dict[str, float]:
    """Returns PPO-ptx's coefficient in both normalisations (`train.ptx.coefficients`), averaged over the run."""
    rows = log.rows("ppo_ptx")
    return {name: statistics.fmean(row[f"ptx_coef_{name}"] for row in rows) for name in ("per_token", "per_sequence")}
