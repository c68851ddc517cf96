"""Defines `Trial`, the world, data and models of one seed, on which claims are measured."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any

from launch.settings import PPO, Settings
from recipe import jobs, optimiser_choice, policy_sampling, rl_methods, tasks
from sweeps import grids

from claims import result_store
from rlhf_jax import generation, lm, parallel
from rlhf_jax.train import ppo, ppo_models, reward_model, sft

SIZES: dict[str, dict[str, Any]] = {
    "sft": {"demonstrations": 3000},
    "comparisons": {"prompts": 1000},
    "ppo": {"iterations": 24, "batch": 128, "minibatches": 2, "ema": 0.0},
    "evaluation": {"prompts": 512, "skills": 1200, "pretraining_rows": 128},
}
"""Settings of the claims that differ from the defaults of instructgpt.py."""
MANY_COMPARISONS: dict[str, dict[str, Any]] = {"comparisons": {"prompts": 3000}}
"""Changes for claims that need a more accurate reward model."""
QUICK: dict[str, dict[str, Any]] = {
    "net": {"layers": 1, "width": 32, "mlp": 64},
    "pretrain": {"documents": 2000, "steps": 20},
    "sft": {"demonstrations": 320, "epochs": 1, "mix_epochs": 1},
    "comparisons": {"prompts": 64, "max_k": 5},
    "ppo": {"iterations": 3, "batch": 32, "minibatches": 2, "warmup": 1},
    "evaluation": {"prompts": 64, "skills": 40, "pretraining_rows": 16},
}
"""Settings of --quick, which only shows that the claims run."""


def settings_of(seed: int, *, quick: bool = False) -> Settings:
    """Returns the settings of a trial."""
    settings = Settings(seed=seed)
    for changes in (SIZES, QUICK) if quick else (SIZES,):
        settings = changed(settings, changes)
    return settings


def changed(settings: Settings, changes: dict[str, dict[str, Any]]) -> Settings:
    """Returns settings with other values, given by part and name."""
    parts = {part: dataclasses.replace(getattr(settings, part), **change) for part, change in changes.items()}
    return dataclasses.replace(settings, **parts)


class Programs:
    """The compiled steps of an architecture, which all seeds share. Each is built when it is first used."""

    def __init__(
        self,
        cfg: lm.LMConfig,
        spec: generation.Sampling,
        *,
        prompt_width: int,
        reward_cfg: lm.LMConfig | None = None,
    ) -> None:
        """Stores the arguments.

        Args:
            cfg: Architecture of the policy.
            spec: Settings of the sampler.
            prompt_width: Number of tokens in a padded prompt.
            reward_cfg: Architecture of the reward model and the critic in RL; None for that of the policy.
        """
        self._cfg, self._spec, self._prompt_width, self._reward_cfg = cfg, spec, prompt_width, reward_cfg
        self._sampler: policy_sampling.Sampler | None = None
        self._ppo_steps: dict[PPO, parallel.JitStep] = {}

    @functools.cached_property
    def compiled_supervised(self) -> parallel.JitStep:
        """The step of pretraining and SFT."""
        return parallel.jit_step(sft.make_train_step(partial(lm.token_logprobs, cfg=self._cfg)))

    @functools.cached_property
    def compiled_reward_model(self) -> parallel.JitStep:
        """The step of reward models."""
        return parallel.jit_step(reward_model.make_train_step(partial(lm.score, cfg=self._cfg)))

    def rl_functions(self, **options: Any) -> ppo.Models:
        """Returns the functions of policy, critic and reward model; ``options`` are those of `ppo_models`."""
        cfgs = {"critic_cfg": self._reward_cfg, "score_cfg": self._reward_cfg}
        return ppo_models.from_config(self._cfg, self._spec, prompt_width=self._prompt_width, **cfgs, **options)

    def sampler(self, task: tasks.Task) -> policy_sampling.Sampler:
        """Returns the sampler of answers to the prompts of ``task``."""
        if self._sampler is None:
            self._sampler = policy_sampling.Sampler(self.rl_functions(), task=task)
        return self._sampler.with_task(task)

    def compiled_ppo(self, settings: PPO) -> parallel.JitStep:
        """The RL iteration. Settings that differ only in inputs of the step share it."""
        default = PPO()
        inputs = (set(grids.SWEPT) - {"kl_loss_coef", "entropy_coef"}) | {"iterations", "warmup", "schedule"}
        key = dataclasses.replace(settings, **{name: getattr(default, name) for name in inputs})
        if key not in self._ppo_steps:
            models = self.rl_functions(samples=settings.samples, critic=rl_methods.has_critic(settings))
            if rl_methods.has_critic(settings) and settings.critic == "zero-head":
                models = models._replace(join=ppo.shared_trunk)
            step = ppo.make_train_step(models, **rl_methods.train_step_options(settings))
            self._ppo_steps[key] = parallel.jit_step(step)
        return self._ppo_steps[key]


@functools.cache
def _programs(cfg: lm.LMConfig, spec: Any, prompt_width: int, reward_cfg: lm.LMConfig | None = None) -> Programs:
    return Programs(cfg, spec, prompt_width=prompt_width, reward_cfg=reward_cfg)


@functools.cache  # a new transformation, even an equal one, would make the step recompile
def _supervised_tx() -> Any:
    return optimiser_choice.supervised()


class NoProgress:
    """Ignores the progress of stages."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Returns a function that does nothing."""
        return lambda *args, **options: None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial(jobs.Job):
    """The world, data and models of one seed, and the compiled steps, which other seeds share."""

    shared: Programs
    store: result_store.Store
    quick: bool = False

    @property
    def supervised_step(self) -> parallel.JitStep:
        """The compiled step of pretraining and SFT."""
        return self.shared.compiled_supervised

    @property
    def reward_step(self) -> parallel.JitStep:
        """The compiled step of reward models."""
        return self.shared.compiled_reward_model

    @property
    def ppo_step(self) -> parallel.JitStep:
        """The compiled RL iteration, with the method of the settings."""
        return self.shared.compiled_ppo(self.settings.ppo)

    def result(self, function: Callable[..., Any], *inputs: Any, **options: Any) -> result_store.Result:
        """Returns the result of ``function(trial, *inputs, **options)``, which is computed once and stored."""
        return self.store.result(function, self, inputs=inputs, **options)

    def with_net(self, net: dict[str, int], *, policy_only: bool = False) -> Trial:
        """Returns a trial with models of another size, given by --net settings.

        Args:
            net: Settings that differ.
            policy_only: Whether the reward model and the critic in RL keep their size.
        """
        settings = changed(self.settings, {"net": net})
        cfg = jobs.model_config(settings, self.task, None)
        programs = _programs(cfg, self.spec, self.task.prompt_width, self.cfg if policy_only else None)  # type: ignore[arg-type]
        sampler = programs.sampler(self.task)
        return dataclasses.replace(self, settings=settings, cfg=cfg, shared=programs, sampler=sampler)

    def with_ppo(self, **changes: Any) -> Trial:
        """Returns a trial with other --ppo settings."""
        settings = dataclasses.replace(self.settings.ppo, **changes)
        return dataclasses.replace(
            self, settings=dataclasses.replace(self.settings, ppo=settings), ppo_tx=optimiser_choice.ppo(settings)
        )


def make_trial(
    seed: int,
    *,
    folder: pathlib.Path,
    quick: bool = False,
    changes: dict[str, dict[str, Any]] | None = None,
    progress: Any = None,
) -> Trial:
    """Returns the trial of a seed.

    Args:
        seed: Seed of the world, the data, the models and all samples.
        folder: Folder of the stored results.
        quick: Whether to use the small sizes of --quick.
        changes: Settings that differ from those of other claims, by part and name.
        progress: Shows the progress of stages, as `report.console.StageProgress` does.
    """
    settings = changed(settings_of(seed, quick=quick), changes or {})
    task = tasks.make_task(settings)
    cfg = jobs.model_config(settings, task, None)
    spec = generation.Sampling(max_new_tokens=task.response_width, stop_ids=task.fmt.stop_ids, pad_id=task.fmt.pad_id)
    programs = _programs(cfg, spec, task.prompt_width)  # type: ignore[arg-type]  # frozen, thus hashable
    context = {"settings": dataclasses.asdict(settings), "quick": quick}
    return Trial(
        settings=settings,
        task=task,
        cfg=cfg,
        spec=spec,
        checkpoints=lambda stage: contextlib.nullcontext(),  # type: ignore[arg-type]
        log=lambda step, floats: None,
        progress=progress or NoProgress(),
        base=None,
        sampler=programs.sampler(task),
        supervised_tx=_supervised_tx(),
        ppo_tx=optimiser_choice.ppo(settings.ppo),
        shared=programs,
        store=result_store.Store(folder, context=context, uses=(make_trial,)),
        quick=quick,
    )
