"""This library's training workloads. Each is a compiled step that donates its state."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import benchmark_models, workload_sizes
from rlhf_jax import generation, lm, parallel, types
from rlhf_jax.train import dpo as dpo_lib
from rlhf_jax.train import objectives, ppo, reward_model, sft
from rlhf_jax.train import state as state_lib

HYPER = {"learning_rate": np.float32(1e-4), "max_grad_norm": np.float32(1.0)}

PreparedWorkload = tuple[Callable[[], Any], dict[str, float]]
"""A function that runs one repetition and returns when its results are ready, and the cost of a repetition."""


def _micro_batches(workload: workload_sizes.Workload) -> int:
    """Returns the number of micro-batches; on a CPU, two are faster for model S, because each fits the caches."""
    return 2 if workload.size_name == "s" and jax.default_backend() == "cpu" else 1


def _adam() -> optax.GradientTransformation:
    """Returns Adam with learning rate 1; the training steps multiply its updates by a traced learning rate."""
    return optax.chain(optax.scale_by_adam(), optax.scale(-1.0))


def supervised(workload: workload_sizes.Workload) -> PreparedWorkload:
    """Prepares a step of supervised fine-tuning on all tokens."""
    shapes, cfg = workload.shapes, benchmark_models.config(workload.size)
    logprobs = partial(lm.token_logprobs, cfg=cfg)
    train_step = parallel.jit_step(sft.make_train_step(logprobs, micro_batches=_micro_batches(workload)))
    mask_BL = np.ones((shapes.rows, shapes.length), bool)

    def batch(rng: np.random.Generator) -> sft.TokenBatch:
        tokens_BL = benchmark_models.random_rows(rng, workload.size, *mask_BL.shape)
        return sft.TokenBatch(tokens_BL, mask_BL, mask_BL)  # type: ignore[arg-type]

    repetition = _stepper(train_step, state_lib.create(benchmark_models.init(cfg), _adam()), None, HYPER, batch)
    return repetition, {
        "tokens": mask_BL.size,
        "operations": workload_sizes.training_flops(workload.size, rows=shapes.rows, length=shapes.length),
    }


def reward(workload: workload_sizes.Workload) -> PreparedWorkload:
    """Prepares a training step of a reward model on pairs."""
    shapes, cfg = workload.shapes, benchmark_models.config(workload.size)
    score = partial(lm.score, cfg=cfg)
    train_step = parallel.jit_step(reward_model.make_train_step(score, micro_batches=_micro_batches(workload)))
    mask_BKL = np.ones((shapes.rows, 2, shapes.length), bool)
    ranks_BK = np.tile(np.array([1, 2], np.int32), (shapes.rows, 1))

    def batch(rng: np.random.Generator) -> types.Comparisons:
        tokens_BKL = benchmark_models.random_rows(rng, workload.size, *mask_BKL.shape)
        return types.Comparisons(tokens_BKL, mask_BKL, ranks_BK, ranks_BK > 0)  # type: ignore[arg-type]

    params = lm.with_head(jax.random.key(1), benchmark_models.init(cfg), cfg)
    repetition = _stepper(train_step, state_lib.create(params, _adam()), None, HYPER, batch)
    operations = workload_sizes.training_flops(
        workload.size, rows=2 * shapes.rows, length=shapes.length, params=workload.size.trunk_params
    )
    return repetition, {"tokens": mask_BKL.size, "operations": operations}


def dpo(workload: workload_sizes.Workload) -> PreparedWorkload:
    """Prepares a DPO step on pairs that includes the reference's forward pass."""
    shapes, cfg = workload.shapes, benchmark_models.config(workload.size)
    P, L = shapes.dpo_prompt, shapes.length
    logprobs = partial(lm.token_logprobs, cfg=cfg, prompt_width=P)
    train_step = parallel.jit_step(
        dpo_lib.make_train_step(logprobs, objectives.dpo, micro_batches=_micro_batches(workload))
    )
    answer_B2T = np.ones((shapes.rows, 2, L - P), bool)

    def batch(rng: np.random.Generator) -> types.Preferences:
        tokens_B2L = benchmark_models.random_rows(rng, workload.size, shapes.rows, 2, L)
        tokens_B2L[:, 1, :P] = tokens_B2L[:, 0, :P]
        return types.Preferences(tokens_B2L, None, answer_B2T)  # type: ignore[arg-type]

    params = benchmark_models.init(cfg)
    hyper = dpo_lib.Hyper(**HYPER, beta=np.float32(0.1))
    repetition = _stepper(train_step, state_lib.create(params, _adam()), params, hyper, batch)
    # The reference's forward pass costs a third of the policy's forward and backward passes.
    operations = 4 / 3 * workload_sizes.training_flops(workload.size, rows=2 * shapes.rows, length=L)
    return repetition, {"tokens": 2 * shapes.rows * L, "operations": operations}


def ppo_iteration(workload: workload_sizes.Workload) -> PreparedWorkload:
    """Prepares a PPO iteration with four separate models: sampling, scoring and all updates."""
    from recipe import jobs  # imported here, because it would add to the peak memory of the other workloads

    shapes, cfg = workload.shapes, benchmark_models.config(workload.size)
    P, B = shapes.ppo_prompt, shapes.ppo_samples
    # Without a stop token, every iteration takes equally long.
    models = jobs.ppo_models(cfg, generation.Sampling(max_new_tokens=shapes.ppo_answer), prompt_width=P)
    train_step = parallel.jit_step(
        ppo.make_train_step(models, epochs=shapes.ppo_epochs, minibatches=shapes.ppo_minibatches)
    )
    numbers = {"learning_rate": 1e-5, "critic_learning_rate": 1e-5, "kl_coef": 0.05, "max_grad_norm": 1.0}
    hyper = ppo.Hyper(**{name: np.float32(number) for name, number in numbers.items()})
    mask_BP = np.ones((B, P), bool)

    def batch(rng: np.random.Generator) -> ppo.Batch:
        return ppo.Batch(benchmark_models.random_rows(rng, workload.size, B, P), mask_BP)  # type: ignore[arg-type]

    policy = benchmark_models.init(cfg)
    scorer = lm.with_head(jax.random.key(1), benchmark_models.init(cfg, 1), cfg)
    frozen = ppo.Frozen(reference=policy, reward=scorer)
    repetition = _stepper(train_step, ppo.create(policy, scorer, _adam()), frozen, hyper, batch)
    return repetition, {"tokens": B * shapes.ppo_answer}


def _stepper(train_step: Any, state: Any, frozen: Any, hyper: Any, batch: Callable[..., Any]) -> Callable[[], Any]:
    rng, key = np.random.default_rng(0), jax.random.key(2)

    def repetition() -> None:
        nonlocal state
        state, logs = train_step(state, frozen, hyper, batch(rng), key)
        jax.block_until_ready((state, logs))

    return repetition
