"""Defines `Job`, which contains the settings, data, model, compiled steps and checkpoints of a run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax
from launch import initial_model
from launch.settings import SettingError, Settings

from recipe import engine, optimiser_choice, policy_sampling, rl_methods, tasks, world_words
from rlhf_jax import generation, lm, parallel, types
from rlhf_jax.train import ppo, ppo_models, reward_model, sft

Params = types.Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(engine.Engine):
    """The objects that all stages of a run share. A job is built once so that each step compiles once."""

    settings: Settings
    task: tasks.Task
    spec: generation.Sampling
    """Settings of the sampler, without top-k and top-p."""
    base: Params | None
    """Parameters of --model; None if the base model is trained from scratch."""
    sampler: policy_sampling.Sampler
    supervised_tx: optax.GradientTransformation
    """Optimiser of pretraining, SFT and reward models."""
    ppo_tx: optax.GradientTransformation
    """Optimiser of RL."""

    @functools.cached_property
    def supervised_step(self) -> parallel.JitStep:
        """The compiled step of pretraining and SFT."""
        train_step = sft.make_train_step(partial(lm.token_logprobs, cfg=self.cfg))
        return parallel.jit_step(train_step, mesh=self.mesh)

    @functools.cached_property
    def reward_step(self) -> parallel.JitStep:
        """The compiled step of reward models."""
        return parallel.jit_step(reward_model.make_train_step(partial(lm.score, cfg=self.cfg)), mesh=self.mesh)

    @functools.cached_property
    def ppo_step(self) -> parallel.JitStep:
        """The compiled RL iteration, with the method of the settings."""
        train_step = ppo.make_train_step(self.rl_models(), **rl_methods.train_step_options(self.settings.ppo))
        return parallel.jit_step(train_step, mesh=self.mesh)

    def rl_models(self, *, axis_name: str | None = None) -> ppo.Models:
        """Returns the functions of the policy, critic and reward model that RL calls."""
        settings, task = self.settings.ppo, self.task
        shared = rl_methods.has_critic(settings) and settings.critic == "zero-head"
        # The compiled step can compute the gold utility only if token ids are the built-in world's words.
        models = ppo_models.from_config(
            self.cfg,
            _rollout_sampling(self.spec, self.settings),
            prompt_width=task.prompt_width,
            watch=world_words.make_watch(task.world.tables, prompt_width=task.prompt_width)
            if task.world and task.in_world_words
            else None,
            samples=settings.samples,
            critic=rl_methods.has_critic(settings),
            axis_name=axis_name,
        )
        return models._replace(join=ppo.shared_trunk) if shared else models

    def new_policy(self, start: Params, reward: Params) -> ppo.PPOState:
        """Creates the initial RL state from the SFT model ``start``, with a critic if the method has one."""
        settings = self.settings.ppo
        critic = self._new_critic(start, reward) if rl_methods.has_critic(settings) else None
        reference = None if settings.reference_ema is None else start

        def make(start: Params, critic: Params | None, reference: Params | None) -> ppo.PPOState:
            return ppo.create(start, critic, self.ppo_tx, reference=reference)

        return self.create_on_mesh(make, start, critic, reference)

    def _new_critic(self, start: Params, reward: Params) -> Params:
        """Creates the initial critic that --ppo.critic selects."""
        source, key = self.settings.ppo.critic, jax.random.fold_in(self.key("reward_model"), 3)
        if source == "reward":
            return reward
        critic = lm.with_head(key, start, self.cfg, zero=source == "zero-head")
        return {"head": critic["head"]} if source == "zero-head" else critic

    def programs(self) -> dict[str, int]:
        """Returns the number of times that each large program was compiled.

        The number for a train step is at least 1, even if only an earlier process of the run called the step, so that
        a resumed run has the same results as an uninterrupted one.
        """
        steps = {"supervised": self.supervised_step, "reward_model": self.reward_step, "ppo": self.ppo_step}
        return {name: max(step.traces, 1) for name, step in steps.items()} | {"sampling": self.sampler.traces}


def make_job(
    settings: Settings,
    task: tasks.Task,
    *,
    model: initial_model.InitialModel | None,
    checkpoints: Any,
    log: Any,
    progress: Any,
    mesh: jax.sharding.Mesh | None = None,
    note: Callable[[str, str], None] | None = None,
) -> Job:
    """Configures the model and builds all steps, each of which compiles when it is first called."""
    cfg = model_config(settings, task, model)
    spec = generation.Sampling(max_new_tokens=task.response_width, stop_ids=task.fmt.stop_ids, pad_id=task.fmt.pad_id)
    models = ppo_models.from_config(cfg, spec, prompt_width=task.prompt_width)
    if not settings.ppo.correct_sampler:
        generation.check_on_policy(_rollout_sampling(spec, settings))
    job = Job(
        settings=settings,
        task=task,
        cfg=cfg,
        spec=spec,
        checkpoints=checkpoints,
        log=log,
        progress=progress,
        base=None if model is None else model.params,
        sampler=policy_sampling.Sampler(models, task=task, temperature=settings.ppo.temperature, mesh=mesh),
        # To change an optimiser, edit recipe/optimiser_choice.py.
        supervised_tx=optimiser_choice.supervised(),
        ppo_tx=optimiser_choice.ppo(settings.ppo),
        mesh=mesh,
        **({} if note is None else {"note": note}),
    )
    return job if job.base is None else dataclasses.replace(job, base=job.put_params(job.base))


def _rollout_sampling(spec: generation.Sampling, settings: Settings) -> generation.Sampling:
    return dataclasses.replace(spec, top_k=settings.ppo.top_k, top_p=settings.ppo.top_p)


def model_config(settings: Settings, task: tasks.Task, model: initial_model.InitialModel | None) -> lm.LMConfig:
    """Returns the architecture of --model or, without it, of a new model with the size given by --net.*."""
    if model is not None:
        return initial_model.with_compute(model.cfg, settings.compute)
    if settings.model is not None:
        cfg = initial_model.new_config(settings.model, len(task.tokenizer))
        if task.row_width > cfg.max_length:
            raise SettingError(
                f"a prompt with an answer has {task.row_width} tokens, more than the {cfg.max_length} of --model "
                f"{settings.model}; lower --data.prompt-width or --data.response-width"
            )
        return initial_model.with_compute(cfg, settings.compute)
    return lm.LMConfig(
        vocab_size=len(task.tokenizer),
        n_layers=settings.net.layers,
        d_model=settings.net.width,
        n_heads=settings.net.heads,
        d_mlp=settings.net.mlp,
        max_length=max(task.row_width, initial_model.ROTARY_LENGTH),
        tie_embeddings=True,
        dtype=settings.compute.dtype or "float32",
        remat=settings.compute.remat,
    )
