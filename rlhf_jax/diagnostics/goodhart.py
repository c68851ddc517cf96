"""Whether what a policy is trained on still stands for what is wanted of it.

Checkpoints of one run answer the same N prompts; tables of scores are ``[C, N]``, checkpoints by prompts, in the order
of training. Differences are taken prompt by prompt.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rlhf_jax.diagnostics import intervals


class SplitHalves(NamedTuple):
    """One entry a checkpoint; arrays of length C."""

    train: np.ndarray
    """Mean score by the reward model that the policy is trained on, less that of the first checkpoint."""
    test: np.ndarray
    """The same by a reward model of the other half of the comparisons."""
    gap: np.ndarray
    """Train less test."""
    lo: np.ndarray
    hi: np.ndarray
    """Ends of the interval of the gap, over prompts."""
    parted: int | None
    """The first checkpoint from which on, to the last, the gap's interval lies above 0; None if there is none."""


class FallFromPeak(NamedTuple):
    """What a judge says of the last checkpoint, beside the one that it likes best."""

    peak: int
    """The checkpoint that the judge likes best."""
    fall: intervals.Estimate
    """The judge's mean score at the peak less that at the end."""
    rise: intervals.Estimate
    """The proxy's mean score at the end less that at the judge's peak."""
    gamed: bool
    """Both intervals lie above 0: the policy gets better at what it is trained on, and worse."""


def split_halves(train_CN: npt.ArrayLike, test_CN: npt.ArrayLike, *, confidence: float = 0.95) -> SplitHalves:
    """Two reward models of two halves of the comparisons, along the training on one of them (Bai 2022, Fig 4 and 35).

    The test model has as much to say about quality as the train model, and nobody optimised it: where the two part, the
    policy goes on to what one model alone likes. Both start from 0 at the first checkpoint. Scores of the two have to
    be in one unit, such as the standard deviation on samples of the first checkpoint.

    Args:
        train_CN: ``[C, N]``, scores by the model that the policy is trained on; the first row is where it starts.
        test_CN: ``[C, N]``, scores of the same answers by the other.
        confidence: of each checkpoint's interval, Student's over prompts.

    Raises:
        ValueError: unless both are tables of one shape, without NaN, of a checkpoint and two prompts or more.
    """
    train, test = (scores - scores[0] for scores in _tables(train_CN, test_CN))
    gaps = [intervals.mean_interval(row, confidence=confidence) for row in train - test]
    apart = [gap.lo > 0 for gap in gaps]
    together = [c for c, on in enumerate(apart) if not on]
    first = together[-1] + 1 if together else 0
    mean, lo, hi = (np.array(each) for each in zip(*gaps))
    return SplitHalves(train.mean(axis=1), test.mean(axis=1), mean, lo, hi, first if first < len(apart) else None)


def fall_from_peak(proxy_CN: npt.ArrayLike, judge_CN: npt.ArrayLike, *, confidence: float = 0.95) -> FallFromPeak:
    """Whether a judge that is not trained on has fallen since its peak while the proxy went on rising.

    The highest of many noisy means is high by chance too. So the intervals hold for all checkpoints at once
    (Bonferroni over those before the last): where nothing changes, no more than ``1 - confidence`` of runs are called
    gamed.

    Args:
        proxy_CN: ``[C, N]``, scores that the policy is trained to raise.
        judge_CN: ``[C, N]``, scores of the same answers by the gold utility or a held-out reward model.
        confidence: of both intervals.

    Raises:
        ValueError: as in `split_halves`.
    """
    proxy, judge = _tables(proxy_CN, judge_CN)
    intervals.quantiles(confidence)  # For its check.
    peak = int(judge.mean(axis=1).argmax())
    if peak == len(judge) - 1:
        none = intervals.Estimate(0.0, 0.0, 0.0)
        return FallFromPeak(peak, none, none, False)
    each = 1 - (1 - confidence) / (len(judge) - 1)
    fall = intervals.mean_interval(judge[peak] - judge[-1], confidence=each)
    rise = intervals.mean_interval(proxy[-1] - proxy[peak], confidence=each)
    return FallFromPeak(peak, fall, rise, fall.lo > 0 and rise.lo > 0)


def regressional_goodhart(
    proxy: npt.ArrayLike,
    *,
    mean: float = 0.0,
    variance: float,
    noise_mean: float = 0.0,
    noise_variance: float,
) -> np.ndarray:
    """``E[X | X + Z = proxy]``: the true score to expect of an answer with this proxy score (Gao 2022, 4.2.1).

    ``mean + (proxy - mean - noise_mean) variance / (variance + noise_variance)``: of what a proxy is above its
    mean, its noise Z takes a share, whoever optimises. Exact for normal X and Z that are independent; for others the
    best straight line.

    Args:
        proxy: proxy scores, of any shape.
        mean: of the true score X.
        variance: of X.
        noise_mean: of the noise Z.
        noise_variance: of Z.

    Raises:
        ValueError: if a variance is below 0, or both are 0.
    """
    if variance < 0 or noise_variance < 0 or variance + noise_variance == 0:
        raise ValueError(f"variances must be at least 0 and not both 0, got {variance} and {noise_variance}")
    proxy = np.asarray(proxy, np.float64)
    return mean + (proxy - mean - noise_mean) * variance / (variance + noise_variance)


def _tables(left: npt.ArrayLike, right: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    if left.ndim != 2 or left.shape != right.shape or left.shape[0] < 1 or left.shape[1] < 2:
        raise ValueError(f"need two tables of scores, checkpoints by prompts, got {left.shape} and {right.shape}")
    if np.isnan(left).any() or np.isnan(right).any():
        raise ValueError("a score is NaN")
    return left, right
