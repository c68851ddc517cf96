"""Tests that a failure raises its alarm, and that neither a near miss nor a healthy run raises an alarm."""

import dataclasses
import json
import math

import instructgpt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch import settings
from recipe import monitoring

from rlhf_jax import metrics
from rlhf_jax.diagnostics import alarms, falls
from rlhf_jax.train import loop, monitor


def healthy(steps=60, seed=0):
    """Returns the rows of a healthy run, whose gold falls a little after its peak and whose ratios have spikes."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(steps):
        progress = 1 - math.exp(-i / 6)
        rows.append(
            {
                "step": i + 1,
                "reward": 0.8 * progress + 0.04 * rng.normal(),
                "gold": 0.77 + 0.15 * progress - 0.02 * i / steps + 0.01 * rng.normal(),
                "kl": 2.5 * progress + 0.1 * rng.normal() * (i > 0),
                "ratio_max": 16.0 if i % 20 == 7 else 1.2 + rng.exponential(1.0),
                "first_ratio_error": 5e-6,
                "sampler_gap": 1e-5 * rng.random(),
                "entropy": 0.63 - 0.35 * progress + 0.01 * rng.normal(),
                "stopped": min(1.0, 0.93 + 0.08 * progress + 0.01 * rng.normal()),
                "training_reward_std": 1.0,
            }
        )
    return rows


def alarms_of(rows, **thresholds):
    """Returns the first alarm of each name, checked after each row as in a run."""
    raised = {}
    for n in range(1, len(rows) + 1):
        for alarm in alarms.check_all(rows[:n], **thresholds):
            raised.setdefault(alarm.name, alarm)
    return raised


def replace(rows, start, **series):
    """Replaces metrics with functions of the row from row ``start``; a negative ``start`` counts from the end."""
    first = start % len(rows)
    return [row | ({k: f(row) for k, f in series.items()} if i >= first else {}) for i, row in enumerate(rows)]


def constant(value):
    return lambda row: value


@given(seed=st.integers(0, 10_000), steps=st.sampled_from([4, 38, 60]))
def test_healthy_run_raises_no_alarm(seed, steps):
    assert alarms_of(healthy(steps, seed)) == {}


@pytest.mark.parametrize("seed", range(10))
def test_run_without_progress_raises_no_alarm(seed):
    rng = np.random.default_rng(seed)
    rows = [{"reward": rng.normal(), "gold": rng.normal(), "heldout_reward": rng.normal()} for _ in range(150)]
    assert alarms_of(rows) == {}


def down(by):
    """Returns a function that makes a metric fall by ``by`` per row after row 40."""
    return lambda name: lambda row: row[name] - by * (row["step"] - 40)


def validated(row, *, rise):
    """Returns the losses of a row: the validation loss falls until row 30 and then rises by ``rise`` per row."""
    step, noise = row["step"], 0.02 * (-1) ** row["step"]
    held_out = 0.7 - 0.002 * min(step, 30) + rise * max(step - 30, 0)
    return {"loss": 0.7 - 0.01 * step, "validation_loss": held_out + noise}


CASES = {
    # name: (rows that raise the alarm, a near miss, part of the message)
    "not_finite": (
        lambda rows: replace(rows, -1, reward=constant(math.nan)),
        lambda rows: replace(rows, -1, explained_variance=constant(math.nan), gold=constant(None)),
        "NaN or infinite: reward.",
    ),
    "negative_kl": (
        lambda rows: replace(rows, -2, kl=constant(-1.2)),
        lambda rows: replace(replace(rows, -2, kl=constant(-0.9)), -1, kl=constant(-1.9)),
        "KL from the reference is -1.2 nats",
    ),
    "first_ratio": (
        lambda rows: replace(rows, -1, first_ratio_error=constant(0.02)),
        lambda rows: replace(rows, -1, first_ratio_error=constant(9e-4)),
        "differs from 1 by 0.02",
    ),
    "large_ratios": (
        lambda rows: replace(rows, -5, ratio_max=constant(11.0)),
        lambda rows: replace(rows, -4, ratio_max=constant(1e4)),
        "at least 11-fold",
    ),
    "sampler_gap": (
        lambda rows: replace(rows, -1, sampler_gap=constant(0.3)),
        lambda rows: replace(rows, -1, sampler_gap=constant(9e-3)),
        "differ by 0.3 nats",
    ),
    "entropy_collapse": (
        lambda rows: replace(rows, -3, entropy=constant(0.01)),
        lambda rows: replace(rows, -3, entropy=constant(0.06)),
        "to 0.01 nats per token",
    ),
    "equal_rewards": (
        lambda rows: replace(rows, -3, training_reward_std=constant(0.0)),
        lambda rows: replace(rows, -2, training_reward_std=constant(0.0)),
        "the same reward",
    ),
    "unfinished_answers": (
        lambda rows: replace(rows, -3, stopped=constant(0.6)),
        lambda rows: replace(rows, -3, stopped=constant(0.75)),
        "40% of the answers lack a stop token, compared with",
    ),
    "reward_below_start": (
        lambda rows: [row | {"reward": -0.02 * row["step"]} for row in rows],
        lambda rows: replace(rows, 40, reward=lambda row: max(0.45, down(0.05)("reward")(row))),
        "the reward fell from",
    ),
    "overoptimised": (
        lambda rows: replace(rows, 40, gold=down(0.01)("gold"), reward=lambda r: r["reward"] + 0.01 * (r["step"] - 40)),
        lambda rows: replace(rows, 40, gold=down(0.01)("gold"), reward=lambda r: r["reward"] - 0.01 * (r["step"] - 40)),
        "while gold, which is not used in training, fell from",
    ),
    "overfitted": (
        lambda rows: [row | validated(row, rise=0.01) for row in rows],
        lambda rows: [row | validated(row, rise=0.0) for row in rows],
        "while the validation loss rose from",
    ),
}


def test_every_check_has_a_case():
    assert set(CASES) == set(alarms.CHECKS)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_failure_raises_its_alarm_and_a_near_miss_does_not(name, seed):
    failing, near_miss, words = CASES[name]
    raised = alarms_of(failing(healthy(seed=seed)))
    assert set(raised) == {name} and words in raised[name].message and "Look first " in raised[name].message
    assert alarms_of(near_miss(healthy(seed=seed))) == {}


def test_a_rollout_without_stop_tokens_raises_an_alarm_at_once():
    """Even from the first row on: the answers' own scores are never used."""
    raised = alarms_of([{"stopped": 0.05, "reward": 6.49, "training_reward": -1.0}])
    assert raised["unfinished_answers"].message.startswith("95% of the answers lack a stop token, so nearly every")
    assert alarms_of([{"stopped": 0.12}] * 9) == {}


def test_gold_may_lose_a_third_of_its_gain_without_an_alarm():
    rng = np.random.default_rng(0)

    def rows(lost):
        scores = np.concatenate([np.linspace(0, 1, 10), np.ones(10), 1 - lost * np.linspace(0, 1, 10), [1 - lost] * 10])
        return [{"gold": g + 0.01 * rng.normal(), "reward": 0.1 * i} for i, g in enumerate(scores)]

    assert alarms_of(rows(0.25)) == {} and set(alarms_of(rows(0.5))) == {"overoptimised"}
    assert set(alarms_of(rows(0.25), lost_share=0.1)) == {"overoptimised"}


def test_losses_that_rise_together_are_not_called_overfitting():
    rows = [{"loss": 1 - 0.02 * i, "validation_loss": 1 + 0.05 * i} for i in range(16)]
    assert alarms.overfitted(rows) is not None
    assert alarms.overfitted([row | {"loss": 2 - row["loss"]} for row in rows]) is None, "the run diverges"


def test_falls_are_compared_with_their_bound_from_the_newest_row():
    rewards = np.random.default_rng(0).normal(size=30) - 0.1 * np.arange(30)
    rows = [{"reward": reward} for reward in rewards]
    size = np.sort(rewards[:7])[1:-1].mean() - np.sort(rewards[-7:])[1:-1].mean()
    factor = size / falls.measure(rewards, from_start=True).bound
    assert alarms.reward_below_start(rows, noise_factor=0.99 * factor) is not None
    assert alarms.reward_below_start(rows, noise_factor=1.01 * factor) is None


def test_any_judge_raises_the_alarm_and_is_named():
    rows = [{"reward": 0.1 * i, "gold": 0.0, "heldout_reward": -0.1 * i} for i in range(20)]
    assert "heldout_reward, which is not" in alarms_of(rows)["overoptimised"].message
    assert alarms_of(rows, judges=("gold",)) == {}


def test_few_rows_or_metrics_raise_no_alarm():
    assert alarms.check_all([]) == []
    assert alarms_of([{"loss": 1.0}, {"loss": math.nan}]) == {}
    assert alarms_of([{"step": 1, "reward": 0.0, "kl": None}])["not_finite"].message.startswith("NaN or infinite: kl.")
    # Long answers from the start and a small initial entropy raise no alarm.
    assert alarms_of([{"stopped": 0.3, "entropy": 0.02}] * 20) == {}


def test_thresholds_reach_their_checks_and_unknown_thresholds_raise():
    rows = healthy()
    assert set(alarms_of(rows, max_ratio=1.0, patience=2)) == {"large_ratios"}
    assert alarms_of(replace(rows, -1, sampler_gap=constant(0.3)), max_gap=math.inf) == {}
    with pytest.raises(TypeError, match="max_gaps"):
        alarms.check_all(rows, max_gaps=1.0)


def test_alarms_have_the_steps_of_their_rows():
    rows = replace(healthy(), -1, kl=constant(-5.0))
    assert [(a.name, a.step) for a in alarms.check_all(rows)] == [("negative_kl", 60)]
    assert alarms.check_all([{"kl": -5.0}] * 3)[0].step == 3


# Watch


def feed(log, rows):
    for row in rows:
        log(row["step"], {name: value for name, value in row.items() if name != "step"})


def test_watch_forwards_rows_and_reports_each_alarm_once():
    rows, seen, warned = replace(healthy(), 10, kl=constant(-5.0)), [], []
    log = monitor.Watch(lambda step, values: seen.append({"step": step, **values}), warn=warned.append)
    feed(log, rows)
    assert seen == rows and len(warned) == 1 and warned[0].startswith("alarm at step 11 (negative_kl): the KL from")
    assert [(a.name, a.step) for a in log.alarms] == [("negative_kl", 11)]
    with pytest.raises(TypeError, match="no check"):
        monitor.Watch(warn=warned.append, least=1)


def test_stopping_watch_logs_the_row_and_reports_the_alarm():
    rows, seen, warned = replace(healthy(), 10, kl=constant(-5.0)), [], []
    log = monitor.Watch(lambda step, values: seen.append(step), warn=warned.append, stop=True)
    with pytest.raises(loop.Alarmed, match="negative_kl at step 11"):
        feed(log, rows)
    assert seen[-1] == 11 and len(warned) == 1
    feed(log, rows[11:])  # The same alarm does not stop a resumed run again.
    assert len(warned) == 1


def test_resumed_watch_remembers_reported_alarms(tmp_path):
    rows, warned = replace(healthy(), 10, kl=constant(-5.0), sampler_gap=constant(1.0)), []
    rows = [row | {"sampler_gap": 0.0} if row["step"] < 21 else row for row in rows]

    def watched(log):
        warned.clear()
        return monitor.Watch(loop.StageLog(log, "ppo"), warn=warned.append, stop=True, rows=log.rows("ppo"))

    whole = [("negative_kl", 11), ("sampler_gap", 21)]
    with metrics.MetricLog(tmp_path) as log:
        log.write("sft", 1, {"kl": -9.0})
        first = watched(log)
        first.rewind(0)
        with pytest.raises(loop.Alarmed):
            feed(first, rows)
    with metrics.MetricLog(tmp_path) as log:  # Stopped after step 11 and resumed from there.
        second = watched(log)
        second.rewind(11)
        assert [(a.name, a.step) for a in second.alarms] == whole[:1] and not warned
        with pytest.raises(loop.Alarmed, match=r"\(sampler_gap at step 21\)"):
            feed(second, rows[11:])
    with metrics.MetricLog(tmp_path) as log:  # Killed and resumed before the first alarm.
        third = watched(log)
        assert [(a.name, a.step) for a in third.alarms] == whole
        third.rewind(5)
        assert third.alarms == [] and len(log.rows("ppo")) == 5 and len(log.rows("sft")) == 1
        with pytest.raises(loop.Alarmed, match="negative_kl at step 11"):
            feed(third, rows[5:])


def test_nan_and_infinity_raise_the_same_alarms_when_read_from_the_log(tmp_path):
    rows = replace(healthy(20), -1, reward=constant(math.nan), ratio_max=constant(math.inf))
    with metrics.MetricLog(tmp_path) as log:
        live = monitor.Watch(loop.StageLog(log, "ppo"), warn=lambda text: None)
        feed(live, rows)
        assert monitor.Watch(warn=print, rows=log.rows("ppo")).alarms == live.alarms != []


# Alarms in a run


def smoke_settings(**changes):
    return dataclasses.replace(settings.preset("smoke"), **changes)


def test_job_reports_and_records_alarms_or_stops(tmp_path):
    rows, warned = replace(healthy(), 10, kl=constant(-5.0)), []
    with metrics.MetricLog(tmp_path) as log:
        feed(monitoring.watch_stage(log, "ppo", smoke_settings(), warned.append), rows)
        feed(monitoring.watch_stage(log, "ppo_ptx", smoke_settings(), warned.append), healthy())
        assert len(warned) == 1
        (alarm,) = monitoring.raised_alarms(log, smoke_settings())
    assert (alarm["stage"], alarm["step"], alarm["name"]) == ("ppo", 11, "negative_kl")
    assert alarm["message"] in warned[0]
    json.dumps(alarm, allow_nan=False)
    with metrics.MetricLog(tmp_path / "other") as log, pytest.raises(loop.Alarmed):
        feed(monitoring.watch_stage(log, "ppo", smoke_settings(on_alarm="stop"), warned.append), rows)


def test_rounding_in_bfloat16_raises_no_alarm_and_a_different_temperature_does():
    """The numbers are those of models with 2 to 8 layers, measured in bfloat16."""
    thresholds = alarms.rounding_thresholds("bfloat16")
    rounded = [{"first_ratio_error": 0.44, "sampler_gap": 0.42, "sampler_gap_mean": 0.032}]
    assert alarms_of(rounded, **thresholds) == {}
    assert set(alarms_of(rounded)) == {"first_ratio", "sampler_gap"}, "such errors are faults in float32"
    mean = alarms_of([{"sampler_gap": 0.6, "sampler_gap_mean": 0.2}], **thresholds)
    assert mean["sampler_gap"].message.startswith("sampler and trainer differ on average by 0.2 nats")
    assert alarms.rounding_thresholds("float32") == {"max_ratio_error": 1e-3, "max_gap": 1e-2, "max_mean_gap": 1e-3}


def test_corrected_sampler_raises_no_sampler_gap_alarm(tmp_path):
    rows, plain = replace(healthy(), 10, sampler_gap=constant(3.0)), settings.preset("smoke").ppo
    corrected = smoke_settings(on_alarm="stop", ppo=dataclasses.replace(plain, correct_sampler=True))
    with metrics.MetricLog(tmp_path) as log:
        feed(monitoring.watch_stage(log, "ppo", corrected, print), rows)
        assert (
            monitoring.raised_alarms(log, corrected) == [] and len(monitoring.raised_alarms(log, smoke_settings())) == 1
        )


def test_alarm_that_stops_the_job_has_a_separate_exit_status(monkeypatch, capsys):
    def run(options):
        assert options.on_alarm == "stop"
        raise loop.Alarmed("negative_kl at step 11", stage="ppo", step=12, saved=True)

    monkeypatch.setattr(instructgpt, "run", run)
    with pytest.raises(SystemExit) as exit_info:
        instructgpt.main(["--preset", "smoke", "--on-alarm", "stop"])
    output = capsys.readouterr().err
    assert exit_info.value.code == 3 and "stopped ppo after 12 iterations" in output
    assert "an alarm (negative_kl at step 11)" in output and "--resume" in output
    with pytest.raises(SystemExit) as exit_info:
        instructgpt.main(["--preset", "smoke", "--on-alarm", "panic"])
    assert exit_info.value.code == 2
