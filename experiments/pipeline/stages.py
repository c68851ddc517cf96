"""The stages of InstructGPT's recipe, in order. Each is a pure function of the task, the settings and what came before.

A stage that was finished is restored instead of trained; one that was under way goes on from its last checkpoint.
"""

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

from rlhf_jax import checkpoint, generation, hosts, lm, manifest, parallel, types
from rlhf_jax.data import batching
from rlhf_jax.simulation import gold
from rlhf_jax.train import loop, ppo, reward_model, schedules, sft
from rlhf_jax.train import state as state_lib

from . import methods, optimisers, sampling, tasks, watching
from . import start as start_lib
from . import validation as validation_lib
from .settings import Settings

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
    sampler: sampling.Sampler
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
        made = ppo.make_train_step(self.rollouts(), **methods.composed(self.settings.ppo))
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
        return parallel.put(params, parallel.shardings(params, self.mesh, self.axes))

    def everywhere(self, x: np.ndarray) -> jax.Array:
        """An array of the host, whole on every device."""
        return jnp.asarray(x) if self.mesh is None else parallel.whole(x, self.mesh)

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
            critic=methods.has_critic(settings),
            axis_name=axis_name,
        )
        return models._replace(join=ppo.shared_trunk) if settings.critic == "zero-head" else models

    def new_policy(self, start: Params, reward: Params) -> ppo.PPOState:
        """What reinforcement learning begins with: the SFT model, and a critic where the method has one."""
        settings = self.settings.ppo
        critic = self._new_critic(start, reward) if methods.has_critic(settings) else None
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
                batch_at=batch_at if mesh is None else lambda i: parallel.own_rows(batch_at(i), mesh),
                agreed=hosts.current().stage(),
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
        return {"max_skipped": self.settings.max_skipped, "tell": partial(self.note, stage), "fingerprint": data}


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
        sampler=sampling.Sampler(models, task=task, mesh=mesh),
        supervised_step=parallel.jit_step(sft.make_train_step(token_logprobs), mesh=mesh),
        reward_step=parallel.jit_step(reward_model.make_train_step(partial(lm.score, cfg=cfg)), mesh=mesh),
        supervised_tx=optimisers.muon(),
        ppo_tx=methods.optimiser(settings.ppo),
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
        return lm.response_stats(
            params, tokens_BL, cfg=cfg, prompt_width=prompt_width, mask_BL=mask_BL, temperature=temperature
        )

    def values(params: Params, tokens_BL: Any, mask_BL: Any) -> jax.Array:
        return lm.response_values(params, tokens_BL, cfg=cfg, prompt_width=prompt_width, mask_BL=mask_BL)

    def score(params: Params, rollout: types.Rollout) -> jax.Array:
        return lm.score(params, rollout.tokens_BL, cfg=cfg, mask_BL=rollout.mask_BL)

    watch = None if tables is None else partial(_watch_gold, tables, prompt_width=prompt_width)
    token_logprobs = partial(lm.token_logprobs, cfg=cfg)
    return ppo.Models(generate, logprobs, values if critic else None, score, token_logprobs, watch)


def _watch_gold(tables: gold.Tables, rollout: types.Rollout, *, prompt_width: int) -> dict[str, jax.Array]:
    judge = jax.vmap(gold.utility, in_axes=(None, 0, 0, 0))
    prompts_BP, answers_BT = rollout.tokens_BL[:, :prompt_width], rollout.tokens_BL[:, prompt_width:]
    return {"gold": judge(tables, prompts_BP, answers_BT, rollout.response_mask_BT).total}


def hyper(rate: Any) -> dict[str, np.float32]:
    """What the supervised and the reward-model step take, with gradients clipped to norm 1."""
    return {"learning_rate": np.float32(rate), "max_grad_norm": np.float32(1.0)}


def pretrain(job: Job) -> Params:
    """A base model from nothing, on the corpus; or the one that the run was given, as it is."""
    if job.base is not None:
        job.progress.skip("pretrain")
        return job.base
    settings, rows_BL = job.settings.pretrain, job.task.pretraining_BL
    key = job.key("pretrain")
    order = batching.epoch_batches(0, n=len(rows_BL), batch_size=settings.batch, key=key, steps=settings.steps)

    def rate(i: int) -> Any:
        warm = schedules.constant_with_warmup(i, settings.steps, warmup=settings.warmup)
        return settings.learning_rate * warm * schedules.cosine(i, settings.steps)

    state = job.fit(
        "pretrain",
        job.supervised_step,
        job.begin(lambda key: state_lib.create(jax.jit(partial(lm.init, cfg=job.cfg))(key), job.supervised_tx), key),
        settings.steps,
        batch_at=lambda i: tasks.text_batch(rows_BL[order[i]]),
        hyper_at=lambda i: hyper(rate(i)),
    )
    return state.params


def supervised(job: Job, stage: str, base: Params, *, epochs: int, mix: float) -> Params:
    """Fine-tune on demonstrations, a share ``mix`` of each batch being pretraining rows."""
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
        job.begin(partial(state_lib.create, tx=job.supervised_tx), base),
        steps,
        batch_at=batch_at,
        hyper_at=lambda i: hyper(settings.sft.learning_rate * schedules.cosine(i, steps)),
    )
    return state.params


def train_reward_models(job: Job, start: Params, parts: list[types.Comparisons], **how: Any) -> list[Params]:
    """The reward model, and one that was held out where the comparisons are in two parts (Bai et al. 2022, 4.2)."""
    named = zip(("reward_model", "heldout_reward_model"), parts)
    made = (normalised(job, train_reward_model(job, start, part, stage=stage, **how), start) for stage, part in named)
    return [job.placed(params) for params in made]


def train_reward_model(
    job: Job,
    start: Params,
    train: types.Comparisons,
    *,
    validation: types.Comparisons | None = None,
    stage: str = "reward_model",
) -> Params:
    """One epoch over the comparisons, all pairs of a prompt in one batch element; see `validated` for the others."""
    settings, n = job.settings.reward_model, len(train.ranks_BK)
    batch = min(settings.batch, n)
    steps = n // batch
    key = job.key(stage)
    order = batching.epoch_batches(0, n=n, batch_size=batch, key=key, steps=steps)
    params = lm.with_head(jax.random.fold_in(key, 1), start, job.cfg)
    state = job.fit(
        stage,
        job.reward_step,
        job.begin(partial(state_lib.create, tx=job.supervised_tx), params),
        steps,
        batch_at=lambda i: jax.tree.map(lambda x: np.asarray(x)[order[i]], train),
        hyper_at=lambda i: hyper(settings.learning_rate * schedules.cosine(i, steps)),
        **({} if validation is None else validated(job, stage, validation, steps=steps)),
    )
    return lm.absorb_gain(state.params)


def validated(job: Job, stage: str, held_out: types.Comparisons, *, steps: int, **how: Any) -> dict[str, Any]:
    """What `Job.fit` takes to log the loss on ``held_out`` comparisons, and to raise alarms on it."""
    return {
        "callbacks": [validation_lib.logged(job.sampler.score, held_out, steps=steps, **how)],
        "log": watching.watched(job.log, stage, job.settings, partial(job.progress.tell, stage)),
    }


def normalised(job: Job, params: Params, policy: Params) -> Params:
    """Scale scores to standard deviation 1 on samples of ``policy``; shift them so that demonstrations have mean 0.

    InstructGPT 3.5 centres on demonstrations; the scale makes the KL coefficient mean the same from run to run. Both
    are kept in the head, so they are saved with the model.
    """
    prompt_set = job.task.rl_prompts.take(sampling.CHUNK)
    key = jax.random.fold_in(job.key("reward_model"), 2)
    samples = job.sampler(policy, policy, params, prompt_set, key)
    params = lm.standardise(params, job.everywhere(samples.scores_B))
    rows = job.task.demonstrations
    n = min(1024, len(rows.tokens_BL))
    scores = job.sampler.score(params, rows.tokens_BL[:n], rows.mask_BL[:n])
    return lm.centre(params, job.everywhere(scores))


def optimise(job: Job, stage: str, start: Params, rewards: list[Params], *, ptx_coef: float) -> Params:
    """PPO from ``start``, with ``start`` as the KL reference; the second of two reward models only looks on."""
    batch_at, hyper_at = ppo_inputs(job, stage, ptx_coef=ptx_coef)
    state = job.fit(
        stage,
        job.ppo_step,
        job.new_policy(start, rewards[0]),
        job.settings.ppo.iterations,
        batch_at=batch_at,
        hyper_at=hyper_at,
        frozen=ppo.Frozen(start, *rewards),
        log=watching.watched(job.log, stage, job.settings, partial(job.progress.tell, stage)),
    )
    return state.ema


def ppo_inputs(
    job: Job, stage: str, *, ptx_coef: float
) -> tuple[Callable[[int], ppo.Batch], Callable[[int], ppo.Hyper]]:
    """Batch and hyperparameters of each iteration of PPO."""
    settings, task = job.settings.ppo, job.task
    key = job.key(stage)
    prompts_, updates = task.rl_prompts, settings.epochs * settings.minibatches
    asked = settings.batch // settings.samples
    order = batching.epoch_batches(0, n=len(prompts_), batch_size=asked, key=key, steps=settings.iterations)
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
            prompts_.tokens_BP[rows],  # type: ignore[arg-type]
            prompts_.mask_BP[rows],  # type: ignore[arg-type]
            tasks.text_batch(task.pretraining_BL[text_order[i]]),
        )

    return batch_at, lambda i: methods.hyper(settings, i, ptx_coef=ptx_coef)
