"""Many short runs of reinforcement learning from one SFT model and one reward model, and what came of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from launch.settings import PPO
from recipe import comparison_data, jobs, optimiser_choice, policy_sampling, rl_methods, stages

from rlhf_jax import diagnostics, parallel, types
from rlhf_jax.train import ppo

AXIS = "member"


class StartModels(NamedTuple):
    """What all runs share."""

    sft: types.Params
    start: types.Params
    """The SFT model that they begin with, which is the KL reference too."""
    reward: types.Params
    heldout: types.Params | None = None
    """A second reward model, which nothing is trained on."""

    @property
    def frozen(self) -> ppo.Frozen:
        """As PPO reads it."""
        return ppo.Frozen(reference=self.start, reward=self.reward, heldout=self.heldout)


class Cell(NamedTuple):
    """One run: its name, which is its stage in the logs, its settings and its seed."""

    name: str
    settings: PPO
    seed: int
    ptx_coef: float = 0.0


def prepare(job: jobs.Job) -> StartModels:
    """The recipe up to the reward model; stages that are finished are restored."""
    settings = job.settings
    base = stages.pretrain(job)
    sft = stages.supervised(job, "sft", base, epochs=settings.sft.epochs, mix=0.0)
    start = stages.supervised(job, "sft_mix", base, epochs=settings.sft.mix_epochs, mix=settings.sft.mix)
    parts, _, _ = comparison_data.load_or_collect(job, [sft, start])
    return StartModels(sft, start, *stages.train_reward_models(job, start, parts))


def train(job: jobs.Job, shared: StartModels, cell: Cell, *, step: parallel.JitStep | None = None) -> types.Params:
    """One run, from its last checkpoint where there is one; returns its policy.

    ``step`` is a compiled step that serves the cell's method; by default a new one.
    """
    own = with_settings(job, cell.settings)
    batch_at, hyper_at = stages.ppo_inputs(own, "ppo", ptx_coef=cell.ptx_coef)
    state = job.fit(
        cell.name,
        step or own.ppo_step,
        own.new_policy(shared.start, shared.reward),
        cell.settings.iterations,
        batch_at=batch_at,
        hyper_at=hyper_at,
        rng=jax.random.fold_in(job.key("ppo"), cell.seed),
        frozen=shared.frozen,
    )
    return state.ema


def train_together(job: jobs.Job, shared: StartModels, cells: Sequence[Cell]) -> list[types.Params]:
    """All runs as one program, ``jax.vmap`` of the step over keys and numbers; the cells differ in nothing else.

    One after the other is as fast on a CPU; an accelerator that one small run leaves idle does all in the time of one.
    """
    own, M = with_settings(job, cells[0].settings), len(cells)
    single = ppo.make_train_step(own.rl_models(axis_name=AXIS), **rl_methods.train_step_options(own.settings.ppo))

    def members(states: Any, frozen: Any, hypers: Any, batch: Any, keys: Any) -> tuple[Any, dict[str, Any]]:
        states, logs = jax.vmap(single, in_axes=(0, None, 0, None, 0), axis_name=AXIS)(
            states, frozen, hypers, batch, keys
        )
        apart = [jax.tree.map(lambda x, i=i: x[i], logs) for i in range(M)]
        return states, {f"{i}/{name}": value for i in range(M) for name, value in apart[i].items()}

    step = parallel.jit_step(lambda state, frozen, hypers, batch, keys: members(state, frozen, hypers, batch, keys))
    batch_at, _ = stages.ppo_inputs(own, "ppo", ptx_coef=cells[0].ptx_coef)
    states = jax.jit(lambda one: jax.tree.map(lambda x: jnp.stack([x] * M), one))(
        own.new_policy(shared.start, shared.reward)
    )
    keys = jnp.stack([jax.random.fold_in(job.key("ppo"), cell.seed) for cell in cells])
    for cell in cells:
        job.log.rewind(cell.name, 0)
    for i in range(own.settings.ppo.iterations):
        each = [rl_methods.hyper(cell.settings, i, ptx_coef=cell.ptx_coef) for cell in cells]
        hypers = jax.tree.map(lambda *x: np.stack(x), *each)
        states, logs = step(states, shared.frozen, hypers, batch_at(i), keys)
        logs = jax.device_get(logs)
        for m, cell in enumerate(cells):
            own_logs = {name.split("/", 1)[1]: value for name, value in logs.items() if name.startswith(f"{m}/")}
            job.log.write(cell.name, i + 1, own_logs)
    assert step.traces == 1
    return [jax.tree.map(lambda x, m=m: x[m], states.ema) for m in range(M)]


def measure(
    job: jobs.Job, shared: StartModels, prompts: Any, against: Any, policy: types.Params, *, seed: int
) -> dict[str, float]:
    """Reward, KL, gold and win rate of a policy's answers to held-out prompts; ``against`` are those of `sample_answers`."""
    found = sample_answers(job, shared, prompts, policy, seed=seed)
    numbers: dict[str, Any] = {"reward": found.scores_B, "kl": found.kl_B, "length": found.lengths_B}
    if found.gold is not None:
        numbers["gold"] = found.gold.total
        wins = diagnostics.win_rate(found.gold.total, against.gold.total, tie_tolerance=1e-5)
        return {name: float(np.mean(x)) for name, x in numbers.items()} | {"win_rate": float(wins[0])}
    return {name: float(np.mean(x)) for name, x in numbers.items()}


def sample_answers(
    job: jobs.Job, shared: StartModels, prompts: Any, policy: types.Params, *, seed: int
) -> policy_sampling.Answers:
    """A policy's answers to held-out prompts, with reward and KL to the start."""
    key = jax.random.fold_in(job.key("evaluate"), seed)
    return job.sampler(policy, shared.start, shared.reward, prompts, key)


def mean_over_seeds(numbers: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Mean and 95 % interval over seeds of each number."""
    names: Callable[[], Any] = numbers[0].keys
    return {name: list(diagnostics.mean_interval([each[name] for each in numbers])) for name in names()}


def with_settings(job: jobs.Job, settings: PPO) -> jobs.Job:
    """The same job with other settings of reinforcement learning, and a step of its own."""
    return dataclasses.replace(
        job, settings=dataclasses.replace(job.settings, ppo=settings), ppo_tx=optimiser_choice.ppo(settings)
    )
