"""Rewards of tokens, from the scores of whole responses and a KL penalty; combinations of score functions."""

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
    """Returns ``-kl_coef * (logprob - reference)`` for every real token, plus the score at the last real token.

    The sum over a row is ``score - kl_coef * log(policy / reference)``, the objective of InstructGPT Eq 2 and the
    sequence-level reward of RLOO (Ahmadian 2024). The KL term uses the policy that sampled the tokens; compute it once
    per rollout and keep it fixed through the epochs.

    Args:
        scores_B: One score per response, of any dtype; computed in at least float32.
        logprobs_BT: Log-probabilities under the behaviour policy.
        reference_logprobs_BT: Log-probabilities under the frozen reference.
        mask_BT: True at real response tokens, the stop token included.
        kl_coef: KL coefficient, in units of score per nat.

    Returns:
        ``[B, T]``, at least float32, 0 outside the mask. A row without real tokens is all zeros, whatever its score.

    Raises:
        ValueError: If ranks or shapes disagree.

    Example:
        >>> import jax.numpy as jnp
        >>> from rlhf_jax import rewards
        >>> logprobs_BT = jnp.array([[-1.0, -2.0, 0.0]])
        >>> reference_BT = jnp.array([[-1.5, -2.0, 0.0]])
        >>> mask_BT = jnp.array([[True, True, False]])
        >>> print(rewards.token_rewards(jnp.array([2.0]), logprobs_BT, reference_BT, mask_BT, kl_coef=0.1))
        [[-0.05  2.    0.  ]]
    """
    masking.check_rank(1, scores_B=scores_B)
    masking.check_rank(2, logprobs_BT=logprobs_BT)
    masking.check_same_shape(logprobs_BT=logprobs_BT, reference_logprobs_BT=reference_logprobs_BT, mask_BT=mask_BT)
    if scores_B.shape[0] != mask_BT.shape[0]:
        raise ValueError(f"need one score per row, got {scores_B.shape[0]} scores for {mask_BT.shape[0]} rows")
    mask_BT = mask_BT.astype(bool)
    kl_BT = masking.masked_fill(logprobs_BT, where=mask_BT) - masking.masked_fill(reference_logprobs_BT, where=mask_BT)
    score_BT = jnp.where(_is_last(mask_BT), masking.as_float32(scores_B)[:, None], 0.0)
    return score_BT - kl_coef * kl_BT


def replace_unfinished(scores_B: jax.Array, stopped_B: jax.Array, *, score: float | jax.Array) -> jax.Array:
    """Replaces the scores of responses without a stop token by ``score``: the papers' rule (-1 in Ziegler 2019).

    ``stopped_B`` is True where a response ended with its stop token. ``score`` should be below that of a bad response.
    """
    masking.check_same_shape(scores_B=scores_B, stopped_B=stopped_B)
    return jnp.where(stopped_B.astype(bool), masking.as_float32(scores_B), score)


def penalise_unfinished(scores_B: jax.Array, stopped_B: jax.Array, *, penalty: float | jax.Array) -> jax.Array:
    """Subtracts ``penalty`` from the scores of responses without a stop token: a later variant of the papers' rule."""
    masking.check_same_shape(scores_B=scores_B, stopped_B=stopped_B)
    scores_B = masking.as_float32(scores_B)
    return jnp.where(stopped_B.astype(bool), scores_B, scores_B - penalty)


def weighted(
    scorers: Mapping[str, Callable[[Any, types.Rollout], jax.Array]], weights: Mapping[str, float]
) -> Callable[[Mapping[str, Any], types.Rollout], jax.Array]:
    """Returns a score function that is the weighted sum of several, such as a helpful and a harmless one.

    Its ``params`` are a mapping with the same names. Raises ValueError if the names of scorers and weights differ.
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
    """Returns a score function that calls ``fn(tokens_BL, mask_BL, response_mask_BT)`` on the host.

    It can be used inside a compiled step. ``fn`` receives NumPy arrays and returns one number per response, of any
    numeric type; the step fails if it returns another shape or a number that is not finite. Device and host wait for
    each other, so a JAX function is faster.
    """

    def on_host(tokens_BL: Any, mask_BL: Any, response_mask_BT: Any) -> np.ndarray:
        rows = np.asarray(tokens_BL), np.asarray(mask_BL), np.asarray(response_mask_BT)
        scores_B = np.asarray(fn(*rows), np.float32)
        if scores_B.shape != rows[0].shape[:1]:
            raise ValueError(f"the reward function returned shape {scores_B.shape} for {len(rows[0])} responses")
        if not np.isfinite(scores_B).all():
            row = int(np.flatnonzero(~np.isfinite(scores_B))[0])
            raise ValueError(f"the reward function returned {scores_B[row]} for response {row} of {len(scores_B)}")
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
