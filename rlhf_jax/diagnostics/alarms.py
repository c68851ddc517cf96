"""Alarms: what the logged rows of a training stage say is going wrong, in words.

Ziegler 2019 woke up to a policy trained to be as bad as it could be: one sign was flipped in the reward and in the KL
at once, and nobody was told. Each check here reads the rows of one stage and returns a message, or None. The rows are
what `metrics.MetricLog` holds: mappings from names to numbers, newest last, None or NaN for what is not a number. A
metric that is absent is not checked. A check speaks of the newest row, so call it after each; it is pure, so a resumed
run that reads its old rows finds the alarms that were raised on them.

Levels are compared over windows of rows, and a difference counts where it is beyond the noise: ``z`` standard errors,
from the scatter between neighbouring rows, which a trend hardly moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Rows = Sequence[Mapping[str, Any]]


class Alarm(NamedTuple):
    """What is wrong, since when it is known, and where to look."""

    name: str
    message: str
    step: int


def not_finite(rows: Rows, *, names: Sequence[str] = ("reward", "kl", "entropy", "ratio_max")) -> str | None:
    """One of ``names`` is not a number in the newest row."""
    broken = [name for name in names if rows and name in rows[-1] and not math.isfinite(_number(rows[-1][name]))]
    if not broken:
        return None
    return (
        f"not a finite number: {', '.join(broken)}. Look first at the reward function (an empty answer, a division "
        "by 0), then at the gradient norm of the rows before and at the learning rate."
    )


def negative_kl(rows: Rows, *, least_kl: float = -1.0) -> str | None:
    """The mean KL from the reference is below ``least_kl`` nats: a KL is at least 0, an estimate of it nearly so."""
    (kl,) = _last(rows, "kl", 1) or (0.0,)
    if kl >= least_kl:
        return None
    return (
        f"the KL from the reference is {kl:.3g} nats, and a KL cannot be below 0. The answers are not samples of the "
        "policy that is scored, or policy and reference are swapped. Look first at the sign of the KL, then at the "
        "temperature and the masks of sampling and scoring."
    )


def first_ratio(rows: Rows, *, most_ratio_error: float = 1e-3) -> str | None:
    """Probability ratios are not 1 before the first update on a batch (metric ``first_ratio_error``)."""
    (error,) = _last(rows, "first_ratio_error", 1) or (0.0,)
    if error <= most_ratio_error:
        return None
    return (
        f"before the first update on a batch a probability ratio is off 1 by {error:.3g} (at most "
        f"{most_ratio_error:.3g} is rounding). Old and new log-probabilities are not of the same function: look first "
        "for dropout, then at temperature, masks and number formats."
    )


def large_ratios(rows: Rows, *, most_ratio: float = 10.0, lasting: int = 3) -> str | None:
    """In ``lasting`` rows running an update made some token more than ``most_ratio`` times as likely.

    One spike is no alarm: a rare token that proves right makes one in a healthy run.
    """
    ratios = _last(rows, "ratio_max", lasting)
    if not ratios or min(ratios) <= most_ratio:
        return None
    return (
        f"for {lasting} rows a token became more than {min(ratios):.3g} times as likely within one batch (bound "
        f"{most_ratio:.3g}), which clipping is there to prevent. The steps are too large: look first at the learning "
        "rate and the number of epochs, then at the scale of the advantages."
    )


def sampler_gap(rows: Rows, *, most_gap: float = 1e-2) -> str | None:
    """Sampler and trainer disagree about a token's log-probability.

    Where samples are drawn from another distribution on purpose, and corrected for, give ``most_gap=math.inf``.
    """
    (gap,) = _last(rows, "sampler_gap", 1) or (0.0,)
    if gap <= most_gap:
        return None
    return (
        f"sampler and trainer differ by {gap:.3g} nats about the probability of a token (at most {most_gap:.3g} is "
        "rounding). The policy learns from samples that are not its own: look first at temperature, top-k and top-p, "
        "then at padding, positions and the cache."
    )


def entropy_collapse(
    rows: Rows, *, entropy_share: float = 0.1, least_entropy: float = 0.05, lasting: int = 3
) -> str | None:
    """Entropy is below ``entropy_share`` of its first value and below ``least_entropy`` nats, ``lasting`` rows long."""
    entropies, began = _last(rows, "entropy", lasting), _first(rows, "entropy")
    if not entropies or max(entropies) >= min(entropy_share * began, least_entropy):
        return None
    return (
        f"the entropy fell from {began:.3g} to {entropies[-1]:.3g} nats a token: the policy writes nearly the same "
        "answer every time and explores no more. Look first at the answers, then raise the KL coefficient or lower the "
        "learning rate."
    )


def equal_rewards(rows: Rows, *, least_std: float = 1e-6, lasting: int = 3) -> str | None:
    """All answers get the same reward (metric ``reward_std``), ``lasting`` rows long."""
    stds = _last(rows, "reward_std", lasting)
    if not stds or max(stds) >= least_std:
        return None
    return (
        f"for {lasting} rows all answers of a batch got the same reward (standard deviation {stds[-1]:.3g}): nothing "
        "can be learnt from it. Look first at whether the reward function sees the answer, then at the answers: one "
        "policy for all prompts, a format that never fits, a task that is too hard or too easy."
    )


def unfinished_answers(
    rows: Rows, *, most_unfinished: float = 0.3, unfinished_rise: float = 0.2, lasting: int = 3
) -> str | None:
    """``1 - stopped`` is above ``most_unfinished`` and above its first value by ``unfinished_rise``."""
    stopped, began = _last(rows, "stopped", lasting), _first(rows, "stopped")
    if not stopped or 1 - max(stopped) <= max(most_unfinished, 1 - began + unfinished_rise):
        return None
    return (
        f"{1 - stopped[-1]:.0%} of the answers do not stop, against {1 - began:.0%} at the start. Length is paid, or "
        "the end mark is lost: look first at the answers, then at the score for a missing stop, the end mark in the "
        "loss masks, and the reward of long answers."
    )


def reward_below_start(rows: Rows, *, window: int = 5, z: float = 5.0) -> str | None:
    """The reward that training raises is below where it started, beyond the noise: a sign may be flipped."""
    rewards = _series(rows, "reward")
    if len(rewards) < 2 * window:
        return None
    began, now = rewards[:window].mean(), rewards[-window:].mean()
    if began - now <= z * _standard_error(rewards, window):
        return None
    return (
        f"the reward fell from {began:.3g} (first {window} rows) to {now:.3g} (last {window}), while training is there "
        "to raise it. Look first at signs: of the reward, of the advantages, of the policy loss, of the KL penalty; "
        "then at the KL coefficient, and at a learning rate that is too high."
    )


def overoptimised(
    rows: Rows,
    *,
    judges: Sequence[str] = ("gold", "heldout_reward"),
    judge_window: int = 8,
    lost_share: float = 1 / 3,
    judge_z: float = 4.0,
) -> str | None:
    """The reward rises while a judge that is not trained on falls (over-optimisation).

    The last window of rows is compared with the best window before it. Both changes have to be beyond the noise, and
    the judge has to have lost more than ``lost_share`` of what it had gained since the start: a little of that is the
    price of every long run.
    """
    for judge in judges:
        both = [(_number(row.get("reward")), _number(row.get(judge))) for row in rows]
        rewards, scores = np.array([pair for pair in both if np.isfinite(pair).all()]).reshape(-1, 2).T
        if len(scores) < 2 * judge_window:
            continue
        means, reward_means = (_window_means(values, judge_window) for values in (scores, rewards))
        best = int(np.argmax(means[:-1]))
        lost, gained = means[best] - means[-1], max(means[best] - scores[:3].mean(), 0.0)
        rise = reward_means[-1] - reward_means[best]
        noise = judge_z * _standard_error(scores, judge_window)
        if lost > max(noise, lost_share * gained) and rise > judge_z * _standard_error(rewards, judge_window):
            return (
                f"the reward rose from {reward_means[best]:.3g} to {reward_means[-1]:.3g} while {judge}, which is not "
                f"trained on, fell from {means[best]:.3g} to {means[-1]:.3g} (means of {judge_window} rows). The "
                "policy games the reward model: look first at the answers with the highest reward, then stop earlier "
                "or raise the KL coefficient, and train the reward model on new samples."
            )
    return None


def overfitted(rows: Rows, *, validation_window: int = 4, validation_z: float = 4.0) -> str | None:
    """The loss falls while ``validation_loss``, of pairs or texts that are not trained on, rises beyond the noise.

    Rows that have both are compared in windows, the last with the best before it. For a test of a trained reward model
    see `accuracy.generalisation_gap`.
    """
    both = [(_number(row.get("loss")), _number(row.get("validation_loss"))) for row in rows]
    losses, held_out = np.array([pair for pair in both if np.isfinite(pair).all()]).reshape(-1, 2).T
    if len(held_out) < 2 * validation_window:
        return None
    means, loss_means = (_window_means(values, validation_window) for values in (held_out, losses))
    best = int(np.argmin(means[:-1]))
    noise = validation_z * _standard_error(held_out, validation_window)
    if means[-1] - means[best] <= noise or loss_means[-1] >= loss_means[best]:
        return None
    return (
        f"the loss fell from {loss_means[best]:.3g} to {loss_means[-1]:.3g} while the validation loss rose from "
        f"{means[best]:.3g} to {means[-1]:.3g} (means of {validation_window} rows): the model learns its training set "
        "by heart. Look first at the number of epochs and at whether one prompt's pairs are spread over batches, then "
        "lower the learning rate or stop earlier."
    )


CHECKS: dict[str, Callable[..., str | None]] = {
    check.__name__: check
    for check in (
        *(not_finite, negative_kl, first_ratio, large_ratios, sampler_gap, entropy_collapse, equal_rewards),
        *(unfinished_answers, reward_below_start, overoptimised, overfitted),
    )
}
"""Every check, by the name of its alarm."""


def check_all(rows: Rows, **thresholds: Any) -> list[Alarm]:
    """All alarms that the rows of one stage raise at the newest of them.

    Args:
        rows: Mappings of one stage, newest last; ``"step"`` numbers them, else they count from 1.
        thresholds: Keywords of the checks; one that several have, such as ``lasting``, goes to all of them.

    Raises:
        TypeError: for a threshold that no check has.
    """
    known = {name: set(check.__kwdefaults__ or {}) for name, check in CHECKS.items()}
    if unknown := set(thresholds).difference(*known.values()):
        raise TypeError(f"no check has a threshold {', '.join(sorted(unknown))}")
    step = int(rows[-1].get("step", len(rows))) if rows else 0
    found = []
    for name, check in CHECKS.items():
        message = check(rows, **{key: value for key, value in thresholds.items() if key in known[name]})
        if message is not None:
            found.append(Alarm(name, message, step))
    return found


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _series(rows: Rows, name: str) -> np.ndarray:
    """The finite values of a metric, in order."""
    values = np.array([_number(row[name]) for row in rows if name in row], np.float64)
    return values[np.isfinite(values)]


def _first(rows: Rows, name: str) -> float:
    """The first finite value of a metric; NaN if there is none."""
    return next((value for row in rows if math.isfinite(value := _number(row.get(name)))), math.nan)


def _last(rows: Rows, name: str, count: int) -> list[float]:
    """The metric in the newest ``count`` rows; nothing where there are fewer rows or one of them lacks it."""
    values = [_number(row.get(name)) for row in rows[-count:]]
    return values if len(values) == count and np.isfinite(values).all() else []


def _window_means(values: np.ndarray, window: int) -> np.ndarray:
    """Means of neighbours; windows end at the newest row, so that the last one is whole."""
    return values[len(values) % window :].reshape(-1, window).mean(axis=1)


def _standard_error(values: np.ndarray, window: int) -> float:
    """Of the difference of two means of ``window`` values each, from the differences of neighbours."""
    variance = np.square(np.diff(values)).mean() / 2
    return math.sqrt(2 * variance / window)
