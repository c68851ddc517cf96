"""Simulated labelers, who weight the components of the gold utility differently and make mistakes.

A labeler's utility is linear in features of an answer: the components of helpfulness, harmlessness, the number of
polite words (up to six) and the length. Labeler i of group g has the weights
``w * (1 + spread * eps_i + group_spread * eps_g)``, with mean weights w and standard normal eps. Rankings follow the
Plackett-Luce model with a temperature, which for two answers is the Bradley-Terry model.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from scipy import optimize, special

from rlhf_jax.simulation import gold

FEATURES = (*gold.COMPONENTS, "harmless", "polite_words", "length")


@struct.dataclass
class Pool:
    """R labelers with their weights on `FEATURES` and their groups. The scalar fields apply to all labelers."""

    weights_RF: jax.Array
    group_R: jax.Array
    temperature: jax.Array
    """Bradley-Terry temperature, in units of utility."""
    tie_width: jax.Array
    """Neighbours in a ranking are tied if their noisy utilities differ by at most this much."""
    lapse: jax.Array
    """Probability that a whole ranking is random, i.e. independent of the utilities."""


def features(judged: gold.Utility) -> jax.Array:
    """Returns the features ``[..., F]`` of the answers whose gold utility is ``judged``.

    The number of polite words, capped at six, is in units of four words; the length is in units of twenty tokens.
    """
    columns = [judged.components[name] for name in gold.COMPONENTS]
    columns += [judged.harmless, jnp.minimum(judged.polite_words, 6) / 4.0, judged.length / 20.0]
    return jnp.stack([jnp.asarray(column, jnp.float32) for column in columns], axis=-1)


def make_pool(
    rng: jax.Array,
    n_labelers: int,
    *,
    n_groups: int = 1,
    spread: float = 0.25,
    group_spread: float = 0.0,
    polite_taste: float = 0.12,
    length_taste: float = 0.0,
    temperature: float = 0.1,
    tie_width: float = 0.0,
    lapse: float = 0.0,
) -> Pool:
    """Draws a pool of labelers.

    Args:
        rng: A JAX key; consumed.
        n_labelers: Number of labelers, R.
        n_groups: Number of groups, to which the labelers are assigned in rotation.
        spread: Relative standard deviation of the weights across the labelers of a group.
        group_spread: Relative standard deviation of the weights across groups.
        polite_taste: Mean weight on polite words, i.e. the utility of four polite words.
        length_taste: Mean weight on length, i.e. the utility of twenty tokens.
        temperature: Bradley-Terry temperature, in units of utility.
        tie_width: Largest difference in noisy utility at which neighbours in a ranking are tied.
        lapse: Probability of a random ranking, from 0 to 1.

    Returns:
        The pool.
    """
    own, grouped = jax.random.split(rng)
    base_F = jnp.asarray([*gold.WEIGHTS, 1.0, polite_taste, length_taste], jnp.float32)
    group_R = jnp.arange(n_labelers) % n_groups
    own_RF = jax.random.normal(own, (n_labelers, base_F.shape[0]))
    group_GF = jax.random.normal(grouped, (n_groups, base_F.shape[0]))
    factor_RF = 1.0 + spread * own_RF + group_spread * group_GF[group_R]
    return Pool(
        weights_RF=base_F[None, :] * factor_RF,
        group_R=group_R,
        temperature=jnp.float32(temperature),
        tie_width=jnp.float32(tie_width),
        lapse=jnp.float32(lapse),
    )


def utilities(pool: Pool, features_F: jax.Array) -> jax.Array:
    """Returns the utility ``[..., R]`` that each labeler of the pool assigns to answers with features ``[..., F]``."""
    return features_F @ pool.weights_RF.T


def rank(rng: jax.Array, pool: Pool, labeler: jax.Array, features_KF: jax.Array, where_K: jax.Array) -> jax.Array:
    """Ranks K answers as one labeler would.

    Args:
        rng: A JAX key; consumed.
        pool: The pool.
        labeler: Index of the labeler in the pool.
        features_KF: Features of the answers.
        where_K: False for missing answers, which are ranked last.

    Returns:
        Ranks ``[K]``; 1 is best, and tied answers have equal ranks.
    """
    noise, lapses = jax.random.split(rng)
    utility_K = features_KF @ pool.weights_RF[labeler] / pool.temperature
    attentive = jax.random.uniform(lapses) >= pool.lapse
    noisy_K = jnp.where(attentive, utility_K, 0.0) + jax.random.gumbel(noise, utility_K.shape)
    noisy_K = jnp.where(where_K, noisy_K, -jnp.inf)
    order_K = jnp.argsort(-noisy_K)
    sorted_K = noisy_K[order_K]
    apart_K = (sorted_K[:-1] - sorted_K[1:]) > pool.tie_width / pool.temperature
    apart_K = apart_K | ~where_K[order_K][1:]
    rank_sorted_K = 1 + jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(apart_K, dtype=jnp.int32)])
    return jnp.zeros_like(rank_sorted_K).at[order_K].set(rank_sorted_K)


def preference_share(
    pool: Pool, features_a_F: jax.Array, features_b_F: jax.Array, *, tolerance: float = 1e-5
) -> jax.Array:
    """Returns the share of labelers who would prefer answer a to answer b if choices had no noise.

    Args:
        pool: The pool.
        features_a_F: Features ``[..., F]`` of answer a.
        features_b_F: Features ``[..., F]`` of answer b.
        tolerance: Largest difference in utility that counts as indifference; an indifferent labeler counts as one half.

    Returns:
        The share ``[...]``, from 0 to 1.
    """
    gap_R = utilities(pool, features_a_F) - utilities(pool, features_b_F)
    return jnp.mean(jnp.where(jnp.abs(gap_R) <= tolerance, 0.5, 1.0 * (gap_R > 0)), axis=-1)


def choice_share(pool: Pool, features_a_F: jax.Array, features_b_F: jax.Array) -> jax.Array:
    """Returns the probability that a random labeler, with noise and lapses, prefers answer a to answer b.

    It is the probability of the choices that `rank` makes between two answers; a tie counts as one half.

    Args:
        pool: The pool; its temperature is the scale of the noise.
        features_a_F: Features ``[..., F]`` of answer a.
        features_b_F: Features ``[..., F]`` of answer b.

    Returns:
        The probability ``[...]``.
    """
    gap_R = utilities(pool, features_a_F) - utilities(pool, features_b_F)
    # The difference of two Gumbel variables is logistic.
    wins = [jax.nn.sigmoid((gap_R + side * pool.tie_width) / pool.temperature) for side in (-1.0, 1.0)]
    attentive = jnp.mean((wins[0] + wins[1]) / 2, axis=-1)
    return (1.0 - pool.lapse) * attentive + pool.lapse / 2


def agreement(utility_a_NR: np.ndarray, utility_b_NR: np.ndarray, *, temperature: float) -> float:
    """Returns the probability that two different labelers make the same choice, averaged over N pairs of answers.

    It is ``E[p_i p_j + (1 - p_i)(1 - p_j)]``, where p_i is the Bradley-Terry probability that labeler i prefers answer
    a; ties and lapses are ignored. ``utility_a_NR`` and ``utility_b_NR`` are outputs of `utilities`.
    """
    p_NR = special.expit((np.asarray(utility_a_NR, np.float64) - utility_b_NR) / temperature)
    n = p_NR.shape[1]

    def over_pairs(q_NR: np.ndarray) -> np.ndarray:
        return (q_NR.sum(axis=1) ** 2 - (q_NR**2).sum(axis=1)) / (n * (n - 1))

    return float(np.mean(over_pairs(p_NR) + over_pairs(1.0 - p_NR)))


def calibrated_temperature(utility_a_NR: np.ndarray, utility_b_NR: np.ndarray, *, target: float = 0.75) -> float:
    """Returns the temperature at which the `agreement` of labelers is ``target``; papers report rates of 0.72 to 0.78.

    Raises:
        ValueError: If no temperature from 0.001 to 100 results in that rate, for example because the labelers differ
            too much.
    """

    def excess(log_temperature: float) -> float:
        return agreement(utility_a_NR, utility_b_NR, temperature=float(np.exp(log_temperature))) - target

    low, high = np.log(1e-3), np.log(1e2)
    if excess(low) < 0 or excess(high) > 0:
        raise ValueError(f"no temperature from 0.001 to 100 makes these labelers agree at a rate of {target}")
    return float(np.exp(optimize.brentq(excess, low, high)))  # type: ignore[arg-type]
