"""Expert iteration (rejection-sampling fine-tuning): fine-tunes a policy on the best of its sampled answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from launch import device_mesh
from recipe import jobs, policy_sampling, stages, tasks

from rlhf_jax import types
from rlhf_jax.data import batching
from rlhf_jax.train import loop, sft
from rlhf_jax.train import state as state_lib
from sweeps import run_grid


def train(
    job: jobs.Job,
    models: run_grid.StartModels,
    prompts: tasks.PromptSet,
    *,
    name: str,
    seed: int,
    rounds: int,
    samples: int,
    steps: int,
    learning_rate: float,
    measure: Callable[[types.Params], dict[str, float]],
) -> tuple[types.Params, list[dict[str, float]]]:
    """Trains a policy by expert iteration (Anthony et al. 2017).

    Each round uses a different part of the prompts and continues from the policy of the previous round. A single round
    is the rejection sampling of Touvron et al. 2023. The KL to the start policy is measured but not penalised.

    Args:
        job: The job of the run.
        models: The SFT model to start from and the reward model that selects answers.
        prompts: The prompts, which are divided among the rounds.
        name: Prefix of the name of each round's stage.
        seed: Seed of the run.
        rounds: Number of rounds.
        samples: Number of answers sampled per prompt; the best is kept.
        steps: Number of optimiser steps per round, each on --pretrain.batch of the kept answers.
        learning_rate: Learning rate of fine-tuning.
        measure: Measures the policy after each round.

    Returns:
        The policy of the last round and the measurements.
    """
    policy, key = models.start, jax.random.fold_in(job.key("ppo"), seed)
    n = len(prompts) // rounds
    measured: list[dict[str, float]] = []
    for r in range(rounds):
        round_prompts = prompts.at(np.repeat(np.arange(r * n, (r + 1) * n), samples))
        answers = job.sampler(policy, models.start, models.reward, round_prompts, jax.random.fold_in(key, 2 * r))
        best = np.arange(n) * samples + answers.scores_B.reshape(n, samples).argmax(axis=1)
        policy = _fine_tune(
            job,
            policy,
            jax.tree.map(lambda x: x[best], answers),  # noqa: B023
            name=f"{name}-round{r}",
            key=jax.random.fold_in(key, 2 * r + 1),
            steps=steps,
            learning_rate=learning_rate,
        )
        measured.append(measure(policy))
    return policy, measured


def _fine_tune(
    job: jobs.Job,
    policy: types.Params,
    answers: policy_sampling.Answers,
    *,
    name: str,
    key: jax.Array,
    steps: int,
    learning_rate: float,
) -> types.Params:
    rows, batch = len(answers.tokens_BL), job.settings.pretrain.batch
    batch = device_mesh.round_rows_down(min(batch, rows), job.mesh, "--pretrain.batch")
    order = batching.epoch_batches(0, n=rows, batch_size=batch, key=key, steps=steps)
    loss_mask_BL = np.zeros_like(answers.mask_BL)
    loss_mask_BL[:, job.task.prompt_width :] = answers.response_mask_BT

    def batch_at(i: int) -> Any:
        parts = (answers.tokens_BL, answers.mask_BL, loss_mask_BL)
        return sft.TokenBatch(*(jnp.asarray(x[order[i]]) for x in parts))

    with job.checkpoints(name) as checkpoints:
        state = loop.fit(
            job.supervised_step,
            job.create_on_mesh(partial(state_lib.create, tx=job.supervised_tx), policy),
            steps=steps,
            batch_at=batch_at,
            hyper_at=lambda i: stages.hyper(learning_rate),
            rng=key,
            stage=name,
            log=job.log,
            checkpoints=checkpoints,
            **job.loop_checks(name, steps, batch_at),
        )
    return state.params
