"""Lines, tables and differences between methods for the results of dpo_vs_ppo.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.table import Table
from sweeps import frontier_plot, run_grid

from rlhf_jax import diagnostics
from rlhf_jax.report import console

SHIFTED = "shifted pairs"


def new_table(title: str, *columns: str) -> Table:
    """Returns an empty table; all columns except the first are aligned to the right."""
    return console.NumbersTable(*columns, title=title)


def line(method: str, runs: dict[float, list[dict[str, float]]]) -> dict[str, Any]:
    """Returns the data of a method's line in a figure: its look, points and runs."""
    families = ("PPO", "DPO", "iterated DPO", "optimum")
    return {
        "method": method,
        "look": families.index(method.split(",")[0]),
        "paler": SHIFTED in method,
        "points": [{"coef": coef} | run_grid.mean_over_seeds(each) for coef, each in runs.items()],
        "runs": {f"{coef:g}": each for coef, each in runs.items()},
    }


def effects(
    runs: dict[str, dict[float, list[dict[str, float]]]], middle: dict[str, float], at: tuple[float, ...]
) -> dict[str, list[float]]:
    """Returns differences in gold utility with 95 % intervals over seeds.

    ``runs`` has the numbers of each seed by method and coefficient. Shifted pairs are compared with pairs of SFT
    samples at the ``middle`` coefficients. Methods are compared at the KLs ``at``.
    """

    def gold(method: str) -> list[float]:
        return [numbers["gold"] for numbers in runs[method][middle[method.split(",")[0]]]]

    cost = {name: _difference(gold(name), gold(f"{name}, {SHIFTED}")) for name in ("DPO", "PPO")}
    differences = {f"gold that shifted pairs cost {name}": cost[name] for name in cost}
    differences["what they cost DPO more than PPO"] = _difference(cost["DPO"], cost["PPO"])
    for kl in at:
        for method, other in (("PPO", "DPO"), ("iterated DPO", "DPO")):
            upper, lower = (_gold_at(runs[name], kl) for name in (method, other))
            if upper is not None and lower is not None:
                differences[f"gold of {method} above {other} at a KL of {kl:g}"] = _difference(upper, lower)
    return {name: list(diagnostics.mean_interval(each)) for name, each in differences.items()}


def _gold_at(runs: dict[float, list[dict[str, float]]], kl: float) -> list[float] | None:
    """Returns the gold utility of each seed at a KL, interpolated linearly in √KL between the coefficients.

    Returns None if ``kl`` is outside the range of any seed's KLs.
    """
    golds = []
    for each in zip(*runs.values(), strict=True):
        points = sorted((max(numbers["kl"], 0.0) ** 0.5, numbers["gold"]) for numbers in each)
        x, y = zip(*points)
        if not x[0] <= kl**0.5 <= x[-1]:
            return None
        golds.append(float(np.interp(kl**0.5, x, y)))
    return golds


def _difference(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def lines_table(lines: list[dict[str, Any]], title: str) -> Table:
    """Returns a table with one row per method and coefficient."""
    table = new_table(title, "method", "coef", "KL", "gold")
    for line in lines:
        for i, point in enumerate(line["points"]):
            numbers = (frontier_plot.interval_text(point[name]) for name in ("kl", "gold"))
            table.add_row("" if i else line["method"], f"{point['coef']:g}", *numbers)
    return table


def data_table(data: dict[str, dict[str, int]]) -> Table:
    """Returns a table of what each method is trained on, with one row per method."""
    columns = list(next(iter(data.values())))
    table = new_table(
        "what each method is trained on (iterated DPO and PPO: labels of their reward model)", "", *columns
    )
    for method, numbers in data.items():
        table.add_row(method, *(str(numbers[name]) for name in columns))
    return table
