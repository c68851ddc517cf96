"""Length bias of reward models, preference labels and win rates."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from rlhf_jax.diagnostics import intervals
from rlhf_jax.diagnostics.accuracy import prompt_groups, rate


class LengthBias(NamedTuple):
    """Dependence of labels and scores on length. A rate is ``(NaN, 0, 1)`` if it is computed from no pairs."""

    longer_wins: intervals.Estimate
    """Share of pairs whose preferred response is the longer one; equal lengths count as one half."""
    shorter_wins: intervals.Estimate
    """Share of pairs whose preferred response is the shorter one, 1 minus ``longer_wins``."""
    prefers_longer: intervals.Estimate
    """Share of pairs with unequal lengths whose longer response scores higher; tied scores count as one half."""
    accuracy_where_longer: intervals.Estimate
    """Accuracy of the scores on pairs whose preferred response is the longer one."""
    accuracy_where_shorter: intervals.Estimate
    """Accuracy of the scores on pairs whose preferred response is the shorter one; low if the model rewards length."""
    correlation: intervals.Estimate
    """Correlation of score and length within pairs (`length_correlation`)."""
    explained: float
    """Squared correlation: the share of the variance in score differences that is explained by length differences."""
    equal_lengths: int
    """Number of pairs whose responses have equal lengths."""
    count: int
    """Number of pairs."""


class LengthControlledWinRates(NamedTuple):
    """Win rates of several policies. Lists have one entry per policy, in order of first appearance."""

    policies: list[Any]
    rates: list[intervals.Estimate]
    """Probability of a win at equal lengths; see `length_controlled_win_rates` for rates of NaN, 0 and 1."""
    errors: list[float]
    """Standard errors of the rates; NaN for rates of NaN, 0 and 1."""
    plain: list[intervals.Estimate]
    """Win rates without length control; a tie counts as one half."""
    length_effect: intervals.Estimate
    """Change of the log odds of a win per unit of log length ratio; above 0 if longer responses win more often. It is
    NaN if the data do not determine it (all ratios are 1, for example), and infinite if length decides the outcomes."""


def length_correlation(
    scores: npt.ArrayLike,
    lengths: npt.ArrayLike,
    *,
    groups: Iterable[Hashable] | None = None,
    clusters: Iterable[Hashable] | None = None,
    confidence: float = 0.95,
) -> intervals.Estimate:
    """Returns Pearson's correlation ``r`` of score and length, within groups if ``groups`` is given.

    If groups are given, their means are subtracted from scores and lengths. Typical lengths and scores both depend on
    the prompt, so group the responses by prompt to measure the effect of length on a model's score.

    Args:
        scores: One score per response.
        lengths: Lengths of the responses, in any unit. For the correlation with relative length, pass logarithms.
        groups: One label per response, such as its prompt.
        clusters: One label per response, such as what its prompt asks; by default, its group or, without groups, a
            cluster of its own. The interval treats only responses of different clusters as independent.
        confidence: Coverage of the interval, which is symmetric in ``atanh(r)`` (Fisher's transformation). Its variance
            is the jackknife's, as in `intervals.ratio_interval`.

    Returns:
        The correlation; ``(NaN, -1, 1)`` if scores or lengths do not vary within groups.

    Raises:
        ValueError: If the arrays are empty, are not of rank 1, differ in length or contain NaN, or if ``groups`` or
            ``clusters`` does not have one entry per response.
    """
    scores, lengths = intervals.score_pairs(scores, lengths)
    _, index = intervals.label_indices(groups, len(scores), "groups")
    clusters = groups if clusters is None else clusters
    cluster = None if clusters is None else intervals.label_indices(clusters, len(scores), "clusters")[1]
    return _correlation(_centred(scores, index), _centred(lengths, index), cluster, confidence)


def length_bias(
    chosen: npt.ArrayLike,
    rejected: npt.ArrayLike,
    chosen_lengths: npt.ArrayLike,
    rejected_lengths: npt.ArrayLike,
    *,
    prompts: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> LengthBias:
    """Measures how much a reward model and its labels depend on length.

    Args:
        chosen: Scores of the preferred responses, one per pair.
        rejected: Scores of the rejected responses, in the same order.
        chosen_lengths: Lengths of the preferred responses, in any unit.
        rejected_lengths: Lengths of the rejected responses.
        prompts: One label per pair, for the intervals, as in `accuracy_by_stratum`.
        confidence: Coverage of all intervals.

    Returns:
        The rates, the correlation and the counts.

    Raises:
        ValueError: As in `intervals.win_outcomes`, for scores and lengths, or if ``prompts`` does not have one
            entry per pair.
    """
    chosen, rejected = intervals.score_pairs(chosen, rejected)
    chosen_lengths, rejected_lengths = intervals.score_pairs(chosen_lengths, rejected_lengths)
    if len(chosen) != len(chosen_lengths):
        raise ValueError(f"got {len(chosen)} pairs of scores but {len(chosen_lengths)} pairs of lengths")
    groups = prompt_groups(prompts, len(chosen))
    estimate = partial(rate, groups=groups, confidence=confidence)
    scores, lengths = chosen - rejected, chosen_lengths - rejected_lengths
    # The score of the longer response minus the score of the shorter one.
    longer_gap = np.where(lengths > 0, 1.0, -1.0) * scores
    # Centring a pair leaves plus and minus half the difference, so the differences suffice for the correlation.
    correlation = _correlation(scores, lengths, groups, confidence)
    return LengthBias(
        longer_wins=estimate(chosen_lengths, rejected_lengths),
        shorter_wins=estimate(rejected_lengths, chosen_lengths),
        prefers_longer=estimate(longer_gap, np.zeros_like(longer_gap), rows=lengths != 0),
        accuracy_where_longer=estimate(chosen, rejected, rows=lengths > 0),
        accuracy_where_shorter=estimate(chosen, rejected, rows=lengths < 0),
        correlation=correlation,
        explained=correlation.mean**2,
        equal_lengths=int((lengths == 0).sum()),
        count=len(chosen),
    )


def length_controlled_win_rates(
    outcomes: npt.ArrayLike,
    lengths: npt.ArrayLike,
    reference_lengths: npt.ArrayLike,
    policies: Iterable[Hashable] | None = None,
    *,
    clusters: Iterable[Hashable] | None = None,
    confidence: float = 0.95,
) -> LengthControlledWinRates:
    """Estimates how often each policy would beat the reference with responses of equal length (Stiennon 2020, App. F).

    The estimates come from a logistic regression of the outcome on the policy and the log length ratio, with one slope
    for all policies: ``logit P(win) = policy + effect * log(length / reference length)``. The rates are the predictions
    at a log ratio of 0. Standard errors are robust (sandwich), so ties narrow the intervals as in `intervals.win_rate`,
    and sums over clusters, if they are given, replace single comparisons.

    Some policies are special cases:

    * A policy that won (or lost) every comparison has a rate of 1 (or 0) at any length, with the interval of its plain
      win rate. Its comparisons do not affect the estimated effect of length.
    * The rates of the other policies are ``(NaN, 0, 1)`` in two cases: if length alone separates their wins from their
      losses, so that the likelihood has no maximum, and if each of these policies has a constant length ratio.
    * The rate of a policy whose length ratios are all 1 is never NaN.

    Args:
        outcomes: 1 for a win over the reference, 0 for a loss, 1/2 for a tie; see `intervals.win_outcomes`.
        lengths: Lengths of the policies' responses, counting the stop token; above 0.
        reference_lengths: Lengths of the reference's responses to the same prompts, above 0.
        policies: One policy label per comparison; by default a single policy labelled None.
        clusters: One label per comparison, such as what its prompt asks. Only comparisons of different clusters are
            treated as independent; by default, all are.
        confidence: Coverage of all intervals.

    Returns:
        Length-controlled and plain win rates of each policy, and the effect of length.

    Raises:
        ValueError: If the arrays are empty, are not of rank 1, differ in length or contain NaN; if an outcome is
            outside [0, 1] or a length is not above 0; if ``confidence`` is not in (0, 1); or if every policy's
            length ratio is constant and differs from 1 for a policy that neither won nor lost every comparison, so
            that the effect of length is not identifiable.
    """
    outcomes, own_lengths, reference_lengths = map(intervals.samples, (outcomes, lengths, reference_lengths))
    if not outcomes.shape == own_lengths.shape == reference_lengths.shape:
        shapes = f"{outcomes.shape}, {own_lengths.shape} and {reference_lengths.shape}"
        raise ValueError(f"outcomes, lengths and reference lengths must be equally long, got shapes {shapes}")
    if ((own_lengths <= 0) | (reference_lengths <= 0)).any():
        raise ValueError("lengths must be above 0, because their ratio is used; count the stop token too")
    names, policy = intervals.label_indices(policies, len(outcomes), "policies")
    x = np.log(own_lengths / reference_lengths)
    cluster = None if clusters is None else intervals.label_indices(clusters, len(outcomes), "clusters")[1]
    plain = [_plain_rate(outcomes, cluster, policy == i, confidence) for i in range(len(names))]
    mixed = [i for i, estimate in enumerate(plain) if 0 < estimate.mean < 1]
    used = np.isin(policy, mixed)
    if x[used].any() and not any(np.ptp(x[policy == i]) for i in range(len(names))):
        raise ValueError(
            "the length ratio is the same in all comparisons of each policy, so the effect of length cannot be "
            "separated from the effect of the policy"
        )

    def fit(rows: np.ndarray, own: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, intervals.Estimate]:
        return _fit(outcomes[rows], x[rows], own, count, None if cluster is None else cluster[rows], confidence)

    thetas, covariance, slope = fit(used, np.searchsorted(mixed, policy[used]), len(mixed))
    rates, errors = list(plain), [math.nan] * len(names)
    for row, i in enumerate(mixed):
        theta, variance = thetas[row], covariance[row, row]
        own = policy == i
        if math.isnan(theta) and not x[own].any():  # All length ratios are 1, so the effect of length is irrelevant.
            (theta,), ((variance,),), _ = fit(own, np.zeros_like(policy[own]), 1)
        if math.isnan(theta):
            rates[i] = intervals.Estimate(math.nan, 0.0, 1.0)
            continue
        error = math.sqrt(variance)
        width = _critical(cluster, own, confidence) * error
        ends = special.expit(np.array([theta, theta - width, theta + width]))
        rates[i] = intervals.Estimate(*map(float, ends))
        errors[i] = float(ends[0] * (1 - ends[0]) * error)
    return LengthControlledWinRates(names, rates, errors, plain, slope)


def length_controlled_win_rate(
    outcomes: npt.ArrayLike,
    lengths: npt.ArrayLike,
    reference_lengths: npt.ArrayLike,
    *,
    clusters: Iterable[Hashable] | None = None,
    confidence: float = 0.95,
) -> intervals.Estimate:
    """Returns the rate that `length_controlled_win_rates` estimates for a single policy.

    Args:
        outcomes: As in `length_controlled_win_rates`.
        lengths: Lengths of the policy's responses, above 0.
        reference_lengths: Lengths of the reference's responses to the same prompts, above 0.
        clusters: One label per comparison, as in `length_controlled_win_rates`.
        confidence: Coverage of the interval.

    Returns:
        The win rate at equal lengths and its interval.

    Raises:
        ValueError: As in `length_controlled_win_rates`.
    """
    return length_controlled_win_rates(
        outcomes, lengths, reference_lengths, clusters=clusters, confidence=confidence
    ).rates[0]


def _plain_rate(
    outcomes: np.ndarray, cluster: np.ndarray | None, rows: np.ndarray, confidence: float
) -> intervals.Estimate:
    if cluster is None:
        return intervals.outcome_rate(outcomes[rows], confidence=confidence)
    return intervals.clustered_mean(outcomes[rows], cluster[rows], rate=True, confidence=confidence)


def _critical(cluster: np.ndarray | None, rows: Any, confidence: float) -> float:
    """Returns the half-width of an interval in standard errors: normal, or Student's t if there are clusters."""
    if cluster is None:
        return intervals.critical(confidence)
    sizes = np.bincount(cluster[rows]).astype(np.float64)
    return intervals.critical(confidence, freedom=intervals.jackknife(sizes, sizes)[1])


def _fit(
    y: np.ndarray, x: np.ndarray, policy: np.ndarray, policies: int, cluster: np.ndarray | None, confidence: float
) -> tuple[np.ndarray, np.ndarray, intervals.Estimate]:
    """Returns the log odds of the policies at x = 0, their covariance, and the slope in x."""
    unknown_slope = intervals.Estimate(math.nan, -math.inf, math.inf)
    if not policies:
        return np.zeros(0), np.zeros((0, 0)), unknown_slope
    columns = np.eye(policies)[policy]
    if x.any():
        unknown = np.full(policies, math.nan), np.zeros((policies, policies))
        if not any(np.ptp(x[policy == i]) for i in range(policies)):
            return *unknown, unknown_slope
        if sign := _separated(y, x, policy, policies):
            return *unknown, unknown_slope._replace(mean=sign * math.inf)
        columns = np.concatenate([columns, x[:, None]], axis=1)

    def loss(w: np.ndarray) -> float:
        return float(np.sum(np.logaddexp(0.0, columns @ w) - y * (columns @ w)))

    def gradient(w: np.ndarray) -> np.ndarray:
        return columns.T @ (special.expit(columns @ w) - y)

    def hessian(w: np.ndarray) -> np.ndarray:
        p = special.expit(columns @ w)
        return columns.T @ ((p * (1 - p))[:, None] * columns)

    start = np.zeros(columns.shape[1])
    w = optimize.minimize(loss, start, method="trust-exact", jac=gradient, hess=hessian, options={"gtol": 1e-6}).x
    for _ in range(3):  # Newton steps refine w beyond the precision of the loss.
        w = w - np.linalg.solve(hessian(w), gradient(w))
    inverse, scores = np.linalg.inv(hessian(w)), columns * (y - special.expit(columns @ w))[:, None]
    # As in `intervals.win_rate`, shrinkage prevents an interval of width 0 for a few tied comparisons.
    shrinkage = len(y) / (len(y) + intervals.critical(confidence) ** 2)
    meat = scores.T @ scores
    if cluster is not None:
        sums = np.stack([np.bincount(cluster, weights=column) for column in scores.T], axis=1)
        meat = sums.T @ sums * (n := len(np.unique(cluster))) / max(n - 1, 1)
    covariance = inverse @ (shrinkage * meat + (1 - shrinkage) * hessian(w)) @ inverse
    if not x.any():
        return w, covariance, unknown_slope
    width = _critical(cluster, slice(None), confidence) * math.sqrt(covariance[-1, -1])
    return w[:-1], covariance, intervals.Estimate(float(w[-1]), float(w[-1]) - width, float(w[-1]) + width)


def _separated(y: np.ndarray, x: np.ndarray, policy: np.ndarray, policies: int) -> int:
    """Returns 1 (-1) if, in every policy, each x of wins and ties is >= (<=) each x of losses and ties, else 0."""
    for sign in (1, -1):
        if all(
            (sign * x[(policy == i) & (y < 1)]).max() <= (sign * x[(policy == i) & (y > 0)]).min()
            for i in range(policies)
        ):
            return sign
    return 0


def _centred(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Subtracts the group means; the result is exactly 0, despite rounding, if all values of a group are equal."""
    low, high = np.full(group.max() + 1, np.inf), np.full(group.max() + 1, -np.inf)
    np.minimum.at(low, group, values)
    np.maximum.at(high, group, values)
    centred = values - (np.bincount(group, weights=values) / np.bincount(group))[group]
    return np.where((low == high)[group], 0.0, centred)


def _correlation(x: np.ndarray, y: np.ndarray, cluster: np.ndarray | None, confidence: float) -> intervals.Estimate:
    """Returns the correlation of centred values, with its interval."""
    intervals.quantiles(confidence)  # Raises ValueError for an invalid confidence.
    if not x.any() or not y.any():
        return intervals.Estimate(math.nan, -1.0, 1.0)
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # Squares of small numbers would underflow.
    x, y = x / math.sqrt(float(x @ x)), y / math.sqrt(float(y @ y))
    r = min(max(float(x @ y), -1.0), 1.0)
    # If each value were scaled by its own factor near 1, r would change by the sum of these scores.
    scores, weights = x * y - r * (x**2 + y**2) / 2, np.full(len(x), 1 / len(x))
    if cluster is not None:
        scores, weights = (np.bincount(cluster, weights=each) for each in (scores, weights))
    variance, freedom = intervals.jackknife(scores, weights)
    if not freedom or len(scores) <= 3:
        return intervals.Estimate(r, -1.0, 1.0)
    if abs(r) == 1.0:
        return intervals.Estimate(r, r, r)
    width = intervals.critical(confidence, freedom=freedom) * math.sqrt(variance) / (1 - r**2)
    return intervals.Estimate(r, math.tanh(math.atanh(r) - width), math.tanh(math.atanh(r) + width))
