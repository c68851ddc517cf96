"""Biases of each labeler towards the completion that is shown first and towards the longer one, and their speed.

Arrays of votes and ``clusters`` are as in `labeler_agreement`. Ties are left out.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from rlhf_jax.diagnostics import intervals
from rlhf_jax.feedback.labelers import labeler_agreement

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class PositionBias(NamedTuple):
    """How often a labeler chooses the completion that is shown first."""

    first_shown: labeler_agreement.Rate
    p_value: float
    """Probability of a share as far from one half, or farther, of a labeler without the bias; 1 without votes."""


class LengthPreference(NamedTuple):
    """How often a labeler chooses the longer completion."""

    longer: labeler_agreement.Rate
    beyond_others: intervals.Estimate
    """By how much the share exceeds that of the other labelers on the same pairs; (NaN, -1, 1) if there are none.
    Longer completions are often better, so that only this difference indicates a bias."""


class JudgementTimes(NamedTuple):
    """Time that a labeler takes for a judgement."""

    count: int
    """Number of judgements with a time."""
    quantiles: np.ndarray
    """Quantiles of the time in seconds, at the levels `QUANTILES`; NaN without a time."""
    fast: int
    """Number of judgements that took less time than is plausible."""

    @property
    def median(self) -> float:
        """Median time, in seconds."""
        return float(self.quantiles[QUANTILES.index(0.5)])


def position_bias(
    votes_NM: npt.ArrayLike,
    first_shown_NM: npt.ArrayLike,
    *,
    items: Sequence[Hashable] | None = None,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> list[PositionBias]:
    """Returns how often each labeler chooses the completion that is shown first, and a test of one half.

    The test is the exact binomial test. It needs no assumption on the labelers, because the order is random. The pairs
    of a ranking have one order, so they count as one trial, with the sign of their sum.

    Args:
        votes_NM: The votes.
        first_shown_NM: 1 if the first completion was shown before the second, 0 if after, NaN if that is unknown.
        items: The item of each pair, such as a ranking; None if each pair is an item.
        clusters: One label per pair; None if all pairs are independent.
        confidence: Coverage of the intervals.

    Returns:
        One bias for each labeler.
    """
    decided_NM, first_shown_NM = _decided(votes_NM), np.asarray(first_shown_NM, np.float64)
    rates = labeler_agreement.agreement_with(decided_NM, first_shown_NM, clusters=clusters, confidence=confidence)
    side_NM = np.nan_to_num((2 * decided_NM - 1) * (2 * first_shown_NM - 1))
    n = len(side_NM)
    item_N = np.arange(n) if items is None else intervals.label_indices(items, n, "items")[1]
    found = []
    for first_shown, side_N in zip(rates, side_NM.T):
        sign_I = np.sign(np.bincount(item_N, weights=side_N))
        first, trials = int((sign_I > 0).sum()), int((sign_I != 0).sum())
        p_value = float(stats.binomtest(first, trials, 0.5).pvalue) if trials else 1.0
        found.append(PositionBias(first_shown, p_value))
    return found


def length_preference(
    votes_NM: npt.ArrayLike,
    longer_N: npt.ArrayLike,
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> list[LengthPreference]:
    """Returns how often each labeler chooses the longer completion, alone and compared with the other labelers.

    Args:
        votes_NM: The votes.
        longer_N: 1 if the first completion of a pair is longer, 0 if the second is, NaN if both are equally long.
        clusters: One label per pair; None if all pairs are independent.
        confidence: Coverage of the intervals.

    Returns:
        One preference for each labeler.
    """
    decided_NM, longer_N = _decided(votes_NM), np.asarray(longer_N, np.float64)
    longer = labeler_agreement.agreement_with(decided_NM, longer_N, clusters=clusters, confidence=confidence)
    chosen_NM = np.where(np.isnan(longer_N)[:, None], np.nan, decided_NM == longer_N[:, None])
    chosen_NM[np.isnan(decided_NM)] = np.nan
    voted_NM = ~np.isnan(chosen_NM)
    others_NM = voted_NM.sum(axis=1, keepdims=True) - voted_NM
    sum_NM = np.nansum(chosen_NM, axis=1, keepdims=True) - np.nan_to_num(chosen_NM)
    difference_NM = np.where(others_NM > 0, chosen_NM - sum_NM / np.maximum(others_NM, 1), np.nan)
    group_N = list(range(len(difference_NM)) if clusters is None else clusters)
    found = []
    for rate, difference_N in zip(longer, difference_NM.T):
        known = np.flatnonzero(~np.isnan(difference_N))
        beyond = intervals.Estimate(np.nan, -1.0, 1.0)
        if len(known):
            groups = [group_N[n] for n in known]
            beyond = intervals.clustered_mean(difference_N[known], groups, confidence=confidence)
        found.append(LengthPreference(rate, beyond))
    return found


def judgement_times(seconds: npt.ArrayLike, *, min_seconds: float = 2.0) -> JudgementTimes:
    """Returns the quantiles of times in seconds, and the number of times below ``min_seconds``."""
    seconds = np.asarray(seconds, np.float64)
    quantiles = np.quantile(seconds, QUANTILES) if len(seconds) else np.full(len(QUANTILES), np.nan)
    return JudgementTimes(len(seconds), quantiles, int((seconds < min_seconds).sum()))


def _decided(votes_NM: npt.ArrayLike) -> np.ndarray:
    chosen_NM = labeler_agreement.choices(votes_NM)
    return np.where(chosen_NM == 0.5, np.nan, chosen_NM)
