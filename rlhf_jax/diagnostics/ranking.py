"""Strengths of models from comparisons between them: the Bradley-Terry model and Elo scores."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rlhf_jax.diagnostics import intervals

ELO_PER_NAT = 400.0 / np.log(10.0)
"""Elo points per unit of log-odds, 173.7 (Bai et al. 2022, Training a Helpful and Harmless Assistant, B.5)."""


class Strengths(NamedTuple):
    """Bradley-Terry strengths of M models, with mean 0, in nats: ``P(i beats j) = sigmoid(value_i - value_j)``."""

    value_M: np.ndarray
    covariance_MM: np.ndarray
    """Covariance of the estimates; its rows sum to 0, as the strengths do."""

    def difference(self, first: int, second: int, *, confidence: float = 0.95) -> intervals.Estimate:
        """Returns the strength of model ``first`` minus that of ``second``, with its interval, in nats."""
        between_M = np.zeros(len(self.value_M))
        between_M[first] += 1.0
        between_M[second] -= 1.0
        half = intervals.critical(confidence) * float(np.sqrt(max(between_M @ self.covariance_MM @ between_M, 0.0)))
        mean = float(self.value_M[first] - self.value_M[second])
        return intervals.Estimate(mean, mean - half, mean + half)

    def elo(self, *, reference: int, confidence: float = 0.95) -> list[intervals.Estimate]:
        """Returns the Elo score of each model relative to model ``reference``, whose score is 0, with its interval.

        HH reports scores relative to a snapshot, its context-distilled model (Figure 15).
        """
        found = [self.difference(m, reference, confidence=confidence) for m in range(len(self.value_M))]
        return [intervals.Estimate(*(ELO_PER_NAT * x for x in each)) for each in found]


def bradley_terry(wins: npt.ArrayLike, *, clusters: bool = False) -> Strengths:
    """Returns the maximum-likelihood strengths of models, given how often each was preferred to each other.

    Args:
        wins: ``wins_MM[i, j]`` is the number of comparisons in which model i was preferred to model j; a tie counts as
            half a win for each. With ``clusters``, one such matrix for each cluster, ``[C, M, M]``.
        clusters: Whether to estimate the covariance from the differences between clusters, such as all comparisons
            about one prompt, which are not independent. It needs no assumption on them and is also right if ties are
            frequent. By default, comparisons are independent, and the covariance follows from the likelihood (Bai et
            al. 2022, B.5).

    Returns:
        The strengths. Add a small number to the wins off the diagonal to shrink the strengths.

    Raises:
        ValueError: The matrix has a wrong shape or a negative entry, or no finite strengths maximise the likelihood,
            because some models never win against, or are never compared with, all others.
    """
    wins_CMM = np.asarray(wins, np.float64) if clusters else np.asarray(wins, np.float64)[None]
    if wins_CMM.ndim != 3 or wins_CMM.shape[1] != wins_CMM.shape[2] or wins_CMM.shape[1] < 2 or (wins_CMM < 0).any():
        raise ValueError(
            f"wins must be [{'C, ' if clusters else ''}M, M], M >= 2, and not negative, got {wins_CMM.shape}"
        )
    wins_CMM = wins_CMM * ~np.eye(wins_CMM.shape[1], dtype=bool)
    wins_MM = wins_CMM.sum(axis=0)
    _check_connected(wins_MM)
    value_M = _maximise(wins_MM)
    bread_MM = np.linalg.pinv(_information(wins_MM, value_M))
    if not clusters:
        return Strengths(value_M, bread_MM)
    n, score_CM = len(wins_CMM), _score(wins_CMM, value_M)
    return Strengths(value_M, bread_MM @ (score_CM.T @ score_CM) @ bread_MM * (n / max(n - 1, 1)))


def _maximise(wins_MM: np.ndarray) -> np.ndarray:
    """Maximises the log-likelihood, which is concave, by Newton's method with step halving."""
    value_M = np.zeros(len(wins_MM))
    for _ in range(200):
        step_M = np.linalg.pinv(_information(wins_MM, value_M)) @ _score(wins_MM, value_M)
        scale, before = 1.0, _log_likelihood(wins_MM, value_M)
        while _log_likelihood(wins_MM, value_M + scale * step_M) < before and scale > 1e-12:
            scale /= 2
        value_M = value_M + scale * step_M
        if np.abs(step_M).max() < 1e-11:
            break
    return value_M - value_M.mean()


def _log_likelihood(wins_MM: np.ndarray, value_M: np.ndarray) -> float:
    return float(-(wins_MM * np.logaddexp(0.0, value_M[None, :] - value_M[:, None])).sum())


def _win_probability(value_M: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, value_M[None, :] - value_M[:, None]))


def _score(wins_MM: np.ndarray, value_M: np.ndarray) -> np.ndarray:
    """Returns the gradient of the log-likelihood, ``[..., M]``."""
    expected_MM = (wins_MM + np.swapaxes(wins_MM, -1, -2)) * _win_probability(value_M)
    return (wins_MM - expected_MM).sum(axis=-1)


def _information(wins_MM: np.ndarray, value_M: np.ndarray) -> np.ndarray:
    """Returns minus the Hessian of the log-likelihood."""
    p_MM = _win_probability(value_M)
    weight_MM = (wins_MM + wins_MM.T) * p_MM * p_MM.T
    return np.diag(weight_MM.sum(axis=1)) - weight_MM


def _check_connected(wins_MM: np.ndarray) -> None:
    """Raises ValueError unless each model can be reached from each other along wins (Ford 1957)."""
    reached_MM = (wins_MM > 0) | np.eye(len(wins_MM), dtype=bool)
    for _ in range(len(wins_MM)):
        reached_MM = reached_MM @ reached_MM
    if not reached_MM.all():
        i, j = np.argwhere(~reached_MM)[0].tolist()
        raise ValueError(
            f"the strengths are not finite: model {i} has won against model {j} neither directly nor through others"
        )
