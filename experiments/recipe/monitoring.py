"""Raises alarms while reward models and policies are trained, and collects them for the results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from launch.settings import Settings

from rlhf_jax import metrics
from rlhf_jax.diagnostics import alarms
from rlhf_jax.train import loop, monitor

STAGES = ("reward_model", "heldout_reward_model", "ppo", "ppo_ptx")


def watch_stage(
    log: metrics.MetricLog,
    stage: str,
    settings: Settings,
    print_alarm: Callable[[str], None],
    *,
    dtype: str = "float32",
) -> monitor.Watch:
    """Returns a log that raises alarms; with --on-alarm stop, an alarm stops the run.

    Args:
        log: The log of the run. Rows that it already has for the stage are checked too.
        stage: Name of the stage.
        settings: The settings of the run.
        print_alarm: Called with the text of each new alarm.
        dtype: Compute dtype of the models, on which the thresholds for rounding depend.

    Returns:
        The ``log`` argument of `loop.fit`.
    """
    # With --ppo.correct-sampler, the sampler may differ from the policy, which is no cause for an alarm.
    changed = {"max_gap": math.inf, "max_mean_gap": math.inf} if settings.ppo.correct_sampler else {}
    return watch(log, stage, print_alarm, stop=settings.on_alarm == "stop", dtype=dtype, **changed)


def watch(
    log: metrics.MetricLog, stage: str, print_alarm: Callable[[str], None], *, stop: bool, dtype: str, **changed: float
) -> monitor.Watch:
    """Returns a log of a stage that raises alarms.

    Args:
        log: The log of the run. Rows that it already has for the stage are checked too.
        stage: Name of the stage.
        print_alarm: Called with the text of each new alarm.
        stop: Whether an alarm stops the run.
        dtype: Compute dtype of the models, on which the thresholds for rounding depend.
        **changed: Other thresholds that differ from their defaults.
    """
    return monitor.Watch(
        loop.StageLog(log, stage),
        warn=print_alarm,
        stop=stop,
        rows=log.rows(stage),
        **alarms.rounding_thresholds(dtype) | changed,
    )


def raised_alarms(
    log: metrics.MetricLog, settings: Settings, *, dtype: str = "float32", stages: Sequence[str] = STAGES
) -> list[dict[str, Any]]:
    """Returns all alarms of the run's ``stages``, including those raised before it was resumed, for results.json."""
    return [
        {"stage": stage, "step": alarm.step, "name": alarm.name, "message": alarm.message}
        for stage in stages
        for alarm in watch_stage(log, stage, settings, lambda text: None, dtype=dtype).alarms
    ]


def ptx_coef(log: metrics.MetricLog) -> dict[str, float]:
    """Returns PPO-ptx's mean coefficient over the run, in both normalisations of `train.ptx.coefficients`."""
    rows = log.rows("ppo_ptx")
    return {name: statistics.fmean(row[f"ptx_coef_{name}"] for row in rows) for name in ("per_token", "per_sequence")}
