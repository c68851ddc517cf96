"""Trains and measures many short RL runs that share one SFT model and one reward model."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from launch.settings import PPO
from recipe import comparison_data, jobs, optimiser_choice, policy_sampling, rl_methods, stages

from rlhf_jax import diagnostics, parallel, types
from rlhf_jax.train import ppo
from sweeps import grids

AXIS = "member"
MEASURED = {"reward": "eval_reward", "kl": "eval_kl", "gold": "eval_gold"}
"""Names in the log of what `train` measures on held-out prompts."""


class StartModels(NamedTuple):
    """The models that all runs share."""

    sft: types.Params
    """The baseline of win rates."""
    start: types.Params
    """The SFT model that the runs start from, which is also the KL reference."""
    reward: types.Params
    heldout: types.Params | None = None
    """A second reward model, whose scores are only logged."""

    @property
    def frozen(self) -> ppo.Frozen:
        """The frozen models for PPO."""
        return ppo.Frozen(reference=self.start, reward=self.reward, heldout=self.heldout)


class Cell(NamedTuple):
    """One run. ``name`` is the name of its stage in logs and checkpoints."""

    name: str
    settings: PPO
    seed: int
    ptx_coef: float = 0.0


def prepare(job: jobs.Job) -> StartModels:
    """Runs the recipe up to the reward model, restoring finished stages."""
    settings = job.settings
    base = stages.pretrain(job)
    sft = stages.supervised(job, "sft", base, epochs=settings.sft.epochs, mix=0.0)
    start = stages.supervised(job, "sft_mix", base, epochs=settings.sft.mix_epochs, mix=settings.sft.mix)
    parts, _, _ = comparison_data.load_or_collect(job, [sft, start])
    return StartModels(sft, start, *stages.train_reward_models(job, start, parts))


def train(
    job: jobs.Job, models: StartModels, cell: Cell, *, step: parallel.JitStep | None = None, times: int = 0
) -> types.Params:
    """Trains one run, resuming from its last checkpoint, and returns the moving average of its policy.

    Args:
        job: The job of the run.
        models: The models that all runs share.
        cell: The run.
        step: The compiled step of the cell's method; by default, a new one is compiled.
        times: Number of times that the moving average is evaluated on the held-out prompts during training. The means
            are logged as `MEASURED` in the rows of these iterations.
    """
    cell_job = with_settings(job, cell.settings)
    batch_at, hyper_at = stages.ppo_inputs(cell_job, "ppo", ptx_coef=cell.ptx_coef)
    state = job.fit(
        cell.name,
        step or cell_job.ppo_step,
        cell_job.new_policy(models.start, models.reward),
        cell.settings.iterations,
        batch_at=batch_at,
        hyper_at=hyper_at,
        rng=jax.random.fold_in(job.key("ppo"), cell.seed),
        frozen=models.frozen,
        callbacks=[_make_evaluation(job, models, cell, times=times)] if times else [],
    )
    return state.ema


def _make_evaluation(
    job: jobs.Job, models: StartModels, cell: Cell, *, times: int
) -> Callable[[int, Any, Any], dict[str, float] | None]:
    steps = cell.settings.iterations
    every = -(-steps // times)

    def evaluate(done: int, state: Any, metrics: Any) -> dict[str, float] | None:
        del metrics
        if done % every and done != steps:
            return None
        means = answer_means(sample_answers(job, models, job.task.eval_prompts, state.ema, seed=cell.seed))
        return {log_name: means[name] for name, log_name in MEASURED.items() if name in means}

    return evaluate


def train_together(job: jobs.Job, models: StartModels, cells: Sequence[Cell]) -> list[types.Params]:
    """Trains all runs in one program that vmaps the step over keys and hyperparameters; returns their policies.

    The cells may differ only in their seeds and in the hyperparameters of `ppo.Hyper`. On a CPU, the program takes as
    long as separate runs. On an accelerator that a single run does not fill, it takes about as long as one run.
    """
    first, M = with_settings(job, cells[0].settings), len(cells)
    single_step = ppo.make_train_step(
        first.rl_models(axis_name=AXIS), **rl_methods.train_step_options(first.settings.ppo)
    )

    def all_steps(states: Any, frozen: Any, hypers: Any, batch: Any, keys: Any) -> tuple[Any, dict[str, Any]]:
        states, logs = jax.vmap(single_step, in_axes=(0, None, 0, None, 0), axis_name=AXIS)(
            states, frozen, hypers, batch, keys
        )
        return states, {f"{m}/{name}": jax.tree.map(lambda x, m=m: x[m], logs[name]) for m in range(M) for name in logs}

    step = parallel.jit_step(all_steps)
    batch_at, _ = stages.ppo_inputs(first, "ppo", ptx_coef=cells[0].ptx_coef)
    states = jax.jit(lambda state: jax.tree.map(lambda x: jnp.stack([x] * M), state))(
        first.new_policy(models.start, models.reward)
    )
    keys = jnp.stack([jax.random.fold_in(job.key("ppo"), cell.seed) for cell in cells])
    for cell in cells:
        job.log.rewind(cell.name, 0)
    for i in range(first.settings.ppo.iterations):
        hypers = [rl_methods.hyper(cell.settings, i, ptx_coef=cell.ptx_coef) for cell in cells]
        states, logs = step(states, models.frozen, jax.tree.map(lambda *x: np.stack(x), *hypers), batch_at(i), keys)
        logs = jax.device_get(logs)
        for m, cell in enumerate(cells):
            cell_logs = {name.split("/", 1)[1]: value for name, value in logs.items() if name.startswith(f"{m}/")}
            job.log.write(cell.name, i + 1, cell_logs)
    assert step.traces == 1
    return [jax.tree.map(lambda x, m=m: x[m], states.ema) for m in range(M)]


def measure(
    job: jobs.Job, models: StartModels, prompts: Any, baseline: Any, policy: types.Params, *, seed: int
) -> dict[str, float]:
    """Returns a policy's mean reward, KL, length, gold utility and win rate on held-out prompts.

    Args:
        job: The job of the run.
        models: The models that all runs share.
        prompts: The held-out prompts.
        baseline: Answers from `sample_answers` with which the policy's answers are compared.
        policy: Parameters of the policy.
        seed: Seed of the sampling.

    Returns:
        The means. Without the built-in world, gold utility and win rate are missing.
    """
    answers = sample_answers(job, models, prompts, policy, seed=seed)
    means = answer_means(answers)
    if answers.gold is not None:
        wins = diagnostics.win_rate(answers.gold.total, baseline.gold.total, tie_tolerance=1e-5)
        means["win_rate"] = float(wins[0])
    return means


def answer_means(answers: policy_sampling.Answers) -> dict[str, float]:
    """Returns the mean reward, KL, length and, in the built-in world, gold utility of answers."""
    numbers = {"reward": answers.scores_B, "kl": answers.kl_B, "length": answers.lengths_B}
    if answers.gold is not None:
        numbers["gold"] = np.asarray(answers.gold.total)
    return {name: float(np.mean(x)) for name, x in numbers.items()}


def sample_answers(
    job: jobs.Job, models: StartModels, prompts: Any, policy: types.Params, *, seed: int
) -> policy_sampling.Answers:
    """Returns a policy's answers to held-out prompts, with their reward and KL to the start policy."""
    key = jax.random.fold_in(job.key("evaluate"), seed)
    temperature = job.settings.evaluation.temperature
    return job.sampler(policy, models.start, models.reward, prompts, key, temperature=temperature)


def mean_over_seeds(numbers: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Returns each number's mean and 95 % interval over seeds."""
    return {name: list(diagnostics.mean_interval([each[name] for each in numbers])) for name in numbers[0]}


def widest(runs: Sequence[PPO]) -> PPO:
    """Returns settings whose compiled step serves all runs, which may differ only in numbers of `ppo.Hyper`.

    A term that a run does not use has a weight of 0.
    """
    most = {name: max(getattr(run, name) or 0.0 for run in runs) for name in ("entropy_coef", "kl_loss_coef")}
    return dataclasses.replace(runs[0], **{name: value for name, value in most.items() if value > 0})


def copy_stages(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies the checkpoints of the stages before RL from one run folder to another, unless it has them already."""
    for stage in grids.SHARED_STAGES:
        old, new = source / "checkpoints" / stage, target / "checkpoints" / stage
        if old.is_dir() and not new.exists():
            partial = new.with_name(f"{stage}.copying")  # so that an interrupted copy is not taken for a checkpoint
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(old, partial)
            partial.rename(new)


def with_settings(job: jobs.Job, settings: PPO) -> jobs.Job:
    """Returns a copy of the job with other RL settings and the matching optimiser."""
    return dataclasses.replace(
        job, settings=dataclasses.replace(job.settings, ppo=settings), ppo_tx=optimiser_choice.ppo(settings)
    )
