"""Intervals over seeds, and the verdicts that follow from them.

Each seed has its own world, prompts, labels and models, so a statistic has one value per seed, and these values are
independent. Their Student's t interval therefore covers the choice of the prompts, the labels and the training alike.
Arms share the seed, so differences between arms are paired.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from rlhf_jax import diagnostics

Verdict = Literal["shown", "not shown", "refuted"]


@dataclasses.dataclass(frozen=True)
class Part:
    """A statistic of a claim, with its mean over seeds, its 95 % interval, and the verdict."""

    statistic: str
    """What is measured, and the range in which the claim expects it."""
    value: float
    ci: tuple[float, float]
    verdict: Verdict


def above(statistic: str, values_S: npt.ArrayLike, bound: float = 0.0) -> Part:
    """Returns whether a statistic is above ``bound``, given its value for each seed."""
    return _part(f"{statistic} > {bound:g}", values_S, bound, np.inf)


def below(statistic: str, values_S: npt.ArrayLike, bound: float = 0.0) -> Part:
    """Returns whether a statistic is below ``bound``, given its value for each seed."""
    return _part(f"{statistic} < {bound:g}", values_S, -np.inf, bound)


def between(statistic: str, values_S: npt.ArrayLike, lo: float, hi: float) -> Part:
    """Returns whether a statistic is between two bounds, given its value for each seed."""
    return _part(f"{lo:g} < {statistic} < {hi:g}", values_S, lo, hi)


def spread_above(statistic: str, first_S: npt.ArrayLike, second_S: npt.ArrayLike) -> Part:
    """Returns whether one quantity varies more between the seeds than another.

    The value is the logarithm of the ratio of the standard deviations. Its interval is that of Morgan (1939) and Pitman
    (1939) for paired samples of a normal distribution; with fewer than three seeds, it is infinitely wide.
    """
    x_S, y_S = np.asarray(first_S, np.float64), np.asarray(second_S, np.float64)
    n, lo, hi, value = len(x_S), -np.inf, np.inf, 0.0
    if n > 1:
        value = float(np.log(np.std(x_S) / np.std(y_S)))
    if n > 2:
        t, r = stats.t.ppf(0.975, n - 2), np.corrcoef(x_S, y_S)[0, 1]
        half = float(np.arccosh(1 + 2 * (1 - r**2) * t**2 / (n - 2))) / 2
        lo, hi = value - half, value + half
    return _decided(f"log of the ratio of standard deviations, {statistic} > 0", value, (lo, hi), 0.0, np.inf)


def jackknife(statistic: Callable[[Sequence[Any]], float], measured_S: Sequence[Any]) -> np.ndarray:
    """Returns a value per seed, whose mean and interval are those of a statistic of all seeds together.

    It serves statistics that are not means over seeds, such as those of a mean curve. The values are the pseudo-values
    of Tukey (1958), ``n T - (n - 1) T_i``, where T_i leaves out seed i. A single seed has the statistic as its value.
    """
    n, all_of_them = len(measured_S), statistic(measured_S)
    if n == 1:
        return np.array([all_of_them])
    others = [[*measured_S[:i], *measured_S[i + 1 :]] for i in range(n)]
    return np.array([n * all_of_them - (n - 1) * statistic(each) for each in others])


def _part(statistic: str, values_S: npt.ArrayLike, lo: float, hi: float) -> Part:
    value, *ci = diagnostics.mean_interval(np.asarray(values_S, np.float64))
    return _decided(statistic, value, (ci[0], ci[1]), lo, hi)


def _decided(statistic: str, value: float, ci: tuple[float, float], lo: float, hi: float) -> Part:
    inside, outside = lo < ci[0] and ci[1] < hi, ci[1] < lo or hi < ci[0]
    return Part(statistic, value, ci, "shown" if inside else "refuted" if outside else "not shown")


def overall(parts: Sequence[Part]) -> Verdict:
    """Returns the verdict on a claim: shown if all parts are, refuted if any part is."""
    verdicts = {part.verdict for part in parts}
    return "refuted" if "refuted" in verdicts else "not shown" if "not shown" in verdicts else "shown"
