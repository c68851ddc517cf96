"""Expert iteration (rejection-sampling fine-tuning): fine-tunes a policy on the best of its sampled answers."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

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


class Round(NamedTuple):
    """Means over the answers that a round samples before it fine-tunes."""

    reward: float
    kl: float
    gold: float


def train(
    job: jobs.Job,
    models: run_grid.StartModels,
    prompts: tasks.PromptSet,
    *,
    name: str,
    seed: int,
    rounds: int,
    samples: int,
    epochs: int,
    learning_rate: float,
) -> tuple[types.Params, list[Round]]:
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
        epochs: Number of passes over the kept answers in a round.
        learning_rate: Learning rate of fine-tuning.

    Returns:
        The policy of the last round and the measurements of each round.
    """
    policy, key = models.start, jax.random.fold_in(job.key("ppo"), seed)
    n = len(prompts) // rounds
    measured: list[Round] = []
    for r in range(rounds):
        round_prompts = prompts.at(np.repeat(np.arange(r * n, (r + 1) * n), samples))
        answers = job.sampler(policy, models.start, models.reward, round_prompts, jax.random.fold_in(key, 2 * r))
        gold = np.nan if answers.gold is None else float(np.mean(answers.gold.total))
        measured.append(Round(float(np.mean(answers.scores_B)), float(np.mean(answers.kl_B)), gold))
        best = np.arange(n) * samples + answers.scores_B.reshape(n, samples).argmax(axis=1)
        policy = _fine_tune(
            job,
            policy,
            jax.tree.map(lambda x: x[best], answers),  # noqa: B023
            name=f"{name}-round{r}",
            key=jax.random.fold_in(key, 2 * r + 1),
            epochs=epochs,
            learning_rate=learning_rate,
        )
    return policy, measured


def _fine_tune(
    job: jobs.Job,
    policy: types.Params,
    answers: policy_sampling.Answers,
    *,
    name: str,
    key: jax.Array,
    epochs: int,
    learning_rate: float,
) -> types.Params:
    rows, batch = len(answers.tokens_BL), job.settings.pretrain.batch
    steps = max(1, epochs * rows // batch)
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
