"""Confidence intervals of rates and means, on the host with NumPy and SciPy.

Prompts are the independent units, or clusters of prompts if several prompts ask the same. To compare two models, run
both on the same prompts, reduce each prompt to one number, and compute the interval of the mean of these numbers
(`clustered_mean`). Intervals that treat correlated numbers as independent, such as tokens, the pairs of a ranking or
paraphrases of one question, are too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

_ROUNDING = 1e-6
"""Tolerance of rates, whose values may have been computed in float32."""


class Estimate(NamedTuple):
    """A point estimate and the bounds of its confidence interval."""

    mean: float
    lo: float
    hi: float


def wilson(successes: int, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Returns Wilson's score interval ``(lo, hi)`` for the success rate of independent trials (Wilson 1927).

    The bounds are the solutions p of ``(rate - p)^2 = z^2 p (1 - p) / trials`` with the normal quantile z. Unlike the
    normal interval, Wilson's interval has a positive width at rates of 0 and 1 and stays in [0, 1]. Without trials, the
    interval is (0, 1). Raises ValueError unless ``0 <= successes <= trials`` and ``0 < confidence < 1``.

    Example:
        >>> from rlhf_jax import diagnostics
        >>> lo, hi = diagnostics.wilson(8, 10)
        >>> print(round(lo, 3), round(hi, 3))
        0.49 0.943
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"need 0 <= successes <= trials, got {successes} of {trials}")
    z = critical(confidence)
    return _score_interval(successes / trials, 0.0, trials, z) if trials else (0.0, 1.0)


def mean_interval(values: npt.ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Returns the mean and Student's t interval.

    For n values with standard deviation s, the interval is ``mean ± t s / sqrt(n)``, where t is Student's quantile. It
    is infinitely wide for a single value.

    Raises ValueError if ``values`` is empty, is not of rank 1 or contains NaN, or if ``confidence`` is not in (0, 1).

    Example:
        >>> from rlhf_jax import diagnostics
        >>> estimate = diagnostics.mean_interval([1.0, 2.0, 3.0, 4.0])
        >>> print([round(x, 3) for x in estimate])
        [2.5, 0.446, 4.554]
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
    """Returns the mean and its bootstrap percentile interval (Efron 1979).

    Args:
        values: Independent numbers, ``[N]``, such as one per prompt.
        rng: Random generator; the same state gives the same interval.
        confidence: Coverage of the interval.
        resamples: Number of bootstrap samples.

    Returns:
        The estimate; its interval is infinitely wide for a single value.

    Raises:
        ValueError: If ``values`` is empty, is not of rank 1 or contains NaN, or if ``confidence`` is not in (0, 1).
    """
    values, ends = samples(values), quantiles(confidence)
    n = len(values)
    if n == 1:
        return Estimate(float(values[0]), -math.inf, math.inf)
    # One resample at a time, because the indices of all resamples at once would need a lot of memory.
    means = np.array([values[rng.integers(n, size=n)].mean() for _ in range(resamples)])
    lo, hi = np.quantile(means, ends)
    return Estimate(float(values.mean()), float(lo), float(hi))


def win_outcomes(a_scores: npt.ArrayLike, b_scores: npt.ArrayLike, *, tie_tolerance: float = 0.0) -> np.ndarray:
    """Returns 1 where ``a_scores`` is higher, 0 where lower, and 1/2 where the two differ by at most ``tie_tolerance``.

    Raises ValueError if the arrays are empty, are not of rank 1, differ in length or contain NaN.
    """
    a_scores, b_scores = score_pairs(a_scores, b_scores)
    tied = (a_scores == b_scores) | (np.abs(a_scores - b_scores) <= tie_tolerance)
    return np.where(tied, 0.5, (a_scores > b_scores).astype(np.float64))


def win_rate(
    a_scores: npt.ArrayLike, b_scores: npt.ArrayLike, *, tie_tolerance: float = 0.0, confidence: float = 0.95
) -> Estimate:
    """Returns the rate at which model a beats model b on the same prompts; a tie counts as one half.

    The interval is Wilson's with the variance ``p (1 - p) - t / 4`` for a share t of ties, because ties reduce the
    variance. To prevent a width of 0 if a few prompts all tie, t is first multiplied by ``n / (n + z^2)`` for n prompts
    and the normal quantile z.

    Args:
        a_scores: Scores of model a, one per prompt.
        b_scores: Scores of model b, in the same order of prompts.
        tie_tolerance: Largest difference in score that counts as a tie.
        confidence: Coverage of the interval.

    Returns:
        The win rate of a, in [0, 1], and its interval.

    Raises:
        ValueError: As in `win_outcomes`, or if ``confidence`` is not in (0, 1).

    Example:
        >>> from rlhf_jax import diagnostics
        >>> estimate = diagnostics.win_rate([1.0, 2.0, 3.0, 4.0], [0.0, 2.5, 1.0, 4.0])
        >>> print([round(x, 3) for x in estimate])
        [0.625, 0.243, 0.885]
    """
    return outcome_rate(win_outcomes(a_scores, b_scores, tie_tolerance=tie_tolerance), confidence=confidence)


def outcome_rate(outcomes: npt.ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Computes `win_rate` from outcomes: 1 for a win, 0 for a loss, and 1/2 for a tie.

    Other outcomes in [0, 1] count as partial ties. Raises ValueError if ``outcomes`` is empty, is not of rank 1, or
    contains NaN or a number outside [0, 1].
    """
    outcomes = samples(outcomes)
    if ((outcomes < 0) | (outcomes > 1)).any():
        raise ValueError("each outcome must be from 0 (loss) to 1 (win), but one is outside [0, 1]")
    mean = float(outcomes.mean())
    # Outcomes between 0 and 1 reduce the Bernoulli variance by ties / 4; those other than 1/2 count as partial ties.
    ties = float((4 * outcomes * (1 - outcomes)).mean())
    return Estimate(mean, *_score_interval(mean, ties, len(outcomes), critical(confidence)))


def pairwise_accuracy(chosen: npt.ArrayLike, rejected: npt.ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Returns the share of pairs whose chosen response scores strictly higher, with Wilson's interval.

    A reward model with constant scores has accuracy 0, whereas `win_rate` would return 1/2. Raises ValueError as
    `win_outcomes` does.
    """
    right = win_outcomes(chosen, rejected) == 1.0
    return Estimate(float(right.mean()), *wilson(int(right.sum()), len(right), confidence=confidence))


def clustered_mean(
    values: npt.ArrayLike,
    clusters: Iterable[Hashable] | None = None,
    *,
    rate: bool = False,
    confidence: float = 0.95,
) -> Estimate:
    """Returns the mean and its interval, with clusters of values as the independent units.

    Values of one cluster, such as those of prompts that ask the same, are correlated; different clusters are
    independent. The interval is that of `ratio_interval` for the cluster sums and the cluster sizes. To compare two
    models on the same prompts, pass the difference of each prompt's two numbers or, for a win rate, its outcome
    (`win_outcomes`) with ``rate=True``. To compute a rate among some of the prompts, pass only these prompts.

    Args:
        values: ``[B]``, one number per prompt.
        clusters: ``[B]``, the label of each value's cluster. By default, each value is its own cluster.
        rate: Whether the mean is a rate, i.e. all values are in [0, 1]. The interval then stays in [0, 1].
        confidence: Coverage of the interval.

    Returns:
        The mean and its interval. For a single cluster, the interval is (0, 1) for a rate, else infinitely wide.

    Raises:
        ValueError: If ``values`` is empty, is not of rank 1 or contains NaN; if there is not one label per value; if
            ``rate`` is True and a value is outside [0, 1]; or if ``confidence`` is not in (0, 1).

    Example:
        >>> from rlhf_jax import diagnostics
        >>> estimate = diagnostics.clustered_mean([1.0, 2.0, 3.0, 4.0], ["a", "b", "b", "c"])
        >>> print([round(x, 3) for x in estimate])
        [2.5, -0.527, 5.527]
    """
    values = samples(values)
    index = np.arange(len(values)) if clusters is None else label_indices(clusters, len(values), "clusters")[1]
    if rate and ((values < -_ROUNDING) | (values > 1 + _ROUNDING)).any():
        raise ValueError("the values of a rate must be in [0, 1], but one is outside")
    return ratio_interval(np.bincount(index, weights=values), np.bincount(index), rate=rate, confidence=confidence)


def ratio_interval(
    parts: npt.ArrayLike, wholes: npt.ArrayLike, *, rate: bool | None = None, confidence: float = 0.95
) -> Estimate:
    """Returns ``r = sum(parts) / sum(wholes)`` with an interval that treats clusters as independent.

    For the accuracy on pairs, a cluster is a prompt, because the pairs of a prompt are correlated. Its part is the
    number of correct pairs, and its whole is the number of all pairs. The variance is the jackknife's (CR3, MacKinnon
    and White 1985): ``(n - 1) / n sum(c^2)``, where c is the change of r when one of the n clusters is left out.
    Student's t has ``m - 1`` degrees of freedom for ``m = sum(wholes)^2 / sum(wholes^2)`` effective clusters (at least
    one degree of freedom), because unequal clusters carry less information. Clusters whose whole and part are 0 are
    ignored.

    The interval of a rate is Wilson's for the number of independent trials whose rate would have this variance, so it
    stays in [0, 1]. One pseudo-cluster, whose variance is at least that of independent trials, is averaged into the
    variance, so that the interval of a few identical clusters does not have a width of 0.

    Args:
        parts: One number per cluster.
        wholes: One number per cluster, at least 0; for a rate, the number of trials.
        rate: Whether the ratio is a rate, i.e. each part is between 0 and its whole. If None, inferred from the data.
        confidence: Coverage of the interval.

    Returns:
        The ratio and its interval. For a single cluster, the interval is (0, 1) for a rate, else infinitely wide.

    Raises:
        ValueError: If the arrays differ in shape or contain NaN, if a whole is below 0 or all are 0, if ``rate`` is
            True and a part is not between 0 and its whole, or if ``confidence`` is not in (0, 1).
    """
    parts, wholes = samples(parts), samples(wholes)
    if parts.shape != wholes.shape or (wholes < 0).any() or not wholes.sum() > 0:
        raise ValueError("need one part and one whole per cluster; wholes must be at least 0 and not all 0")
    used = (wholes > 0) | (parts != 0)
    parts, wholes = parts[used], wholes[used]
    slack = _ROUNDING * wholes
    shares = bool(((parts >= -slack) & (parts <= wholes + slack)).all())
    if rate and not shares:
        raise ValueError("the parts of a rate must be between 0 and their wholes, but one is outside")
    rate = shares if rate is None else rate
    total = float(wholes.sum())
    parts = np.clip(parts, 0.0, wholes) if rate else parts
    mean = float(parts.sum()) / total
    variance, freedom = jackknife(parts - mean * wholes, wholes)
    t = critical(confidence, freedom=freedom)
    if not freedom:
        return Estimate(mean, 0.0, 1.0) if rate else Estimate(mean, -math.inf, math.inf)
    if not rate:
        width = t * math.sqrt(variance)
        return Estimate(mean, mean - width, mean + width)
    effective_clusters, coin = total**2 / float(np.square(wholes).sum()), mean * (1 - mean)
    variance = (effective_clusters * variance + max(variance, coin / total)) / (effective_clusters + 1)
    return Estimate(mean, *_score_interval(mean, 0.0, coin / variance if coin > 0 else effective_clusters, t))


def jackknife(scores: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Returns the jackknife variance of an estimate and the degrees of freedom of its Student's t.

    The estimate solves ``sum(scores) = 0``, where the score of each of n independent clusters falls by its weight (its
    size or information) if the estimate rises by 1. Without cluster c, the estimate would change by ``-scores[c] /
    (sum(weights) - weights[c])``. If a single cluster has all the weight, the result is ``(inf, 0)``.
    """
    n, total = len(weights), float(weights.sum())
    if np.count_nonzero(weights) < 2:
        return math.inf, 0.0
    variance = (n - 1) / n * float(np.square(scores / (total - weights)).sum())
    return variance, max(total**2 / float(np.square(weights).sum()) - 1, 1.0)


def difference(first: Estimate, second: Estimate) -> Estimate:
    """Returns ``first - second`` for two independent estimates, with an interval at their common confidence.

    With means m and bounds lo and hi of the two estimates, the interval extends ``sqrt((m1 - lo1)^2 + (hi2 - m2)^2)``
    below and ``sqrt((hi1 - m1)^2 + (m2 - lo2)^2)`` above the difference, so asymmetry is preserved. For rates with
    Wilson's intervals, the result is Newcombe's hybrid score interval (1998, method 10).
    """
    mean = first.mean - second.mean
    low = math.hypot(first.mean - first.lo, second.hi - second.mean)
    high = math.hypot(first.hi - first.mean, second.mean - second.lo)
    return Estimate(mean, mean - low, mean + high)


def average(estimates: Sequence[Estimate]) -> Estimate:
    """Returns the unweighted mean of independent estimates; interval widths add in quadrature, as in `difference`.

    Raises ValueError if there are no estimates.
    """
    if not estimates:
        raise ValueError("need at least one estimate")
    n, mean = len(estimates), sum(each.mean for each in estimates) / len(estimates)
    low = math.hypot(*(each.mean - each.lo for each in estimates)) / n
    high = math.hypot(*(each.hi - each.mean for each in estimates)) / n
    return Estimate(mean, mean - low, mean + high)


def _score_interval(mean: float, ties: float, n: float, z: float) -> tuple[float, float]:
    """Returns the solutions p of ``(mean - p)^2 = z^2 / n * (p (1 - p) - t / 4)`` with ``t = ties * n / (n + z^2)``."""
    z2 = z**2
    ties = ties * n / (n + z2)
    center = (mean + z2 / (2 * n)) / (1 + z2 / n)
    product = (mean**2 + z2 * ties / (4 * n)) / (1 + z2 / n)
    width = math.sqrt(max(center**2 - product, 0.0))
    # At a rate of exactly 0 or 1, rounding could exclude the rate from its interval.
    return 0.0 if mean == 0 else max(center - width, 0.0), 1.0 if mean == 1 else min(center + width, 1.0)


def quantiles(confidence: float) -> tuple[float, float]:
    """Returns the levels of the quantiles that bound an interval; raises ValueError unless ``0 < confidence < 1``."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    return (1 - confidence) / 2, (1 + confidence) / 2


def critical(confidence: float, *, freedom: float | None = None) -> float:
    """Returns the half-width, in standard errors, of a normal or, if ``freedom`` is given, a Student's t interval.

    ``freedom`` is the number of degrees of freedom. The half-width is infinite for 0 degrees of freedom. Raises
    ValueError unless ``0 < confidence < 1``.
    """
    _, upper = quantiles(confidence)
    if freedom is None:
        return float(stats.norm.ppf(upper))
    return float(stats.t.ppf(upper, freedom)) if freedom > 0 else math.inf


def samples(values: npt.ArrayLike) -> np.ndarray:
    """Returns the values as a float64 array; raises ValueError if it is empty, is not of rank 1 or contains NaN."""
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values) or np.isnan(values).any():
        raise ValueError(f"need an array of rank 1 with at least one number and no NaN, got shape {values.shape}")
    return values


def score_pairs(first: npt.ArrayLike, second: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Returns two equally long sequences of scores as float64 arrays; raises ValueError as `win_outcomes` does."""
    first, second = samples(first), samples(second)
    if first.shape != second.shape:
        raise ValueError(f"paired arrays must have the same length, got shapes {first.shape} and {second.shape}")
    return first, second


def label_indices(labels: Iterable[Hashable] | None, count: int, kind: str) -> tuple[list[Any], np.ndarray]:
    """Returns the distinct labels in order of first appearance, and the index of each item's label.

    If ``labels`` is None, all ``count`` items have the same label. Raises ValueError if there is not one label per
    item. ``kind`` is the word for the labels in the error message, such as "prompts".
    """
    labels = [None] * count if labels is None else list(labels)
    if len(labels) != count:
        raise ValueError(f"need {count} {kind}, one for each entry, got {len(labels)}")
    index = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return list(index), np.array([index[label] for label in labels])
