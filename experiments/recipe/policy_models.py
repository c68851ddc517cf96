"""The functions of policy, critic and reward model that PPO calls, for this library's language model."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax

from rlhf_jax import generation, lm, types
from rlhf_jax.simulation import gold
from rlhf_jax.train import ppo

Params = types.Params


def ppo_models(
    cfg: lm.LMConfig,
    spec: generation.Sampling,
    *,
    prompt_width: int,
    tables: gold.Tables | None = None,
    samples: int = 1,
    critic: bool = True,
    axis_name: str | None = None,
) -> ppo.Models:
    """Returns the functions of policy, critic and reward model that PPO calls.

    Args:
        cfg: The architecture of all models.
        spec: Settings of the sampler.
        prompt_width: Number of tokens in a padded prompt.
        tables: Tables of the gold utility. If they are given, the gold utility of rollouts is logged.
        samples: Number of answers to each prompt.
        critic: Whether the method has a critic.
        axis_name: Name of the axis of a ``jax.vmap`` over the whole step.

    Returns:
        The functions.
    """

    def generate(params: Params, rng_B: jax.Array, prompts_BP: Any, mask_BP: Any, temperature: Any) -> types.Rollout:
        sampling = spec.replace(temperature=temperature)  # type: ignore[attr-defined]
        return generation.generate(
            params, rng_B, prompts_BP, mask_BP, cfg=cfg, sampling=sampling, n=samples, axis_name=axis_name
        )

    def logprobs(params: Params, tokens_BL: Any, mask_BL: Any, temperature: Any) -> Any:
        return lm.token_stats(
            params, tokens_BL, cfg=cfg, prompt_width=prompt_width, mask_BL=mask_BL, temperature=temperature
        )

    def values(params: Params, tokens_BL: Any, mask_BL: Any) -> jax.Array:
        return lm.values(params, tokens_BL, cfg=cfg, prompt_width=prompt_width, mask_BL=mask_BL)

    def score(params: Params, rollout: types.Rollout) -> jax.Array:
        return lm.score(params, rollout.tokens_BL, cfg=cfg, mask_BL=rollout.mask_BL)

    watch = None if tables is None else partial(_gold_utility, tables, prompt_width=prompt_width)
    token_logprobs = partial(lm.token_logprobs, cfg=cfg)
    return ppo.Models(generate, logprobs, values if critic else None, score, token_logprobs, watch)


def _gold_utility(tables: gold.Tables, rollout: types.Rollout, *, prompt_width: int) -> dict[str, jax.Array]:
    utility = jax.vmap(gold.utility, in_axes=(None, 0, 0, 0))
    prompts_BP, answers_BT = rollout.tokens_BL[:, :prompt_width], rollout.tokens_BL[:, prompt_width:]
    return {"gold": utility(tables, prompts_BP, answers_BT, rollout.response_mask_BT).total}
