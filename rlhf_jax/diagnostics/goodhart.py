"""Tests of whether the proxy score that a policy is trained to raise still measures quality.

In `split_halves` and `fall_from_peak`, scores are arrays ``[C, N]``: C checkpoints of a run, in order of training,
respond to the same N prompts. Differences are computed per prompt.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rlhf_jax.diagnostics import intervals


class SplitHalves(NamedTuple):
    """Scores of C checkpoints under two reward models trained on different halves of the comparisons.

    Arrays have length C.
    """

    train: np.ndarray
    """Mean gain in score since the first checkpoint, under the train model, against which the policy is optimised."""
    test: np.ndarray
    """The same quantity under the test model, which is not used to train the policy."""
    gap: np.ndarray
    """``train - test``."""
    lo: np.ndarray
    hi: np.ndarray
    """Bounds of the interval of the gap, over prompts."""
    parted: int | None
    """Index of the first checkpoint from which the interval of the gap stays above 0; None if there is none."""


class FallFromPeak(NamedTuple):
    """Comparison of the last checkpoint with the one that a judge scores highest; see `fall_from_peak`."""

    peak: int
    """Index of the checkpoint with the judge's highest mean score."""
    fall: intervals.Estimate
    """The judge's mean score at the peak minus its mean score at the last checkpoint."""
    rise: intervals.Estimate
    """The proxy's mean score at the last checkpoint minus its mean score at the judge's peak."""
    gamed: bool
    """True if both intervals are above 0, i.e. the proxy's score rose while the judge's score fell."""


def split_halves(
    train_CN: npt.ArrayLike,
    test_CN: npt.ArrayLike,
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> SplitHalves:
    """Compares the reward model used in training with one trained on other comparisons (Bai 2022, Figs 4 and 35).

    The two models should measure quality equally well, but the policy is optimised against the train model only. A
    positive gap between the two therefore suggests that the policy exploits errors of the train model. Both curves
    start from 0 at the first checkpoint. The scores of the two models must have the same unit, such as their standard
    deviation on samples of the first checkpoint.

    Args:
        train_CN: ``[C, N]``, the train model's scores; the first row belongs to the initial policy.
        test_CN: ``[C, N]``, the test model's scores of the same responses.
        clusters: One label per prompt; prompts with the same label are correlated (`intervals.clustered_mean`).
        confidence: Coverage of the intervals.

    Returns:
        The gains in score, their gaps and the first checkpoint from which the gap stays significant.

    Raises:
        ValueError: Unless both arrays have the same shape, with at least one checkpoint and one prompt, and contain no
            NaN.
    """
    train, test = (scores - scores[0] for scores in _tables(train_CN, test_CN))
    gaps = [intervals.clustered_mean(row, clusters, confidence=confidence) for row in train - test]
    first = 1 + max((c for c, gap in enumerate(gaps) if not gap.lo > 0), default=-1)
    mean, lo, hi = (np.array(column) for column in zip(*gaps))
    return SplitHalves(train.mean(axis=1), test.mean(axis=1), mean, lo, hi, first if first < len(gaps) else None)


def fall_from_peak(
    proxy_CN: npt.ArrayLike,
    judge_CN: npt.ArrayLike,
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> FallFromPeak:
    """Tests whether the score of a judge that is not used in training fell from its peak while the proxy's score rose.

    The highest of many noisy means is partly high by chance, so the intervals are Bonferroni-corrected for the number
    of checkpoints before the last. If neither score changes in expectation, at most ``1 - confidence`` of runs are
    reported as gamed.

    Args:
        proxy_CN: ``[C, N]``, the scores that the policy is trained to raise.
        judge_CN: ``[C, N]``, the scores of the same responses under the gold utility or a held-out reward model.
        clusters: One label per prompt, as in `split_halves`.
        confidence: Coverage of both intervals together.

    Returns:
        The judge's peak, the changes since then, and whether the policy games its score.

    Raises:
        ValueError: As in `split_halves`.
    """
    proxy, judge = _tables(proxy_CN, judge_CN)
    intervals.quantiles(confidence)  # Raises ValueError for an invalid confidence.
    peak = int(judge.mean(axis=1).argmax())
    if peak == len(judge) - 1:
        none = intervals.Estimate(0.0, 0.0, 0.0)
        return FallFromPeak(peak, none, none, False)
    corrected = 1 - (1 - confidence) / (len(judge) - 1)
    fall, rise = (
        intervals.clustered_mean(change, clusters, confidence=corrected)
        for change in (judge[peak] - judge[-1], proxy[-1] - proxy[peak])
    )
    return FallFromPeak(peak, fall, rise, fall.lo > 0 and rise.lo > 0)


def regressional_goodhart(
    proxy: npt.ArrayLike,
    *,
    mean: float = 0.0,
    variance: float,
    noise_mean: float = 0.0,
    noise_variance: float,
) -> np.ndarray:
    """Returns ``E[X | X + Z = proxy]``, the expected true score X given the proxy score X + Z (Gao 2022, 4.2.1).

    The result is ``mean + (proxy - mean - noise_mean) variance / (variance + noise_variance)``. Part of the proxy's
    excess over its mean is noise, regardless of how the proxy was optimised. X and Z must be independent. The formula
    is exact if both are normal; otherwise it is the best linear predictor.

    Args:
        proxy: Proxy scores, any shape.
        mean: Mean of the true score X.
        variance: Variance of X.
        noise_mean: Mean of the noise Z.
        noise_variance: Variance of Z.

    Returns:
        Expected true scores, in the shape of ``proxy``.

    Raises:
        ValueError: If a variance is below 0 or both are 0.
    """
    if variance < 0 or noise_variance < 0 or variance + noise_variance == 0:
        raise ValueError(f"variances must be at least 0 and not both 0, got {variance} and {noise_variance}")
    proxy = np.asarray(proxy, np.float64)
    return mean + (proxy - mean - noise_mean) * variance / (variance + noise_variance)


def _tables(left: npt.ArrayLike, right: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    if left.ndim != 2 or left.shape != right.shape or not left.size:
        raise ValueError(f"need equal shapes (checkpoints, prompts) without a 0, got {left.shape} and {right.shape}")
    if np.isnan(left).any() or np.isnan(right).any():
        raise ValueError("a score is NaN")
    return left, right
