"""The scores of a rollout, as a reward model or a score function returns them and as PPO trains on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import masking, rewards
from rlhf_jax.train.ppo_state import Hyper, Models
from rlhf_jax.types import Params, Rollout


class Scores(NamedTuple):
    """The scores of B responses."""

    raw_B: jax.Array
    """float32 scores as `Models.score` returned them, summed over tokens if there is one per token."""
    parts: dict[str, jax.Array]
    """The other numbers that `Models.score` returned, ``[B]`` each."""
    raw_BT: jax.Array | None = None
    """The scores of the tokens, 0 at padding; None if there is one score per response."""


def score(models: Models, params: Params, rollout: Rollout, *, responses: int) -> Scores:
    """Calls `Models.score`.

    Args:
        models: The functions of the models.
        params: The first argument of `Models.score`.
        rollout: The responses.
        responses: B, the number of responses that the rollout must have.

    Returns:
        The scores.

    Raises:
        ValueError: The scores have neither shape ``[B]`` nor ``[B, T]``.
    """
    returned: Any = models.score(params, rollout)
    scores, parts = returned if isinstance(returned, tuple) else (returned, {})
    scores, mask_BT = masking.as_float32(scores), rollout.response_mask_BT
    T = mask_BT.shape[1]
    if mask_BT.shape[0] != responses or scores.shape not in ((responses,), (responses, T)):
        raise ValueError(
            f"Models.score returned shape {scores.shape} for {mask_BT.shape[0]} responses; the prompts and samples of "
            f"the batch need one score per response, shape ({responses},), or one per token, shape ({responses}, {T})"
        )
    if scores.ndim == 1:
        return Scores(scores, parts)
    raw_BT = rewards.as_token_scores(scores, mask_BT)
    return Scores(jnp.sum(raw_BT, axis=1), parts, raw_BT)


def training_scores(
    scores: Scores, rollout: Rollout, hyper: Hyper, unfinished: Callable[..., jax.Array]
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the scores on which the policy is trained.

    Scores are clipped to [-`Hyper.reward_clip`, `Hyper.reward_clip`], token by token if there is one per token. Then
    ``unfinished`` is applied to the score of each response. If tokens have scores, it is applied to their sum, and the
    change is added at the last token, so that scores of earlier tokens are kept.

    Args:
        scores: The scores from `score`.
        rollout: The responses.
        hyper: Hyperparameters.
        unfinished: The rule for responses without a stop token, as in `ppo.make_train_step`.

    Returns:
        ``(scores_B, token_scores_BT)``, of which the second is None if there is one score per response.
    """
    stopped_B = rollout.finish_B == 1
    if scores.raw_BT is None:
        clipped_B = jnp.clip(scores.raw_B, -hyper.reward_clip, hyper.reward_clip)
        return unfinished(clipped_B, stopped_B, hyper), None
    clipped_BT = jnp.clip(scores.raw_BT, -hyper.reward_clip, hyper.reward_clip)
    sums_B = jnp.sum(clipped_BT, axis=1)
    change_B = unfinished(sums_B, stopped_B, hyper) - sums_B
    token_scores_BT = clipped_BT + rewards.as_token_scores(change_B, rollout.response_mask_BT)
    return jnp.sum(token_scores_BT, axis=1), token_scores_BT
