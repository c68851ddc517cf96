"""KL and expected score of best-of-n sampling, computed for every n from one pool of samples.

The best of n samples is the one with the highest *proxy* score; its quality is measured by its *gold* score.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

from rlhf_jax.diagnostics import intervals


class BestOfNCurve(NamedTuple):
    """KL and gold score of best-of-n sampling for M values of n. Arrays have length M."""

    n: np.ndarray
    kl: np.ndarray
    """KL of best-of-n sampling from the policy, in nats; see `best_of_n_kl`."""
    mean: np.ndarray
    """Expected gold score of the sample with the highest proxy score among n, averaged over prompts."""
    lo: np.ndarray
    hi: np.ndarray
    """Bounds of the interval of the mean, over prompts; infinite for a single prompt."""


def best_of_n_kl(n: npt.ArrayLike) -> np.ndarray:
    """Returns ``log n - (n - 1) / n``, which is ``KL(best-of-n || policy)`` in nats (Stiennon 2020, G.3).

    The formula is exact if proxy scores are never tied, and an upper bound otherwise. Raises ValueError if any n is
    below 1.

    Example:
        >>> from rlhf_jax import diagnostics
        >>> print(diagnostics.best_of_n_kl([1, 4, 16]).round(3))
        [0.    0.636 1.835]
    """
    n = np.asarray(n, np.float64)
    if (n < 1).any():
        raise ValueError(f"n must be at least 1, got {n}")
    return np.log(n) - (n - 1) / n


def best_of_n_mean(proxy_scores: npt.ArrayLike, gold_scores: npt.ArrayLike, ns: Sequence[int]) -> np.ndarray:
    """Returns unbiased estimates of the expected gold score of best-of-n sampling, from N samples for each prompt.

    With samples sorted in ascending order of proxy score, the estimate is ``sum_i C(i - 1, n - 1) / C(N, n) * gold_i``,
    the average gold score of the best sample over all subsets of size n (Nakano 2021, App. I). Samples with tied proxy
    scores are assigned the mean of their gold scores.

    Args:
        proxy_scores: ``[..., N]``, the scores that select the best sample.
        gold_scores: ``[..., N]``, the scores to average. For the expected proxy score, pass the proxy scores.
        ns: M values of n, each from 1 to N.

    Returns:
        Estimates ``[..., M]``, to be averaged over prompts.

    Raises:
        ValueError: If the scores differ in shape, are scalars or contain NaN, or if an n is out of range.

    Example:
        >>> from rlhf_jax import diagnostics
        >>> print(diagnostics.best_of_n_mean([1.0, 2.0, 3.0], [0.0, 3.0, 6.0], ns=[1, 2, 3]))
        [3. 5. 6.]
    """
    proxy, gold = np.asarray(proxy_scores, np.float64), np.asarray(gold_scores, np.float64)
    if proxy.ndim < 1 or proxy.shape != gold.shape or np.isnan(proxy).any() or np.isnan(gold).any():
        raise ValueError(f"scores must have the same shape [..., N] and no NaN, got {proxy.shape} and {gold.shape}")
    total, sizes = proxy.shape[-1], np.asarray(ns, np.int64)
    if ((sizes < 1) | (sizes > total)).any():
        raise ValueError(f"every n must be between 1 and {total}, the number of samples, got {list(ns)}")
    order = proxy.argsort(axis=-1, kind="stable")
    proxy, gold = (np.take_along_axis(scores, order, axis=-1) for scores in (proxy, gold))
    first = np.ones(proxy.shape, bool)  # first of the samples that share a proxy score
    first[..., 1:] = proxy[..., 1:] != proxy[..., :-1]
    group = first.ravel().cumsum() - 1
    shared = (np.bincount(group, weights=gold.ravel()) / np.bincount(group))[group].reshape(gold.shape)
    rank = np.arange(1, total + 1)
    estimates = []
    for n in sizes:
        # Logarithms avoid overflow of the binomial coefficients. The best of n samples has a rank of at least n.
        weights = np.exp(_log_binomial(rank[n - 1 :] - 1, n - 1) - _log_binomial(total, n))
        estimates.append(shared[..., n - 1 :] @ weights)
    return np.stack(estimates, axis=-1)


def best_of_n_curve(
    proxy_scores: npt.ArrayLike,
    gold_scores: npt.ArrayLike,
    *,
    ns: Sequence[int] | None = None,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> BestOfNCurve:
    """Computes KL and mean gold score of best-of-n sampling for every n, with intervals over prompts.

    Args:
        proxy_scores: ``[B, N]``, the scores that select the best sample, for N samples of each of B prompts.
        gold_scores: ``[B, N]``, the scores to average. To compute the proxy's curve, pass the proxy scores.
        ns: Values of n, each from 1 to N; by default, all of them.
        clusters: One label per prompt; prompts with the same label are correlated (`intervals.clustered_mean`).
        confidence: Coverage of the intervals.

    Returns:
        KL, mean and interval for each n.

    Raises:
        ValueError: If the scores differ in shape, are not of rank 2, are empty or contain NaN, if an n is out of range,
            or if ``confidence`` is not in (0, 1).
    """
    proxy, gold = np.asarray(proxy_scores, np.float64), np.asarray(gold_scores, np.float64)
    if proxy.ndim != 2 or proxy.shape != gold.shape or not proxy.size:
        raise ValueError(f"scores must have the same shape (prompts, samples), got {proxy.shape} and {gold.shape}")
    sizes = range(1, proxy.shape[1] + 1) if ns is None else ns
    means_MB = best_of_n_mean(proxy, gold, sizes).T
    estimates = [intervals.clustered_mean(means_B, clusters, confidence=confidence) for means_B in means_MB]
    mean, lo, hi = (np.array(x) for x in zip(*estimates))
    return BestOfNCurve(np.array(sizes), best_of_n_kl(np.array(sizes)), mean, lo, hi)


def _log_binomial(n: npt.ArrayLike, k: npt.ArrayLike) -> np.ndarray:
    n, k = np.asarray(n, np.float64), np.asarray(k, np.float64)
    return special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)
