"""Detection of prompts that differ from the training prompts (Bai 2022, 5.4 and B.9), on the host with NumPy and SciPy.

A detector scores the hidden state of a prompt at one layer; `lm.first_layers` yields a model whose last layer is any
layer. `fit` needs in-distribution prompts only, `fit_exposure` also a few prompts of the other kind. `threshold` turns
scores into a gate that refuses prompts before an answer is generated.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

from rlhf_jax.diagnostics import intervals


class Gaussian(NamedTuple):
    """The distribution of in-distribution hidden states with D features."""

    mean_D: np.ndarray
    precision_DD: np.ndarray
    """Inverse of the covariance matrix."""
    variance_D: np.ndarray
    """Diagonal of the covariance matrix."""


class Probe(NamedTuple):
    """A linear classifier of hidden states."""

    weight_D: np.ndarray
    bias: float


def fit(hidden_ND: npt.ArrayLike, *, ridge: float = 1e-3) -> Gaussian:
    """Estimates the mean and the covariance matrix of in-distribution hidden states.

    Args:
        hidden_ND: Hidden states, one row per prompt.
        ridge: Share of the mean variance that is added to each variance, so that the covariance matrix has an inverse
            also with fewer prompts than features.

    Raises:
        ValueError: There are fewer than two rows, the rank is not 2, a number is not finite, or ``ridge`` is negative.

    Example:
        >>> import numpy as np
        >>> from rlhf_jax.diagnostics import ood
        >>> gaussian = ood.fit(np.random.default_rng(0).normal(size=(500, 3)))
        >>> bool(ood.mahalanobis(gaussian, [[9.0, 0.0, 0.0]])[0] > 50)
        True
    """
    hidden_ND = _checked(hidden_ND)
    if len(hidden_ND) < 2 or ridge < 0:
        raise ValueError(f"need at least 2 rows and ridge >= 0, got {len(hidden_ND)} rows and ridge {ridge}")
    covariance_DD = np.cov(hidden_ND, rowvar=False, bias=True).reshape(2 * hidden_ND.shape[1:])
    covariance_DD = covariance_DD + ridge * np.mean(np.diag(covariance_DD)) * np.eye(len(covariance_DD))
    return Gaussian(hidden_ND.mean(axis=0), np.linalg.pinv(covariance_DD, hermitian=True), np.diag(covariance_DD))


def mahalanobis(gaussian: Gaussian, hidden_ND: npt.ArrayLike) -> np.ndarray:
    """Returns the squared Mahalanobis distance ``(v - mean)^T covariance^-1 (v - mean)`` of each row, ``[N]``."""
    shift_ND = _checked(hidden_ND) - gaussian.mean_D
    return np.einsum("nd,de,ne->n", shift_ND, gaussian.precision_DD, shift_ND)


def relative_mahalanobis(gaussian: Gaussian, hidden_ND: npt.ArrayLike) -> np.ndarray:
    """Returns the simplified relative Mahalanobis distance of each row, ``[N]`` (SRMD; Bai 2022, 5.4).

    It is `mahalanobis` minus the same distance with the diagonal of the covariance matrix only, so it is large where
    combinations of features are unusual although each feature alone is not.
    """
    shift_ND = _checked(hidden_ND) - gaussian.mean_D
    return mahalanobis(gaussian, hidden_ND) - np.sum(shift_ND**2 / gaussian.variance_D, axis=1)


def fit_exposure(inside_ND: npt.ArrayLike, outside_MD: npt.ArrayLike, *, ridge: float = 1e-3) -> Probe:
    """Trains a linear classifier on in-distribution and a few other hidden states (outlier exposure; Bai 2022, B.9).

    Both kinds have the same weight in the logistic loss, as if each of the M other rows were repeated N / M times.

    Args:
        inside_ND: In-distribution hidden states.
        outside_MD: Hidden states of other prompts.
        ridge: Weight of the squared norm of the classifier, for features of standard deviation 1.

    Raises:
        ValueError: An array is empty, the numbers of features differ, or a number is not finite.
    """
    inside_ND, outside_MD = _checked(inside_ND), _checked(outside_MD)
    if not len(inside_ND) or not len(outside_MD) or inside_ND.shape[1] != outside_MD.shape[1]:
        raise ValueError(f"need rows with equal numbers of features, got {inside_ND.shape} and {outside_MD.shape}")
    mean_D, scale_D = inside_ND.mean(axis=0), inside_ND.std(axis=0)
    scale_D = np.where(scale_D > 0, scale_D, 1.0)
    x_BD = (np.concatenate([inside_ND, outside_MD]) - mean_D) / scale_D
    y_B = np.repeat([0.0, 1.0], [len(inside_ND), len(outside_MD)])
    weight_B = np.repeat([0.5 / len(inside_ND), 0.5 / len(outside_MD)], [len(inside_ND), len(outside_MD)])

    def loss(params: np.ndarray) -> tuple[float, np.ndarray]:
        logit_B = x_BD @ params[1:] + params[0]
        error_B = weight_B * (special.expit(logit_B) - y_B)
        value = weight_B @ (np.logaddexp(0, logit_B) - y_B * logit_B) + ridge * params[1:] @ params[1:]
        return value, np.concatenate([[error_B.sum()], error_B @ x_BD + 2 * ridge * params[1:]])

    params = optimize.minimize(loss, np.zeros(1 + x_BD.shape[1]), jac=True, method="L-BFGS-B").x
    weight_D = params[1:] / scale_D
    return Probe(weight_D, float(params[0] - mean_D @ weight_D))


def exposure(probe: Probe, hidden_ND: npt.ArrayLike) -> np.ndarray:
    """Returns the probability that each row is of the other kind, in (0, 1), for equally frequent kinds, ``[N]``."""
    return special.expit(_checked(hidden_ND) @ probe.weight_D + probe.bias)


def auroc(inside_N: npt.ArrayLike, outside_M: npt.ArrayLike) -> intervals.Estimate:
    """Returns the area under the ROC curve with its 95 % interval (DeLong 1988).

    The area is the probability that a random prompt of the other kind has a higher score than a random in-distribution
    prompt; equal scores count as one half. The interval is that of a normal distribution for the logit of the area, so
    it stays in [0, 1]; it is (0, 1) if the area is 0 or 1 or a kind has fewer than two prompts.

    Args:
        inside_N: Scores of in-distribution prompts.
        outside_M: Scores of other prompts.

    Raises:
        ValueError: An array is empty or contains NaN.
    """
    inside_N, outside_M = (np.asarray(each, np.float64).ravel() for each in (inside_N, outside_M))
    if not len(inside_N) or not len(outside_M) or np.isnan(inside_N).any() or np.isnan(outside_M).any():
        raise ValueError("need at least one score of each kind, and no NaN")
    pooled = stats.rankdata(np.concatenate([inside_N, outside_M]))
    # The share of the other kind that each score is above, or below for in-distribution prompts.
    above_M = (pooled[len(inside_N) :] - stats.rankdata(outside_M)) / len(inside_N)
    below_N = 1 - (pooled[: len(inside_N)] - stats.rankdata(inside_N)) / len(outside_M)
    area = float(above_M.mean())
    if not 0 < area < 1 or min(len(inside_N), len(outside_M)) < 2:
        return intervals.Estimate(area, 0.0, 1.0)
    variance = above_M.var(ddof=1) / len(above_M) + below_N.var(ddof=1) / len(below_N)
    half = stats.norm.ppf(0.975) * np.sqrt(variance) / (area * (1 - area))
    lo, hi = special.expit(special.logit(area) + np.array([-half, half]))
    return intervals.Estimate(area, float(lo), float(hi))


def threshold(inside_N: npt.ArrayLike, *, refusals: float) -> float:
    """Returns the score above which a gate refuses, given the share of in-distribution prompts that it may refuse.

    A new in-distribution prompt is refused with a probability of at most ``refusals``, over the choice of the scores
    and the prompt (split conformal prediction; Vovk 2005). The result is infinity if there are too few scores for that.
    Measure the rate of refusals with `diagnostics.wilson` on prompts that neither `fit` nor this function has seen.

    Raises:
        ValueError: ``refusals`` is not in [0, 1], or a score is NaN.

    Example:
        >>> from rlhf_jax.diagnostics import ood
        >>> ood.threshold(range(99), refusals=0.05)
        94.0
    """
    scores_N = np.sort(np.asarray(inside_N, np.float64).ravel())
    if not 0 <= refusals <= 1 or np.isnan(scores_N).any():
        raise ValueError(f"need refusals in [0, 1] and no NaN, got {refusals}")
    rank = int(np.ceil((len(scores_N) + 1) * (1 - refusals) - 1e-9))
    return float(np.inf if rank > len(scores_N) else scores_N[rank - 1] if rank else -np.inf)


def _checked(hidden_ND: npt.ArrayLike) -> np.ndarray:
    hidden_ND = np.asarray(hidden_ND, np.float64)
    if hidden_ND.ndim != 2 or not np.isfinite(hidden_ND).all():
        raise ValueError(f"hidden states must be finite and have shape [N, D], got shape {hidden_ND.shape}")
    return hidden_ND
