"""What every stage of a run needs, and the models as reinforcement learning calls them."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from launch import initial_model as start_lib
from launch.settings import Settings

from recipe import muon, policy_sampling, rl_methods, tasks
from rlhf_jax import checkpoint, generation, lm, parallel, types
from rlhf_jax.checkpoint import manifest
from rlhf_jax.distributed import hosts
from rlhf_jax.simulation import gold
from rlhf_jax.train import loop, ppo, reward_model, sft

STAGES = ("pretrain", "sft", "sft_mix", "comparisons", "reward_model", "ppo", "ppo_ptx", "evaluate")
STAGES += ("heldout_reward_model",)  # last: the place is the random key

Params = types.Params


@dataclasses.dataclass(frozen=True)
class Job:
    """What every stage needs: built once, so that each step compiles once."""

    settings: Settings
    task: tasks.Task
    cfg: lm.LMConfig
    spec: generation.Sampling
    """Of an answer that is not cut off in any way."""
    base: Params | None
    """The model that the run was given, if it was."""
    checkpoints: Callable[[str], checkpoint.Checkpoints]
    log: Any
    progress: Any
    sampler: policy_sampling.Sampler
    supervised_step: parallel.JitStep
    reward_step: parallel.JitStep
    supervised_tx: optax.GradientTransformation
    ppo_tx: optax.GradientTransformation
    mesh: jax.sharding.Mesh | None = None
    """Where the run is spread; None on one device."""
    note: Callable[[str, str], None] = lambda stage, text: print(f"{stage}: {text}", file=sys.stderr)
    """``note(stage, text)`` of what a user should know."""

    def key(self, stage: str) -> jax.Array:
        """The random key of a stage; ``ppo-more`` has that of ``ppo``."""
        return jax.random.fold_in(jax.random.key(self.settings.seed), 100 + STAGES.index(stage.partition("-")[0]))

    @functools.cached_property
    def ppo_step(self) -> parallel.JitStep:
        """An iteration of reinforcement learning by the method of the settings."""
        made = ppo.make_train_step(self.rollouts(), **rl_methods.composed(self.settings.ppo))
        return parallel.jit_step(made, mesh=self.mesh)

    def begin(self, make: Callable[..., Any], *args: Any) -> Any:
        """``make(*args)``: a state, or parameters; on a mesh born spread out, as `parallel.RULES` say."""
        if self.mesh is None:
            return make(*args)
        args = tuple(self.placed(each) for each in args)
        where = parallel.shardings(jax.eval_shape(make, *args), self.mesh, self.axes)
        with jax.set_mesh(self.mesh):
            return jax.jit(make, out_shardings=where)(*args)

    def placed(self, params: Params) -> Params:
        """Parameters that are there already, spread out likewise."""
        if self.mesh is None:
            return params
        return parallel.shard(params, parallel.shardings(params, self.mesh, self.axes))

    def everywhere(self, x: np.ndarray) -> jax.Array:
        """An array of the host, whole on every device."""
        return jnp.asarray(x) if self.mesh is None else parallel.replicate(x, self.mesh)

    @property
    def axes(self) -> Params:
        """The logical axes of the model and of a head."""
        return lm.logical_axes(self.cfg, head=True)

    def rollouts(self, *, axis_name: str | None = None) -> ppo.Models:
        """The models as reinforcement learning calls them."""
        settings, task = self.settings.ppo, self.task
        # What PPO writes while it runs is what its compiled step can see: ids, which gold reads only where they are
        # words.
        models = ppo_models(
            self.cfg,
            _drawn(self.spec, self.settings),
            prompt_width=task.prompt_width,
            tables=task.world.tables if task.world and task.speaks_world else None,
            samples=settings.samples,
            critic=rl_methods.has_critic(settings),
            axis_name=axis_name,
        )
        return models._replace(join=ppo.shared_trunk) if settings.critic == "zero-head" else models

    def new_policy(self, start: Params, reward: Params) -> ppo.PPOState:
        """What reinforcement learning begins with: the SFT model, and a critic where the method has one."""
        settings = self.settings.ppo
        critic = self._new_critic(start, reward) if rl_methods.has_critic(settings) else None
        reference = None if settings.reference_ema is None else start

        def make(start: Params, critic: Params | None, reference: Params | None) -> ppo.PPOState:
            return ppo.create(start, critic, self.ppo_tx, reference=reference)

        return self.begin(make, start, critic, reference)

    def _new_critic(self, start: Params, reward: Params) -> Params:
        """The reward model (InstructGPT C.4), the SFT model with a new head, or a head of zeros alone (Ziegler)."""
        how, key = self.settings.ppo.critic, jax.random.fold_in(self.key("reward_model"), 3)
        if how == "reward":
            return reward
        made = lm.with_head(key, start, self.cfg, zero=how == "zero-head")
        return {"head": made["head"]} if how == "zero-head" else made

    def programs(self) -> dict[str, int]:
        """How often each of the large programs was traced, which is how often it was compiled.

        A program that only stages of an earlier process called counts once, so that a resumed run has the same facts.
        """
        steps = {"supervised": self.supervised_step, "reward_model": self.reward_step, "ppo": self.ppo_step}
        return {name: max(step.traces, 1) for name, step in steps.items()} | {"sampling": self.sampler.traces}

    def fit(
        self, stage: str, train_step: parallel.JitStep, state: Any, steps: int, *, batch_at: Any, **how: Any
    ) -> Any:
        """Run one stage's loop with the run's log, the stage's key (or others), progress and checkpoints.

        ``batch_at`` gives whole batches, of which each host takes its own rows: NumPy arrays, so that nothing has to
        come back from a device that is busy.
        """
        mesh = self.mesh
        how = {"log": self.log} | ({} if "rng" in how else {"rng": self.key(stage)}) | how
        how |= self.guarded(stage, steps, batch_at)
        self.progress.start(stage, steps)
        with self.checkpoints(stage) as checkpoints:
            state = loop.fit(
                train_step,
                state,
                steps=steps,
                stage=stage,
                checkpoints=checkpoints,
                save_every=max(1, -(-steps // self.settings.saves)),
                progress=self.progress.update,
                batch_at=batch_at if mesh is None else lambda i: parallel.local_rows(batch_at(i), mesh),
                should_stop=hosts.current().stop_agreement(),
                **how,
            )
        self.progress.finish(stage)
        return state

    def guarded(self, stage: str, steps: int, batch_at: Callable[[int], Any]) -> dict[str, Any]:
        """What `loop.fit` of a stage is to know of skipped steps, and of the data that the stage is trained on.

        The data's fingerprint is its first and its last batch and the number of steps: other data, another order or
        another batch size is refused where a run goes on. Hosts hold rows of their own, and have none.
        """
        data: Any = [steps]
        if jax.process_count() == 1 and steps > 0:
            data += [manifest.digest_tree(batch_at(i)) for i in (0, steps - 1)]
        return {"max_skipped": self.settings.max_skipped, "warn": partial(self.note, stage), "fingerprint": data}


def make_job(
    settings: Settings,
    task: tasks.Task,
    *,
    start: start_lib.Start | None,
    checkpoints: Any,
    log: Any,
    progress: Any,
    mesh: jax.sharding.Mesh | None = None,
    note: Callable[[str, str], None] | None = None,
) -> Job:
    """Configure the model and build every compiled step; nothing is compiled before it is first called."""
    cfg = model_of(settings, task, start)
    spec = generation.Sampling(max_new_tokens=task.response_width, stop_ids=task.fmt.stop_ids, pad_id=task.fmt.pad_id)
    models = ppo_models(cfg, spec, prompt_width=task.prompt_width)
    if not settings.ppo.correct_sampler:
        generation.check_on_policy(_drawn(spec, settings))
    token_logprobs = partial(lm.token_logprobs, cfg=cfg)
    job = Job(
        settings=settings,
        task=task,
        cfg=cfg,
        spec=spec,
        checkpoints=checkpoints,
        log=log,
        progress=progress,
        base=None if start is None else start.params,
        sampler=policy_sampling.Sampler(models, task=task, mesh=mesh),
        supervised_step=parallel.jit_step(sft.make_train_step(token_logprobs), mesh=mesh),
        reward_step=parallel.jit_step(reward_model.make_train_step(partial(lm.score, cfg=cfg)), mesh=mesh),
        supervised_tx=muon.muon(),
        ppo_tx=rl_methods.optimiser(settings.ppo),
        mesh=mesh,
        **({} if note is None else {"note": note}),
    )
    return job if job.base is None else dataclasses.replace(job, base=job.placed(job.base))


def _drawn(spec: generation.Sampling, settings: Settings) -> generation.Sampling:
    return dataclasses.replace(spec, top_k=settings.ppo.top_k, top_p=settings.ppo.top_p)


def model_of(settings: Settings, task: tasks.Task, start: start_lib.Start | None) -> lm.LMConfig:
    """The architecture: that of the model a run starts from, or a new one."""
    if start is not None:
        return start.cfg
    return lm.LMConfig(
        vocab_size=len(task.tokenizer),
        n_layers=settings.net.layers,
        d_model=settings.net.width,
        n_heads=settings.net.heads,
        d_mlp=settings.net.mlp,
        max_length=max(task.row_width, 64),
        tie_embeddings=True,
    )


def ppo_models(
    cfg: lm.LMConfig,
    spec: generation.Sampling,
    *,
    prompt_width: int,
    tables: gold.Tables | None = None,
    samples: int = 1,
    critic: bool = True,
    axis_name: str | None = None,
) -> ppo.Models:
    """This library's language model as the functions that PPO calls; gold is watched where there is any.

    ``samples`` are the answers to each prompt; ``axis_name`` is that of a ``jax.vmap`` over the whole step.
    """

    def generate(params: Params, rng_B: jax.Array, prompts_BP: Any, mask_BP: Any, temperature: Any) -> types.Rollout:
        how = spec.replace(temperature=temperature)  # type: ignore[attr-defined]
        return generation.generate(
            params, rng_B, prompts_BP, mask_BP, cfg=cfg, sampling=how, n=samples, axis_name=axis_name
        )

    def logprobs(params: Params, tokens_BL: Any, mask_BL: Any, temperature: Any) -> Any:
        return lm.token_stats(
            params, tokens_BL, cfg=cfg, prompt_width=prompt_width, mask_BL=mask_BL, temperature=temperature
        )

    def values(params: Params, tokens_BL: Any, mask_BL: Any) -> jax.Array:
        return lm.values(params, tokens_BL, cfg=cfg, prompt_width=prompt_width, mask_BL=mask_BL)

    def score(params: Params, rollout: types.Rollout) -> jax.Array:
        return lm.score(params, rollout.tokens_BL, cfg=cfg, mask_BL=rollout.mask_BL)

    watch = None if tables is None else partial(_watch_gold, tables, prompt_width=prompt_width)
    token_logprobs = partial(lm.token_logprobs, cfg=cfg)
    return ppo.Models(generate, logprobs, values if critic else None, score, token_logprobs, watch)


def _watch_gold(tables: gold.Tables, rollout: types.Rollout, *, prompt_width: int) -> dict[str, jax.Array]:
    judge = jax.vmap(gold.utility, in_axes=(None, 0, 0, 0))
    prompts_BP, answers_BT = rollout.tokens_BL[:, :prompt_width], rollout.tokens_BL[:, prompt_width:]
    return {"gold": judge(tables, prompts_BP, answers_BT, rollout.response_mask_BT).total}
