"""Checks that raise alarms about problems in the logged metrics of a training stage.

Ziegler 2019 describes a bug that flipped the signs of both the reward and the KL penalty, so that a run trained the
worst possible policy overnight. Each check accepts the rows of a stage as `metrics.MetricLog` records them: mappings
from metric names to numbers, newest row last, with None for NaN and infinity. It returns a message if the newest row
shows a problem, and None otherwise, so call it whenever a row is added. Metrics that were not logged are not checked.
Checks are pure functions, so a resumed run that checks its old rows again raises the same alarms.

The docstring of each check states how fast it detects a fault and how often it is raised on healthy runs of up to
1,000 rows. Unless exact, rates come from the simulation in tests/diagnostics/test_alarm_rates.py, whose noise has an
autocorrelation of 0.5, with or without heavy tails. Checks that compare windows of rows use `falls`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rlhf_jax.diagnostics import falls

Rows = Sequence[Mapping[str, Any]]


class Alarm(NamedTuple):
    """A problem that a check detected; the message says where to look first."""

    name: str
    message: str
    step: int


def rounding_thresholds(dtype: Any) -> dict[str, float]:
    """Returns the thresholds of `first_ratio` and `sampler_gap` for models that compute in ``dtype``.

    The same log-probability, computed by two programs, differs by the rounding of hidden states. The relative error of
    a hidden state is a few times the machine epsilon of the dtype, and logits have magnitudes of up to 50. The bounds
    are therefore 96 epsilon nats for the largest difference and 16 epsilon for the mean difference, and at least those
    of float32. In bfloat16, that is 0.75 and 0.125; models with 2 to 8 layers and large logits reach 0.42 and 0.03.

    Example:
        >>> from rlhf_jax.diagnostics import alarms
        >>> alarms.rounding_thresholds("float32")
        {'max_ratio_error': 0.001, 'max_gap': 0.01, 'max_mean_gap': 0.001}
        >>> alarms.rounding_thresholds("bfloat16")["max_gap"]
        0.75
    """
    epsilon = float(jnp.finfo(dtype).eps)
    return {
        "max_ratio_error": max(1e-3, math.expm1(96 * epsilon)),
        "max_gap": max(1e-2, 96 * epsilon),
        "max_mean_gap": max(1e-3, 16 * epsilon),
    }


def not_finite(rows: Rows, *, names: Sequence[str] = ("reward", "kl", "entropy", "ratio_max")) -> str | None:
    """Checks that none of the metrics ``names`` is NaN or infinite in the newest row.

    The check is exact: without such a value, it raises no alarm, and it detects one in its row.
    """
    broken = [name for name in names if rows and name in rows[-1] and not math.isfinite(_number(rows[-1][name]))]
    if not broken:
        return None
    return (
        f"NaN or infinite: {', '.join(broken)}. Look first for an empty answer or a division by 0 in the reward "
        "function, then at the learning rate and at the gradient norm in the preceding rows."
    )


def negative_kl(rows: Rows, *, min_kl: float = -1.0) -> str | None:
    """Checks that the mean KL from the reference is at least ``min_kl`` nats; a true KL cannot be negative.

    The alarm is raised at once below twice ``min_kl``, and otherwise in the second consecutive row below ``min_kl``,
    because the mean over a batch is a noisy estimate. False alarms: below 1 %. A wrong sign is detected within 2 rows,
    or later if it is wrong from the start, where the KL is 0.
    """
    kl = max(_newest(rows, "kl", 1), default=0.0)
    if kl >= 2 * min_kl and max(_newest(rows, "kl", 2), default=0.0) >= min_kl:
        return None
    return (
        f"the KL from the reference is {kl:.3g} nats, but a KL cannot be negative. Either the answers were not sampled "
        "from the policy that scores them, or the policy and the reference are swapped. Look first at the sign of the "
        "KL, then check that sampling and scoring use the same temperature and masks."
    )


def first_ratio(rows: Rows, *, max_ratio_error: float = 1e-3) -> str | None:
    """Checks that probability ratios are 1 before the first update on a batch (metric ``first_ratio_error``).

    False alarms: none in the simulation; rounding is 100 times smaller. A fault is detected in its row.
    """
    error = max(_newest(rows, "first_ratio_error", 1), default=0.0)
    if error <= max_ratio_error:
        return None
    return (
        f"before the first update on a batch, a probability ratio differs from 1 by {error:.3g} (rounding explains at "
        f"most {max_ratio_error:.3g}), so the old and the new log-probabilities are not computed in the same way. Look "
        "first for dropout, then for differences in temperature, masks and dtypes."
    )


def large_ratios(rows: Rows, *, max_ratio: float = 10.0, patience: int = 5) -> str | None:
    """Checks that the largest probability ratio is at most ``max_ratio`` in at least one of the last ``patience`` rows.

    A single spike does not raise the alarm, because a rare token with a high reward can cause one in a healthy run.
    False alarms: none in the simulation. Ratios that are 20 times as large are detected within ``patience`` rows.
    """
    ratios = _newest(rows, "ratio_max", patience)
    if not ratios or min(ratios) <= max_ratio:
        return None
    return (
        f"in each of the last {patience} rows, the probability of some token grew at least {min(ratios):.3g}-fold "
        f"within one batch (limit {max_ratio:.3g}), which clipping should prevent. The updates are too large. Look "
        "first at the learning rate and the number of epochs, then at the scale of the advantages."
    )


def sampler_gap(rows: Rows, *, max_gap: float = 1e-2, max_mean_gap: float = 1e-3) -> str | None:
    """Checks that sampler and trainer agree on the log-probabilities of tokens.

    The largest difference must be at most ``max_gap`` nats and the mean difference at most ``max_mean_gap``. See
    `rounding_thresholds` for models in 16 bits. If the sampler deliberately draws from a different distribution, pass
    `math.inf` for both. False alarms: below 1 %. A fault is detected in its row.
    """
    gap, mean_gap = (max(_newest(rows, name, 1), default=0.0) for name in ("sampler_gap", "sampler_gap_mean"))
    if gap <= max_gap and mean_gap <= max_mean_gap:
        return None
    kind, value, limit = ("", gap, max_gap) if gap > max_gap else (" on average", mean_gap, max_mean_gap)
    return (
        f"sampler and trainer differ{kind} by {value:.3g} nats on the log-probability of a token (rounding explains at "
        f"most {limit:.3g}), so the policy learns from samples of a different distribution. Look first at the "
        "temperature, top-k and top-p, then at padding, positions and the KV cache."
    )


def entropy_collapse(
    rows: Rows, *, entropy_share: float = 0.1, min_entropy: float = 0.05, patience: int = 3
) -> str | None:
    """Checks that the policy's entropy has not collapsed.

    The alarm is raised if the entropy is below both thresholds in each of the last ``patience`` rows. False alarms:
    none in the simulation. An entropy that falls by 30 % per row is detected within 9 rows.

    Args:
        rows: Rows of one stage, newest last.
        entropy_share: Threshold as a share of the entropy in the first row.
        min_entropy: Threshold in nats per token.
        patience: Number of newest rows to test.

    Returns:
        A message, or None.
    """
    entropies, first = _newest(rows, "entropy", patience), _first(rows, "entropy")
    if not entropies or max(entropies) >= min(entropy_share * first, min_entropy):
        return None
    return (
        f"the entropy fell from {first:.3g} to {entropies[-1]:.3g} nats per token: the policy writes nearly the same "
        "answer every time and no longer explores. Look first at the answers, then raise the KL coefficient or lower "
        "the learning rate."
    )


def equal_rewards(rows: Rows, *, min_std: float = 1e-6, patience: int = 3) -> str | None:
    """Checks that rewards vary (metric ``training_reward_std``) in at least one of the last ``patience`` rows.

    False alarms: none in the simulation, where rewards are continuous. Detection: within ``patience`` rows.
    """
    stds = _newest(rows, "training_reward_std", patience)
    if not stds or max(stds) >= min_std:
        return None
    return (
        f"in each of the last {patience} rows, all answers of a batch received the same reward (standard deviation "
        f"{stds[-1]:.3g}), so the policy cannot learn from them. Look first at whether answers end with a stop token "
        "(without one, they receive a constant) and whether the reward function receives the answers, then at the "
        "answers themselves: all may be the same, none may match the required format, or the task may be too hard or "
        "too easy."
    )


def unfinished_answers(
    rows: Rows,
    *,
    max_unfinished: float = 0.3,
    unfinished_rise: float = 0.2,
    almost_all: float = 0.9,
    patience: int = 3,
) -> str | None:
    """Checks that few responses lack a stop token; their share is 1 minus the metric ``stopped``.

    The alarm is raised if, in each of the last ``patience`` rows, the share is above ``max_unfinished`` and has risen
    by more than ``unfinished_rise``, and at once if the share in the newest row is above ``almost_all``. False alarms:
    none in the simulation. A rise by 40 percentage points is detected within ``patience`` rows.

    Args:
        rows: Rows of one stage, newest last.
        max_unfinished: Largest acceptable share of responses without a stop token.
        unfinished_rise: Largest acceptable increase of that share since the first row.
        almost_all: Share above which the alarm does not depend on earlier rows.
        patience: Number of newest rows to test.

    Returns:
        A message, or None.
    """
    newest = max(_newest(rows, "stopped", 1), default=1.0)
    if 1 - newest > almost_all:
        return (
            f"{1 - newest:.0%} of the answers lack a stop token, so nearly every reward is the score for a missing "
            "stop token and not the score of the answer. Look first at the stop ids and the maximum length of an "
            "answer, then at the score for a missing stop token."
        )
    stopped, first = _newest(rows, "stopped", patience), _first(rows, "stopped")
    if not stopped or 1 - max(stopped) <= max(max_unfinished, 1 - first + unfinished_rise):
        return None
    return (
        f"{1 - stopped[-1]:.0%} of the answers lack a stop token, compared with {1 - first:.0%} at the start. Either "
        "the reward favours long answers, or the loss masks exclude the stop token. Look first at the answers, then at "
        "the score for a missing stop token, at the loss masks, and at the reward of long answers."
    )


def reward_below_start(rows: Rows, *, noise_factor: float = 1.0) -> str | None:
    """Checks that the reward has not fallen below its first values by more than the noise, from 8 rows on.

    False alarms: below 1 %. A reward that falls from the start by 20 standard deviations of its noise, as steeply as a
    healthy one rises, is detected within 21 rows in 95 % of runs, and in half of them within 10.

    Args:
        rows: Rows of one stage, newest last.
        noise_factor: Factor on the fall that noise explains.

    Returns:
        A message, or None.
    """
    rewards = _series(rows, "reward")
    if len(rewards) < 8:
        return None
    fall = falls.measure(rewards, from_start=True, factor=noise_factor)
    if fall.size <= fall.bound:
        return None
    first, last = falls.means(rewards, fall.window)[[0, -1]]
    return (
        f"the reward fell from {first:.3g} (first {fall.window} rows) to {last:.3g} (last {fall.window} rows), though "
        "training should raise it. Look first at the signs of the reward, the advantages, the policy loss and the KL "
        "penalty, then check whether the KL coefficient or the learning rate is too high."
    )


def overoptimised(
    rows: Rows,
    *,
    judges: Sequence[str] = ("gold", "heldout_reward"),
    lost_share: float = 1 / 3,
    noise_factor: float = 1.0,
) -> str | None:
    """Checks for over-optimisation: the reward rises while the score of a judge that is not used in training falls.

    The newest rows are compared with the earlier window in which the judge's score is highest, from 8 rows on. The fall
    must exceed the noise. The judge's score must also have lost more than ``lost_share`` of its gain since the start,
    because some loss occurs in every long run. False alarms: below 1 %. In 95 % of runs, a fall by one standard
    deviation of the noise per row is detected within 15 rows, and one by a tenth of that within 86 (after row 100).

    Args:
        rows: Rows of one stage, newest last.
        judges: Metrics to compare with ``reward``; the first that raises the alarm is reported.
        lost_share: Share of its gain that the judge's score may lose.
        noise_factor: Factor on the fall that noise explains.

    Returns:
        A message, or None.
    """
    for judge in judges:
        rewards, scores = _paired(rows, "reward", judge)
        if len(scores) < 8:
            continue
        fell, fall = falls.falls_alone(scores, rewards, lost_share=lost_share, other_noise=1.0, factor=noise_factor)
        if fell:
            (before, after), (high, low) = (
                falls.means(values, fall.window)[[int(fall.reference), -1]] for values in (rewards, scores)
            )
            return (
                f"the reward rose from {before:.3g} to {after:.3g} while {judge}, which is not used in training, fell "
                f"from {high:.3g} to {low:.3g} (means of {fall.window} rows). The policy exploits the reward model. "
                "Look first at the answers with the highest reward, then stop earlier, raise the KL coefficient, or "
                "train the reward model on new samples."
            )
    return None


def overfitted(rows: Rows, *, lost_share: float = 1 / 3, noise_factor: float = 1.0) -> str | None:
    """Checks for overfitting: the loss falls while ``validation_loss`` rises by more than the noise.

    The newest measurements of the validation loss are compared with the earlier ones at which it is lowest, from the
    fifth on. The loss of a measurement is the mean over the rows since the previous one. To check a trained reward
    model, use `generalisation_gap`. False alarms: below 1 %. In 95 % of runs, a rise by 5 standard deviations of the
    noise per measurement is detected within 7 measurements, one by 1 within 12, and a lasting jump by 20 within 5
    (after measurement 20 of 60).

    Args:
        rows: Rows of one stage, newest last.
        lost_share: Share of the initial decrease of the validation loss by which it may rise again.
        noise_factor: Factor on the rise that noise explains.

    Returns:
        A message, or None.
    """
    losses, validation_losses = _validated(rows)
    if len(validation_losses) < 5:
        return None
    methods = (falls.measure, falls.jump) if len(losses) in falls.JUMP_ROWS else (falls.measure,)
    options: Any = {"lost_share": lost_share, "other_noise": 0.0, "factor": noise_factor}
    tests = [falls.falls_alone(-validation_losses, -losses, method=method, **options) for method in methods]
    fall = next((fall for rose, fall in tests if rose), None)
    if fall is None:
        return None
    (before, after), (low, high) = (
        falls.means(values, fall.window)[[int(fall.reference), -1]] for values in (losses, validation_losses)
    )
    return (
        f"the loss fell from {before:.3g} to {after:.3g} while the validation loss rose from {low:.3g} to {high:.3g} "
        f"(means of {fall.window} measurements): the model overfits its training set. Look first at the number of "
        "epochs and at whether the pairs of one prompt are spread over several batches, then lower the learning rate "
        "or stop earlier."
    )


CHECKS: dict[str, Callable[..., str | None]] = {
    check.__name__: check
    for check in (
        *(not_finite, negative_kl, first_ratio, large_ratios, sampler_gap, entropy_collapse, equal_rewards),
        *(unfinished_answers, reward_below_start, overoptimised, overfitted),
    )
}
"""All checks, keyed by the name of the alarm."""


def check_all(rows: Rows, **thresholds: Any) -> list[Alarm]:
    """Runs all checks on the rows of one stage and returns the alarms that they raise for the newest row.

    The step of an alarm is the ``"step"`` of the newest row, or the number of rows if the newest has no step. Each of
    ``thresholds`` is passed to all checks that have a keyword argument of that name; ``patience``, for example, applies
    to several checks. Raises TypeError if no check has such an argument.

    Example:
        >>> from rlhf_jax.diagnostics import alarms
        >>> rows = [{"step": 1, "kl": 0.0}, {"step": 2, "kl": -3.0}]
        >>> [(alarm.name, alarm.step) for alarm in alarms.check_all(rows)]
        [('negative_kl', 2)]
    """
    known = {name: set(check.__kwdefaults__ or {}) for name, check in CHECKS.items()}
    if unknown := set(thresholds).difference(*known.values()):
        raise TypeError(f"no check has a threshold named {', '.join(sorted(unknown))}")
    step = int(rows[-1].get("step", len(rows))) if rows else 0
    alarms = []
    for name, check in CHECKS.items():
        message = check(rows, **{key: value for key, value in thresholds.items() if key in known[name]})
        if message is not None:
            alarms.append(Alarm(name, message, step))
    return alarms


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _series(rows: Rows, name: str) -> np.ndarray:
    """Returns the finite values of a metric, in order."""
    values = np.array([_number(row[name]) for row in rows if name in row], np.float64)
    return values[np.isfinite(values)]


def _paired(rows: Rows, first: str, second: str) -> np.ndarray:
    """Returns two metrics as ``[2, N]``, from the N rows in which both are finite."""
    pairs = [(_number(row.get(first)), _number(row.get(second))) for row in rows]
    return np.array([pair for pair in pairs if np.isfinite(pair).all()]).reshape(-1, 2).T


def _validated(rows: Rows) -> np.ndarray:
    """Returns the loss and the validation loss as ``[2, N]``; the loss is averaged since the previous measurement."""
    pairs: list[tuple[float, float]] = []
    since: list[float] = []
    for row in rows:
        since += [loss] if math.isfinite(loss := _number(row.get("loss"))) else []
        if since and math.isfinite(validation := _number(row.get("validation_loss"))):
            pairs.append((sum(since) / len(since), validation))
            since = []
    return np.array(pairs).reshape(-1, 2).T


def _first(rows: Rows, name: str) -> float:
    """Returns the first finite value of a metric; NaN if there is none."""
    return next((value for row in rows if math.isfinite(value := _number(row.get(name)))), math.nan)


def _newest(rows: Rows, name: str, count: int) -> list[float]:
    """Returns a metric in the newest ``count`` rows; an empty list if there are fewer rows or a value is not finite."""
    values = [_number(row.get(name)) for row in rows[-count:]]
    return values if len(values) == count and np.isfinite(values).all() else []
