"""What the folds of a cross-validation say together: numbers, a table and a page."""

from __future__ import annotations

import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from recipe import human_comparisons
from rich import box
from rich.table import Table
from sweeps import frontier_plot

from preferences import cross_validation as folds_lib
from rlhf_jax import diagnostics
from rlhf_jax.data import dialogues
from rlhf_jax.report import plots

NAMES = {"reward_model": "reward model", "tfidf": "TF-IDF regression", "shorter": "shorter wins"}
TOGETHER = "reward model + TF-IDF"


def over_groups(values_N: np.ndarray, group_N: np.ndarray, *, rate: bool) -> list[float]:
    """Mean and 95 % interval of a number of each pair, pairs of one conversation standing or falling together."""
    return list(diagnostics.ratio_interval(np.bincount(group_N, weights=values_N), np.bincount(group_N), rate=rate))


def facts(lead: np.ndarray, group_N: np.ndarray) -> dict[str, Any]:
    """Accuracy (ties a half) and calibration of leads that claim log odds."""
    zeros = np.zeros_like(lead)
    curve = diagnostics.calibration_curve(lead, zeros, bins=10)
    slope = diagnostics.calibration_slope(lead, zeros) if lead.any() else (float("nan"),) * 3
    return {
        "accuracy": over_groups(diagnostics.win_outcomes(lead, zeros), group_N, rate=True),
        "log_loss": float(np.logaddexp(0.0, -lead).mean()),
        "calibration": {
            "bins": [dict(zip(curve._fields, map(float, each))) for each in zip(*curve)],
            "error": diagnostics.expected_calibration_error(lead, zeros),
            "slope": list(slope),
        },
    }


def by(groups: Mapping[str, np.ndarray], leads: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Each method's accuracy on each group of pairs."""
    rows = []
    for name, mine in groups.items():
        if mine.any():
            rates = {m: list(diagnostics.win_rate(lead[mine], np.zeros(mine.sum()))) for m, lead in leads.items()}
            rows.append({"group": name, "pairs": int(mine.sum()), **rates})
    return rows


def turn_groups(pairs: Sequence[human_comparisons.Pair]) -> dict[str, np.ndarray]:
    """By which assistant turn of the dialogue is judged."""
    turn = np.array([1 + sum(t.role == dialogues.ASSISTANT for t in pair.prompt) for pair in pairs])
    return {f"turn {n}": turn == n for n in (1, 2, 3)} | {"turn 4 and on": turn >= 4}


def length_groups(pairs: Sequence[human_comparisons.Pair]) -> dict[str, np.ndarray]:
    """By the length of the two answers together, in quarters, and by which of them is longer."""
    total = np.array([len(pair.chosen) + len(pair.rejected) for pair in pairs])
    shorter = np.array([len(pair.chosen) < len(pair.rejected) for pair in pairs])
    ends = np.quantile(total, [0.25, 0.5, 0.75])
    quarter = np.searchsorted(ends, total, side="left")
    names = ["shortest quarter", "second quarter", "third quarter", "longest quarter"]
    return {name: quarter == q for q, name in enumerate(names)} | {
        "chosen is shorter": shorter,
        "chosen is longer": np.array([len(pair.chosen) > len(pair.rejected) for pair in pairs]),
    }


def summary(
    pairs: Sequence[human_comparisons.Pair], found: Sequence[Mapping[str, Any]], *, seed: int
) -> dict[str, Any]:
    """The folds together: every pair once, scored by the model that has not seen it."""
    group_N = human_comparisons.conversation_ids(pairs)
    where = folds_lib.parts(group_N, len(found), seed=seed)
    leads: dict[str, np.ndarray] = {}
    for method in folds_lib.METHODS:
        leads[method] = np.zeros(len(pairs))
        for test, fold in zip(where, found):
            leads[method][test] = fold[method]
    outcome = {m: diagnostics.win_outcomes(lead, np.zeros(len(lead))) for m, lead in leads.items()}
    differences = {
        m: over_groups(outcome["reward_model"] - outcome[m], group_N, rate=False) for m in ("tfidf", "shorter")
    }
    # Both claim log odds: their sum shows whether one knows what the other does not.
    together = leads["reward_model"] + leads["tfidf"]
    gain = diagnostics.win_outcomes(together, np.zeros(len(together))) - outcome["tfidf"]
    members = np.concatenate([np.asarray(fold["members"]) for fold in found], axis=1).ravel()
    methods: dict[str, Any] = {m: facts(leads[m], group_N) for m in ("reward_model", "tfidf")}
    methods["shorter"] = {"accuracy": over_groups(outcome["shorter"], group_N, rate=True)}
    sizes = np.array([len(test) for test in where])
    return {
        "pairs": len(pairs),
        "folds": [
            {m: float(outcome[m][test].mean()) for m in folds_lib.METHODS}
            | {name: fold[name] for name in ("train_accuracy", "tfidf_train_accuracy", "tfidf_strength")}
            for test, fold in zip(where, found)
        ],
        "methods": methods,
        "difference": differences,
        "together": facts(together, group_N) | {"over_tfidf": over_groups(gain, group_N, rate=False)},
        "single_member_accuracy": float(diagnostics.win_outcomes(members, np.zeros(len(members))).mean()),
        "train_accuracy": float(np.average([fold["train_accuracy"] for fold in found], weights=len(pairs) - sizes)),
        "agreement_with_tfidf": float(np.mean(outcome["reward_model"] == outcome["tfidf"])),
        "by_turn": by(turn_groups(pairs), leads),
        "by_length": by(length_groups(pairs), leads),
    }


def percent(estimate: Sequence[float], *, signed: bool = False) -> str:
    """A rate with its interval, in percent."""
    mean, low, high = (100 * x for x in estimate)
    sign = "+" if signed else ""
    return f"{mean:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def table(results: Mapping[str, Any]) -> Table:
    """Methods beside each other."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for title in ("method", "accuracy, %", "reward model leads by, points", "log loss", "calib. error", "slope"):
        made.add_column(title, justify="left" if title == "method" else "right")
    named = {NAMES[method]: each for method, each in results["methods"].items()} | {TOGETHER: results["together"]}
    differences = {NAMES[method]: each for method, each in results["difference"].items()}
    for name, each in named.items():
        lead = percent(differences[name], signed=True) if name in differences else ""
        rest = ("", "", "")
        if "calibration" in each:
            slope = each["calibration"]["slope"][0]
            shown = "" if slope is None else f"{slope:.2f}"
            rest = (f"{each['log_loss']:.4f}", f"{each['calibration']['error']:.3f}", shown)
        made.add_row(name, percent(each["accuracy"]), lead, *rest)
    return made


def groups_table(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str] = NAMES) -> Table:
    """Accuracy of every method on groups of pairs; ``names`` are the methods' headings."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for title in ("pairs", "n", *names.values()):
        made.add_column(title, justify="left" if title == "pairs" else "right")
    for row in rows:
        made.add_row(row["group"], str(row["pairs"]), *(percent(row[m]) for m in names if m in row))
    return made


def tables(results: Mapping[str, Any]) -> list[Table]:
    """What the terminal shows."""
    return [table(results), groups_table(results["by_turn"]), groups_table(results["by_length"])]


def write_page(path: pathlib.Path, results: Mapping[str, Any]) -> None:
    """One self-contained page: calibration as a figure, and the tables."""
    drawn = [svg for svg in [plots.calibration({"reward_model": results["methods"]["reward_model"]})] if svg]
    titled = [("Methods", table(results))] + [
        (title, groups_table(results[key]))
        for title, key in (("Accuracy by turn", "by_turn"), ("Accuracy by length", "by_length"))
    ]
    tables = "".join(f"<h2>{html.escape(title)}</h2>{as_html(each)}" for title, each in titled)
    note = "Each pair is scored by a model that has not seen it. Intervals are 95 %."
    frontier_plot.write_page(path, "A reward model, cross-validated", drawn, note, tables=tables)


def as_html(made: Table) -> str:
    """A table of the terminal as one of a page."""
    cells = list(zip(*(list(column.cells) for column in made.columns)))
    head = "".join(f"<th>{html.escape(str(column.header))}</th>" for column in made.columns)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in cells)
    return f"<table><tr>{head}</tr>{rows}</table>"
