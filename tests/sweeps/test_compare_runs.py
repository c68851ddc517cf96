"""Tests of experiments/compare_runs.py on run folders that are written by hand."""

import json
import math
import re

import compare_runs
import numpy as np
import pytest
from launch import config_file
from launch.settings import SettingError
from scipy import stats
from sweeps import run_comparison

STEPS = 6


def value(kl_coef, seed, step):
    return kl_coef + 0.1 * step + 0.01 * seed**2


def write(folder, *, command="ppo", stage="ppo", kl_coef=0.02, seed=0, finished=True, steps=STEPS, **extra):
    """Writes a run folder whose reward at each step is `value`, and whose final reward is that of the last step."""
    folder.mkdir()
    settings = {"seed": seed, "out": str(folder), "resume": None, "ppo": {"kl_coef": kl_coef, "batch": 8}}
    config = (
        settings | {"version": config_file.VERSION, "command": command, "input_digests": {"prompts": "abc"}} | extra
    )
    (folder / "config.json").write_text(json.dumps(config))
    rows = [
        {"stage": stage, "step": s, "reward": value(kl_coef, seed, s), "kl": 0.1 * s, "own": 1.0, "skipped": None}
        for s in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        final = value(kl_coef, seed, STEPS)
        policy = {"reward": [final, final - 0.5, final + 0.5], "counts": [1, 2, 3], "name": "x", "kl": None}
        (folder / "results.json").write_text(json.dumps({"seed": seed, "policies": {"ppo": policy}, "steps": STEPS}))
    return str(folder)


@pytest.fixture
def folders(tmp_path):
    """Returns three seeds with a coefficient of 0.02, and one with 0.2."""
    return [
        *(write(tmp_path / f"low{seed}", seed=seed) for seed in range(3)),
        write(tmp_path / "high", kl_coef=0.2, seed=1),
    ]


def groups_of(folders, labels=()):
    return run_comparison.group(run_comparison.share_stages(list(map(run_comparison.read, folders))), labels)


def compare(folders, tmp_path, *flags):
    """Returns the text of compare.html."""
    compare_runs.main([*folders, "--out", str(tmp_path / "out"), *flags])
    return (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")


def refusal(folders, *flags):
    with pytest.raises(SettingError) as error:
        compare_runs.run(compare_runs.parse([*folders, "--out", "unused", *flags]))
    return str(error.value)


def test_runs_that_differ_only_in_the_seed_are_one_group(folders):
    groups = groups_of(folders)
    assert [len(each.runs) for each in groups] == [3, 1]
    assert [each.label for each in groups] == ["--ppo.kl-coef 0.02", "--ppo.kl-coef 0.2"]
    assert run_comparison.settings_table(groups)[1:] == [["--ppo.kl-coef", "0.02", "0.2"]]


def test_results_of_seeds_have_students_interval_and_those_of_a_run_its_own(folders):
    several, single = map(run_comparison.results, groups_of(folders))
    finals = [value(0.02, seed, STEPS) for seed in range(3)]
    half = stats.t.ppf(0.975, 2) * np.std(finals, ddof=1) / math.sqrt(3)
    expected = [np.mean(finals), np.mean(finals) - half, np.mean(finals) + half]
    np.testing.assert_allclose(np.array(several["policies.ppo.reward"], float), expected)
    final = value(0.2, 1, STEPS)
    np.testing.assert_allclose(np.array(single["policies.ppo.reward"], float), [final, final - 0.5, final + 0.5])
    assert set(single) == set(several) == {"policies.ppo.reward", "steps"}  # no seed, no list of counts, no null


def test_a_curve_has_the_steps_that_all_seeds_have(tmp_path):
    runs = [write(tmp_path / f"{seed}", seed=seed, steps=6 - seed, finished=not seed) for seed in range(3)]
    (group,) = groups_of(runs)
    found = run_comparison.curve(group, ("ppo", "reward"))
    assert found is not None
    np.testing.assert_array_equal(found[0], [1, 2, 3, 4])
    np.testing.assert_allclose(found[1], [[value(0.02, seed, s) for s in range(1, 5)] for seed in range(3)])
    assert run_comparison.curve(group, ("ppo", "skipped")) is None


def test_the_page_has_one_figure_per_metric_and_both_tables(folders, tmp_path, capsys):
    page = compare(folders, tmp_path)
    assert page.count("<svg") == 2  # reward and kl; the report does not plot "own"
    assert page.count("<table") == 2
    printed = capsys.readouterr().out
    for text in ("--ppo.kl-coef", "policies.ppo.reward", "finished runs"):
        assert text in page and text in printed


def test_metrics_stages_and_labels_are_chosen(folders, tmp_path):
    page = compare(folders, tmp_path, "--metrics", "own", "--stages", "ppo", "--labels", "weak <1>", "strong")
    assert page.count("<svg") == 1
    assert page.count("weak &lt;1&gt;") >= 3 and "weak <1>" not in page
    assert not re.search("ppo.kl-coef 0.2", page)


def test_an_unfinished_run_is_plotted_without_results(folders, tmp_path, capsys):
    running = write(tmp_path / "running", kl_coef=0.5, finished=False, steps=2)
    page = compare([*folders, running], tmp_path)
    assert "--ppo.kl-coef 0.5" in page
    assert "running has no results.json" in " ".join(capsys.readouterr().out.split())
    assert len(run_comparison.results_table(groups_of([*folders, running]))[0]) == 3


def test_different_commands_share_only_common_metrics(folders, tmp_path):
    other = write(tmp_path / "other", command="instructgpt", stage="sft", extra=1)
    page = compare([*folders, other], tmp_path)
    assert "<svg" not in page and "no metrics in common" in page
    assert "settings that only some of the groups have are left out (1)" in page
    assert ["command", "ppo", "ppo", "instructgpt"] in run_comparison.settings_table(groups_of([*folders, other]))


def test_losses_of_direct_alignment_share_their_figures(tmp_path):
    runs = [write(tmp_path / loss, command="dpo", stage=loss, loss=loss) for loss in ("dpo", "ipo")]
    shared = run_comparison.share_stages(list(map(run_comparison.read, runs)))
    assert [set(run.curves) for run in shared] == [{("dpo", name) for name in ("reward", "kl", "own")}] * 2


def test_stages_of_the_same_run_stay_apart(tmp_path):
    run = run_comparison.read(write(tmp_path / "a"))
    both = run._replace(curves=run.curves | {("ppo_ptx", "kl"): {1: 0.5}})
    assert run_comparison.share_stages([run, both]) == [run, both]


def test_a_changed_data_file_separates_groups(tmp_path):
    runs = [
        write(tmp_path / "a", prompts="p.jsonl"),
        write(tmp_path / "b", prompts="p.jsonl", seed=1, input_digests={"prompts": "def"}),
    ]
    assert run_comparison.settings_table(groups_of(runs))[1:] == [["--prompts (digest)", "abc", "def"]]


def test_refusals_say_what_is_wrong_and_what_to_do(folders, tmp_path):
    assert "is not a run folder" in refusal([str(tmp_path)])
    assert "RUN gs://bucket/a is not a local folder" in refusal(["gs://bucket/a"])
    assert "name at least one" in refusal([])
    assert "choose from kl, own, reward" in refusal(folders, "--metrics", "gold")
    assert "choose from ppo" in refusal(folders, "--stages", "sft")
    assert "--labels names 1 instead of 2 groups" in refusal(folders, "--labels", "a")
    assert "same settings and the same seed" in refusal([*folders, folders[0]])
    (tmp_path / "high" / "results.json").write_text("{")
    assert "a file is damaged" in refusal(folders)
    assert not (tmp_path / "out").exists()
