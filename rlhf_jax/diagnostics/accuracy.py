"""Where a reward model is right: by stratum, on what it has not seen, and among answers that it scores high.

Everywhere a tie of the two scores counts a half, and a small sample is shown with the wide interval that it has.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from rlhf_jax.diagnostics import intervals


class Stratum(NamedTuple):
    """The pairs that share a label."""

    name: Any
    """The label; None for pairs without one."""
    accuracy: intervals.Estimate
    count: int


class Bucket(NamedTuple):
    """Values that are near each other, as a label that sorts and prints."""

    least: float
    most: float

    def __str__(self) -> str:
        """``3–12``, both ends within; one number where there is but one."""
        # Whole numbers in full: "g" alone would print a length of 1234567 as 1.23457e+06.
        least, most = (f"{x:.0f}" if x == round(x, 0) and abs(x) < 1e15 else f"{x:g}" for x in self)
        return least if least == most else f"{least}–{most}"


class GeneralisationGap(NamedTuple):
    """What is known of the training pairs against what is known of others; both gaps are above 0 where it overfits."""

    train_accuracy: intervals.Estimate
    validation_accuracy: intervals.Estimate
    accuracy_gap: intervals.Estimate
    """Training less validation."""
    train_loss: intervals.Estimate
    """Mean of ``-log sigmoid(chosen - rejected)``, in nats a pair."""
    validation_loss: intervals.Estimate
    loss_gap: intervals.Estimate
    """Validation less training."""


class ThresholdScan(NamedTuple):
    """One entry a threshold, rising; arrays of length N. What passes one threshold passes all before it."""

    threshold: np.ndarray
    accuracy: np.ndarray
    """Of the pairs whose two scores are both at least the threshold; NaN where there are none."""
    lo: np.ndarray
    hi: np.ndarray
    """Ends of the interval of the accuracy; 0 and 1 where there are no pairs."""
    count: np.ndarray
    """Pairs that pass."""
    spearman: float
    """Rank correlation of threshold and accuracy, over the thresholds that some pair passes; NaN for fewer than 3 or
    where the accuracy never changes. The points share pairs, so it has no p-value."""


def accuracy_by_stratum(
    chosen: npt.ArrayLike,
    rejected: npt.ArrayLike,
    strata: Iterable[Hashable],
    *,
    prompts: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> list[Stratum]:
    """Accuracy of the pairs of each stratum: of an annotator, a confidence, a turn, a domain, a bucket of lengths.

    Args:
        chosen: scores of the preferred answers, one a pair.
        rejected: scores of the others, in the same order.
        strata: one label a pair, of any kind that can be told apart; None and NaN mean that there is none.
        prompts: a label a pair: pairs of one prompt stand or fall together, and intervals then count prompts, as in
            `intervals.ratio_interval`. Without it every pair counts as independent, as in `intervals.win_rate`.
        confidence: of the intervals.

    Returns:
        The strata in the order of their labels, or as they come where labels cannot be ordered; None last. Their
        counts add up to the number of pairs.

    Raises:
        ValueError: as in `intervals.win_outcomes`, or if there is not one label, or prompt, a pair.
    """
    chosen, rejected = _pairs(chosen, rejected)
    group = groups(prompts, len(chosen))
    labels = strata.tolist() if isinstance(strata, np.ndarray) else list(strata)
    if len(labels) != len(chosen):
        raise ValueError(f"need one label a pair, got {len(labels)} labels for {len(chosen)} pairs")
    places: dict[Any, list[int]] = {}
    for i, label in enumerate(labels):
        places.setdefault(None if label != label else label, []).append(i)
    return [
        Stratum(name, rate(chosen[at], rejected[at], group=_at(group, at), confidence=confidence), len(at))
        for name, at in ((name, places[name]) for name in _ordered(places))
    ]


def quantile_buckets(values: npt.ArrayLike, *, count: int = 4) -> list[Bucket]:
    """A label for each value: the bucket that it falls in, of at most ``count`` with about equally many values.

    Equal values share a bucket, so many ties make fewer of them.

    Raises:
        ValueError: if ``values`` is empty, not of rank 1 or holds NaN, or ``count`` is below 1.
    """
    values = intervals.samples(values)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    edges = np.quantile(values, np.arange(1, count) / count, method="inverted_cdf")
    group = np.searchsorted(edges, values, side="left")
    ends = {g: Bucket(float(values[group == g].min()), float(values[group == g].max())) for g in np.unique(group)}
    return [ends[g] for g in group]


def generalisation_gap(
    train_chosen: npt.ArrayLike,
    train_rejected: npt.ArrayLike,
    validation_chosen: npt.ArrayLike,
    validation_rejected: npt.ArrayLike,
    *,
    train_prompts: Sequence[Hashable] | None = None,
    validation_prompts: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> GeneralisationGap:
    """The test for overfitting: accuracy and loss on trained pairs against others, with intervals of the differences.

    A gap whose interval lies above 0 is overfitting; InstructGPT (3.5, footnote 5) saw it after one epoch over shuffled
    pairs. The intervals of the differences are made as in `intervals.difference`.

    Args:
        train_chosen: scores of the preferred answers of pairs that were trained on.
        train_rejected: of the others.
        validation_chosen: the same of pairs that were not.
        validation_rejected: of the others.
        train_prompts: a label a pair: pairs of one prompt, as K-way rankings have them, stand or fall together, and
            intervals then count prompts. Without it every pair counts as independent.
        validation_prompts: the same of the other pairs.
        confidence: of all intervals.

    Raises:
        ValueError: as in `intervals.win_outcomes`, or if there is not one prompt a pair.
    """
    train = _accuracy_and_loss(train_chosen, train_rejected, train_prompts, confidence)
    validation = _accuracy_and_loss(validation_chosen, validation_rejected, validation_prompts, confidence)
    return GeneralisationGap(
        train_accuracy=train[0],
        validation_accuracy=validation[0],
        accuracy_gap=intervals.difference(train[0], validation[0]),
        train_loss=train[1],
        validation_loss=validation[1],
        loss_gap=intervals.difference(validation[1], train[1]),
    )


def accuracy_above_threshold(
    chosen: npt.ArrayLike,
    rejected: npt.ArrayLike,
    *,
    thresholds: npt.ArrayLike | None = None,
    prompts: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> ThresholdScan:
    """Accuracy on the pairs whose two scores both pass a threshold (Bai 2022, Fig 25).

    RL pushes all answers to where scores are high: a model that tells good answers from bad ones but not good ones from
    better ones is of little use there.

    Args:
        chosen: scores of the preferred answers, one a pair.
        rejected: scores of the others, in the same order.
        thresholds: least scores; by default the tenths of the lower scores of the pairs, which leave 100 %, 90 %, ...,
            10 % of the pairs.
        prompts: as in `accuracy_by_stratum`.
        confidence: of the intervals.

    Raises:
        ValueError: as in `intervals.win_outcomes`, if a threshold is NaN, or if there is not one prompt a pair.
    """
    chosen, rejected = _pairs(chosen, rejected)
    group = groups(prompts, len(chosen))
    lower = np.minimum(chosen, rejected)
    tenths = np.sort(lower)[np.arange(10) * len(lower) // 10]
    scan = np.unique(intervals.samples(tenths if thresholds is None else thresholds))
    passing = [lower >= least for least in scan]
    rates = [rate(chosen[on], rejected[on], group=_at(group, on), confidence=confidence) for on in passing]
    accuracy, count = np.array([r.mean for r in rates]), np.array([int(on.sum()) for on in passing])
    known = count > 0
    return ThresholdScan(
        threshold=scan,
        accuracy=accuracy,
        lo=np.array([r.lo for r in rates]),
        hi=np.array([r.hi for r in rates]),
        count=count,
        spearman=_spearman(scan[known], accuracy[known]),
    )


def rate(
    a: np.ndarray, b: np.ndarray, *, group: np.ndarray | None = None, confidence: float = 0.95
) -> intervals.Estimate:
    """`intervals.win_rate`, but of no pairs too: ``(NaN, 0, 1)``.

    With ``group``, a number from 0 a pair, an interval of groups: `intervals.ratio_interval`.
    """
    intervals.quantiles(confidence)  # For its check.
    if not len(a):
        return intervals.Estimate(math.nan, 0.0, 1.0)
    if group is None:
        return intervals.win_rate(a, b, confidence=confidence)
    right = np.bincount(group, weights=intervals.win_outcomes(a, b))
    return intervals.ratio_interval(right, np.bincount(group), rate=True, confidence=confidence)


def groups(prompts: Sequence[Hashable] | None, pairs: int) -> np.ndarray | None:
    """A number from 0 a pair, the same for pairs of one prompt."""
    if prompts is None:
        return None
    if len(prompts) != pairs:
        raise ValueError(f"need one prompt a pair, got {len(prompts)} prompts for {pairs} pairs")
    places = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    return np.array([places[prompt] for prompt in prompts])


def _at(group: np.ndarray | None, rows: Any) -> np.ndarray | None:
    return None if group is None else group[rows]


def _accuracy_and_loss(
    chosen: npt.ArrayLike, rejected: npt.ArrayLike, prompts: Sequence[Hashable] | None, confidence: float
) -> tuple[intervals.Estimate, intervals.Estimate]:
    chosen, rejected = _pairs(chosen, rejected)
    loss = np.logaddexp(0.0, rejected - chosen)
    group = groups(prompts, len(chosen))
    accuracy = rate(chosen, rejected, group=group, confidence=confidence)
    if group is None:
        return accuracy, intervals.mean_interval(loss, confidence=confidence)
    nats = np.bincount(group, weights=loss)
    return accuracy, intervals.ratio_interval(nats, np.bincount(group), rate=False, confidence=confidence)


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 3 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])


def _ordered(names: Iterable[Any]) -> list[Any]:
    known, rest = [name for name in names if name is not None], [name for name in names if name is None]
    try:
        return [*sorted(known), *rest]
    except TypeError:
        return [*known, *rest]


def _pairs(chosen: npt.ArrayLike, rejected: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    intervals.win_outcomes(chosen, rejected)  # For its checks.
    return np.asarray(chosen, np.float64), np.asarray(rejected, np.float64)
