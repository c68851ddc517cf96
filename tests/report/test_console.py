"""The results table and the progress display in the terminal."""

import io
import re

import numpy as np
import pytest
import real_run
from rich.console import Console

from rlhf_jax.report import console
from rlhf_jax.report import results as results_lib

RESULTS = real_run.results()


def printed_table(results, width):
    file = io.StringIO()
    Console(file=file, width=width).print(console.results_table(results))
    return file.getvalue()


@pytest.mark.parametrize("width", [120, 100])
def test_a_wide_table_has_one_line_per_policy(width):
    _, table = re.split("─+", printed_table(RESULTS, width))
    rows = {line.split()[0]: line.split() for line in table.splitlines()[6:0:-1]}
    policy = RESULTS["policies"]["ppo_ptx"]
    wins = [real_run.text(policy[f"{by}_win_rate_vs_sft"], percent=True).split() for by in ("gold", "heldout")]
    assert rows["PPO-ptx"][:6] == ["PPO-ptx", *wins[0], *wins[1], real_run.text(policy["gold"], digits=3).split()[0]]
    assert rows["PPO-ptx"][-1] == real_run.text(policy["length"]).split()[0]
    assert rows["best-of-n"].count("–") >= 2, "best-of-n is not probed for skills and pretraining loss"
    names = ["base", "SFT", "SFT-mix", "PPO", "PPO-ptx", "best-of-n"]
    assert list(console.results_table(RESULTS).columns[0].cells) == names
    results = {"policies": RESULTS["policies"] | {"sft": {"gold_win_rate_vs_sft": None, "gold": float("nan")}}}
    (row,) = [line.split() for line in printed_table(results, width).splitlines() if line.split()[:1] == ["SFT"]]
    assert row[:4] == ["SFT", "–", "–", "nan"]


def test_the_caption_states_the_gap_that_is_closed_the_accuracy_and_one_duration():
    text = " ".join(printed_table(RESULTS, 120).split())
    (mean, bounds) = real_run.text(RESULTS["reward_model"]["accuracy"], percent=True).split()
    assert f"reward model accuracy {mean} % ({bounds})" in text
    assert f"duration {results_lib.seconds_text(RESULTS['seconds'])}" in text
    closed = {name: real_run.text(RESULTS["policies"][name]["gap_closed"], percent=True) for name in ("ppo", "ppo_ptx")}
    start = "share of the gap between SFT and the maximum of the gold utility closed: PPO "
    assert start + closed["ppo"].split()[0] + " %" in text and f"PPO-ptx {closed['ppo_ptx'].split()[0]} %" in text


def test_the_caption_states_how_best_of_n_differs():
    policies = {"sft": {"gold": 0.7}, "best_of_n": {"gold": 0.8, "n": 16, "prompts": 400}}
    results = {"policies": policies, "held_out": {"prompts": 1280}, "temperature": {"best_of_n": 1.0, "policies": 0.01}}
    text = " ".join(printed_table(results, 120).split())
    assert "best-of-n answers 400 of 1280 prompts and samples at a temperature of 1 instead of 0.01" in text
    assert results_lib.best_of_n_differs(results | {"temperature": None}) == "best-of-n answers 400 of 1280 prompts"
    assert results_lib.best_of_n_differs({"policies": policies, "held_out": {"prompts": 400}}) == ""


def test_the_table_fits_into_80_characters():
    text = printed_table(RESULTS, 80)
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    mean, bounds = real_run.text(RESULTS["policies"]["ppo"]["gold_win_rate_vs_sft"], percent=True).split()
    for part in (mean, bounds, "best-of-n"):
        assert part in text


def test_a_column_without_numbers_is_omitted():
    human_data = {"policies": {"sft": {"reward": 0.0, "kl": None, "gold": None}, "ppo": {"reward": 1.0, "kl": 3.0}}}
    table = console.results_table(human_data)
    assert [str(c.header).split()[0] for c in table.columns] == ["policy", "RM", "KL/seq"]
    assert "diversity" not in printed_table(RESULTS, 120)
    assert printed_table({}, 80)


def test_there_is_no_estimate_before_anything_is_measured():
    assert console.remaining_seconds(finished=[], waiting=60) is None
    assert console.remaining_seconds(finished=[], waiting=0, current=20, elapsed=5) is None
    assert console.remaining_seconds(finished=[], waiting=0) == 0


def test_the_estimate_follows_the_pace_of_finished_stages():
    assert console.remaining_seconds(finished=[(10, 30)], waiting=20) == 60
    assert console.remaining_seconds(finished=[(10, 30), (30, 10)], waiting=20) == 20
    assert console.remaining_seconds(finished=[(10, 30)], waiting=20, current=10, elapsed=6) == (30 - 6) + 60


def test_the_current_stage_is_estimated_from_its_own_speed():
    assert console.remaining_seconds(finished=[], waiting=0, current=20, elapsed=15, rest=7) == 7
    # The stage will have taken 15 + 25 s for a weight of 20.
    assert console.remaining_seconds(finished=[], waiting=40, current=20, elapsed=15, rest=25) == 25 + 80
    assert console.remaining_seconds(finished=[(20, 80)], waiting=40, current=20, elapsed=15, rest=25) == 25 + 120
    assert console.remaining_seconds(finished=[], waiting=0, current=0, elapsed=15, rest=25) == 25


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def plain_progress(stages, **kwargs):
    clock, file = Clock(), io.StringIO()
    progress = console.StageProgress(stages, console=Console(file=file, width=60), clock=clock, **kwargs)
    return progress, clock, file


def test_progress_in_plain_lines():
    progress, clock, file = plain_progress([("sft", 10), ("reward_model", 20), ("ppo_ptx", 30)])
    with progress:
        progress.start("sft", 4)
        for step in range(4):
            clock.now += 5
            progress.update("sft", step + 1, 4, {"step": step, "loss": 0.25, "gold": None, "note": "x"})
        progress.finish("sft")
        progress.skip("reward_model")
        progress.start("ppo_ptx", 100, done=50)
        clock.now += 2
        progress.finish("ppo_ptx")
    assert file.getvalue().splitlines() == [
        "stage 1/3 SFT: 4 steps",
        "stage 1/3 SFT 2/4 · 0:10 elapsed, about 1:50 left · loss 0.25",
        "stage 1/3 SFT 4/4 · 0:20 elapsed, about 1:40 left · loss 0.25",
        "stage 1/3 SFT done: 4 steps in 20.0 s · 0:20 elapsed, about 1:40 left",
        "stage 2/3 reward model: already done",
        "stage 3/3 PPO-ptx: 100 steps, resumed after 50",
        "stage 3/3 PPO-ptx done: 50 steps in 2.0 s · 0:22 elapsed, about 0:00 left",
        "3 of 3 stages done",
    ]


def test_time_before_the_display_starts_counts_as_elapsed():
    progress, clock, file = plain_progress([("sft", 10)], elapsed=30.0)
    with progress:
        progress.start("sft", 1)
        clock.now += 5
        progress.finish("sft")
    assert file.getvalue().splitlines()[1:] == [
        "stage 1/1 SFT done: 1 step in 5.0 s · 0:35 elapsed, about 0:00 left",
        "1 of 1 stage done",
    ]


def test_plain_lines_have_no_control_characters_and_go_to_stderr(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with console.StageProgress([("sft", 1)], line_interval=0.0) as progress:
        progress.update("sft", 1, 2)
        progress.finish("sft")
    out, err = capsys.readouterr()
    assert out == ""
    assert "\x1b" not in err and "stage 1/1 SFT done" in err


def test_a_resumed_stage_counts_only_its_new_steps():
    progress, clock, _ = plain_progress([("a", 10), ("b", 40)])
    with progress:
        progress.start("a", 100)
        progress.update("a", 80, 100, {})
        assert progress.remaining() is None
        clock.now += 4
        progress.update("a", 100, 100)
        progress.finish("a")
        assert progress.remaining() == pytest.approx(80)  # 4 s for a weight of 2


def simulate(stages, weights):
    """Runs stages with these durations of steps; returns ``[(stage, fraction, estimate, truth)]`` after each step."""
    progress, clock, _ = plain_progress(weights)
    end = clock.now + sum(map(sum, stages.values()))
    rows = []
    with progress:
        for stage, seconds in stages.items():
            progress.start(stage, len(seconds))
            progress.update(stage, 0, len(seconds), {})
            for i, each in enumerate(seconds):
                clock.now += each
                progress.update(stage, i + 1, len(seconds))
                rows.append((stage, (i + 1) / len(seconds), progress.remaining(), end - clock.now))
            progress.finish(stage)
    assert clock.now == pytest.approx(end)
    return rows


def check_estimates(rows, *, margin):
    """The error is at most 25 % after a tenth of a stage, and ``margin``, a few steps, at its end."""
    late = [(estimate, truth) for _, fraction, estimate, truth in rows if fraction > 0.1]
    assert late and all(abs(estimate - truth) <= 0.25 * truth + margin for estimate, truth in late)


RECORDED = (
    *(0.4, 0.007, 0.131, 0.172, 0.212, 0.2, 0.198, 0.194, 0.204, 0.192, 0.196, 0.074),
    *(0.342, 0.215, 0.237, 0.192, 0.208, 0.2, 0.2, 0.206, 0.251, 0.224, 0.216, 0.171),
    *(0.362, 0.223, 0.208, 0.188, 0.204, 0.213, 0.195, 0.207, 0.184, 0.17, 0.173, 0.097),
    *(0.239, 0.205, 0.001, 0.129, 0.116, 0.144, 0.154, 0.082, 0.131, 0.213),
)
"""Seconds per step of a pretraining run on two CPU cores. The first step includes compilation."""


@pytest.mark.parametrize("compilation", [0.0, 10.0, 300.0])
def test_estimate_of_a_single_stage_comes_from_its_own_speed(compilation):
    seconds = [RECORDED[0] + compilation, *RECORDED[1:]]
    check_estimates(simulate({"sft": seconds}, [("sft", 60)]), margin=0.7)
    slow = [RECORDED[0] + compilation, *(100 * each for each in RECORDED[1:])]
    check_estimates(simulate({"sft": slow}, [("sft", 60)]), margin=70)


@pytest.mark.parametrize("seed", range(5))
def test_estimate_on_a_slow_machine_does_not_start_too_low(seed):
    """All stages take 20 times as long as expected, up to 10 % per stage and 30 % per step, and compile for 10 s."""
    rng, weights, stages = np.random.default_rng(seed), [("pretrain", 60), ("sft", 15), ("ppo", 40)], {}
    for name, weight in weights:
        mean = 20 * weight / 50 * rng.uniform(0.9, 1.1)
        stages[name] = mean * rng.uniform(0.7, 1.3, 50)
        stages[name][0] += 10
    rows = simulate(stages, weights)
    check_estimates(rows, margin=20)
    assert rows[0][2] is None and all(estimate is not None for _, _, estimate, _ in rows[1:])


def test_a_failure_prints_its_stage_and_step():
    progress, clock, file = plain_progress([("sft", 10), ("ppo", 20)])
    with pytest.raises(KeyError), progress:
        progress.start("ppo", 9)
        progress.update("ppo", 3, 9)
        clock.now += 61
        raise KeyError("x")
    assert file.getvalue().splitlines()[-1] == "stopped in stage 2/2 PPO at step 3/9 after 1:01"


def test_a_message_is_not_wrapped_and_appears_above_the_display():
    progress, _, file = plain_progress([("sft", 10), ("ppo", 20)])
    text = "alarm at step 3: [kl] " + "a message that is too long for a narrow line " * 3
    with progress:
        progress.start("ppo", 9)
        progress.message("ppo", text)
    assert f"stage 2/2 PPO: {text}" in file.getvalue().splitlines()
    progress.message("data", "short")
    assert file.getvalue().splitlines()[-1] == "data: short", "a subject that is no stage"
    screen = io.StringIO()
    terminal = Console(file=screen, width=60, force_terminal=True)
    with console.StageProgress([("ppo", 20)], console=terminal, live=True) as progress:
        progress.start("ppo", 9)
        progress.message("ppo", text)
    assert f"stage 1/1 PPO: {text}" in screen.getvalue()


def test_unknown_and_duplicate_stages_are_errors():
    progress, _, _ = plain_progress([("sft", 1)])
    with pytest.raises(ValueError, match="unknown stage 'rm'"):
        progress.start("rm", 3)
    with pytest.raises(ValueError, match="same name"):
        plain_progress([("sft", 1), ("sft", 2)])
    with pytest.raises(ValueError, match="negative"):
        plain_progress([("sft", -1)])


def test_reward_kl_and_losses_are_shown_before_other_metrics():
    metrics = {
        "approx_kl": 1.0,
        "clip_fraction": 2.0,
        "entropy": 3.0,
        "kl": 4.0,
        "length": 5.0,
        "reward": 6.0,
        "step": 7,
    }
    assert console.metrics_text(metrics) == "reward 6 · kl 4 · length 5 · approx kl 1"
    metrics = {"accuracy": 1.0, "chosen_logprob": 2.0, "grad_norm": 3.0, "loss": 4.0, "margin": 5.0}
    assert console.metrics_text(metrics) == "loss 4 · margin 5 · accuracy 1 · chosen logprob 2"


def test_progress_says_where_a_resumed_stage_continues():
    progress, _, file = plain_progress([("sft", 10)])
    with progress:
        progress.start("sft", 10)
        progress.update("sft", 4, 10, {})
        progress.update("sft", 10, 10, {"loss": 1.0})
        progress.finish("sft")
    assert "stage 1/1 SFT: resumed after 4" in file.getvalue().splitlines()


def test_metrics_are_read_only_when_they_are_shown():
    class Unreadable(dict):
        def items(self):
            raise AssertionError("read")

    progress, clock, _ = plain_progress([("sft", 1)])
    with progress:
        progress.start("sft", 3)
        clock.now += 9
        progress.update("sft", 1, 3, Unreadable(loss=1.0))
        clock.now += 2
        with pytest.raises(AssertionError, match="read"):
            progress.update("sft", 2, 3, Unreadable(loss=1.0))


def test_the_live_display_shows_stage_steps_and_time():
    clock, file = Clock(), io.StringIO()
    terminal = Console(file=file, width=90, force_terminal=True)
    with console.StageProgress([("sft", 10), ("ppo", 20)], console=terminal, live=True, clock=clock) as progress:
        progress.start("ppo", 9)
        clock.now += 2
        progress.update("ppo", 1, 9, {"reward": 1.25})
        clock.now += 2
        progress.update("ppo", 3, 9, {"reward": 1.25})
        drawn = io.StringIO()
        Console(file=drawn, width=90).print(progress._render())
        progress.finish("ppo")
    assert re.search(r"stage 2/2 PPO .* 3/9 0:04 elapsed, about 0:11 left", drawn.getvalue())
    assert "reward 1.25" in drawn.getvalue()
    assert "stage 2/2 PPO done" in file.getvalue() and "1 of 2 stages done" in file.getvalue()
