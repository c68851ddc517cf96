"""Fits the gate of gate.py, and measures what it refuses."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from finetune import answers
from recipe import human_comparisons
from rich.table import Table
from sweeps import frontier_plot

from judging.prompt_gate import Gate, Kind
from rlhf_jax import diagnostics
from rlhf_jax.data import errors, records
from rlhf_jax.diagnostics import ood
from rlhf_jax.report import console, plots
from rlhf_jax.report import results as results_lib

EXAMPLES = (1, 10, 100)
"""Numbers of unusual prompts whose classifiers are measured."""
LEAST, FOLDS = 8, 4
"""Least number of different usual prompts, and number of equal folds, of which two fit the detector."""


class Parts(NamedTuple):
    """Different prompts and the indices of each part; no conversation is in two parts of the usual or unusual ones."""

    ids: list[list[int]]
    conversation_N: np.ndarray
    """Number of the conversation of each prompt."""
    fit: np.ndarray
    """Half of the usual prompts, from which distances are measured."""
    limit: np.ndarray
    """A quarter of the usual prompts, which set the limit."""
    test: np.ndarray
    """A quarter of the usual prompts."""
    known: np.ndarray
    """Half of the unusual prompts, for classifiers."""
    unknown: np.ndarray
    """Half of the unusual prompts."""


PARTS = ("fit", "limit", "test", "known", "unknown")


class Fitted(NamedTuple):
    """The detector of a gate, and its limit."""

    kind: Kind
    detector: ood.Gaussian | ood.Probe
    limit: float


def divide(
    usual: answers.Prompts,
    unusual: answers.Prompts | None,
    *,
    seed: int,
    warn: Callable[[str], None] = lambda text: None,
) -> Parts:
    """Divides the prompts at random, by conversation; equal prompts count once, and those in both files as usual.

    Args:
        usual: The usual prompts.
        unusual: The unusual prompts; None for none.
        seed: Seed of the division.
        warn: Called with a message if all prompts begin alike (see `human_comparisons.conversation_ids`).

    Raises:
        DataError: There are too few different prompts or conversations.
    """
    first = _different(usual)
    others = {} if unusual is None else {ids: each for ids, each in _different(unusual).items() if ids not in first}
    if len(first) < LEAST:
        raise errors.DataError(
            f"--prompts has {errors.counted(len(first), 'different prompts')}; a gate needs at least {LEAST}"
        )
    if unusual is not None and len(others) < 2:
        raise errors.DataError(
            f"--unusual has {errors.counted(len(others), 'different prompts')} that --prompts does not have; it needs "
            "at least 2"
        )
    group_N = human_comparisons.conversation_ids(list(first.values()), warn=warn)
    conversations = int(group_N.max()) + 1
    if conversations < FOLDS:
        raise errors.DataError(
            f"--prompts has {errors.counted(conversations, 'conversations')}, which are not divided; a gate needs at "
            f"least {FOLDS}"
        )
    *fitted, limit, test = human_comparisons.fold_indices(group_N, FOLDS, seed=seed)
    rng = np.random.default_rng(seed)
    known = unknown = np.zeros(0, int)
    other_N = np.zeros(0, int)
    if others:
        other_N = human_comparisons.conversation_ids(list(others.values()), warn=warn)
        known, unknown = (len(first) + each for each in human_comparisons.fold_indices(other_N, 2, seed=seed))
    return Parts(
        [list(ids) for ids in [*first, *others]],
        np.concatenate([group_N, conversations + other_N]),
        np.concatenate(fitted),
        limit,
        test,
        rng.permutation(known),  # classifiers see the first ones
        unknown,
    )


def _different(prompts: answers.Prompts) -> dict[tuple[int, ...], records.Prompt]:
    found: dict[tuple[int, ...], records.Prompt] = {}
    for ids, record in zip(prompts.ids, prompts.records):
        found.setdefault(tuple(ids), record)
    return found


def fit(hidden_ND: np.ndarray, parts: Parts, *, examples: int, refusals: float) -> Fitted:
    """Fits the detector and sets the limit.

    Args:
        hidden_ND: Hidden state of each prompt.
        parts: The parts of the prompts.
        examples: Number of unusual prompts of a classifier; 0 for the relative Mahalanobis distance.
        refusals: Maximum share of usual prompts that are refused.
    """
    kind, detector, score = _detector(hidden_ND, parts, examples)
    return Fitted(kind, detector, ood.threshold(score(detector, hidden_ND[parts.limit]), refusals=refusals))


def _detector(hidden_ND: np.ndarray, parts: Parts, examples: int) -> tuple[Kind, Any, Any]:
    usual_ND = hidden_ND[parts.fit]
    if examples:
        return "exposure", ood.fit_exposure(usual_ND, hidden_ND[parts.known[:examples]]), ood.exposure
    return "relative", ood.fit(usual_ND), ood.relative_mahalanobis


def measure(gate: Gate, hidden_ND: np.ndarray, parts: Parts) -> dict[str, Any]:
    """Returns the shares of usual and unusual prompts that are refused, and the areas under the ROC curves."""
    results: dict[str, Any] = {
        "limit": gate.limit,
        "prompts": {name: len(getattr(parts, name)) for name in PARTS},
        "clusters": {"share of usual prompts that are refused": len(np.unique(parts.conversation_N[parts.test]))},
        "refused_usual": _share(gate, hidden_ND, parts, parts.test),
    }
    if not len(parts.unknown):
        return results
    gaussian = ood.fit(hidden_ND[parts.fit])
    scores = {
        "Mahalanobis distance": ood.mahalanobis(gaussian, hidden_ND),
        "relative Mahalanobis distance": ood.relative_mahalanobis(gaussian, hidden_ND),
    }
    for n in EXAMPLES:
        if n <= len(parts.known):
            _, probe, score = _detector(hidden_ND, parts, n)
            scores[f"classifier, {errors.counted(n, 'examples')}"] = score(probe, hidden_ND)
    unusual = len(np.unique(parts.conversation_N[parts.unknown]))
    results["clusters"]["share of unusual prompts that are refused"] = unusual
    return results | {
        "refused_unusual": _share(gate, hidden_ND, parts, parts.unknown),
        "areas": {name: list(ood.auroc(each[parts.test], each[parts.unknown])) for name, each in scores.items()},
    }


def _share(gate: Gate, hidden_ND: np.ndarray, parts: Parts, part: np.ndarray) -> list[float]:
    refused = gate.refuses(hidden_ND[part])
    return list(diagnostics.clustered_mean(refused, parts.conversation_N[part].tolist(), rate=True))


def rows(results: dict[str, Any]) -> list[tuple[str, Any]]:
    """Returns the names of the numbers of a gate with the numbers, of which shares are in percent."""
    percent = [("usual prompts that are refused, %", results["refused_usual"])]
    if "areas" in results:
        percent.append(("unusual prompts that are refused, %", results["refused_unusual"]))
    shares = [(name, results_lib.format_parts(value, percent=True, digits=1)) for name, value in percent]
    areas = results.get("areas", {}).items()
    return shares + [(f"area, {name}", results_lib.format_parts(value, digits=3)) for name, value in areas]


def table(results: dict[str, Any]) -> Table:
    """Returns the table that is printed."""
    made = console.NumbersTable("", "value", "95 % interval")
    for name, parts in rows(results):
        made.add_row(name, *parts)
    return made


def write_page(path: pathlib.Path, results: dict[str, Any], gate: Gate, hidden_ND: np.ndarray, parts: Parts) -> None:
    """Writes the report: the distributions of the scores, the limit, and the table."""
    with plots.axes(height=2.6) as (svg, (ax,)):
        for name, color, indices in (("usual", "sft", parts.test), ("unusual", "ppo", parts.unknown)):
            if len(indices):
                scores = np.sort(gate.score(hidden_ND[indices]))
                share = 1 - np.arange(len(scores)) / len(scores)
                ax.step(scores, share, where="post", color=plots.color(color), label=f"{name} prompts")
        if np.isfinite(gate.limit):
            ax.axvline(gate.limit, color=plots.color("other"), linestyle="--", label="limit")
        ax.set_xlabel("score")
        ax.set_ylabel("share of prompts with at least this score")
        ax.legend()
    kind = {"relative": "relative Mahalanobis distance", "exposure": "classifier"}[gate.kind]
    n = results["prompts"]
    note = (
        f"The gate scores layer {gate.layer} by the {kind}. It was fitted to {n['fit']} usual prompts; {n['limit']} "
        f"others set the limit, for at most {100 * results['refusals']:g} % refusals of usual prompts. The numbers are "
        f"those of {n['test']} further usual and {n['unknown']} unusual prompts, with 95 % intervals. Those of the "
        "shares are clustered by conversation; those of the areas treat prompts as independent."
    )
    cells = [(name, mean, bounds) for name, (mean, bounds) in rows(results)]
    frontier_plot.write_page(path, "Gate for unusual prompts", svg, note, tables=frontier_plot.html_table(cells))
