"""Agreement of labelers with each other, as functions of their votes on pairs of completions.

In all functions, ``votes_NM`` is a float64 array of the votes of M labelers on N pairs: 1 if the first completion is
better, 0 if the second is, 0.5 for a tie, and NaN if a labeler was not asked or is unsure. Other numbers are
probabilities, which count as the more probable choice. A tie is a third choice: it agrees with a tie, and disagrees
with a preference. To leave ties out, replace them by NaN.

Pairs are the independent units of the intervals, or clusters of pairs: ``clusters`` has one label per pair, such as its
prompt, and pairs with the same label are not independent.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

from rlhf_jax.diagnostics import intervals

CHOICES = (1.0, 0.0, 0.5)
"""The first completion is better, the second is, neither is."""


class Rate(NamedTuple):
    """A share or a mean of several numbers."""

    share: intervals.Estimate
    """The share and its interval; (NaN, 0, 1) if it is computed from nothing."""
    count: int
    """Number of comparisons over which the share is computed."""


class AgreementMatrix(NamedTuple):
    """Agreement of each two labelers; NaN, 0 and 1 on the diagonal and where two labelers have no pair in common."""

    share_MM: np.ndarray
    lo_MM: np.ndarray
    hi_MM: np.ndarray
    count_MM: np.ndarray
    """Number of pairs on which both labelers voted."""


class ModalAgreement(NamedTuple):
    """How often a labeler agrees with one other, and with the mode of three others, on the same pairs."""

    one: Rate
    three: Rate


class GroupAgreement(NamedTuple):
    """Agreement of two labelers who are both in a group, both outside it, or one of each."""

    inside: Rate
    outside: Rate
    between: Rate
    difference: intervals.Estimate
    """``inside - between``; the interval allows for the pairs that both have in common."""


def choices(votes: npt.ArrayLike) -> np.ndarray:
    """Returns votes as 1 for the first completion, 0 for the second, and 0.5 for a tie; NaN is kept.

    Raises ValueError if a vote is outside [0, 1].
    """
    votes = np.asarray(votes, np.float64)
    if ((votes < 0) | (votes > 1)).any():
        raise ValueError("each vote must be from 0 (the second is better) to 1 (the first is), but one is outside")
    return (np.sign(votes - 0.5) + 1) / 2


def rate(
    parts_N: npt.ArrayLike,
    wholes_N: npt.ArrayLike,
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> Rate:
    """Returns ``sum(parts) / sum(wholes)``, with the interval of `intervals.ratio_interval`.

    Args:
        parts_N: Number of agreements on each pair.
        wholes_N: Number of comparisons of each pair.
        clusters: One label per pair; None if all pairs are independent.
        confidence: Coverage of the interval.

    Returns:
        The rate and the number of comparisons.
    """
    parts_N, wholes_N = np.asarray(parts_N, np.float64), np.asarray(wholes_N, np.float64)
    if not wholes_N.sum() > 0:
        return Rate(intervals.Estimate(np.nan, 0.0, 1.0), 0)
    group_N = _groups(clusters, len(parts_N))
    sums = (np.bincount(group_N, weights=each) for each in (parts_N, wholes_N))
    return Rate(intervals.ratio_interval(*sums, rate=True, confidence=confidence), round(wholes_N.sum()))


def pairwise_agreement(
    votes_NM: npt.ArrayLike, *, clusters: Sequence[Hashable] | None = None, confidence: float = 0.95
) -> Rate:
    """Returns how often two labelers make the same choice about a pair, over all pairs and all two of their labelers.

    It is ``sum_ic n_ic (n_ic - 1) / sum_i n_i (n_i - 1)``, where n_ic of the n_i labelers of pair i make choice c.
    Ouyang et al. (2022, 3.4) report 72.6 ± 1.5 % for the labelers of the training data and 77.3 ± 1.3 % for others.

    Example:
        >>> from rlhf_jax.feedback.labelers import labeler_agreement
        >>> found = labeler_agreement.pairwise_agreement([[1.0, 1.0, 0.0], [0.0, 0.0, float("nan")]])
        >>> print(found.share.mean, found.count)  # one of three, and one of one
        0.5 4
    """
    agreeing_N, all_N = _labeler_pairs(_counts(votes_NM))
    return rate(agreeing_N, all_N, clusters=clusters, confidence=confidence)


def agreement_matrix(
    votes_NM: npt.ArrayLike, *, clusters: Sequence[Hashable] | None = None, confidence: float = 0.95
) -> AgreementMatrix:
    """Returns how often each two labelers make the same choice."""
    chosen_NM = choices(votes_NM)
    M = chosen_NM.shape[1]
    share_MM, lo_MM, hi_MM = np.full((M, M), np.nan), np.zeros((M, M)), np.ones((M, M))
    count_MM = np.zeros((M, M), int)
    for m in range(M):
        for other in range(m):
            two_N2 = chosen_NM[:, [m, other]]
            (share_MM[m, other], lo_MM[m, other], hi_MM[m, other]), count_MM[m, other] = pairwise_agreement(
                two_N2, clusters=clusters, confidence=confidence
            )
    upper = np.triu_indices(M)
    for each_MM in (share_MM, lo_MM, hi_MM, count_MM):
        each_MM[upper] = each_MM.T[upper]
    return AgreementMatrix(share_MM, lo_MM, hi_MM, count_MM)


def fleiss_kappa(
    votes_NM: npt.ArrayLike, *, clusters: Sequence[Hashable] | None = None, confidence: float = 0.95
) -> intervals.Estimate:
    """Returns Fleiss' kappa, the agreement beyond that of random choices: ``1 - (1 - P) / (1 - sum_c p_c^2)``.

    P is the `pairwise_agreement`, and p_c is the share of choice c among the labelers of these comparisons, ``sum_i
    n_ic (n_i - 1) / sum_i n_i (n_i - 1)``. With the same number of labelers for each pair, this is the kappa of Fleiss
    (1971). With different numbers, each two labelers of a pair count once, and p_c is computed from the same
    comparisons as P, so that random choices have the kappa 0.

    The variance of the interval is the jackknife's with linear scores (see `intervals.jackknife`). If all choices
    agree, the interval is that of P, with p_c as a constant.

    Returns:
        Kappa, at most 1; (NaN, -1, 1) if no pair has two votes, or all choices are the same.
    """
    counts_NC = _counts(votes_NM)
    agreeing_N, all_N = _labeler_pairs(counts_NC)
    total, chance_C = all_N.sum(), np.zeros(len(CHOICES))
    weight_NC = counts_NC * (counts_NC.sum(axis=1, keepdims=True) - 1) / 2
    if total:
        chance_C = weight_NC.sum(axis=0) / total
    expected = 1 - float(np.square(chance_C).sum())  # disagreement of random choices
    if not total or expected <= 0:
        return intervals.Estimate(np.nan, -1.0, 1.0)
    agreement = rate(agreeing_N, all_N, clusters=clusters, confidence=confidence).share
    observed = 1 - agreement.mean
    kappa = 1 - observed / expected
    if observed == 0:
        return intervals.Estimate(kappa, 1 - (1 - agreement.lo) / expected, 1.0)
    # How much kappa changes with the disagreements of a pair, and with its choices.
    score_N = -(all_N - agreeing_N - observed * all_N) / expected
    score_N -= 2 * observed / expected**2 * (weight_NC - chance_C * all_N[:, None]) @ chance_C
    group_N = _groups(clusters, len(score_N))
    score_G, all_G = (np.bincount(group_N, weights=each) for each in (score_N, all_N))
    variance, freedom = intervals.jackknife(score_G, all_G)
    if not freedom:
        return intervals.Estimate(kappa, -1.0, 1.0)
    half = intervals.critical(confidence, freedom=freedom) * variance**0.5
    return intervals.Estimate(kappa, max(kappa - half, -1.0), min(kappa + half, 1.0))


def mode(votes_NM: npt.ArrayLike) -> np.ndarray:
    """Returns the most frequent choice about each pair, ``[N]``; NaN if there is none or several are as frequent."""
    return _mode(_counts(votes_NM))


def mode_of_others(votes_NM: npt.ArrayLike, among_M: npt.ArrayLike | None = None) -> np.ndarray:
    """Returns, for each labeler, the `mode` of the votes of the others, ``[N, M]``.

    ``among_M`` is True for the labelers whose votes count, such as researchers; by default, those of all count.
    """
    chosen_NM = choices(votes_NM)
    counted_NM = chosen_NM if among_M is None else np.where(np.asarray(among_M, bool), chosen_NM, np.nan)
    counts_NC = _counts(counted_NM)
    own_NMC = np.stack([counted_NM == choice for choice in CHOICES], axis=-1)
    return _mode(counts_NC[:, None] - own_NMC)


def agreement_with(
    votes_NM: npt.ArrayLike,
    reference: npt.ArrayLike,
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> list[Rate]:
    """Returns how often each labeler makes the same choice as a reference.

    With `mode_of_others` as the reference, it is the agreement of each labeler with the majority of the others.

    Args:
        votes_NM: The votes.
        reference: Votes of the reference, ``[N]``, or of one for each labeler, ``[N, M]``. Pairs with NaN are left out.
        clusters: One label per pair; None if all pairs are independent.
        confidence: Coverage of the intervals.

    Returns:
        M rates.
    """
    chosen_NM, reference = choices(votes_NM), choices(reference)
    reference_NM = np.broadcast_to(reference[:, None] if reference.ndim == 1 else reference, chosen_NM.shape)
    both_NM = ~np.isnan(chosen_NM) & ~np.isnan(reference_NM)
    hits_NM = both_NM & (chosen_NM == reference_NM)
    return [
        rate(hits_N, both_N, clusters=clusters, confidence=confidence) for hits_N, both_N in zip(hits_NM.T, both_NM.T)
    ]


def modal_of_three(
    votes_NM: npt.ArrayLike, *, clusters: Sequence[Hashable] | None = None, confidence: float = 0.95
) -> ModalAgreement:
    """Returns how often a labeler agrees with the most frequent choice of three others, and with one other.

    It is the exact mean over all labelers and all three others, on the pairs with at least four votes, each of which
    counts equally. Three others who make three different choices have no mode and are left out. Stiennon et al.
    (2020, C.2) report that the mode of three labelers raises agreement from 72 to 77 %.

    Returns:
        Both rates; their counts are numbers of pairs.
    """
    counts_NC = _counts(votes_NM)
    n_N = counts_NC.sum(axis=1)
    enough_N = n_N >= 4
    agreeing_N, all_N = _labeler_pairs(counts_NC)
    one_N = np.where(enough_N, agreeing_N / np.maximum(all_N, 1), 0.0)
    hits_N, modes_N = np.zeros(len(n_N)), np.zeros(len(n_N))
    for c in range(len(CHOICES)):  # of the labeler
        others_NC = np.maximum(counts_NC - np.eye(len(CHOICES))[c], 0)
        same_N, rest_N = others_NC[:, c], n_N - 1
        mode_N = special.comb(same_N, 3) + special.comb(same_N, 2) * (rest_N - same_N)
        hits_N += counts_NC[:, c] * mode_N
        modes_N += counts_NC[:, c] * (special.comb(rest_N, 3) - others_NC.prod(axis=1))
    all_N = np.where(enough_N, n_N * special.comb(n_N - 1, 3), 1.0)
    three = rate(
        *(np.where(enough_N, each_N / all_N, 0.0) for each_N in (hits_N, modes_N)),
        clusters=clusters,
        confidence=confidence,
    )
    return ModalAgreement(
        rate(one_N, enough_N, clusters=clusters, confidence=confidence), three._replace(count=int(enough_N.sum()))
    )


def group_agreement(
    votes_NM: npt.ArrayLike,
    inside_M: npt.ArrayLike,
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> GroupAgreement:
    """Returns the agreement of labelers within a group, outside it and between both.

    Ouyang et al. (2022, 3.4) report the agreement of held-out labelers, and Stiennon et al. (2020, C.2) that of
    researchers with each other and with labelers.

    Args:
        votes_NM: The votes.
        inside_M: True for the labelers of the group.
        clusters: One label per pair; None if all pairs are independent.
        confidence: Coverage of the intervals.

    Returns:
        The rates and the difference of the agreement within the group and with labelers outside it.
    """
    chosen_NM, inside_M = choices(votes_NM), np.asarray(inside_M, bool)
    inside_NC, outside_NC = (_counts(chosen_NM[:, each_M]) for each_M in (inside_M, ~inside_M))
    inside, outside = _labeler_pairs(inside_NC), _labeler_pairs(outside_NC)
    between = (inside_NC * outside_NC).sum(axis=1), inside_NC.sum(axis=1) * outside_NC.sum(axis=1)
    rates = [rate(*each, clusters=clusters, confidence=confidence) for each in (inside, outside, between)]
    difference = _difference(inside, between, _groups(clusters, len(chosen_NM)), confidence)
    return GroupAgreement(rates[0], rates[1], rates[2], difference)


def disagreement_by(
    votes_NM: npt.ArrayLike,
    labels_N: Sequence[Hashable],
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> dict[Hashable, Rate]:
    """Returns how often two labelers make different choices, by a label of the pairs such as the category of a prompt.

    Args:
        votes_NM: The votes.
        labels_N: The labels.
        clusters: One label per pair; None if all pairs are independent.
        confidence: Coverage of the intervals.

    Returns:
        1 minus the `pairwise_agreement` for each label, in order of first appearance.
    """
    agreeing_N, all_N = _labeler_pairs(_counts(votes_NM))
    names, label_N = intervals.label_indices(labels_N, len(all_N), "labels")
    of = [np.where(label_N == i, all_N, 0.0) for i in range(len(names))]
    shares = [(each_N > 0) * (all_N - agreeing_N) for each_N in of]
    return {
        name: rate(share_N, each_N, clusters=clusters, confidence=confidence)
        for name, share_N, each_N in zip(names, shares, of)
    }


def _counts(votes_NM: npt.ArrayLike) -> np.ndarray:
    """Returns how many labelers make each of `CHOICES`, ``[N, C]``."""
    chosen_NM = choices(votes_NM)
    return np.stack([(chosen_NM == choice).sum(axis=1) for choice in CHOICES], axis=1)


def _labeler_pairs(counts_NC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the number of two labelers who make the same choice about each pair, and of all two labelers."""
    n_N = counts_NC.sum(axis=1)
    return (counts_NC * (counts_NC - 1)).sum(axis=1) / 2, n_N * (n_N - 1) / 2


def _difference(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], group_N: np.ndarray, confidence: float
) -> intervals.Estimate:
    """Returns the difference of two rates on the same pairs, with the jackknife's variance over clusters of pairs."""
    sums = [[np.bincount(group_N, weights=each_N) for each_N in pair] for pair in (first, second)]
    means = [float(parts_G.sum() / max(wholes_G.sum(), 1)) for parts_G, wholes_G in sums]
    if not all(wholes_G.any() for _, wholes_G in sums):
        return intervals.Estimate(np.nan, -1.0, 1.0)
    difference = means[0] - means[1]
    if any(np.count_nonzero(wholes_G) < 2 for _, wholes_G in sums):
        return intervals.Estimate(difference, -1.0, 1.0)
    # How much each rate falls if a cluster is left out, and the share of its comparisons that are of this cluster.
    fall_2G = [
        (parts_G - mean * wholes_G) / (wholes_G.sum() - wholes_G) for mean, (parts_G, wholes_G) in zip(means, sums)
    ]
    weight_G = np.mean([wholes_G / wholes_G.sum() for _, wholes_G in sums], axis=0)
    variance, freedom = intervals.jackknife((fall_2G[0] - fall_2G[1]) * (1 - weight_G), weight_G)
    half = intervals.critical(confidence, freedom=freedom) * variance**0.5
    return intervals.Estimate(difference, max(difference - half, -1.0), min(difference + half, 1.0))


def _mode(counts: np.ndarray) -> np.ndarray:
    """Returns the only most frequent choice, ``[...]``, from the numbers ``[..., C]``; NaN if it is not the only."""
    most = counts.max(axis=-1)
    only = ((counts == most[..., None]).sum(axis=-1) == 1) & (most > 0)
    return np.where(only, np.array(CHOICES)[counts.argmax(axis=-1)], np.nan)


def _groups(clusters: Sequence[Hashable] | None, n: int) -> np.ndarray:
    return np.arange(n) if clusters is None else intervals.label_indices(clusters, n, "clusters")[1]
