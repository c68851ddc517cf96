"""Results of a cross-validation over all folds: numbers, tables and a report page."""

from __future__ import annotations

import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from recipe import human_comparisons
from rich.table import Table
from sweeps import frontier_plot

from preferences import cross_validation
from rlhf_jax import diagnostics
from rlhf_jax.data import dialogues
from rlhf_jax.report import console, plots
from rlhf_jax.report import results as results_lib

THREE_PHASE = cross_validation.THREE_PHASE
METHOD_NAMES = {
    "reward_model": "reward model",
    THREE_PHASE: "reward model after PMP",
    "tfidf": "TF-IDF regression",
    "shorter": "shorter wins",
}


def over_groups(values_N: np.ndarray, group_N: np.ndarray, *, rate: bool) -> list[float]:
    """Returns the mean of ``values_N`` over pairs and its 95 % interval, clustered by groups (conversations).

    ``rate`` is whether the mean is a rate, whose interval stays in [0, 1].
    """
    return list(diagnostics.clustered_mean(values_N, group_N.tolist(), rate=rate))


def calibration(margin_N: np.ndarray, group_N: np.ndarray) -> dict[str, Any]:
    """Returns log loss and calibration of margins, which are chosen minus rejected scores, interpreted as log odds.

    The intervals are clustered by groups. The slope is None if every margin is 0.
    """
    zeros, groups = np.zeros_like(margin_N), group_N.tolist()
    curve = diagnostics.calibration_curve(margin_N, zeros, bins=10, prompts=groups)
    return {
        "log_loss": over_groups(np.logaddexp(0.0, -margin_N), group_N, rate=False),
        "calibration": {
            "bins": [dict(zip(curve._fields, map(float, each))) for each in zip(*curve)],
            "error": diagnostics.expected_calibration_error(margin_N, zeros),
            "slope": list(diagnostics.calibration_slope(margin_N, zeros, prompts=groups)) if margin_N.any() else None,
            "overconfidence": list(diagnostics.overconfidence(margin_N, zeros, prompts=groups)),
        },
    }


def _facts(margin_N: np.ndarray, group_N: np.ndarray) -> dict[str, Any]:
    """Returns accuracy (a tie counts as one half), log loss and calibration of score margins."""
    outcome_N = diagnostics.win_outcomes(margin_N, np.zeros_like(margin_N))
    return {"accuracy": over_groups(outcome_N, group_N, rate=True)} | calibration(margin_N, group_N)


def accuracy_by_group(
    groups: Mapping[str, np.ndarray], margins: Mapping[str, np.ndarray], group_N: np.ndarray
) -> list[dict[str, Any]]:
    """Returns each method's accuracy on each group of pairs; a group is a boolean mask.

    The intervals are clustered by ``group_N``, the conversation of each pair.
    """
    outcomes = {m: diagnostics.win_outcomes(x, np.zeros(len(x))) for m, x in margins.items()}
    return [
        {"group": name, "pairs": int(members_N.sum()), "clusters": len(np.unique(group_N[members_N]))}
        | {m: over_groups(x[members_N], group_N[members_N], rate=True) for m, x in outcomes.items()}
        for name, members_N in groups.items()
        if members_N.any()
    ]


def turn_groups(turn_N: np.ndarray) -> dict[str, np.ndarray]:
    """Returns masks of the pairs, grouped by the assistant turn that they compare; turns are numbered from 1."""
    return {f"turn {n}": turn_N == n for n in (1, 2, 3)} | {"turn 4 and on": turn_N >= 4}


def _length_groups(pairs: Sequence[human_comparisons.Pair]) -> dict[str, np.ndarray]:
    """Returns masks of the pairs, grouped by quarters of the answers' total length and by which answer is longer."""
    chosen_N, rejected_N = (np.array([len(getattr(p, side)) for p in pairs]) for side in ("chosen", "rejected"))
    total_N = chosen_N + rejected_N
    quarter_N = np.searchsorted(np.quantile(total_N, [0.25, 0.5, 0.75]), total_N, side="left")
    names = ("shortest quarter", "second quarter", "third quarter", "longest quarter")
    return {name: quarter_N == q for q, name in enumerate(names)} | {
        "chosen is shorter": chosen_N < rejected_N,
        "chosen is longer": chosen_N > rejected_N,
    }


def summary(
    pairs: Sequence[human_comparisons.Pair], folds: Sequence[Mapping[str, Any]], *, seed: int
) -> dict[str, Any]:
    """Returns the results over all folds; each pair is scored once, by a model that was not trained on it."""
    group_N = human_comparisons.conversation_ids(pairs)
    tested = human_comparisons.fold_indices(group_N, len(folds), seed=seed)
    margins: dict[str, np.ndarray] = {}
    three_phase = [THREE_PHASE] if THREE_PHASE in folds[0] else []
    names = [*cross_validation.METHODS, *three_phase]
    for method in names:
        margins[method] = np.zeros(len(pairs))
        for test, fold in zip(tested, folds):
            margins[method][test] = fold[method]
    outcome = {m: diagnostics.win_outcomes(x, np.zeros(len(x))) for m, x in margins.items()}
    differences = {
        m: over_groups(outcome["reward_model"] - outcome[m], group_N, rate=False) for m in names if m != "reward_model"
    }
    # Both margins are log odds and can be added. The sum is more accurate than the regression alone if the reward
    # model adds information.
    together = margins["reward_model"] + margins["tfidf"]
    gain = diagnostics.win_outcomes(together, np.zeros(len(together))) - outcome["tfidf"]
    members = np.concatenate([np.asarray(fold["members"]) for fold in folds], axis=1).ravel()
    methods: dict[str, Any] = {m: _facts(margins[m], group_N) for m in ("reward_model", *three_phase, "tfidf")}
    methods["shorter"] = {"accuracy": over_groups(outcome["shorter"], group_N, rate=True)}
    sizes = np.array([len(test) for test in tested])
    turn_N = np.array([1 + sum(t.role == dialogues.ASSISTANT for t in pair.prompt) for pair in pairs])
    turns = turn_groups(turn_N)
    pretrained = {"pmp": _pretraining(folds, outcome, {"all": turn_N > 0} | turns, group_N)} if three_phase else {}
    return {
        "pairs": len(pairs),
        "clusters": {"cross-validation": len(np.unique(group_N))},
        "folds": [
            {m: float(outcome[m][test].mean()) for m in names}
            | {name: fold[name] for name in ("train_accuracy", "tfidf_train_accuracy", "tfidf_strength")}
            for test, fold in zip(tested, folds)
        ],
        "methods": methods,
        "difference": differences,
        "together": _facts(together, group_N) | {"over_tfidf": over_groups(gain, group_N, rate=False)},
        "single_member_accuracy": float(diagnostics.win_outcomes(members, np.zeros(len(members))).mean()),
        "train_accuracy": float(np.average([fold["train_accuracy"] for fold in folds], weights=len(pairs) - sizes)),
        "agreement_with_tfidf": float(np.mean(outcome["reward_model"] == outcome["tfidf"])),
        "by_turn": accuracy_by_group(turns, margins, group_N),
        "by_length": accuracy_by_group(_length_groups(pairs), margins, group_N),
        **pretrained,
    }


def _pretraining(
    folds: Sequence[Mapping[str, Any]],
    outcome: Mapping[str, np.ndarray],
    groups: Mapping[str, np.ndarray],
    group_N: np.ndarray,
) -> dict[str, Any]:
    """Returns what preference-model pretraining adds to the accuracy, in all and by group, and facts about it.

    Args:
        folds: The results of the folds.
        outcome: 1 for each pair that a method orders as labelled, else 0.
        groups: Masks of the pairs.
        group_N: The conversation of each pair.
    """
    gain_N, sizes = outcome[THREE_PHASE] - outcome["reward_model"], [len(fold[THREE_PHASE]) for fold in folds]
    facts = {name: [fold["pmp"].get(name) for fold in folds] for name in folds[0]["pmp"]}
    return {
        "gain": [
            {"group": name, "pairs": int(where_N.sum()), "clusters": len(np.unique(group_N[where_N]))}
            | {"gain": over_groups(gain_N[where_N], group_N[where_N], rate=False)}
            for name, where_N in groups.items()
            if where_N.any()
        ],
        **{name: float(np.average(x, weights=sizes)) for name, x in facts.items() if None not in x},
    }


def _percent(estimate: Sequence[Any], *, signed: bool = False) -> str:
    """Formats a rate and its interval in percent; without the interval if it has a single cluster."""
    sign = "+" if signed else ""
    if None in estimate or list(estimate[1:]) == [0, 1] or not np.isfinite(estimate).all():
        return f"{100 * estimate[0]:{sign}.1f}"
    mean, low, high = (100 * x for x in estimate)
    return f"{mean:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def _methods_table(results: Mapping[str, Any]) -> Table:
    """Returns a table with one row for each method."""
    table = console.NumbersTable(
        "method", "accuracy, %", "reward model's lead, points", "log loss", "calib. error", "slope"
    )
    for key, numbers in (results["methods"] | {"together": results["together"]}).items():
        difference = results["difference"].get(key)
        calibrated = ("", "", "")
        if "calibration" in numbers:
            slope = (numbers["calibration"]["slope"] or [None])[0]
            error = numbers["calibration"]["error"]
            calibrated = (f"{numbers['log_loss'][0]:.4f}", f"{error:.3f}", "" if slope is None else f"{slope:.2f}")
        ahead = _percent(difference, signed=True) if difference else ""
        table.add_row(
            (METHOD_NAMES | {"together": "reward model + TF-IDF"})[key],
            _percent(numbers["accuracy"]),
            ahead,
            *calibrated,
        )
    return table


def groups_table(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str] = METHOD_NAMES) -> Table:
    """Returns a table of each method's accuracy on groups of pairs; ``names`` maps methods to column titles."""
    names = {m: title for m, title in names.items() if m in rows[0]}
    table = console.NumbersTable("pairs", "n", *names.values())
    for row in rows:
        mark = results_lib.ROUGH_MARK * results_lib.is_rough(row)
        table.add_row(row["group"] + mark, str(row["pairs"]), *(_percent(row[m]) for m in names if m in row))
    return table


def _gain_table(pmp: Mapping[str, Any]) -> Table:
    """Returns a table of the accuracy that preference-model pretraining adds, in points."""
    table = console.NumbersTable("pairs", "n", "accuracy after PMP − without, points")
    for row in pmp["gain"]:
        mark = results_lib.ROUGH_MARK * results_lib.is_rough(row)
        table.add_row(row["group"] + mark, str(row["pairs"]), _percent(row["gain"], signed=True))
    return table


def titled_tables(results: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """Returns the tables of the terminal output and the report, with their headings."""
    pretrained = [("Preference-model pretraining", _gain_table(results["pmp"]))] if "pmp" in results else []
    return [
        ("Methods", _methods_table(results)),
        *pretrained,
        ("Accuracy by turn", groups_table(results["by_turn"])),
        ("Accuracy by length", groups_table(results["by_length"])),
    ]


def write_page(
    path: pathlib.Path, title: str, results: Mapping[str, Any], tables: Sequence[tuple[str, Table]], note: str
) -> None:
    """Writes a self-contained report page with a calibration plot, a note and tables with headings."""
    plot = plots.calibration(results)
    body = "".join(f"<h2>{heading}</h2>{_as_html(table)}" for heading, table in tables)
    frontier_plot.write_page(path, title, [plot] if plot else [], note, tables=body)


def _as_html(table: Table) -> str:
    """Converts a terminal table to an HTML table."""
    cells = list(zip(*(list(column.cells) for column in table.columns)))
    head = "".join(f"<th>{html.escape(str(column.header))}</th>" for column in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in cells)
    return f"<table><tr>{head}</tr>{rows}</table>"
