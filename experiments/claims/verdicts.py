"""Intervals over seeds, and the verdicts that follow from them.

Each seed has its own world, prompts, labels and models, so a statistic has one value per seed, and these values are
independent. Their Student's t interval therefore covers the choice of the prompts, the labels and the training alike.
Arms share the seed, so differences between arms are paired.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

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


def _part(statistic: str, values_S: npt.ArrayLike, lo: float, hi: float) -> Part:
    value, *ci = diagnostics.mean_interval(np.asarray(values_S, np.float64))
    inside, outside = lo < ci[0] and ci[1] < hi, ci[1] < lo or hi < ci[0]
    return Part(statistic, value, (ci[0], ci[1]), "shown" if inside else "refuted" if outside else "not shown")


def overall(parts: Sequence[Part]) -> Verdict:
    """Returns the verdict on a claim: shown if all parts are, refuted if any part is."""
    verdicts = {part.verdict for part in parts}
    return "refuted" if "refuted" in verdicts else "not shown" if "not shown" in verdicts else "shown"
