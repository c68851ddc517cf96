"""Accuracy of reward models: by stratum, on training and validation pairs, and among responses with high scores.

In all functions, a tie between the two scores of a pair counts as half correct. Small strata are not dropped; their
intervals are wide.
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
    """Accuracy on the pairs that share a label."""

    name: Any
    """The label; None for pairs without a label."""
    accuracy: intervals.Estimate
    count: int
    clusters: int
    """Number of independent clusters of the pairs, such as prompts, on which the interval rests."""


class Bucket(NamedTuple):
    """A range of values, for use as a stratum label that can be sorted and printed."""

    low: float
    high: float

    def __str__(self) -> str:
        """Formats the range as ``3–12``, with both ends included, or as one number if the ends are equal."""
        # Whole numbers are printed in full: "g" alone would print a length of 1234567 as 1.23457e+06.
        low, high = (f"{x:.0f}" if x == round(x, 0) and abs(x) < 1e15 else f"{x:g}" for x in self)
        return low if low == high else f"{low}–{high}"


class GeneralisationGap(NamedTuple):
    """Accuracy and loss on training pairs compared with validation pairs; overfitting makes both gaps positive."""

    train_accuracy: intervals.Estimate
    validation_accuracy: intervals.Estimate
    accuracy_gap: intervals.Estimate
    """``train_accuracy - validation_accuracy``."""
    train_loss: intervals.Estimate
    """Mean of ``-log sigmoid(chosen - rejected)``, in nats per pair."""
    validation_loss: intervals.Estimate
    loss_gap: intervals.Estimate
    """``validation_loss - train_loss``."""


class ThresholdScan(NamedTuple):
    """Accuracy on the pairs that reach each of N increasing thresholds. Arrays have length N."""

    threshold: np.ndarray
    accuracy: np.ndarray
    """Accuracy on the pairs whose two scores are both at least the threshold; NaN if there are none."""
    lo: np.ndarray
    hi: np.ndarray
    """Bounds of the interval of the accuracy; 0 and 1 if there are no pairs."""
    count: np.ndarray
    """Number of pairs that reach the threshold."""
    spearman: float
    """Rank correlation of threshold and accuracy over the thresholds that at least one pair reaches. It is NaN for
    fewer than 3 such thresholds or a constant accuracy. It has no p-value because the thresholds share pairs."""


def accuracy_by_stratum(
    chosen: npt.ArrayLike,
    rejected: npt.ArrayLike,
    strata: Iterable[Hashable],
    *,
    prompts: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> list[Stratum]:
    """Computes the accuracy on each stratum of pairs, such as each annotator, turn, domain or range of lengths.

    Args:
        chosen: Scores of the preferred responses, one per pair.
        rejected: Scores of the rejected responses, in the same order.
        strata: One hashable label per pair; None and NaN mean that the pair has no label.
        prompts: One label per pair, such as its prompt or what its prompt asks. If given, pairs with the same label
            are treated as correlated (`intervals.clustered_mean`). Otherwise, intervals treat pairs as independent.
        confidence: Coverage of the intervals.

    Returns:
        The strata sorted by label, or in order of appearance if the labels cannot be sorted; None comes last. The
        counts add up to the number of pairs.

    Raises:
        ValueError: As in `intervals.win_outcomes`, or if ``strata`` or ``prompts`` does not have one entry per pair.

    Example:
        >>> from rlhf_jax import diagnostics
        >>> chosen, rejected, turns = [2.0, 1.0, 0.0], [1.0, 0.0, 3.0], [1, 2, 2]
        >>> for stratum in diagnostics.accuracy_by_stratum(chosen, rejected, turns):
        ...     print(stratum.name, stratum.accuracy.mean, stratum.count)
        1 1.0 1
        2 0.5 2
    """
    chosen, rejected = intervals.score_pairs(chosen, rejected)
    groups = prompt_groups(prompts, len(chosen))
    labels = strata.tolist() if isinstance(strata, np.ndarray) else strata
    labels = [None if label != label else label for label in labels]
    names, index = intervals.label_indices(labels, len(chosen), "labels")
    rows = {name: np.flatnonzero(index == i) for i, name in enumerate(names)}
    return [
        Stratum(
            name,
            rate(chosen, rejected, rows=rows[name], groups=groups, confidence=confidence),
            count=len(rows[name]),
            clusters=len(rows[name] if groups is None else np.unique(groups[rows[name]])),
        )
        for name in _ordered(names)
    ]


def quantile_buckets(values: npt.ArrayLike, *, count: int = 4) -> list[Bucket]:
    """Assigns each value to one of at most ``count`` buckets that contain about equally many values.

    Equal values share a bucket, so ties can reduce the number of buckets. Raises ValueError if ``values`` is empty, is
    not of rank 1 or contains NaN, or if ``count`` is below 1.
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
    """Compares accuracy and loss on training pairs with those on validation pairs to detect overfitting.

    A gap whose interval is above 0 indicates overfitting. InstructGPT (section 3.5, footnote 5) reports overfitting
    within one epoch if the pairs of all rankings are shuffled together. The intervals of the gaps are computed by
    `intervals.difference`.

    Args:
        train_chosen: Scores of the preferred responses of the training pairs.
        train_rejected: Scores of the rejected responses of the training pairs.
        validation_chosen: Scores of the preferred responses of the validation pairs.
        validation_rejected: Scores of the rejected responses of the validation pairs.
        train_prompts: One label per training pair, as in `accuracy_by_stratum`.
        validation_prompts: One label per validation pair. The two sets of pairs must be independent.
        confidence: Coverage of all intervals.

    Returns:
        Accuracies, losses and their gaps.

    Raises:
        ValueError: As in `intervals.win_outcomes`, or if a sequence of prompts does not have one entry per pair.
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
    """Computes the accuracy on the pairs whose two scores both reach a threshold (Bai 2022, Fig 25).

    RL raises the scores of all responses, so a reward model must distinguish good responses from better ones, not only
    from bad ones.

    Args:
        chosen: Scores of the preferred responses, one per pair.
        rejected: Scores of the rejected responses, in the same order.
        thresholds: Minimum scores. By default, the deciles of the pairs' lower scores, which keep about 100 %,
            90 %, ..., 10 % of the pairs.
        prompts: One label per pair, as in `accuracy_by_stratum`.
        confidence: Coverage of the intervals.

    Returns:
        Accuracy, interval and count for each distinct threshold, and the rank correlation.

    Raises:
        ValueError: As in `intervals.win_outcomes`, if a threshold is NaN, or if ``prompts`` does not have one entry per
            pair.
    """
    chosen, rejected = intervals.score_pairs(chosen, rejected)
    groups = prompt_groups(prompts, len(chosen))
    lower = np.minimum(chosen, rejected)
    deciles = np.sort(lower)[np.arange(10) * len(lower) // 10]
    levels = np.unique(intervals.samples(deciles if thresholds is None else thresholds))
    passing = [lower >= level for level in levels]
    rates = [rate(chosen, rejected, rows=rows, groups=groups, confidence=confidence) for rows in passing]
    accuracy, count = np.array([r.mean for r in rates]), np.array([int(rows.sum()) for rows in passing])
    nonempty = count > 0
    return ThresholdScan(
        threshold=levels,
        accuracy=accuracy,
        lo=np.array([r.lo for r in rates]),
        hi=np.array([r.hi for r in rates]),
        count=count,
        spearman=_spearman(levels[nonempty], accuracy[nonempty]),
    )


def rate(
    a: np.ndarray,
    b: np.ndarray,
    *,
    rows: Any = slice(None),
    groups: np.ndarray | None = None,
    confidence: float = 0.95,
) -> intervals.Estimate:
    """Computes `intervals.win_rate` on a subset of the pairs, which may be empty.

    Args:
        a: Scores, one per pair.
        b: Scores to compare with, in the same order.
        rows: Mask or indices of the subset; all pairs by default.
        groups: Label of each pair's cluster, such as its prompt. If given, the interval treats only pairs of different
            clusters as independent.
        confidence: Coverage of the interval.

    Returns:
        The win rate of ``a``; ``(NaN, 0, 1)`` for an empty subset.

    Raises:
        ValueError: As in `intervals.win_rate`.
    """
    intervals.quantiles(confidence)  # Raises ValueError for an invalid confidence.
    a, b = a[rows], b[rows]
    if not len(a):
        return intervals.Estimate(math.nan, 0.0, 1.0)
    if groups is None:
        return intervals.win_rate(a, b, confidence=confidence)
    return intervals.clustered_mean(intervals.win_outcomes(a, b), groups[rows], rate=True, confidence=confidence)


def prompt_groups(prompts: Sequence[Hashable] | None, pairs: int) -> np.ndarray | None:
    """Returns the index of each pair's prompt, or None if ``prompts`` is None.

    Raises ValueError if the number of prompts is not ``pairs``.
    """
    return None if prompts is None else intervals.label_indices(prompts, pairs, "prompts")[1]


def _accuracy_and_loss(
    chosen: npt.ArrayLike, rejected: npt.ArrayLike, prompts: Sequence[Hashable] | None, confidence: float
) -> tuple[intervals.Estimate, intervals.Estimate]:
    chosen, rejected = intervals.score_pairs(chosen, rejected)
    losses = np.logaddexp(0.0, rejected - chosen)
    groups = prompt_groups(prompts, len(chosen))
    accuracy = rate(chosen, rejected, groups=groups, confidence=confidence)
    return accuracy, intervals.clustered_mean(losses, groups, confidence=confidence)


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 3 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])


def _ordered(names: list[Any]) -> list[Any]:
    """Returns the names, sorted if they can be compared, with None last."""
    labelled, unlabelled = [name for name in names if name is not None], [name for name in names if name is None]
    try:
        return [*sorted(labelled), *unlabelled]
    except TypeError:
        return [*labelled, *unlabelled]
