"""Intervals around rates and means, on the host with NumPy.

Prompts are the unit: compare two models on the same prompts, reduce each prompt to one number, and put the interval
around the mean of those. Treating tokens or single answers as independent gives intervals that are too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats


class Estimate(NamedTuple):
    """A point estimate with the two ends of its confidence interval."""

    mean: float
    lo: float
    hi: float


def wilson(successes: int, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval ``(lo, hi)`` for a rate of independent successes.

    Unlike the normal interval it has a width at 0 and 1, and stays in [0, 1]. No trials give (0, 1).

    Raises:
        ValueError: unless ``0 <= successes <= trials`` and ``0 < confidence < 1``.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"need 0 <= successes <= trials, got {successes} of {trials}")
    z = critical(confidence)
    return _score_interval(successes / trials, 0.0, trials, z) if trials else (0.0, 1.0)


def mean_interval(values: npt.ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Mean with Student's t interval; infinitely wide for a single value.

    Raises:
        ValueError: if ``values`` is empty, not of rank 1, or holds NaN; unless ``0 < confidence < 1``.
    """
    values = samples(values)
    mean, n = float(values.mean()), len(values)
    t = critical(confidence, freedom=n - 1)
    if n == 1:
        return Estimate(mean, -math.inf, math.inf)
    width = t * float(values.std(ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - width, mean + width)


def bootstrap_mean(
    values: npt.ArrayLike, rng: np.random.Generator, *, confidence: float = 0.95, resamples: int = 2000
) -> Estimate:
    """Mean with the percentile interval of resampled means; the same generator state gives the same interval.

    A single value says nothing of others: its interval is infinitely wide.

    Raises:
        ValueError: if ``values`` is empty, not of rank 1, or holds NaN; unless ``0 < confidence < 1``.
    """
    values, ends = samples(values), quantiles(confidence)
    n = len(values)
    if n == 1:
        return Estimate(float(values[0]), -math.inf, math.inf)
    # One resample at a time: resamples x prompts indices at once is memory for nothing.
    means = np.array([values[rng.integers(n, size=n)].mean() for _ in range(resamples)])
    lo, hi = np.quantile(means, ends)
    return Estimate(float(values.mean()), float(lo), float(hi))


def win_outcomes(a_scores: npt.ArrayLike, b_scores: npt.ArrayLike, *, tie_tolerance: float = 0.0) -> np.ndarray:
    """1 where a's score is higher, 0 where b's is, 1/2 where they differ by at most ``tie_tolerance``.

    Raises:
        ValueError: if the arrays are empty, not of rank 1 and one length, or hold NaN.
    """
    a_scores, b_scores = samples(a_scores), samples(b_scores)
    if a_scores.shape != b_scores.shape:
        raise ValueError(f"scores must be paired by prompt, got {a_scores.shape} and {b_scores.shape}")
    tied = (a_scores == b_scores) | (np.abs(a_scores - b_scores) <= tie_tolerance)
    return np.where(tied, 0.5, (a_scores > b_scores).astype(np.float64))


def win_rate(
    a_scores: npt.ArrayLike, b_scores: npt.ArrayLike, *, tie_tolerance: float = 0.0, confidence: float = 0.95
) -> Estimate:
    """How often a beats b on the same prompts, ties counting a half, as ``(mean, lo, hi)``.

    The interval is Wilson's with the variance that ties leave, ``p (1 - p) - t / 4``: a tie is a half for certain, so
    many ties make it narrower. The share of ties t is shrunk by ``n / (n + z^2)``, so that a few prompts that all tie
    do not count as proof that every prompt does.

    Args:
        a_scores: one score a prompt.
        b_scores: of the other model, in the same order of prompts.
        tie_tolerance: scores this close are a tie.
        confidence: of the interval.

    Raises:
        ValueError: as in ``win_outcomes``.
    """
    return outcome_rate(win_outcomes(a_scores, b_scores, tie_tolerance=tie_tolerance), confidence=confidence)


def outcome_rate(outcomes: npt.ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """`win_rate` from the outcomes themselves: 1 for a win, 0 for a loss, 1/2 for a tie.

    Raises:
        ValueError: if ``outcomes`` is empty, not of rank 1, holds NaN, or something outside [0, 1].
    """
    outcomes = samples(outcomes)
    if ((outcomes < 0) | (outcomes > 1)).any():
        raise ValueError("an outcome is a win (1), a loss (0) or a tie (1/2); got one outside [0, 1]")
    mean = float(outcomes.mean())
    # What an outcome between 0 and 1 takes off the variance of a coin; 1 for a tie.
    ties = float((4 * outcomes * (1 - outcomes)).mean())
    return Estimate(mean, *_score_interval(mean, ties, len(outcomes), critical(confidence)))


def pairwise_accuracy(chosen: npt.ArrayLike, rejected: npt.ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Share of pairs in which the chosen answer scores strictly higher, with Wilson's interval.

    A reward model that scores everything alike is right nowhere; ``win_rate`` would give it 1/2.

    Raises:
        ValueError: as in ``win_outcomes``.
    """
    right = win_outcomes(chosen, rejected) == 1.0
    return Estimate(float(right.mean()), *wilson(int(right.sum()), len(right), confidence=confidence))


def ratio_interval(
    parts: npt.ArrayLike, wholes: npt.ArrayLike, *, rate: bool | None = None, confidence: float = 0.95
) -> Estimate:
    """``sum(parts) / sum(wholes)`` over independent clusters, such as right pairs and all pairs of each prompt.

    The pairs of one prompt stand or fall together; the interval counts prompts, not pairs (the linearised variance of
    a ratio), with Student's t of one degree of freedom less than there are clusters. Clusters with nothing in them are
    left out.

    That of a rate has Wilson's form, with as many trials as would have this variance, and stays in [0, 1]. As with the
    ties of `win_rate`, the variance is shrunk towards that of clusters that are right or wrong as a whole: a few that
    are all alike are no proof that every one is.

    Args:
        parts: one a cluster.
        wholes: one a cluster, 0 or more.
        rate: whether a part is a share of its whole, from nothing to all of it; by default, whether all of these are.
        confidence: of the interval. Of a single cluster it is (0, 1) for a rate, else infinitely wide.

    Raises:
        ValueError: if the arrays differ in shape, hold NaN, or no cluster has anything in it; if a whole is below 0;
            if ``rate`` and a part is not a share of its whole; unless ``0 < confidence < 1``.
    """
    parts, wholes = samples(parts), samples(wholes)
    if parts.shape != wholes.shape or (wholes < 0).any() or not wholes.sum() > 0:
        raise ValueError(f"need one part and one whole a cluster, and one whole above 0; got {parts.shape}")
    parts, wholes = parts[wholes > 0], wholes[wholes > 0]
    shares = bool(((parts >= 0) & (parts <= wholes)).all())
    if rate and not shares:
        raise ValueError("the parts of a rate lie between 0 and their wholes; got one outside")
    rate = shares if rate is None else rate
    mean, n, total = float(parts.sum() / wholes.sum()), len(parts), float(wholes.sum())
    t = critical(confidence, freedom=n - 1)
    if n == 1:
        return Estimate(mean, 0.0, 1.0) if rate else Estimate(mean, -math.inf, math.inf)
    variance = float(np.square(parts - mean * wholes).sum()) * n / (n - 1) / total**2
    if not rate:
        width = t * math.sqrt(variance)
        return Estimate(mean, mean - width, mean + width)
    whole_clusters, coin = total**2 / float(np.square(wholes).sum()), mean * (1 - mean)
    trust = n / (n + critical(confidence) ** 2)
    variance = trust * variance + (1 - trust) * coin / whole_clusters
    return Estimate(mean, *_score_interval(mean, 0.0, coin / variance if variance > 0 else whole_clusters, t))


def difference(first: Estimate, second: Estimate) -> Estimate:
    """``first - second`` of two independent estimates, from the intervals of both.

    Newcombe's hybrid score interval (1998, method 10) where the two are rates with Wilson's intervals: each end of the
    difference is as far off as the two ends that cause it, in quadrature, so that intervals that are not symmetric stay
    so. The confidence is that of the two.
    """
    mean = first.mean - second.mean
    low = math.hypot(first.mean - first.lo, second.hi - second.mean)
    high = math.hypot(first.hi - first.mean, second.mean - second.lo)
    return Estimate(mean, mean - low, mean + high)


def average(estimates: Sequence[Estimate]) -> Estimate:
    """The plain mean of independent estimates, from their intervals, in quadrature as in `difference`.

    Raises:
        ValueError: if there are none.
    """
    if not estimates:
        raise ValueError("need at least one estimate")
    n, mean = len(estimates), sum(each.mean for each in estimates) / len(estimates)
    low = math.hypot(*(each.mean - each.lo for each in estimates)) / n
    high = math.hypot(*(each.hi - each.mean for each in estimates)) / n
    return Estimate(mean, mean - low, mean + high)


def _score_interval(mean: float, ties: float, n: float, z: float) -> tuple[float, float]:
    """The two p with ``(mean - p)^2 = z^2 / n * (p (1 - p) - ties / 4)``."""
    z2 = z**2
    ties = ties * n / (n + z2)
    center = (mean + z2 / (2 * n)) / (1 + z2 / n)
    product = (mean**2 + z2 * ties / (4 * n)) / (1 + z2 / n)
    width = math.sqrt(max(center**2 - product, 0.0))
    # At a rate of exactly 0 or 1 rounding would leave the end a hair inside.
    return 0.0 if mean == 0 else max(center - width, 0.0), 1.0 if mean == 1 else min(center + width, 1.0)


def quantiles(confidence: float) -> tuple[float, float]:
    """What lies below the two ends of an interval; raises ValueError unless ``0 < confidence < 1``."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    return (1 - confidence) / 2, (1 + confidence) / 2


def critical(confidence: float, *, freedom: int | None = None) -> float:
    """How many standard errors an interval reaches to either side: normal, or Student's with ``freedom`` degrees.

    Infinite without a degree of freedom. Raises ValueError unless ``0 < confidence < 1``.
    """
    _, upper = quantiles(confidence)
    if freedom is None:
        return float(stats.norm.ppf(upper))
    return float(stats.t.ppf(upper, freedom)) if freedom > 0 else math.inf


def samples(values: npt.ArrayLike) -> np.ndarray:
    """One or more numbers as float64 of rank 1; raises ValueError for anything else, and for NaN."""
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values) or np.isnan(values).any():
        raise ValueError(f"need at least one number, rank 1, no NaN; got shape {values.shape}")
    return values
