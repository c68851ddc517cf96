"""Calibration of a reward model's score differences (Bai 2022, Fig 9), on the host with NumPy and SciPy.

If the two scores of a pair differ by d > 0, a calibrated model ranks the pair correctly with probability
``sigmoid(d)``.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from rlhf_jax.diagnostics import intervals
from rlhf_jax.diagnostics.accuracy import prompt_groups, rate


class CalibrationCurve(NamedTuple):
    """Accuracy in N bins of increasing score difference. Arrays have length N."""

    gap: np.ndarray
    """Mean absolute score difference."""
    predicted: np.ndarray
    """Mean of the sigmoid of the absolute score difference, the accuracy that the scores imply."""
    accuracy: np.ndarray
    """Share of pairs whose chosen response scores higher; a tie counts as one half."""
    lo: np.ndarray
    hi: np.ndarray
    """Bounds of the 95 % interval of the accuracy."""
    count: np.ndarray
    """Number of pairs in the bin."""


def calibration_curve(
    chosen: npt.ArrayLike, rejected: npt.ArrayLike, *, bins: int = 10, prompts: Sequence[Hashable] | None = None
) -> CalibrationCurve:
    """Computes accuracy as a function of the score difference, in bins whose counts differ by at most one.

    Args:
        chosen: Scores of the preferred responses, one per pair.
        rejected: Scores of the rejected responses, in the same order.
        bins: Number of bins. If there are fewer pairs, each bin contains one pair.
        prompts: One label per pair, for the intervals, as in `accuracy_by_stratum`.

    Returns:
        Score differences, accuracies and counts of the bins.

    Raises:
        ValueError: If the arrays are empty, are not of rank 1, differ in length or contain NaN, if ``bins`` is below 1,
            or if ``prompts`` does not have one entry per pair.

    Example:
        >>> from rlhf_jax import diagnostics
        >>> chosen, rejected = [0.1, 0.0, 3.0, 2.0], [0.0, 0.1, 0.0, 0.0]
        >>> curve = diagnostics.calibration_curve(chosen, rejected, bins=2)
        >>> print(curve.accuracy, curve.predicted.round(3))
        [0.5 1. ] [0.525 0.917]
    """
    chosen, rejected = intervals.score_pairs(chosen, rejected)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    gaps = np.abs(chosen - rejected)
    parts = np.array_split(np.argsort(gaps, kind="stable"), min(bins, len(gaps)))
    groups = prompt_groups(prompts, len(chosen))
    rates = [rate(chosen, rejected, rows=part, groups=groups) for part in parts]
    return CalibrationCurve(
        gap=np.array([gaps[part].mean() for part in parts]),
        predicted=np.array([special.expit(gaps[part]).mean() for part in parts]),
        accuracy=np.array([each.mean for each in rates]),
        lo=np.array([each.lo for each in rates]),
        hi=np.array([each.hi for each in rates]),
        count=np.array([len(part) for part in parts]),
    )


def expected_calibration_error(chosen: npt.ArrayLike, rejected: npt.ArrayLike, *, bins: int = 10) -> float:
    """Returns the mean of ``|accuracy - predicted|`` over the bins of `calibration_curve`, weighted by their counts.

    The error has no interval: it is biased upwards, because the noise of the accuracies raises their absolute
    deviations, and is above 0 even for a calibrated model. To test calibration, use `calibration_slope` or
    `overconfidence`, which have intervals.
    """
    curve = calibration_curve(chosen, rejected, bins=bins)
    return float(np.average(np.abs(curve.accuracy - curve.predicted), weights=curve.count))


def overconfidence(
    chosen: npt.ArrayLike,
    rejected: npt.ArrayLike,
    *,
    prompts: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> intervals.Estimate:
    """Returns the signed calibration error: the accuracy that the scores imply minus the accuracy.

    The scores imply an accuracy of ``sigmoid(|d|)`` on a pair whose two scores differ by d.

    Args:
        chosen: Scores of the preferred responses, one per pair.
        rejected: Scores of the rejected responses, in the same order.
        prompts: One label per pair, as in `accuracy_by_stratum`.
        confidence: Coverage of the interval.

    Returns:
        The error, which is positive for an overconfident model, and its interval.

    Raises:
        ValueError: As in `calibration_curve`, or if ``confidence`` is not in (0, 1).
    """
    chosen, rejected = intervals.score_pairs(chosen, rejected)
    excess = special.expit(np.abs(chosen - rejected)) - intervals.win_outcomes(chosen, rejected)
    return intervals.clustered_mean(excess, prompt_groups(prompts, len(chosen)), confidence=confidence)


def calibration_slope(
    chosen: npt.ArrayLike,
    rejected: npt.ArrayLike,
    *,
    prompts: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> intervals.Estimate:
    """Returns the maximum-likelihood slope a in ``P(chosen is preferred) = sigmoid(a d)``, ``d = chosen - rejected``.

    A model with slope 1 is calibrated; it is underconfident if the slope is above 1 and overconfident if it is below 1.
    The interval is robust (jackknife of the likelihood's scores, as in `intervals.ratio_interval`), so it is valid even
    if the pairs of a prompt are correlated or the logistic form does not hold.

    Args:
        chosen: Scores of the preferred responses, one per pair.
        rejected: Scores of the rejected responses, in the same order.
        prompts: One label per pair, as in `accuracy_by_stratum`.
        confidence: Coverage of the interval.

    Returns:
        The slope and its interval. If every label agrees (or disagrees) with the scores, the likelihood has no maximum.
        The slope is then infinity (or minus infinity), and its interval is unbounded.

    Raises:
        ValueError: As in `calibration_curve`, if all differences are 0, or if ``confidence`` is not in (0, 1).
    """
    chosen, rejected = intervals.score_pairs(chosen, rejected)
    groups = prompt_groups(prompts, len(chosen))
    intervals.quantiles(confidence)  # Raises ValueError for an invalid confidence.
    differences = chosen - rejected
    if not differences.any():
        raise ValueError("all score differences are 0, so the slope is undefined")
    if (differences >= 0).all() or (differences <= 0).all():
        end = float(np.copysign(np.inf, differences.sum()))
        return intervals.Estimate(end, -np.inf, np.inf)

    def derivative(a: float) -> float:  # Derivative of the log-likelihood; decreasing, with one zero.
        return float(np.sum(differences * special.expit(-a * differences)))

    edge = 1.0 / np.abs(differences).max()
    while derivative(edge) > 0 or derivative(-edge) < 0:
        edge *= 2.0
    a = float(optimize.brentq(derivative, -edge, edge))  # pyright: ignore[reportArgumentType]
    scores = differences * special.expit(-a * differences)
    information = differences * scores * special.expit(a * differences)
    if groups is not None:
        scores, information = (np.bincount(groups, weights=x) for x in (scores, information))
    variance, freedom = intervals.jackknife(scores, information)
    width = intervals.critical(confidence, freedom=freedom) * math.sqrt(variance)
    return intervals.Estimate(a, a - width, a + width)


def calibration_temperature(chosen: npt.ArrayLike, rejected: npt.ArrayLike) -> float:
    """Returns the temperature by which the scores must be divided to be calibrated, ``1 / slope``.

    The temperature is NaN if the slope (`calibration_slope`) is infinity (the scores are always right) or not positive
    (they are no better than chance). Raises ValueError as `calibration_slope` does.
    """
    slope = calibration_slope(chosen, rejected).mean
    return 1.0 / slope if 0 < slope < math.inf else math.nan
