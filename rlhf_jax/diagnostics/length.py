"""How much of a preference is length: of a reward model, of its labels, of a win rate."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from rlhf_jax.diagnostics import intervals
from rlhf_jax.diagnostics.accuracy import groups, rate


class LengthBias(NamedTuple):
    """What length has to do with labels and with scores; an estimate of no pairs is ``(NaN, 0, 1)``."""

    longer_wins: intervals.Estimate
    """Accuracy of the rule that prefers the longer answer; answers of one length count a half."""
    shorter_wins: intervals.Estimate
    """Accuracy of the opposite rule, 1 less the other."""
    prefers_longer: intervals.Estimate
    """Share of the pairs of two lengths in which the longer answer scores higher, ties a half."""
    accuracy_where_longer: intervals.Estimate
    """Accuracy of the scores where the preferred answer is the longer one."""
    accuracy_where_shorter: intervals.Estimate
    """And where it is the shorter one; a model that goes by length fails here."""
    correlation: intervals.Estimate
    """Of score and length within a pair; see `length_correlation`."""
    explained: float
    """Square of the correlation: the share of the variance of score differences that length differences explain."""
    equal_lengths: int
    """Pairs whose answers are of one length."""
    count: int
    """All pairs."""


class LengthControlledWinRates(NamedTuple):
    """One entry a policy, in the order in which they first come."""

    policies: list[Any]
    rates: list[intervals.Estimate]
    """Chance of a win at equal lengths; see `length_controlled_win_rates` for what NaN, 0 and 1 mean."""
    errors: list[float]
    """Standard errors of the rates; NaN where there is none."""
    plain: list[intervals.Estimate]
    """Win rates as they are, ties a half, with Wilson's intervals."""
    length_effect: intervals.Estimate
    """Log odds of a win for each unit of log length ratio; above 0 where length pays. NaN where all ratios are 1,
    infinite where length alone decides."""


def length_correlation(
    scores: npt.ArrayLike,
    lengths: npt.ArrayLike,
    *,
    groups: Iterable[Hashable] | None = None,
    confidence: float = 0.95,
) -> intervals.Estimate:
    """Pearson's correlation of score and length, within groups where there are any.

    Some prompts want long answers and some get high scores: only answers to one prompt show what length itself is worth
    to a model. Within groups, scores and lengths are taken from their group's mean.

    Args:
        scores: one an answer.
        lengths: of the answers, in any unit; pass logarithms for the correlation with relative length.
        groups: a label an answer, such as its prompt.
        confidence: of the interval, by Fisher's transformation with one degree of freedom less for each group.

    Returns:
        The correlation; NaN between -1 and 1 where scores or lengths do not vary within groups.

    Raises:
        ValueError: if the arrays are empty, not of rank 1 and one length, or hold NaN; if there is not one group an
            answer.
    """
    scores, lengths = intervals.samples(scores), intervals.samples(lengths)
    if scores.shape != lengths.shape:
        raise ValueError(f"need one length a score, got {scores.shape} and {lengths.shape}")
    labels = [None] * len(scores) if groups is None else list(groups)
    if len(labels) != len(scores):
        raise ValueError(f"need one group an answer, got {len(labels)} groups for {len(scores)} answers")
    places = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    group = np.array([places[label] for label in labels])
    return _correlation(_within(scores, group), _within(lengths, group), len(scores) - len(places), confidence)


def length_bias(
    chosen: npt.ArrayLike,
    rejected: npt.ArrayLike,
    chosen_lengths: npt.ArrayLike,
    rejected_lengths: npt.ArrayLike,
    *,
    prompts: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> LengthBias:
    """What a reward model, and the labels themselves, have to do with length.

    Args:
        chosen: scores of the preferred answers, one a pair.
        rejected: scores of the others, in the same order.
        chosen_lengths: of the preferred answers, in any unit.
        rejected_lengths: of the others.
        prompts: as in `accuracy.accuracy_by_stratum`, for the intervals of the rates. That of the correlation counts
            pairs: where a prompt has several, take `length_correlation` of its answers instead.
        confidence: of all intervals.

    Raises:
        ValueError: as in `intervals.win_outcomes`, for scores and for lengths; if there is not one prompt a pair.
    """
    wins = intervals.win_outcomes(chosen, rejected)
    longer = intervals.win_outcomes(chosen_lengths, rejected_lengths)
    if len(wins) != len(longer):
        raise ValueError(f"need one length an answer, got {len(longer)} pairs of lengths for {len(wins)} of scores")
    group = groups(prompts, len(wins))
    chosen, rejected, chosen_lengths, rejected_lengths = (
        np.asarray(x, np.float64) for x in (chosen, rejected, chosen_lengths, rejected_lengths)
    )

    def of(a: np.ndarray, b: np.ndarray, on: np.ndarray | slice = slice(None)) -> intervals.Estimate:
        mine = None if group is None else group[on]
        return rate(a[on], b[on], group=mine, confidence=confidence)

    scores, lengths = chosen - rejected, chosen_lengths - rejected_lengths
    up, down, apart = longer == 1.0, longer == 0.0, longer != 0.5
    # The score difference of the longer answer less the shorter one.
    toward = np.where(up, 1.0, -1.0) * scores
    # Within a pair, both sides lie half a difference from the pair's mean: what is correlated are the differences.
    correlation = _correlation(scores, lengths, len(scores), confidence)
    return LengthBias(
        longer_wins=of(chosen_lengths, rejected_lengths),
        shorter_wins=of(rejected_lengths, chosen_lengths),
        prefers_longer=of(toward, np.zeros_like(toward), apart),
        accuracy_where_longer=of(chosen, rejected, up),
        accuracy_where_shorter=of(chosen, rejected, down),
        correlation=correlation,
        explained=correlation.mean**2,
        equal_lengths=int((~apart).sum()),
        count=len(wins),
    )


def length_controlled_win_rates(
    outcomes: npt.ArrayLike,
    lengths: npt.ArrayLike,
    reference_lengths: npt.ArrayLike,
    policies: Iterable[Hashable] | None = None,
    *,
    confidence: float = 0.95,
) -> LengthControlledWinRates:
    """How often each policy would beat the reference with answers of the reference's length (Stiennon 2020, App. F).

    Logistic regression of the outcome on who the policy is and on the log length ratio, one slope for all policies,
    evaluated at ratio 1 (a log ratio of 0): ``logit P(win) = policy + effect * log(length / reference length)``. Ties
    are outcomes of a half; errors are robust (sandwich), so that ties narrow the intervals as in `intervals.win_rate`.

    A policy that won, or lost, every comparison has rate 1, or 0, at any length; its interval is that of the plain
    rate, and it says nothing of the effect of length. Where length alone decides all outcomes of the others, the
    likelihood has no maximum: rates are NaN between 0 and 1. So they are where only a policy that won, or lost, all
    its comparisons has answers of various lengths. One whose answers are all of the reference's length has its rate
    even then.

    Args:
        outcomes: 1 for a win over the reference, 0 for a loss, 1/2 for a tie; see `intervals.win_outcomes`.
        lengths: of the policies' answers, above 0 (count the stop token).
        reference_lengths: of the reference's answers to the same prompts.
        policies: who answered, one label a comparison; by default one policy, None.
        confidence: of all intervals.

    Raises:
        ValueError: if the arrays are empty, not of rank 1 and one length, or hold NaN; if an outcome lies outside
            [0, 1] or a length is not above 0; if the log ratio never changes within any policy, but is not always 0;
            unless ``0 < confidence < 1``.
    """
    outcomes, own, theirs = (intervals.samples(x) for x in (outcomes, lengths, reference_lengths))
    if not outcomes.shape == own.shape == theirs.shape:
        raise ValueError(f"need two lengths an outcome, got {outcomes.shape}, {own.shape} and {theirs.shape}")
    if ((own <= 0) | (theirs <= 0)).any():
        raise ValueError("lengths must be above 0, for their ratio is what counts: count the stop token too")
    labels = [None] * len(outcomes) if policies is None else list(policies)
    if len(labels) != len(outcomes):
        raise ValueError(f"need one policy an outcome, got {len(labels)} policies for {len(outcomes)} outcomes")
    names = list(dict.fromkeys(labels))
    places = {name: i for i, name in enumerate(names)}
    who, x = np.array([places[label] for label in labels]), np.log(own / theirs)
    plain = [intervals.outcome_rate(outcomes[who == i], confidence=confidence) for i in range(len(names))]
    mixed = [i for i, each in enumerate(plain) if 0 < each.mean < 1]
    on = np.isin(who, mixed)
    if x[on].any() and not any(np.ptp(x[who == i]) for i in range(len(names))):
        raise ValueError(
            "the ratio of the lengths is the same in all comparisons of a policy: what length does cannot be told "
            "from what the policy does"
        )
    thetas, covariance, slope = _fit(outcomes[on], x[on], np.searchsorted(mixed, who[on]), len(mixed), confidence)
    rates, errors = list(plain), [math.nan] * len(names)
    z = intervals.critical(confidence)
    for place, i in enumerate(mixed):
        theta, variance = thetas[place], covariance[place, place]
        if math.isnan(theta) and not x[who == i].any():  # Whatever length does, it did nothing here.
            (theta,), ((variance,),), _ = _fit(
                outcomes[who == i], x[who == i], np.zeros_like(who[who == i]), 1, confidence
            )
        if math.isnan(theta):
            rates[i] = intervals.Estimate(math.nan, 0.0, 1.0)
            continue
        error = math.sqrt(variance)
        ends = special.expit(np.array([theta, theta - z * error, theta + z * error]))
        rates[i] = intervals.Estimate(*map(float, ends))
        errors[i] = float(ends[0] * (1 - ends[0]) * error)
    return LengthControlledWinRates(names, rates, errors, plain, slope)


def length_controlled_win_rate(
    outcomes: npt.ArrayLike, lengths: npt.ArrayLike, reference_lengths: npt.ArrayLike, *, confidence: float = 0.95
) -> intervals.Estimate:
    """The one rate of `length_controlled_win_rates` of a single policy; arguments and errors as there."""
    return length_controlled_win_rates(outcomes, lengths, reference_lengths, confidence=confidence).rates[0]


def _fit(
    y: np.ndarray, x: np.ndarray, who: np.ndarray, policies: int, confidence: float
) -> tuple[np.ndarray, np.ndarray, intervals.Estimate]:
    """Log odds of the policies at x = 0 with their covariance, and the slope in x."""
    nothing = intervals.Estimate(math.nan, -math.inf, math.inf)
    if not policies:
        return np.zeros(0), np.zeros((0, 0)), nothing
    columns = np.eye(policies)[who]
    if x.any():
        unknown = np.full(policies, math.nan), np.zeros((policies, policies))
        if not any(np.ptp(x[who == i]) for i in range(policies)):
            return *unknown, nothing
        if end := _separated(y, x, who, policies):
            return *unknown, nothing._replace(mean=end * math.inf)
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
    for _ in range(3):  # Newton's last steps, where rounding of the loss would end a search.
        w = w - np.linalg.solve(hessian(w), gradient(w))
    bread, each = np.linalg.inv(hessian(w)), columns * (y - special.expit(columns @ w))[:, None]
    z = intervals.critical(confidence)
    # As in `intervals.win_rate`: a few comparisons that all tie are no proof that every one does.
    trust = len(y) / (len(y) + z**2)
    covariance = bread @ (trust * each.T @ each + (1 - trust) * hessian(w)) @ bread
    if not x.any():
        return w, covariance, nothing
    width = z * math.sqrt(covariance[-1, -1])
    return w[:-1], covariance, intervals.Estimate(float(w[-1]), float(w[-1]) - width, float(w[-1]) + width)


def _separated(y: np.ndarray, x: np.ndarray, who: np.ndarray, policies: int) -> int:
    """1 where within every policy no win (or tie) has a smaller x than a loss (or tie), -1 for larger, else 0."""
    for sign in (1, -1):
        if all(
            (sign * x[(who == i) & (y < 1)]).max() <= (sign * x[(who == i) & (y > 0)]).min() for i in range(policies)
        ):
            return sign
    return 0


def _within(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Values less their group's mean; exactly 0 where all of a group are equal, which rounding would not leave."""
    low, high = np.full(group.max() + 1, np.inf), np.full(group.max() + 1, -np.inf)
    np.minimum.at(low, group, values)
    np.maximum.at(high, group, values)
    centred = values - (np.bincount(group, weights=values) / np.bincount(group))[group]
    return np.where((low == high)[group], 0.0, centred)


def _correlation(x: np.ndarray, y: np.ndarray, freedom: int, confidence: float) -> intervals.Estimate:
    """Of numbers that are taken from their means."""
    z = intervals.critical(confidence)
    if not x.any() or not y.any() or freedom < 1:
        return intervals.Estimate(math.nan, -1.0, 1.0)
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # Squares of small numbers would vanish.
    r = min(max(float(x @ y) / math.sqrt(float(x @ x) * float(y @ y)), -1.0), 1.0)
    if freedom <= 2 or abs(r) == 1.0:
        return intervals.Estimate(r, *((r, r) if freedom > 2 else (-1.0, 1.0)))
    width = z / math.sqrt(freedom - 2)
    return intervals.Estimate(r, math.tanh(math.atanh(r) - width), math.tanh(math.atanh(r) + width))
