"""Expert iteration, or rejection-sampling fine-tuning: answer, keep what scores best, imitate it, and again."""

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
    """What a round began with: its policy's answers, of which one to each prompt is kept."""

    reward: float
    kl: float
    gold: float


def train(
    job: jobs.Job,
    shared: run_grid.StartModels,
    prompts: tasks.PromptSet,
    *,
    name: str,
    seed: int,
    rounds: int,
    samples: int,
    epochs: int,
    learning_rate: float,
) -> tuple[types.Params, list[Round]]:
    """``rounds`` times: ``samples`` answers to each of a share of the prompts, the best by the reward model, imitated.

    Each round has prompts of its own and goes on from the policy of the last (Anthony et al. 2017; the rejection
    sampling of Touvron et al. 2023 is one of them). The KL to the start is measured and not held down.
    """
    policy, key = shared.start, jax.random.fold_in(job.key("ppo"), seed)
    n = len(prompts) // rounds
    kept: list[Round] = []
    for r in range(rounds):
        asked = prompts.at(np.repeat(np.arange(r * n, (r + 1) * n), samples))
        found = job.sampler(policy, shared.start, shared.reward, asked, jax.random.fold_in(key, 2 * r))
        gold = np.nan if found.gold is None else float(np.mean(found.gold.total))
        kept.append(Round(float(np.mean(found.scores_B)), float(np.mean(found.kl_B)), gold))
        best = np.arange(n) * samples + found.scores_B.reshape(n, samples).argmax(axis=1)
        policy = _imitate(
            job,
            policy,
            jax.tree.map(lambda x: x[best], found),  # noqa: B023
            name=f"{name}-round{r}",
            key=jax.random.fold_in(key, 2 * r + 1),
            epochs=epochs,
            learning_rate=learning_rate,
        )
    return policy, kept


def _imitate(
    job: jobs.Job,
    policy: types.Params,
    found: policy_sampling.Answers,
    *,
    name: str,
    key: jax.Array,
    epochs: int,
    learning_rate: float,
) -> types.Params:
    rows, batch = len(found.tokens_BL), job.settings.pretrain.batch
    steps = max(1, epochs * rows // batch)
    batch = device_mesh.round_rows_down(min(batch, rows), job.mesh, "--pretrain.batch")
    order = batching.epoch_batches(0, n=rows, batch_size=batch, key=key, steps=steps)
    learnt_BL = np.zeros_like(found.mask_BL)
    learnt_BL[:, job.task.prompt_width :] = found.response_mask_BT

    def batch_at(i: int) -> Any:
        parts = (found.tokens_BL, found.mask_BL, learnt_BL)
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
