"""The tables of all commands in a terminal of 80 columns, and the warnings about rough intervals."""

import io
import re
from typing import Any

import compare
import dpo_vs_ppo
import evaluate
import pytest
import real_run
import rewardbench
import torture
from benchmarks import benchmark_tables
from fault_injection import interruptions
from finetune import direct_training, outcome, policy_samples, reward_training
from planning import roofline
from preferences import cross_validation_results, reward_run, study_results
from rich.console import Console
from sweeps import frontier_plot

from rlhf_jax import report
from rlhf_jax.report import console
from rlhf_jax.report import results as results_lib

WIDE = [-1234.567, -1240.123, -1229.001]
"""A number with an interval that takes many characters."""
RATE = [0.123, 0.101, 0.145]
STRATA = [{"name": "1000–12345", "accuracy": RATE, "count": 12345, "clusters": 30 - 15 * i} for i in range(2)]
CALIBRATION = {"error": 0.123, "slope": RATE}
GROUPS = [{"group": "chosen is longer", "pairs": 12345, "clusters": 5, "reward_model": RATE, "tfidf": RATE}]
GROUPS[0]["shorter"] = RATE
POINT = {"gold": [0.612, 0.55, 0.66], "kl": [12.345, 12.0, 12.7], "reward": [1.234, 1.0, 1.5]}
RUN = {"kl": [0.0, 1.0, 2.0], "gold": [0.5, 0.6, 0.65]}


def evaluated(policies=5, judges=2):
    row: dict[str, Any] = {name: WIDE for name in ("score", "kl", "length", "characters")}
    row |= {"win_rate": RATE, "length_controlled_win_rate": RATE, "stopped": RATE, "diversity": 0.5}
    row |= {"self_bleu": 0.5, "entropy": WIDE, "entropy_ratio": RATE}
    names = [f"policy-{i}" for i in range(policies)]
    by = [f"judge-{i}" for i in range(judges)]
    rows = {name: row | {"judges": {judge: dict(row) for judge in by}} for name in names}
    for judge in by:
        del rows[names[0]]["judges"][judge]["win_rate"]
    return {"baseline": names[0], "judges": by, "policies": rows, "held_out": {"prompts": 9}}


def methods():
    costs = compare.costs(compare.parse([]), "ppo")
    return [{"method": name, "gold": [[0.6, 0.55, 0.65]] * 6, "runs": [RUN]} | costs for name in compare.METHODS]


def own_ppo():
    row = {name: WIDE for name in ("reward", "reward_my_long_reward_function", "kl", "length")} | {"stopped": RATE}
    policies = {"initial_policy": row, "trained_policy": row | {"win_rate": RATE, "entropy_ratio": RATE}}
    return {"policies": policies, "reward_change": WIDE, "iterations": 30, "tokens_per_second": 12345.6}


def own_dpo():
    both = {"before": WIDE, "after": WIDE}
    return {
        "pairs": {"held_out": 12345},
        "implicit_accuracy_before": RATE,
        "implicit_accuracy": RATE,
        "margin": WIDE,
        "likelihood_accuracy": {"before": RATE, "after": RATE},
        "logprobs": {"chosen": both, "rejected": both},
        "steps": 12345,
        "tokens_per_second": 12345.6,
    }


def own_reward():
    facts = {
        "held_out_pairs": 12345,
        "accuracy": RATE,
        "gap": {"accuracy_gap": RATE},
        "log_loss": RATE,
        "calibration": CALIBRATION,
        "length_bias": {"correlation": RATE},
        "strata": {"tokens of the longer answer": STRATA},
    }
    return {"reward_model": facts, "steps": 12345, "tokens_per_second": None}


def cross_validated():
    numbers = {"accuracy": RATE, "log_loss": RATE, "calibration": CALIBRATION}
    return {
        "methods": {"reward_model": numbers, "tfidf": numbers, "shorter": {"accuracy": RATE}},
        "together": numbers,
        "difference": {"tfidf": [-0.008, -0.033, 0.016], "shorter": RATE},
        "by_turn": GROUPS,
        "by_length": GROUPS,
    }


def world_reward():
    facts = {"held_out_pairs": 12345, "accuracy": RATE, "train_accuracy": RATE, "groups": GROUPS, "log_loss": RATE}
    return {"reward_model": facts | {"calibration": CALIBRATION, "training_prompts": 2000}}


def interrupted() -> Any:
    phases = dict.fromkeys(("start", *interruptions.PHASES), 25)
    numbers = {"stage": "reward model", "kills": phases, "terms": phases, "resumed": 100, "interruptions": 100}
    return [type("Report", (), numbers | {"runs": 10, "failures": [], "seconds": 987.0})]


def comparison_row():
    row = ("SFT step, 12 M parameters", "12345 tok/s", "torch, compiled", "12345 tok/s", "1.00x", "≥ 0.95x", "yes")
    return benchmark_tables.terminal_table("speed", benchmark_tables.COMPARISON_COLUMNS, [row])


TABLES = {
    "evaluate": lambda: evaluate.results_table(evaluated()),
    "ppo": lambda: outcome.table(policy_samples.table(own_ppo())),
    "dpo": lambda: outcome.table(direct_training.table(own_dpo())),
    "reward_model": lambda: outcome.table(reward_training.table(own_reward())),
    "reward_model, folds": lambda: cross_validation_results.titled_tables(cross_validated())[0][1],
    "reward_model, groups": lambda: cross_validation_results.titled_tables(cross_validated())[1][1],
    "reward_model, world": lambda: reward_run.titled_tables(world_reward())[0][1],
    "rewardbench": lambda: rewardbench.accuracy_table(
        {"strata": {"subset": STRATA}, "pairs": 12345, "accuracy": RATE, "ties": 3}
        | {"strict_accuracy": RATE, "mean_subset_accuracy": RATE}
    ),
    "sweep": lambda: frontier_plot.table(
        [{"kl_coef": 0.02, "ptx_coef": 4.0} | POINT | {f"more {i}": [1.0, 0.5, 1.5] for i in range(4)}],
        swept=["kl_coef", "ptx_coef"],
    ),
    "compare": lambda: frontier_plot.methods_table(methods(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
    "compare, costs": lambda: frontier_plot.costs_table(methods()),
    "compare_runs": lambda: frontier_plot.text_table(
        "results", ["", *(f"runs/ppo-{i}" for i in range(4))], [["policies.ppo.reward", *["−0.123 (−0.2 to 0.1)"] * 4]]
    ),
    "dpo_vs_ppo": lambda: study_results.lines_table(
        [{"method": "iterated DPO, shifted pairs", "points": [{"coef": 0.01} | POINT]}], "world"
    ),
    "dpo_vs_ppo, data": lambda: study_results.data_table(
        {"iterated DPO": {name: 12345 for name in ("labelled pairs", "prompts", "sampled answers", "optimiser steps")}}
    ),
    "dpo_vs_ppo, exact": lambda: dpo_vs_ppo._exact_table(
        {"PPO without a reference": {"probabilities": [1.234e-05] * 3, "dpo_loss": 12.3456}}
    ),
    "plan": lambda: roofline._new_table("memory per chip", "kind", "size", "source"),
    "torture": lambda: torture._interruptions_table(interrupted()),
    "benchmark": comparison_row,
}


def printed(table, width=80):
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(table)
    return file.getvalue()


@pytest.mark.parametrize("name", TABLES)
def test_numbers_of_all_tables_are_whole_in_80_columns(name):
    table = TABLES[name]()
    text = printed(table)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in text
    for column in table.columns[1:]:
        for cell in column.cells:
            shown = re.sub(r"\[/?(dim)?\]", "", str(cell))
            assert any(shown in line for line in lines), shown
        for word in str(column.header).split():
            assert word in text
    for cell in table.columns[0].cells:
        for word in str(cell).split():
            assert word in text


def test_headings_wrap_before_a_table_is_divided():
    table = console.NumbersTable("name", *(f"a long heading of the column {i}" for i in range(4)))
    table.add_row("a name", *(f"{i}.5" for i in range(4)))
    assert printed(table, 80).count("a name") == 1


def test_a_table_is_divided_only_if_it_does_not_fit():
    table = console.NumbersTable("name", *(f"column {i}" for i in range(6)), title="title", caption="caption")
    table.add_row("a name", *(f"{i}.123 (−0.1 to 0.1)" for i in range(6)))
    wide, narrow = printed(table, 200), printed(table, 80)
    assert wide.count("a name") == 1 and narrow.count("a name") == 2
    for text in (wide, narrow):
        assert text.count("title") == text.count("caption") == 1
        assert re.findall(r"(\d)\.123", text) == [*"012345"], "each number once and in order"
    text = printed(table, 30)
    assert max(map(len, text.splitlines())) <= 30 and re.findall(r"(\d)\.123", text) == [*"012345"]


# ------------------------------------------------------------------------------------------------------ rough intervals


def test_results_with_few_clusters_have_a_warning():
    many = {"held_out": {"asked": 20}, "reward_model": {"held_out_asked": 400}, "clusters": {"held-out loss": 20}}
    assert results_lib.rough_intervals(many) == results_lib.rough_intervals({}) == []
    few = {"held_out": {"asked": 19}, "reward_model": {"held_out_asked": 2}, "clusters": {"held-out loss": 1}}
    assert results_lib.rough_intervals(few | {"clusters": {"held-out loss": 1, "nothing": 0}}) == [
        "the intervals of the evaluation are rough: they rest on only 19 independent conversations (below 20)",
        "the intervals of the reward model are rough: they rest on only 2 independent conversations (below 20)",
        "the held-out loss has no intervals, because it rests on a single independent conversation",
    ]
    assert "The held-out loss has no intervals, because" in report.render(few, [], title="t")
    assert "evaluation are rough" in " ".join(printed(console.results_table(real_run.results() | few)).split())


def test_commands_of_a_stage_print_the_warning_and_mark_rough_groups():
    file = io.StringIO()
    results = own_reward()
    results["reward_model"]["held_out_asked"] = 7
    outcome.show(Console(file=file, width=80), results, reward_training.table)
    text = file.getvalue()
    assert "rest on only 7 independent conversations" in text and text.count("pairs)*") == 1
    assert text.endswith("* fewer than 20 independent conversations: the interval is rough\n")
    for stratum in results["reward_model"]["strata"]["tokens of the longer answer"]:
        assert results_lib.is_rough(stratum) == (stratum["clusters"] < 20)
    assert "1000–12345*" in printed(TABLES["rewardbench"]())
    assert "chosen is longer*" in printed(TABLES["reward_model, groups"]())
    assert "(n = 12345)*" in report.render(results, [], title="t")


def test_a_single_cluster_has_no_interval():
    assert results_lib.format_parts([0.75, 0.0, 1.0], percent=True) == ("75.0", "")
    assert results_lib.format_parts([0.75, None, None]) == ("0.8", "")
    results = {"baseline": "sft", "policies": {"sft": {}, "ppo": {"win_rate": [1.0, 0.0, 1.0]}}}
    assert results_lib.headline(results) == (
        "PPO does not differ significantly from SFT: it wins on 100.0 % of answers."
    )
    assert cross_validation_results._percent([0.5, 0.0, 1.0]) == "50.0"
    assert cross_validation_results._percent([0.5, None, None], signed=True) == "+50.0"


# ------------------------------------------------------------------------------------------------------------ headlines


def test_the_headline_names_every_policy_and_judge():
    results = evaluated(policies=3, judges=2)
    results["policies"]["policy-2"]["judges"]["judge-1"]["win_rate"] = [0.7, 0.6, 0.8]
    assert results_lib.headlines(results) == [
        f"policy-{policy} {verdict}, judged by judge-{judge}."
        for judge, policy, verdict in (
            *((0, i, "loses to policy-0: it wins on 12.3 % of answers (95 % interval 10.1–14.5)") for i in (1, 2)),
            (1, 1, "loses to policy-0: it wins on 12.3 % of answers (95 % interval 10.1–14.5)"),
            (1, 2, "beats policy-0 on 70.0 % of answers (95 % interval 60.0–80.0)"),
        )
    ]
    page = report.render(results, [], title="t")
    assert all(page.count(sentence) == 1 for sentence in results_lib.headlines(results))
    many = evaluated(policies=9, judges=2)
    many["policies"]["policy-6"]["judges"]["judge-1"]["win_rate"] = [0.7, 0.6, 0.8]
    first, second = results_lib.headlines(many)
    assert first.startswith("The best of 8 policies: policy-") and first.endswith("judged by judge-0.")
    assert second == (
        "The best of 8 policies: policy-6 beats policy-0 on 70.0 % of answers (95 % interval 60.0–80.0), judged by "
        "judge-1."
    )
