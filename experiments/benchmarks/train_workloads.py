"""This library's training steps, built as a user would build them: one compiled step that donates its state."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import measured_models, sizes
from rlhf_jax import generation, lm, parallel, types
from rlhf_jax.train import dpo as dpo_lib
from rlhf_jax.train import objectives, ppo, reward_model, sft
from rlhf_jax.train import state as state_lib

HYPER = {"learning_rate": np.float32(1e-4), "max_grad_norm": np.float32(1.0)}

Ready = tuple[Callable[[], Any], dict[str, float]]
"""A function that makes one repetition and returns when it is done, and what a repetition consists of."""


def parts(work: sizes.Work) -> int:
    """Micro-batches of a step. On a CPU a small model is faster in two: what each leaves stays in the caches."""
    return 2 if work.size_name == "s" and jax.default_backend() == "cpu" else 1


def adam() -> optax.GradientTransformation:
    """Adam with unit rate; the steps multiply by a traced one."""
    return optax.chain(optax.scale_by_adam(), optax.scale(-1.0))


def supervised(work: sizes.Work) -> Ready:
    """Next-token loss on every token of a few rows."""
    shapes, cfg = work.shapes, measured_models.config(work.size)
    logprobs = partial(lm.token_logprobs, cfg=cfg)
    train_step = parallel.jit_step(sft.make_train_step(logprobs, micro_batches=parts(work)))
    mask_BL = np.ones((shapes.rows, shapes.length), bool)

    def batch(rng: np.random.Generator) -> sft.TokenBatch:
        tokens_BL = measured_models.random_rows(rng, work.size, *mask_BL.shape)
        return sft.TokenBatch(tokens_BL, mask_BL, mask_BL)  # type: ignore[arg-type]

    once = _stepper(train_step, state_lib.create(measured_models.init(cfg), adam()), None, HYPER, batch)
    return once, {
        "tokens": mask_BL.size,
        "operations": sizes.training_operations(work.size, rows=shapes.rows, length=shapes.length),
    }


def reward(work: sizes.Work) -> Ready:
    """The ranking loss of pairs."""
    shapes, cfg = work.shapes, measured_models.config(work.size)
    score = partial(lm.score, cfg=cfg)
    train_step = parallel.jit_step(reward_model.make_train_step(score, micro_batches=parts(work)))
    mask_BKL = np.ones((shapes.rows, 2, shapes.length), bool)
    ranks_BK = np.tile(np.array([1, 2], np.int32), (shapes.rows, 1))

    def batch(rng: np.random.Generator) -> types.Comparisons:
        tokens_BKL = measured_models.random_rows(rng, work.size, *mask_BKL.shape)
        return types.Comparisons(tokens_BKL, mask_BKL, ranks_BK, ranks_BK > 0)  # type: ignore[arg-type]

    params = lm.with_head(jax.random.key(1), measured_models.init(cfg), cfg)
    once = _stepper(train_step, state_lib.create(params, adam()), None, HYPER, batch)
    operations = sizes.training_operations(
        work.size, rows=2 * shapes.rows, length=shapes.length, params=work.size.trunk_params
    )
    return once, {"tokens": mask_BKL.size, "operations": operations}


def dpo(work: sizes.Work) -> Ready:
    """DPO on pairs of answers to one prompt, the reference's pass included."""
    shapes, cfg = work.shapes, measured_models.config(work.size)
    P, L = shapes.dpo_prompt, shapes.length
    logprobs = partial(lm.token_logprobs, cfg=cfg, prompt_width=P)
    train_step = parallel.jit_step(dpo_lib.make_train_step(logprobs, objectives.dpo, micro_batches=parts(work)))
    answer_B2T = np.ones((shapes.rows, 2, L - P), bool)

    def batch(rng: np.random.Generator) -> types.Preferences:
        tokens_B2L = measured_models.random_rows(rng, work.size, shapes.rows, 2, L)
        tokens_B2L[:, 1, :P] = tokens_B2L[:, 0, :P]
        return types.Preferences(tokens_B2L, None, answer_B2T)  # type: ignore[arg-type]

    params = measured_models.init(cfg)
    hyper = dpo_lib.Hyper(**HYPER, beta=np.float32(0.1))
    once = _stepper(train_step, state_lib.create(params, adam()), params, hyper, batch)
    # The reference's forward pass is a third of what a forward and a backward pass are.
    operations = 4 / 3 * sizes.training_operations(work.size, rows=2 * shapes.rows, length=L)
    return once, {"tokens": 2 * shapes.rows * L, "operations": operations}


def ppo_iteration(work: sizes.Work) -> Ready:
    """Sampling, scoring and all updates of one iteration; policy, reference, critic and reward model are apart."""
    shapes, cfg = work.shapes, measured_models.config(work.size)
    P, B = shapes.ppo_prompt, shapes.ppo_samples
    functions = ppo_models(cfg, prompt_width=P, max_new_tokens=shapes.ppo_answer)
    train_step = parallel.jit_step(
        ppo.make_train_step(functions, epochs=shapes.ppo_epochs, minibatches=shapes.ppo_minibatches)
    )
    numbers = {"learning_rate": 1e-5, "critic_learning_rate": 1e-5, "kl_coef": 0.05, "max_grad_norm": 1.0}
    hyper = ppo.Hyper(**{name: np.float32(number) for name, number in numbers.items()})
    mask_BP = np.ones((B, P), bool)

    def batch(rng: np.random.Generator) -> ppo.Batch:
        return ppo.Batch(measured_models.random_rows(rng, work.size, B, P), mask_BP)  # type: ignore[arg-type]

    policy = measured_models.init(cfg)
    scorer = lm.with_head(jax.random.key(1), measured_models.init(cfg, 1), cfg)
    frozen = ppo.Frozen(reference=policy, reward=scorer)
    once = _stepper(train_step, ppo.create(policy, scorer, adam()), frozen, hyper, batch)
    return once, {"tokens": B * shapes.ppo_answer}


def ppo_models(cfg: lm.LMConfig, *, prompt_width: int, max_new_tokens: int) -> ppo.Models:
    """This library's model as the functions that PPO calls; no stop, so that every iteration is equally long."""
    how = generation.Sampling(max_new_tokens=max_new_tokens)

    def generate(params: types.Params, rng_B: jax.Array, prompts_BP: Any, mask_BP: Any, temperature: Any) -> Any:
        sampling = how.replace(temperature=temperature)  # type: ignore[attr-defined]
        return generation.generate(params, rng_B, prompts_BP, mask_BP, cfg=cfg, sampling=sampling)

    def logprobs(params: types.Params, tokens_BL: Any, mask_BL: Any, temperature: Any) -> Any:
        return lm.token_stats(
            params, tokens_BL, cfg=cfg, prompt_width=prompt_width, mask_BL=mask_BL, temperature=temperature
        )

    def values(params: types.Params, tokens_BL: Any, mask_BL: Any) -> jax.Array:
        return lm.values(params, tokens_BL, cfg=cfg, prompt_width=prompt_width, mask_BL=mask_BL)

    def score(params: types.Params, rollout: types.Rollout) -> jax.Array:
        return lm.score(params, rollout.tokens_BL, cfg=cfg, mask_BL=rollout.mask_BL)

    return ppo.Models(generate, logprobs, values, score)


def _stepper(train_step: Any, state: Any, frozen: Any, hyper: Any, batch: Callable[..., Any]) -> Callable[[], Any]:
    rng, key = np.random.default_rng(0), jax.random.key(2)

    def once() -> None:
        nonlocal state
        state, logs = train_step(state, frozen, hyper, batch(rng), key)
        jax.block_until_ready((state, logs))

    return once
