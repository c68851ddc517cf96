"""Alarms: each is raised by what it is there for, not by what comes close, and none by a healthy run."""

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
from rlhf_jax.diagnostics import alarms
from rlhf_jax.train import loop, monitor


def healthy(steps=60, seed=0):
    """Rows like those of a run that goes well: gold peaks and gives a little back, ratios have spikes."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(steps):
        come = 1 - math.exp(-i / 6)
        rows.append(
            {
                "step": i + 1,
                "reward": 0.8 * come + 0.04 * rng.normal(),
                "gold": 0.77 + 0.15 * come - 0.02 * i / steps + 0.01 * rng.normal(),
                "kl": 2.5 * come + 0.1 * rng.normal() * (i > 0),
                "ratio_max": 16.0 if i % 20 == 7 else 1.2 + rng.exponential(1.0),
                "first_ratio_error": 5e-6,
                "sampler_gap": 1e-5 * rng.random(),
                "entropy": 0.63 - 0.35 * come + 0.01 * rng.normal(),
                "stopped": min(1.0, 0.93 + 0.08 * come + 0.01 * rng.normal()),
                "reward_std": 1.0,
            }
        )
    return rows


def ever(rows, **thresholds):
    """The alarms of all prefixes: what a run would have been told."""
    told = {}
    for n in range(1, len(rows) + 1):
        for alarm in alarms.check_all(rows[:n], **thresholds):
            told.setdefault(alarm.name, alarm)
    return told


def changed(rows, start, **series):
    """The same rows with metrics replaced from row ``start`` on (negative: from the end); functions see the row."""
    first = start % len(rows)
    return [row | ({k: f(row) for k, f in series.items()} if i >= first else {}) for i, row in enumerate(rows)]


def always(value):
    return lambda row: value


@given(seed=st.integers(0, 10_000), steps=st.sampled_from([4, 38, 60]))
def test_a_healthy_run_raises_none(seed, steps):
    assert ever(healthy(steps, seed)) == {}


@pytest.mark.parametrize("seed", range(10))
def test_a_run_that_learns_nothing_raises_none(seed):
    rng = np.random.default_rng(seed)
    rows = [{"reward": rng.normal(), "gold": rng.normal(), "heldout_reward": rng.normal()} for _ in range(150)]
    assert ever(rows) == {}


def down(by):
    """A metric that falls by ``by`` a row after the fortieth."""
    return lambda name: lambda row: row[name] - by * (row["step"] - 40)


def validated(row, *, rise):
    """Losses of a row: the validation loss falls up to the thirtieth, and then rises by ``rise`` a row."""
    step, noise = row["step"], 0.02 * (-1) ** row["step"]
    held_out = 0.7 - 0.002 * min(step, 30) + rise * max(step - 30, 0)
    return {"loss": 0.7 - 0.01 * step, "validation_loss": held_out + noise}


CASES = {
    # name: (what raises it, what does not quite, words of the message)
    "not_finite": (
        lambda rows: changed(rows, -1, reward=always(math.nan)),
        lambda rows: changed(rows, -1, explained_variance=always(math.nan), gold=always(None)),
        "not a finite number: reward.",
    ),
    "negative_kl": (
        lambda rows: changed(rows, -1, kl=always(-1.2)),
        lambda rows: changed(rows, -1, kl=always(-0.9)),
        "KL from the reference is -1.2 nats",
    ),
    "first_ratio": (
        lambda rows: changed(rows, -1, first_ratio_error=always(0.02)),
        lambda rows: changed(rows, -1, first_ratio_error=always(9e-4)),
        "off 1 by 0.02",
    ),
    "large_ratios": (
        lambda rows: changed(rows, -3, ratio_max=always(11.0)),
        lambda rows: changed(rows, -2, ratio_max=always(1e4)),
        "more than 11 times",
    ),
    "sampler_gap": (
        lambda rows: changed(rows, -1, sampler_gap=always(0.3)),
        lambda rows: changed(rows, -1, sampler_gap=always(9e-3)),
        "differ by 0.3 nats",
    ),
    "entropy_collapse": (
        lambda rows: changed(rows, -3, entropy=always(0.01)),
        lambda rows: changed(rows, -3, entropy=always(0.06)),
        "to 0.01 nats a token",
    ),
    "equal_rewards": (
        lambda rows: changed(rows, -3, reward_std=always(0.0)),
        lambda rows: changed(rows, -2, reward_std=always(0.0)),
        "the same reward",
    ),
    "unfinished_answers": (
        lambda rows: changed(rows, -3, stopped=always(0.6)),
        lambda rows: changed(rows, -3, stopped=always(0.75)),
        "40% of the answers do not stop, against",
    ),
    "reward_below_start": (
        lambda rows: [row | {"reward": -0.02 * row["step"]} for row in rows],
        lambda rows: changed(rows, 40, reward=lambda row: max(0.45, down(0.05)("reward")(row))),
        "the reward fell from",
    ),
    "overoptimised": (
        lambda rows: changed(rows, 40, gold=down(0.01)("gold"), reward=lambda r: r["reward"] + 0.01 * (r["step"] - 40)),
        lambda rows: changed(rows, 40, gold=down(0.01)("gold"), reward=lambda r: r["reward"] - 0.01 * (r["step"] - 40)),
        "while gold, which is not trained on, fell from",
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
def test_what_raises_an_alarm_and_what_does_not_quite(name, seed):
    wrong, close, words = CASES[name]
    told = ever(wrong(healthy(seed=seed)))
    assert set(told) == {name} and words in told[name].message and "ook first " in told[name].message
    assert ever(close(healthy(seed=seed))) == {}


def test_gold_that_gives_back_less_than_a_third_of_its_gain_is_no_alarm():
    rng = np.random.default_rng(0)

    def rows(lost):
        scores = np.concatenate([np.linspace(0, 1, 10), np.ones(10), 1 - lost * np.linspace(0, 1, 10), [1 - lost] * 10])
        return [{"gold": g + 0.01 * rng.normal(), "reward": 0.1 * i} for i, g in enumerate(scores)]

    assert ever(rows(0.25)) == {} and set(ever(rows(0.5))) == {"overoptimised"}
    assert set(ever(rows(0.25), lost_share=0.1)) == {"overoptimised"}


def test_any_judge_counts_and_is_named():
    rows = [{"reward": 0.1 * i, "gold": 0.0, "heldout_reward": -0.1 * i} for i in range(20)]
    assert "heldout_reward, which is not" in ever(rows)["overoptimised"].message
    assert ever(rows, judges=("gold",)) == {}


def test_few_rows_and_few_metrics_are_no_alarm():
    assert alarms.check_all([]) == []
    assert ever([{"loss": 1.0}, {"loss": math.nan}]) == {}
    assert ever([{"step": 1, "reward": 0.0, "kl": None}])["not_finite"].message.startswith("not a finite number: kl.")
    # A long answer is the start's own doing, and an entropy that began small has not collapsed.
    assert ever([{"stopped": 0.3, "entropy": 0.02}] * 20) == {}


def test_thresholds_reach_their_checks_and_others_are_refused():
    rows = healthy()
    assert set(ever(rows, most_ratio=1.0, lasting=2)) == {"large_ratios"}
    assert ever(changed(rows, -1, sampler_gap=always(0.3)), most_gap=math.inf) == {}
    with pytest.raises(TypeError, match="most_gaps"):
        alarms.check_all(rows, most_gaps=1.0)


def test_steps_are_those_of_the_rows():
    rows = changed(healthy(), -1, kl=always(-5.0))
    assert [(a.name, a.step) for a in alarms.check_all(rows)] == [("negative_kl", 60)]
    assert alarms.check_all([{"kl": -5.0}] * 3)[0].step == 3


# Watch


def feed(log, rows):
    for row in rows:
        log(row["step"], {name: value for name, value in row.items() if name != "step"})


def test_a_watch_passes_rows_on_and_tells_each_alarm_once():
    rows, seen, told = changed(healthy(), 10, kl=always(-5.0)), [], []
    log = monitor.Watch(lambda step, values: seen.append({"step": step, **values}), warn=told.append)
    feed(log, rows)
    assert seen == rows and len(told) == 1 and told[0].startswith("alarm at step 11 (negative_kl): the KL from")
    assert [(a.name, a.step) for a in log.alarms] == [("negative_kl", 11)]
    with pytest.raises(TypeError, match="no check"):
        monitor.Watch(warn=told.append, least=1)


def test_a_watch_that_stops_has_written_the_row_and_told_why():
    rows, seen, told = changed(healthy(), 10, kl=always(-5.0)), [], []
    log = monitor.Watch(lambda step, values: seen.append(step), warn=told.append, stop=True)
    with pytest.raises(loop.Alarmed, match="negative_kl at step 11"):
        feed(log, rows)
    assert seen[-1] == 11 and len(told) == 1
    feed(log, rows[11:])  # who goes on all the same is not stopped by it again
    assert len(told) == 1


def test_a_resumed_watch_knows_what_was_told(tmp_path):
    rows, told = changed(healthy(), 10, kl=always(-5.0), sampler_gap=always(1.0)), []
    rows = [row | {"sampler_gap": 0.0} if row["step"] < 21 else row for row in rows]

    def watched(log):
        told.clear()
        return monitor.Watch(loop.StageLog(log, "ppo"), warn=told.append, stop=True, rows=log.rows("ppo"))

    whole = [("negative_kl", 11), ("sampler_gap", 21)]
    with metrics.MetricLog(tmp_path) as log:
        log.write("sft", 1, {"kl": -9.0})
        first = watched(log)
        first.rewind(0)
        with pytest.raises(loop.Alarmed):
            feed(first, rows)
    with metrics.MetricLog(tmp_path) as log:  # stopped after step 11, goes on from there
        second = watched(log)
        second.rewind(11)
        assert [(a.name, a.step) for a in second.alarms] == whole[:1] and not told
        with pytest.raises(loop.Alarmed, match=r": sampler_gap at step 21$"):
            feed(second, rows[11:])
    with metrics.MetricLog(tmp_path) as log:  # killed, goes on from before the first alarm
        third = watched(log)
        assert [(a.name, a.step) for a in third.alarms] == whole
        third.rewind(5)
        assert third.alarms == [] and len(log.rows("ppo")) == 5 and len(log.rows("sft")) == 1
        with pytest.raises(loop.Alarmed, match="negative_kl at step 11"):
            feed(third, rows[5:])


def test_numbers_that_json_does_not_have_raise_the_same_alarms_when_read_again(tmp_path):
    rows = changed(healthy(20), -1, reward=always(math.nan), ratio_max=always(math.inf))
    with metrics.MetricLog(tmp_path) as log:
        live = monitor.Watch(loop.StageLog(log, "ppo"), warn=lambda text: None)
        feed(live, rows)
        assert monitor.Watch(warn=print, rows=log.rows("ppo")).alarms == live.alarms != []


# The main job


def of(**changes):
    return dataclasses.replace(settings.preset("smoke"), **changes)


def test_the_job_tells_alarms_and_keeps_them_or_stops(tmp_path):
    rows, told = changed(healthy(), 10, kl=always(-5.0)), []
    with metrics.MetricLog(tmp_path) as log:
        feed(monitoring.watched(log, "ppo", of(), told.append), rows)
        feed(monitoring.watched(log, "ppo_ptx", of(), told.append), healthy())
        assert len(told) == 1
        (found,) = monitoring.raised(log, of())
    assert (found["stage"], found["step"], found["name"]) == ("ppo", 11, "negative_kl") and found["message"] in told[0]
    json.dumps(found, allow_nan=False)
    with metrics.MetricLog(tmp_path / "other") as log, pytest.raises(loop.Alarmed):
        feed(monitoring.watched(log, "ppo", of(on_alarm="stop"), told.append), rows)


def test_a_sampler_that_is_corrected_for_may_differ(tmp_path):
    rows, plain = changed(healthy(), 10, sampler_gap=always(3.0)), settings.preset("smoke").ppo
    corrected = of(on_alarm="stop", ppo=dataclasses.replace(plain, correct_sampler=True))
    with metrics.MetricLog(tmp_path) as log:
        feed(monitoring.watched(log, "ppo", corrected, print), rows)
        assert monitoring.raised(log, corrected) == [] and len(monitoring.raised(log, of())) == 1


def test_an_alarm_that_stops_the_job_has_an_exit_status_of_its_own(monkeypatch, capsys):
    def run(asked):
        assert asked.on_alarm == "stop"
        raise loop.Alarmed("negative_kl at step 11", stage="ppo", step=12, saved=True)

    monkeypatch.setattr(instructgpt, "run", run)
    with pytest.raises(SystemExit) as left:
        instructgpt.main(["--preset", "smoke", "--on-alarm", "stop"])
    told = capsys.readouterr().err
    assert left.value.code == 3 and "an alarm stopped ppo after 12 iterations" in told
    assert "negative_kl at step 11" in told and "--resume" in told
    with pytest.raises(SystemExit) as left:
        instructgpt.main(["--preset", "smoke", "--on-alarm", "panic"])
    assert left.value.code == 2
