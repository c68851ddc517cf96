"""Policies of the rounds, with snapshots, and their comparison by Elo scores (Bai et al. 2022, Figures 15 and 16)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from recipe import jobs, policy_sampling, stages, tasks

from online import domains
from rlhf_jax import diagnostics, types
from rlhf_jax.train import ppo


def train(
    job: jobs.Job,
    start: types.Params,
    reward: types.Params,
    *,
    name: str,
    snapshots: int,
    log: Callable[[str], Any],
) -> list[types.Params]:
    """Trains a policy with RL from the SFT model; returns snapshots at equal distances, the last of which is final.

    Args:
        job: The job of the run.
        start: Parameters of the SFT model, which is the initial policy and the KL reference.
        reward: Parameters of the preference model.
        name: Name of the stages, which all begin with ``ppo-``, one for each snapshot.
        snapshots: Number of snapshots.
        log: Returns the log of a stage, given its name.
    """
    batch_at, hyper_at = stages.ppo_inputs(job, name, ptx_coef=0.0)
    total = job.settings.ppo.iterations
    ends = [round(total * (i + 1) / snapshots) for i in range(snapshots)]
    state, found, begun = job.new_policy(start, reward), [], 0
    for i, end in enumerate(ends):
        stage, first = segment(name, i), begun
        state = job.fit(
            stage,
            job.ppo_step,
            state,
            end - first,
            batch_at=lambda i, first=first: batch_at(first + i),
            hyper_at=lambda i, first=first: hyper_at(first + i),
            frozen=ppo.Frozen(start, reward),
            rng=jax.random.fold_in(job.key(stage), i),
            log=log(stage),
        )
        found.append(jax.tree.map(np.asarray, state.ema))  # the next stage donates the state
        begun = end
    return [job.put_params(each) for each in found]


def segment(name: str, i: int) -> str:
    """Returns the name of the stage that ends with snapshot i of a policy, such as ``ppo-2b``."""
    return name + "abcdefghij"[i]


def answer_all(
    job: jobs.Job,
    policies: Mapping[str, types.Params],
    prompts: tasks.PromptSet,
    *,
    start: types.Params,
    reward: types.Params,
    key: jax.Array,
    done: int,
) -> dict[str, policy_sampling.Answers]:
    """Returns an answer of each policy to each prompt.

    Args:
        job: The job of the run.
        policies: The policies.
        prompts: The prompts.
        start: The reference of the KL.
        reward: The preference model that scores the answers.
        key: A random key; consumed.
        done: Number of policies that the progress bar counts before these, of twice as many as there are.
    """
    found = {}
    for i, (name, policy) in enumerate(policies.items()):
        found[name] = job.sampler(policy, start, reward, prompts, jax.random.fold_in(key, i))
        job.progress.update("evaluate", done + i + 1, 2 * len(policies))
    return found


def elo(worth: Sequence[np.ndarray], asked_B: np.ndarray) -> diagnostics.Strengths:
    """Returns the strengths of policies from wins, ties and losses on the same prompts, clustered by what they ask.

    Args:
        worth: For each of M policies, what its answer to each prompt is worth, ``[B]``.
        asked_B: What each prompt asks; prompts that ask the same are one cluster.
    """
    worth_MB = np.stack(worth)
    wins_MMB = np.where(np.abs(worth_MB[:, None] - worth_MB) <= TIE, 0.5, worth_MB[:, None] > worth_MB)
    clusters, which_B = np.unique(asked_B, return_inverse=True)
    wins_CMM = np.zeros((len(clusters), len(worth), len(worth)))
    np.add.at(wins_CMM, which_B, np.moveaxis(wins_MMB, 2, 0))
    return diagnostics.bradley_terry(wins_CMM, clusters=True)


TIE = 1e-5
"""Largest difference in gold utility that counts as a tie."""


def measured(answers: policy_sampling.Answers, asked_B: np.ndarray, domain: domains.Domain) -> dict[str, Any]:
    """Returns the means of what a policy's answers are worth, with 95 % intervals clustered by what prompts ask."""
    asked = asked_B.tolist()
    rates = {"worth": domains.worth(answers, domain), "refusals": np.asarray(answers.gold.refused, np.float64)}
    numbers = {"score": answers.scores_B, "kl": answers.kl_B}
    return {name: list(diagnostics.clustered_mean(x, asked, rate=True)) for name, x in rates.items()} | {
        name: list(diagnostics.clustered_mean(x, asked)) for name, x in numbers.items()
    }
