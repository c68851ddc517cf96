"""The stages of InstructGPT's recipe, in order. Each is a pure function of the task, the settings and what came before.

A stage that was finished is restored instead of trained; one that was under way goes on from its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from recipe import monitoring, policy_sampling, rl_methods, tasks
from recipe import validation_loss as validation_lib
from recipe.jobs import Job
from rlhf_jax import lm, types
from rlhf_jax.data import batching
from rlhf_jax.train import ppo, sft
from rlhf_jax.train import state as state_lib
from rlhf_jax.train.optim import schedules

Params = types.Params


def hyper(rate: Any) -> dict[str, np.float32]:
    """What the supervised and the reward-model step take, with gradients clipped to norm 1."""
    return {"learning_rate": np.float32(rate), "max_grad_norm": np.float32(1.0)}


def pretrain(job: Job) -> Params:
    """A base model from nothing, on the corpus; or the one that the run was given, as it is."""
    if job.base is not None:
        job.progress.skip("pretrain")
        return job.base
    settings, rows_BL = job.settings.pretrain, job.task.pretraining_BL
    key = job.key("pretrain")
    order = batching.epoch_batches(0, n=len(rows_BL), batch_size=settings.batch, key=key, steps=settings.steps)

    def rate(i: int) -> Any:
        warm = schedules.constant_with_warmup(i, settings.steps, warmup=settings.warmup)
        return settings.learning_rate * warm * schedules.cosine(i, settings.steps)

    state = job.fit(
        "pretrain",
        job.supervised_step,
        job.begin(lambda key: state_lib.create(jax.jit(partial(lm.init, cfg=job.cfg))(key), job.supervised_tx), key),
        settings.steps,
        batch_at=lambda i: tasks.text_batch(rows_BL[order[i]]),
        hyper_at=lambda i: hyper(rate(i)),
    )
    return state.params


def supervised(job: Job, stage: str, base: Params, *, epochs: int, mix: float) -> Params:
    """Fine-tune on demonstrations, a share ``mix`` of each batch being pretraining rows."""
    settings, batch = job.settings, job.settings.pretrain.batch
    demonstrations, text_BL = job.task.demonstrations, job.task.pretraining_BL
    n_text = round(batch * mix)
    n_demos = batch - n_text
    steps = max(1, epochs * len(demonstrations.tokens_BL) // n_demos)
    key = job.key(stage)
    demo_order = batching.epoch_batches(
        0, n=len(demonstrations.tokens_BL), batch_size=n_demos, key=jax.random.fold_in(key, 0), steps=steps
    )
    text_order = batching.epoch_batches(
        0, n=len(text_BL), batch_size=max(n_text, 1), key=jax.random.fold_in(key, 1), steps=steps
    )

    def batch_at(i: int) -> sft.TokenBatch:
        demos = tasks.token_batch(demonstrations, demo_order[i])
        if n_text == 0:
            return demos
        text = tasks.text_batch(text_BL[text_order[i]])
        return jax.tree.map(lambda a, b: np.concatenate([a, b]), demos, text)

    state = job.fit(
        stage,
        job.supervised_step,
        job.begin(partial(state_lib.create, tx=job.supervised_tx), base),
        steps,
        batch_at=batch_at,
        hyper_at=lambda i: hyper(settings.sft.learning_rate * schedules.cosine(i, steps)),
    )
    return state.params


def train_reward_models(job: Job, start: Params, parts: list[types.Comparisons], **how: Any) -> list[Params]:
    """The reward model, and one that was held out where the comparisons are in two parts (Bai et al. 2022, 4.2)."""
    named = zip(("reward_model", "heldout_reward_model"), parts)
    made = (normalised(job, train_reward_model(job, start, part, stage=stage, **how), start) for stage, part in named)
    return [job.placed(params) for params in made]


def train_reward_model(
    job: Job,
    start: Params,
    train: types.Comparisons,
    *,
    validation: types.Comparisons | None = None,
    stage: str = "reward_model",
) -> Params:
    """One epoch over the comparisons, all pairs of a prompt in one batch element; see `validated` for the others."""
    settings, n = job.settings.reward_model, len(train.ranks_BK)
    batch = min(settings.batch, n)
    steps = n // batch
    key = job.key(stage)
    order = batching.epoch_batches(0, n=n, batch_size=batch, key=key, steps=steps)
    params = lm.with_head(jax.random.fold_in(key, 1), start, job.cfg)
    state = job.fit(
        stage,
        job.reward_step,
        job.begin(partial(state_lib.create, tx=job.supervised_tx), params),
        steps,
        batch_at=lambda i: jax.tree.map(lambda x: np.asarray(x)[order[i]], train),
        hyper_at=lambda i: hyper(settings.learning_rate * schedules.cosine(i, steps)),
        **({} if validation is None else validated(job, stage, validation, steps=steps)),
    )
    return lm.heads.absorb_gain(state.params)


def validated(job: Job, stage: str, held_out: types.Comparisons, *, steps: int, **how: Any) -> dict[str, Any]:
    """What `Job.fit` takes to log the loss on ``held_out`` comparisons, and to raise alarms on it."""
    return {
        "callbacks": [validation_lib.logged(job.sampler.score, held_out, steps=steps, **how)],
        "log": monitoring.watched(job.log, stage, job.settings, partial(job.progress.message, stage)),
    }


def normalised(job: Job, params: Params, policy: Params) -> Params:
    """Scale scores to standard deviation 1 on samples of ``policy``; shift them so that demonstrations have mean 0.

    InstructGPT 3.5 centres on demonstrations; the scale makes the KL coefficient mean the same from run to run. Both
    are kept in the head, so they are saved with the model.
    """
    prompt_set = job.task.rl_prompts.take(policy_sampling.CHUNK)
    key = jax.random.fold_in(job.key("reward_model"), 2)
    samples = job.sampler(policy, policy, params, prompt_set, key)
    params = lm.heads.standardise(params, job.everywhere(samples.scores_B))
    rows = job.task.demonstrations
    n = min(1024, len(rows.tokens_BL))
    scores = job.sampler.score(params, rows.tokens_BL[:n], rows.mask_BL[:n])
    return lm.heads.centre(params, job.everywhere(scores))


def optimise(job: Job, stage: str, start: Params, rewards: list[Params], *, ptx_coef: float) -> Params:
    """PPO from ``start``, with ``start`` as the KL reference; the second of two reward models only looks on."""
    batch_at, hyper_at = ppo_inputs(job, stage, ptx_coef=ptx_coef)
    state = job.fit(
        stage,
        job.ppo_step,
        job.new_policy(start, rewards[0]),
        job.settings.ppo.iterations,
        batch_at=batch_at,
        hyper_at=hyper_at,
        frozen=ppo.Frozen(start, *rewards),
        log=monitoring.watched(job.log, stage, job.settings, partial(job.progress.message, stage)),
    )
    return state.ema


def ppo_inputs(
    job: Job, stage: str, *, ptx_coef: float
) -> tuple[Callable[[int], ppo.Batch], Callable[[int], ppo.Hyper]]:
    """Batch and hyperparameters of each iteration of PPO."""
    settings, task = job.settings.ppo, job.task
    key = job.key(stage)
    prompts_, updates = task.rl_prompts, settings.epochs * settings.minibatches
    asked = settings.batch // settings.samples
    order = batching.epoch_batches(0, n=len(prompts_), batch_size=asked, key=key, steps=settings.iterations)
    n_text = updates * round(settings.batch // settings.minibatches * settings.ptx_ratio)
    text_order = batching.epoch_batches(
        0,
        n=len(task.pretraining_BL),
        batch_size=n_text,
        key=jax.random.fold_in(key, 1),
        steps=settings.iterations,
    )

    def batch_at(i: int) -> ppo.Batch:
        rows = order[i]
        return ppo.Batch(
            prompts_.tokens_BP[rows],  # type: ignore[arg-type]
            prompts_.mask_BP[rows],  # type: ignore[arg-type]
            tasks.text_batch(task.pretraining_BL[text_order[i]]),
        )

    return batch_at, lambda i: rl_methods.hyper(settings, i, ptx_coef=ptx_coef)
