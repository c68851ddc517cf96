"""The stages of InstructGPT's recipe, in order, and functions that prepare their inputs.

The function of a stage returns the trained parameters. The results of a finished stage are restored. An interrupted
stage resumes from its last checkpoint.
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
    """Returns the hyperparameters of a supervised or reward-model step. Gradients are clipped to norm 1."""
    return {"learning_rate": np.float32(rate), "max_grad_norm": np.float32(1.0)}


def pretrain(job: Job) -> Params:
    """Trains the base model on the corpus from random weights or, with --model, returns that model."""
    if job.base is not None:
        job.progress.skip("pretrain")
        return job.base
    settings, rows_BL = job.settings.pretrain, job.task.pretraining_BL
    key = job.key("pretrain")
    order = batching.epoch_batches(0, n=len(rows_BL), batch_size=settings.batch, key=key, steps=settings.steps)

    def initial_state(key: jax.Array) -> state_lib.TrainState:
        return state_lib.create(jax.jit(partial(lm.init, cfg=job.cfg))(key), job.supervised_tx)

    def rate(i: int) -> Any:
        warmup = schedules.constant_with_warmup(i, settings.steps, warmup=settings.warmup)
        return settings.learning_rate * warmup * schedules.cosine(i, settings.steps)

    state = job.fit(
        "pretrain",
        job.supervised_step,
        job.create_on_mesh(initial_state, key),
        settings.steps,
        batch_at=lambda i: tasks.text_batch(rows_BL[order[i]]),
        hyper_at=lambda i: hyper(rate(i)),
    )
    return state.params


def supervised(job: Job, stage: str, base: Params, *, epochs: int, mix: float) -> Params:
    """Fine-tunes ``base`` on demonstrations.

    Args:
        job: The job of the run.
        stage: Name of the stage.
        base: Initial parameters.
        epochs: Number of passes over the demonstrations.
        mix: Share of pretraining rows in each batch.

    Returns:
        The parameters of the SFT model.
    """
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
        job.create_on_mesh(partial(state_lib.create, tx=job.supervised_tx), base),
        steps,
        batch_at=batch_at,
        hyper_at=lambda i: hyper(settings.sft.learning_rate * schedules.cosine(i, steps)),
    )
    return state.params


def train_reward_models(job: Job, start: Params, parts: list[types.Comparisons], **options: Any) -> list[Params]:
    """Trains a reward model on each part and normalises its scores.

    RL only logs the scores of a second model (Bai et al. 2022, section 4.2).
    """
    rewards = []
    for stage, part in zip(("reward_model", "heldout_reward_model"), parts):
        reward = train_reward_model(job, start, part, stage=stage, **options)
        rewards.append(job.put_params(normalise_scores(job, reward, start)))
    return rewards


def train_reward_model(
    job: Job,
    start: Params,
    train: types.Comparisons,
    *,
    validation: types.Comparisons | None = None,
    stage: str = "reward_model",
) -> Params:
    """Trains a reward model for one epoch; all pairs of a prompt are in the same batch.

    Args:
        job: The job of the run.
        start: Initial parameters, those of an SFT model.
        train: Training comparisons.
        validation: Held-out comparisons. If they are given, the loss on them is logged.
        stage: Name of the stage.

    Returns:
        The parameters, including a scalar head.
    """
    settings, n = job.settings.reward_model, len(train.ranks_BK)
    batch = min(settings.batch, n)
    steps = n // batch
    key = job.key(stage)
    order = batching.epoch_batches(0, n=n, batch_size=batch, key=key, steps=steps)
    params = lm.with_head(jax.random.fold_in(key, 1), start, job.cfg)
    state = job.fit(
        stage,
        job.reward_step,
        job.create_on_mesh(partial(state_lib.create, tx=job.supervised_tx), params),
        steps,
        batch_at=lambda i: jax.tree.map(lambda x: np.asarray(x)[order[i]], train),
        hyper_at=lambda i: hyper(settings.learning_rate * schedules.cosine(i, steps)),
        **({} if validation is None else validation_options(job, stage, validation, steps=steps)),
    )
    return lm.heads.absorb_gain(state.params)


def validation_options(
    job: Job, stage: str, held_out: types.Comparisons, *, steps: int, **options: Any
) -> dict[str, Any]:
    """Returns the arguments of `Job.fit` that log the loss on held-out comparisons and raise alarms about it."""
    return {
        "callbacks": [validation_lib.make_callback(job.sampler.score, held_out, steps=steps, **options)],
        "log": monitoring.watch_stage(
            job.log, stage, job.settings, partial(job.progress.message, stage), dtype=job.cfg.dtype
        ),
    }


def normalise_scores(job: Job, reward: Params, policy: Params) -> Params:
    """Scales scores to standard deviation 1 on samples of ``policy``, then shifts them to mean 0 on demonstrations.

    The scale makes KL coefficients comparable between runs. The shift is that of InstructGPT (section 3.5). Both
    numbers are stored in the head of the model and saved with it.
    """
    prompts = job.task.rl_prompts.take(policy_sampling.CHUNK)
    key = jax.random.fold_in(job.key("reward_model"), 2)
    samples = job.sampler(policy, policy, reward, prompts, key)
    reward = lm.heads.standardise(reward, job.replicate(samples.scores_B))
    rows = job.task.demonstrations
    n = min(1024, len(rows.tokens_BL))
    scores = job.sampler.score(reward, rows.tokens_BL[:n], rows.mask_BL[:n])
    return lm.heads.centre(reward, job.replicate(scores))


def train_ppo(job: Job, stage: str, start: Params, rewards: list[Params], *, ptx_coef: float) -> Params:
    """Trains a policy with the RL method of the settings.

    Args:
        job: The job of the run.
        stage: Name of the stage.
        start: Parameters of the SFT model, which is the initial policy and the KL reference.
        rewards: Parameters of the reward model and, optionally, of a held-out one, whose scores are only logged.
        ptx_coef: Weight of the pretraining loss; 0 for none.

    Returns:
        The moving average of the policy's parameters.
    """
    batch_at, hyper_at = ppo_inputs(job, stage, ptx_coef=ptx_coef)
    state = job.fit(
        stage,
        job.ppo_step,
        job.new_policy(start, rewards[0]),
        job.settings.ppo.iterations,
        batch_at=batch_at,
        hyper_at=hyper_at,
        frozen=ppo.Frozen(start, *rewards),
        log=monitoring.watch_stage(
            job.log, stage, job.settings, partial(job.progress.message, stage), dtype=job.cfg.dtype
        ),
    )
    return state.ema


def ppo_inputs(
    job: Job, stage: str, *, ptx_coef: float
) -> tuple[Callable[[int], ppo.Batch], Callable[[int], ppo.Hyper]]:
    """Returns ``(batch_at, hyper_at)``, which return the batch and the hyperparameters of an RL iteration."""
    settings, task = job.settings.ppo, job.task
    key = job.key(stage)
    prompts, updates = task.rl_prompts, settings.epochs * settings.minibatches
    order = batching.epoch_batches(
        0, n=len(prompts), batch_size=settings.batch // settings.samples, key=key, steps=settings.iterations
    )
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
            prompts.tokens_BP[rows],  # type: ignore[arg-type]
            prompts.mask_BP[rows],  # type: ignore[arg-type]
            tasks.text_batch(task.pretraining_BL[text_order[i]]),
        )

    return batch_at, lambda i: rl_methods.hyper(settings, i, ptx_coef=ptx_coef)
