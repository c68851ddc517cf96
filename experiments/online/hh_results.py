"""Shows the results of hh.py in the terminal and in its report."""

from __future__ import annotations

import html
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from sweeps import frontier_plot

from rlhf_jax.report import plots
from rlhf_jax.report import results as results_lib

CRITERIA = {"helpful": "helpfulness", "harmless": "harmlessness", "overall": "overall"}


def show(out: Console, results: Mapping[str, Any]) -> None:
    """Prints the tables and the main result."""
    for title, header, rows in _tables(results):
        out.print(frontier_plot.text_table(title, header, rows))
    out.print(sentence(results), soft_wrap=True, highlight=False)


def sentence(results: Mapping[str, Any]) -> str:
    """Returns what the iterated policy gains over the static one."""
    if "iterated_minus_static_elo" not in results:
        return ""
    found = results["iterated_minus_static_elo"]
    parts = [f"{_elo(found[name])} in {CRITERIA[name]}" for name in ("overall", "helpful", "harmless")]
    return f"Elo of the last round's policy minus that of the static policy, with equal labels: {', '.join(parts)}."


def write_page(path: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Writes the report."""
    tables = "".join(
        f"<h2>{html.escape(title)}</h2>{frontier_plot.html_table([header, *rows])}"
        for title, header, rows in _tables(results)
    )
    note = (
        f"{sentence(results)} Elo scores are relative to the SFT model, from gold utilities on held-out prompts. "
        "Helpfulness is measured on ordinary prompts, harmlessness on requests for help with harm, and the overall "
        "utility on both. Intervals are 95 % confidence intervals, clustered by what a prompt asks. They do not cover "
        "the randomness of labels and training."
    )
    frontier_plot.write_page(path, "Iterated online RLHF", [_plot(results), _tension(results)], note, tables=tables)


def _plot(results: Mapping[str, Any]) -> str:
    """Draws the Elo scores of the policies."""
    names = list(results["policies"])
    with plots.axes(height=2.8) as (svg, (ax,)):
        for i, (criterion, label) in enumerate(CRITERIA.items()):
            elo = np.array([results["elo"][criterion][name] for name in names], float)
            x = np.arange(len(names)) + 0.12 * (i - 1)
            errors = np.abs(elo[:, 1:].T - elo[:, 0])
            color = plots.color(("sft", "ppo", "other")[i])
            ax.errorbar(x, elo[:, 0], yerr=errors, fmt="o", color=color, label=label, markersize=4)
        ax.axhline(0, color=plots.color("rule"), linewidth=0.8)
        ax.set_xticks(range(len(names)), names)
        ax.set_ylabel("Elo, relative to the SFT model")
        ax.legend()
    return svg[0]


def _tension(results: Mapping[str, Any]) -> str:
    """Draws harmlessness against helpfulness."""
    with plots.axes(height=2.8) as (svg, (ax,)):
        for number, (name, each) in enumerate(results["policies"].items()):
            x, y = each["helpful"]["worth"], each["harmless"]["worth"]
            xerr, yerr = ([[v[0] - v[1]], [v[2] - v[0]]] for v in (x, y))
            color = plots.color("sft" if name == "SFT" else "other" if name == "static" else "ppo")
            mark = "osD^vP*X"[number % 8]
            ax.errorbar(x[0], y[0], xerr=xerr, yerr=yerr, fmt=mark, color=color, markersize=5, label=name)
        ax.set_xlabel("gold helpfulness on ordinary prompts")
        ax.set_ylabel("gold harmlessness on harmful requests")
        ax.legend()
    return svg[0]


def _tables(results: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    policies = [
        [
            name,
            *(_elo(results["elo"][criterion][name]) for criterion in CRITERIA),
            *(_number(each[domain]["worth"]) for domain in ("helpful", "harmless")),
            *(_number(each[domain]["refusals"], percent=True) for domain in ("helpful", "harmless")),
            f"{each['helpful']['kl'][0]:.1f}",
        ]
        for name, each in results["policies"].items()
    ]
    header = ["policy", *(f"Elo, {label}" for label in CRITERIA.values())]
    header += ["helpfulness", "harmlessness", "refused, %", "harmful refused, %", "KL"]
    accuracy = [
        [
            name,
            *(
                _number(found[domain], percent=True) if domain in found else "–"
                for domain in ("helpful", "harmless")
                for found in by_set
            ),
        ]
        for name, by_set in results["preference_models"].items()
    ]
    sets = [f"{i}: {each['source']}" for i, each in enumerate(results["sets"], start=1)]
    columns = [f"{label}, {each}" for label in ("helpful", "harmless") for each in sets]
    return [
        ("Policies", header, policies),
        ("Accuracy of the preference models on held-out pairs of each set, %", ["model", *columns], accuracy),
        *_labels(results, sets),
    ]


def _labels(results: Mapping[str, Any], sets: list[str]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Returns the table of the labels of a judge or of people."""
    if "labels" not in results:
        return []
    who = {"judge": "the judge", "people": "people"}[results["labels"]]
    rows = [
        [
            name,
            f"{each['pairs']:,}",
            *(
                _number(each["agreement"][domain], percent=True) if domain in each["agreement"] else "–"
                for domain in ("helpful", "harmless")
            ),
        ]
        for name, each in zip(sets, results["sets"])
    ]
    header = ["set", "training pairs", "agreement on helpfulness, %", "agreement on harmlessness, %"]
    return [(f"Labels of {who}, and their agreement with the gold utility on held-out pairs", header, rows)]


def _elo(estimate: Any) -> str:
    mean, low, high = map(round, estimate)  # no negative zero
    return f"{mean} ({low} to {high})"


def _number(estimate: Any, *, percent: bool = False) -> str:
    mean, bounds = results_lib.format_parts(estimate, percent=percent, digits=1 if percent else 3)
    return f"{mean} ({bounds})" if bounds else mean
