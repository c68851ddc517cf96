"""Whether a reward model means what its score differences say (Bai 2022, Fig 9), on the host with NumPy.

A difference d claims that the higher score is the better answer with probability sigmoid(d).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from rlhf_jax.diagnostics import intervals


class CalibrationCurve(NamedTuple):
    """One entry a bin, from the smallest score differences to the largest; arrays of length N."""

    gap: np.ndarray
    """Mean absolute score difference."""
    predicted: np.ndarray
    """Mean of sigmoid(gap): the accuracy that the scores claim."""
    accuracy: np.ndarray
    """Share of pairs whose chosen answer scores higher, ties a half."""
    lo: np.ndarray
    hi: np.ndarray
    """Ends of the 95 % interval of the accuracy."""
    count: np.ndarray
    """Pairs in the bin."""


def calibration_curve(chosen: npt.ArrayLike, rejected: npt.ArrayLike, *, bins: int = 10) -> CalibrationCurve:
    """Accuracy against the size of the score difference, in bins of equal counts (give or take one).

    Args:
        chosen: scores of the preferred answers, one a pair.
        rejected: scores of the others, in the same order.
        bins: how many; fewer are used if there are fewer pairs.

    Raises:
        ValueError: if the arrays are empty, not of rank 1 and one length, or hold NaN; if ``bins`` is below 1.
    """
    chosen, rejected = _pairs(chosen, rejected)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    gaps = np.abs(chosen - rejected)
    parts = np.array_split(np.argsort(gaps, kind="stable"), min(bins, len(gaps)))
    rates = [intervals.win_rate(chosen[part], rejected[part]) for part in parts]
    return CalibrationCurve(
        gap=np.array([gaps[part].mean() for part in parts]),
        predicted=np.array([special.expit(gaps[part]).mean() for part in parts]),
        accuracy=np.array([rate.mean for rate in rates]),
        lo=np.array([rate.lo for rate in rates]),
        hi=np.array([rate.hi for rate in rates]),
        count=np.array([len(part) for part in parts]),
    )


def expected_calibration_error(chosen: npt.ArrayLike, rejected: npt.ArrayLike, *, bins: int = 10) -> float:
    """Mean over pairs of ``|accuracy - predicted|`` of their bin; 0 is calibrated. See ``calibration_curve``."""
    curve = calibration_curve(chosen, rejected, bins=bins)
    return float(np.average(np.abs(curve.accuracy - curve.predicted), weights=curve.count))


def calibration_slope(
    chosen: npt.ArrayLike, rejected: npt.ArrayLike, *, confidence: float = 0.95
) -> intervals.Estimate:
    """The factor a for which ``sigmoid(a d)`` fits the labels best: logistic regression through the origin.

    1 is calibrated, above 1 under-confident, below 1 over-confident. The interval comes from the Fisher information.

    Returns:
        ``Estimate(slope, lo, hi)``; plus or minus infinity, without a finite interval, where every label agrees
        (or disagrees) with the scores, since the likelihood then has no maximum.

    Raises:
        ValueError: as in ``calibration_curve``, or if all differences are 0; unless ``0 < confidence < 1``.
    """
    chosen, rejected = _pairs(chosen, rejected)
    z = intervals.critical(confidence)
    differences = chosen - rejected
    if not differences.any():
        raise ValueError("all score differences are 0: a slope has no meaning")
    if (differences >= 0).all() or (differences <= 0).all():
        end = float(np.copysign(np.inf, differences.sum()))
        return intervals.Estimate(end, -np.inf, np.inf)

    def score(a: float) -> float:  # Derivative of the log-likelihood: falls through 0 exactly once.
        return float(np.sum(differences * special.expit(-a * differences)))

    edge = 1.0 / np.abs(differences).max()
    while score(edge) > 0 or score(-edge) < 0:
        edge *= 2.0
    a = float(optimize.brentq(score, -edge, edge))  # pyright: ignore[reportArgumentType]
    information = np.sum(differences**2 * special.expit(a * differences) * special.expit(-a * differences))
    width = z / float(np.sqrt(information))
    return intervals.Estimate(a, a - width, a + width)


def calibration_temperature(chosen: npt.ArrayLike, rejected: npt.ArrayLike) -> float:
    """What to divide the scores by to calibrate them: ``1 / slope``. Arguments and errors as ``calibration_slope``.

    NaN where no temperature calibrates them: scores that are always right want none at all, and those that are no
    better than chance, or worse, one that no number above 0 is.
    """
    slope = calibration_slope(chosen, rejected).mean
    return 1.0 / slope if 0 < slope < math.inf else math.nan


def _pairs(chosen: npt.ArrayLike, rejected: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    intervals.win_outcomes(chosen, rejected)  # For its checks.
    return np.asarray(chosen, np.float64), np.asarray(rejected, np.float64)
