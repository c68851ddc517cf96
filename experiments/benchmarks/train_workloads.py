"""This library's training workloads. Each is a compiled step that donates its state.

Each function prepares a workload and returns a function that runs one repetition of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from benchmarks import benchmark_models
from rlhf_jax import generation, lm, parallel, types
from rlhf_jax.train import dpo as dpo_lib
from rlhf_jax.train import objectives, ppo, ppo_models, reward_model, sft
from rlhf_jax.train import state as state_lib

HYPER = {"learning_rate": np.float32(1e-4), "max_grad_norm": np.float32(1.0)}

Repetition = Callable[[], Any]


def adam() -> optax.GradientTransformation:
    """Returns Adam with learning rate 1; the training steps multiply its updates by a traced learning rate."""
    return optax.chain(optax.scale_by_adam(), optax.scale(-1.0))


def supervised(cfg: lm.LMConfig, *, rows: int, length: int, micro_batches: int = 1) -> Repetition:
    """Prepares a step of supervised fine-tuning on all tokens."""
    train_step = parallel.jit_step(
        sft.make_train_step(partial(lm.token_logprobs, cfg=cfg), micro_batches=micro_batches)
    )
    mask_BL = np.ones((rows, length), bool)

    def batch(rng: np.random.Generator) -> sft.TokenBatch:
        return sft.TokenBatch(benchmark_models.random_rows(rng, cfg, rows, length), mask_BL, mask_BL)

    return _stepper(train_step, state_lib.create(benchmark_models.init(cfg), adam()), None, HYPER, batch)


def reward(cfg: lm.LMConfig, *, pairs: int, length: int, micro_batches: int = 1) -> Repetition:
    """Prepares a training step of a reward model on pairs."""
    train_step = parallel.jit_step(
        reward_model.make_train_step(partial(lm.score, cfg=cfg), micro_batches=micro_batches)
    )
    mask_BKL = np.ones((pairs, 2, length), bool)
    ranks_BK = np.tile(np.array([1, 2], np.int32), (pairs, 1))

    def batch(rng: np.random.Generator) -> types.Comparisons:
        tokens_BKL = benchmark_models.random_rows(rng, cfg, *mask_BKL.shape)
        return types.Comparisons(tokens_BKL, mask_BKL, ranks_BK, ranks_BK > 0)  # type: ignore[arg-type]

    params = lm.with_head(jax.random.key(1), benchmark_models.init(cfg), cfg)
    return _stepper(train_step, state_lib.create(params, adam()), None, HYPER, batch)


def dpo(cfg: lm.LMConfig, *, pairs: int, prompt: int, length: int, micro_batches: int = 1) -> Repetition:
    """Prepares a DPO step on pairs, including the reference's forward pass."""
    logprobs = partial(lm.token_logprobs, cfg=cfg, prompt_width=prompt)
    train_step = parallel.jit_step(dpo_lib.make_train_step(logprobs, objectives.dpo, micro_batches=micro_batches))
    answer_B2T = np.ones((pairs, 2, length - prompt), bool)

    def batch(rng: np.random.Generator) -> types.Preferences:
        tokens_B2L = benchmark_models.random_rows(rng, cfg, pairs, 2, length)
        tokens_B2L[:, 1, :prompt] = tokens_B2L[:, 0, :prompt]
        return types.Preferences(tokens_B2L, None, answer_B2T)  # type: ignore[arg-type]

    params = benchmark_models.init(cfg)
    hyper = dpo_lib.Hyper(**HYPER, beta=np.float32(0.1))
    return _stepper(train_step, state_lib.create(params, adam()), params, hyper, batch)


class PPOInputs(NamedTuple):
    """The inputs of a PPO iteration with four separate models."""

    models: ppo.Models
    state: Callable[[], ppo.PPOState]
    """Returns a new initial state, which a step may donate."""
    frozen: ppo.Frozen
    hyper: ppo.Hyper
    batch: Callable[[np.random.Generator], ppo.Batch]
    """Returns random prompts."""


def ppo_inputs(cfg: lm.LMConfig, *, samples: int, prompt: int, answer: int) -> PPOInputs:
    """Returns the inputs of PPO with random models. There are no stop tokens, so all answers have full length."""
    models = ppo_models.from_config(cfg, generation.Sampling(max_new_tokens=answer), prompt_width=prompt)
    rates = {"learning_rate": 1e-5, "critic_learning_rate": 1e-5, "kl_coef": 0.05, "max_grad_norm": 1.0}
    hyper = ppo.Hyper(**{name: np.float32(rate) for name, rate in rates.items()})
    mask_BP = np.ones((samples, prompt), bool)

    def batch(rng: np.random.Generator) -> ppo.Batch:
        return ppo.Batch(benchmark_models.random_rows(rng, cfg, samples, prompt), mask_BP)  # type: ignore[arg-type]

    policy = benchmark_models.init(cfg)
    scorer = lm.with_head(jax.random.key(1), benchmark_models.init(cfg, 1), cfg)
    frozen, tx = ppo.Frozen(reference=policy, reward=scorer), adam()
    return PPOInputs(models, lambda: ppo.create(policy, scorer, tx), frozen, hyper, batch)


def ppo_iteration(
    cfg: lm.LMConfig, *, samples: int, prompt: int, answer: int, epochs: int, minibatches: int
) -> Repetition:
    """Prepares a PPO iteration (sampling, scoring and all updates) with four separate models."""
    inputs = ppo_inputs(cfg, samples=samples, prompt=prompt, answer=answer)
    train_step = parallel.jit_step(ppo.make_train_step(inputs.models, epochs=epochs, minibatches=minibatches))
    return _stepper(train_step, inputs.state(), inputs.frozen, inputs.hyper, inputs.batch)


def _stepper(train_step: Any, state: Any, frozen: Any, hyper: Any, batch: Callable[..., Any]) -> Callable[[], Any]:
    rng, key = np.random.default_rng(0), jax.random.key(2)

    def repetition() -> None:
        nonlocal state
        state, logs = train_step(state, frozen, hyper, batch(rng), key)
        jax.block_until_ready((state, logs))

    return repetition
