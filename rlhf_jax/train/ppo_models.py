"""The functions of policy, critic and reward model that PPO calls, for the language model of `rlhf_jax.lm`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from rlhf_jax import generation, lm, types
from rlhf_jax.train import ppo_state

Params = types.Params


def from_config(
    cfg: lm.LMConfig,
    sampling: generation.Sampling,
    *,
    prompt_width: int,
    samples: int = 1,
    critic: bool = True,
    critic_cfg: lm.LMConfig | None = None,
    score: Callable[[Any, types.Rollout], jax.Array] | None = None,
    score_cfg: lm.LMConfig | None = None,
    watch: Callable[[types.Rollout], dict[str, jax.Array]] | None = None,
    axis_name: str | None = None,
) -> ppo_state.Models:
    """Returns the functions that PPO calls.

    Example:
        >>> import jax
        >>> from rlhf_jax import generation, lm
        >>> from rlhf_jax.train import ppo, ppo_models
        >>> cfg = lm.LMConfig.preset("tiny")
        >>> sampling = generation.Sampling(max_new_tokens=8, stop_ids=(1,))
        >>> def score(params, rollout):
        ...     return rollout.lengths_B
        >>> models = ppo_models.from_config(cfg, sampling, prompt_width=16, score=score)
        >>> train_step = ppo.make_train_step(models, minibatches=2)

    Args:
        cfg: Architecture of the policy and the reference.
        sampling: Settings of the sampler. Its temperature is replaced by `ppo.Hyper.temperature`.
        prompt_width: P, the number of tokens in a padded prompt.
        samples: Number of responses to each prompt.
        critic: Whether the method has a critic.
        critic_cfg: Architecture of the critic; by default ``cfg``.
        score: ``(params, rollout) -> scores_B``. By default, the parameters are those of a reward model.
        score_cfg: Architecture of the default reward model; by default ``cfg``. It must have the policy's token ids.
        watch: As in `ppo.Models`.
        axis_name: Name of the axis of a ``jax.vmap`` over the whole step.

    Returns:
        The functions.
    """

    def generate(params: Params, rng_B: jax.Array, prompts_BP: Any, mask_BP: Any, temperature: Any) -> types.Rollout:
        spec = sampling.replace(temperature=temperature)  # type: ignore[attr-defined]
        return generation.generate(
            params, rng_B, prompts_BP, mask_BP, cfg=cfg, sampling=spec, n=samples, axis_name=axis_name
        )

    def logprobs(params: Params, tokens_BL: Any, mask_BL: Any, temperature: Any) -> Any:
        return lm.token_stats(
            params, tokens_BL, cfg=cfg, prompt_width=prompt_width, mask_BL=mask_BL, temperature=temperature
        )

    def values(params: Params, tokens_BL: Any, mask_BL: Any) -> jax.Array:
        return lm.values(params, tokens_BL, cfg=critic_cfg or cfg, prompt_width=prompt_width, mask_BL=mask_BL)

    def model_score(params: Params, rollout: types.Rollout) -> jax.Array:
        return lm.score(params, rollout.tokens_BL, cfg=score_cfg or cfg, mask_BL=rollout.mask_BL)

    token_logprobs = partial(lm.token_logprobs, cfg=cfg)
    return ppo_state.Models(generate, logprobs, values if critic else None, score or model_score, token_logprobs, watch)
