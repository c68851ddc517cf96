"""Token rewards from scores and a KL penalty, score adjustments for unfinished responses, and score functions.

A score function has the signature ``(params, rollout) -> [B]`` or, if it scores every token, ``[B, T]`` (process
rewards). `weighted` and `from_python` build score functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import masking, types


def token_rewards(
    scores: jax.Array,
    logprobs_BT: jax.Array,
    reference_logprobs_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    kl_coef: float | jax.Array,
) -> jax.Array:
    """Returns ``-kl_coef * (logprob - reference_logprob)`` for each real token, plus the score at the last real token.

    Scores of tokens, ``[B, T]``, are added at their tokens instead; ``score`` below is then their sum.

    Each row sums to ``score - kl_coef * log(policy / reference)``, which is the RL objective of InstructGPT (Eq 2) and
    the sequence-level reward of RLOO (Ahmadian 2024). Compute the rewards once per rollout, with the log-probabilities
    of the policy that sampled the tokens, and keep them fixed during all epochs.

    Args:
        scores: ``[B]``, one score per response, or ``[B, T]``, one per token, of any dtype.
        logprobs_BT: Log-probabilities under the behaviour policy.
        reference_logprobs_BT: Log-probabilities under the frozen reference.
        mask_BT: True at real response tokens, including the stop token.
        kl_coef: KL coefficient, in units of score per nat.

    Returns:
        ``[B, T]``, in at least float32; 0 outside the mask. Rows without real tokens are all 0, whatever their scores.

    Raises:
        ValueError: If a rank is wrong, or the shapes do not match.

    Example:
        >>> import jax.numpy as jnp
        >>> from rlhf_jax import rewards
        >>> logprobs_BT = jnp.array([[-1.0, -2.0, 0.0]])
        >>> reference_BT = jnp.array([[-1.5, -2.0, 0.0]])
        >>> mask_BT = jnp.array([[True, True, False]])
        >>> print(rewards.token_rewards(jnp.array([2.0]), logprobs_BT, reference_BT, mask_BT, kl_coef=0.1))
        [[-0.05  2.    0.  ]]
    """
    masking.check_rank(2, logprobs_BT=logprobs_BT)
    masking.check_same_shape(logprobs_BT=logprobs_BT, reference_logprobs_BT=reference_logprobs_BT, mask_BT=mask_BT)
    if scores.shape not in (mask_BT.shape[:1], mask_BT.shape):
        raise ValueError(
            f"need one score per row or per token, got scores of shape {scores.shape} for a mask of shape "
            f"{mask_BT.shape}"
        )
    mask_BT = mask_BT.astype(bool)
    kl_BT = masking.masked_fill(logprobs_BT, where=mask_BT) - masking.masked_fill(reference_logprobs_BT, where=mask_BT)
    return as_token_scores(scores, mask_BT) - kl_coef * kl_BT


def as_token_scores(scores: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Returns float32 ``[B, T]`` scores, 0 outside the mask: scores ``[B]`` are put at the last real token."""
    mask_BT, scores = mask_BT.astype(bool), masking.as_float32(scores)
    if scores.ndim == 1:
        return jnp.where(_is_last(mask_BT), scores[:, None], 0.0)
    return masking.masked_fill(scores, where=mask_BT)


def replace_unfinished(scores_B: jax.Array, stopped_B: jax.Array, *, score: float | jax.Array) -> jax.Array:
    """Sets the scores of all responses without a stop token to ``score`` (-1 in Ziegler 2019).

    ``stopped_B`` is True for responses that ended with a stop token. ``score`` should be below the score of a bad
    response.
    """
    masking.check_same_shape(scores_B=scores_B, stopped_B=stopped_B)
    return jnp.where(stopped_B.astype(bool), masking.as_float32(scores_B), score)


def penalise_unfinished(scores_B: jax.Array, stopped_B: jax.Array, *, penalty: float | jax.Array) -> jax.Array:
    """Subtracts ``penalty`` from the scores of responses without a stop token, where ``stopped_B`` is False."""
    masking.check_same_shape(scores_B=scores_B, stopped_B=stopped_B)
    scores_B = masking.as_float32(scores_B)
    return jnp.where(stopped_B.astype(bool), scores_B, scores_B - penalty)


def weighted(
    scorers: Mapping[str, Callable[[Any, types.Rollout], jax.Array]], weights: Mapping[str, float]
) -> Callable[[Mapping[str, Any], types.Rollout], jax.Array]:
    """Returns a score function that computes a weighted sum of scores, such as helpfulness and harmlessness.

    The ``params`` argument of the score function maps the name of each scorer to the parameters of that scorer. If a
    scorer returns one score per token, so does the score function, and scores of whole responses are added at the last
    token. Raises ValueError if ``scorers`` and ``weights`` have different names.
    """
    if set(scorers) != set(weights):
        raise ValueError(f"scorers are {sorted(scorers)} and weights {sorted(weights)}; they must have the same names")

    def score(params: Mapping[str, Any], rollout: types.Rollout) -> jax.Array:
        parts = [weights[name] * masking.as_float32(scorers[name](params[name], rollout)) for name in scorers]
        if any(part.ndim == 2 for part in parts):
            parts = [as_token_scores(part, rollout.response_mask_BT) for part in parts]
        return sum(parts[1:], parts[0])

    return score


def penalise_disagreement(scores_BK: jax.Array, *, coef: float | jax.Array) -> jax.Array:
    """Returns the mean over K reward models minus ``coef`` times their standard deviation, ``[B]``.

    The models, or the heads of one model, form an ensemble that disagrees where it has little data, so the penalty
    discourages a policy from leaving the data. Coste et al. 2023 (uncertainty-weighted optimisation) subtract the
    variance; the standard deviation has the unit of the scores. The lowest score, ``scores_BK.min(axis=-1)``, is their
    worst-case optimisation. Normalise the scores of each model first. The standard deviation is that of the population.

    Example:
        >>> import jax.numpy as jnp
        >>> from rlhf_jax import rewards
        >>> print(rewards.penalise_disagreement(jnp.array([[1.0, 3.0]]), coef=0.5))
        [1.5]
    """
    scores_BK = masking.as_float32(scores_BK)
    return jnp.mean(scores_BK, axis=-1) - coef * jnp.std(scores_BK, axis=-1)


def from_python(
    fn: Callable[[np.ndarray, np.ndarray, np.ndarray], Any], *, per_token: bool = False
) -> Callable[[Any, types.Rollout], jax.Array]:
    """Returns a score function that calls ``fn(tokens_BL, mask_BL, response_mask_BT)`` on the host.

    The score function can be used inside a compiled step. ``fn`` receives NumPy arrays and must return one finite
    number per response, of any numeric type, or, with ``per_token``, an array ``[B, T]`` with one per response token,
    whose numbers outside ``response_mask_BT`` are ignored; otherwise the step fails. A score function written in JAX is
    faster, because ``fn`` makes the device and the host wait for each other.
    """
    unit = "token" if per_token else "response"

    def on_host(tokens_BL: Any, mask_BL: Any, response_mask_BT: Any) -> np.ndarray:
        rows = np.asarray(tokens_BL), np.asarray(mask_BL), np.asarray(response_mask_BT)
        scores = np.asarray(fn(*rows), np.float32)
        expected = rows[2].shape if per_token else rows[0].shape[:1]
        if scores.shape != expected:
            raise ValueError(
                f"the reward function returned shape {scores.shape} for {len(rows[0])} responses; it must return one "
                f"number per {unit}" + f", shape {expected}" * per_token
            )
        scores = np.where(rows[2], scores, np.float32(0)) if per_token else scores
        if not np.isfinite(scores).all():
            place = tuple(np.argwhere(~np.isfinite(scores))[0])
            where = f"response {place[0]} of {len(scores)}" + (f", token {place[1]}" if per_token else "")
            raise ValueError(
                f"the reward function returned {scores[place]} for {where}, counted from 0; scores must be finite"
            )
        return scores

    def score(params: Any, rollout: types.Rollout) -> jax.Array:
        del params
        shape = rollout.response_mask_BT.shape if per_token else rollout.tokens_BL.shape[:1]
        arrays = rollout.tokens_BL, rollout.mask_BL, rollout.response_mask_BT
        return jax.pure_callback(on_host, jax.ShapeDtypeStruct(shape, jnp.float32), *arrays, vmap_method="sequential")

    return score


def _is_last(mask_BT: jax.Array) -> jax.Array:
    """Returns a mask of the last real token of each row; an empty row is all False."""
    after_BT = jnp.flip(jnp.cumsum(jnp.flip(mask_BT, axis=-1), axis=-1), axis=-1)
    return mask_BT & (after_BT == 1)
