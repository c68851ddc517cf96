"""From a score for a whole answer to a reward for each of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import masking, types


def token_rewards(
    scores_B: jax.Array,
    logprobs_BT: jax.Array,
    reference_logprobs_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    kl_coef: float | jax.Array,
) -> jax.Array:
    """``-kl_coef * (logprob - reference)`` at every real token, plus the score at the last one.

    Summed over a row this is ``score - kl_coef * log(policy / reference)``, the objective of InstructGPT Eq 2. The KL
    part comes from the policy that sampled the tokens, is computed once a rollout, and stays fixed through the epochs.

    Args:
        scores_B: one score a response, of any dtype; integers become float32, fractions stay fractions.
        logprobs_BT: of the behaviour policy.
        reference_logprobs_BT: of the frozen reference.
        mask_BT: True at real response tokens, the stop token included.
        kl_coef: the coefficient, in units of score per nat.

    Returns:
        ``[B, T]``, at least float32, 0 off the mask. A row with no real token is all zeros, whatever its score.

    Raises:
        ValueError: if ranks or shapes disagree.
    """
    masking.check_rank(1, scores_B=scores_B)
    masking.check_rank(2, logprobs_BT=logprobs_BT)
    masking.check_same_shape(logprobs_BT=logprobs_BT, reference_logprobs_BT=reference_logprobs_BT, mask_BT=mask_BT)
    if scores_B.shape[0] != mask_BT.shape[0]:
        raise ValueError(f"one score a row is needed, got {scores_B.shape[0]} for {mask_BT.shape[0]} rows")
    mask_BT = mask_BT.astype(bool)
    kl_BT = masking.masked_fill(logprobs_BT, where=mask_BT) - masking.masked_fill(reference_logprobs_BT, where=mask_BT)
    score_BT = jnp.where(_is_last(mask_BT), masking.as_float32(scores_B)[:, None], 0.0)
    return score_BT - kl_coef * kl_BT


def sequence_rewards(
    scores_B: jax.Array,
    logprobs_BT: jax.Array,
    reference_logprobs_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    kl_coef: float | jax.Array,
) -> jax.Array:
    """``score - kl_coef * log(policy / reference)`` for whole responses, ``[B]``: what RLOO takes (Ahmadian 2024).

    Arguments as in ``token_rewards``, of which this is the sum over T.
    """
    return jnp.sum(token_rewards(scores_B, logprobs_BT, reference_logprobs_BT, mask_BT, kl_coef=kl_coef), axis=-1)


def missing_stop(scores_B: jax.Array, stopped_B: jax.Array, *, score: float | jax.Array) -> jax.Array:
    """Replaces the score of a response that never stopped by ``score`` (-1 in Ziegler 2019): the papers' rule.

    Args:
        scores_B: scores of the responses, any shape.
        stopped_B: True where the response ended with its stop token.
        score: the score of an unfinished response; choose it below what a bad answer gets.
    """
    masking.check_same_shape(scores_B=scores_B, stopped_B=stopped_B)
    return jnp.where(stopped_B.astype(bool), masking.as_float32(scores_B), score)


def subtract_for_missing_stop(scores_B: jax.Array, stopped_B: jax.Array, *, penalty: float | jax.Array) -> jax.Array:
    """Subtracts ``penalty`` from the score of a response that never stopped: a later variant, not the papers' rule."""
    masking.check_same_shape(scores_B=scores_B, stopped_B=stopped_B)
    scores_B = masking.as_float32(scores_B)
    return jnp.where(stopped_B.astype(bool), scores_B, scores_B - penalty)


def weighted(
    scorers: Mapping[str, Callable[[Any, types.Rollout], jax.Array]], weights: Mapping[str, float]
) -> Callable[[Mapping[str, Any], types.Rollout], jax.Array]:
    """One score function of several, such as helpful and harmless: the sum of weight times score, name by name.

    Raises ValueError where the names of scorers and weights differ.
    """
    if set(scorers) != set(weights):
        raise ValueError(f"scorers are {sorted(scorers)} and weights {sorted(weights)}; they must have the same names")

    def score(params: Mapping[str, Any], rollout: types.Rollout) -> jax.Array:
        parts = [weights[name] * masking.as_float32(scorers[name](params[name], rollout)) for name in scorers]
        return sum(parts[1:], parts[0])

    return score


def from_python(
    fn: Callable[[np.ndarray, np.ndarray, np.ndarray], Any],
) -> Callable[[Any, types.Rollout], jax.Array]:
    """A score function that calls ``fn(tokens_BL, mask_BL, response_mask_BT)`` on the host, in a compiled step too.

    ``fn`` gets NumPy arrays and returns one number an answer, of any type; the step raises where it returns another
    shape or a number that is not finite. Device and host wait for each other, so a JAX function is faster.
    """

    def on_host(tokens_BL: Any, mask_BL: Any, response_mask_BT: Any) -> np.ndarray:
        rows = np.asarray(tokens_BL), np.asarray(mask_BL), np.asarray(response_mask_BT)
        scores_B = np.asarray(fn(*rows), np.float32)
        if scores_B.shape != rows[0].shape[:1]:
            raise ValueError(f"the reward function returned shape {scores_B.shape} for {len(rows[0])} answers")
        if not np.isfinite(scores_B).all():
            row = int(np.flatnonzero(~np.isfinite(scores_B))[0])
            raise ValueError(f"the reward function returned {scores_B[row]} for answer {row} of {len(scores_B)}")
        return scores_B

    def score(params: Any, rollout: types.Rollout) -> jax.Array:
        del params
        shape = jax.ShapeDtypeStruct(rollout.tokens_BL.shape[:1], jnp.float32)
        arrays = rollout.tokens_BL, rollout.mask_BL, rollout.response_mask_BT
        return jax.pure_callback(on_host, shape, *arrays, vmap_method="sequential")

    return score


def _is_last(mask_BT: jax.Array) -> jax.Array:
    """True at the last real token of each row, nowhere in an empty row."""
    after_BT = jnp.flip(jnp.cumsum(jnp.flip(mask_BT, axis=-1), axis=-1), axis=-1)
    return mask_BT & (after_BT == 1)
