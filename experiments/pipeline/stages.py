"""The stages of InstructGPT's recipe, in order. Each is a pure function of the task, the settings and what came before.

A stage that was finished is restored instead of trained; one that was under way goes on from its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import checkpoint, generation, lm, parallel, types
from rlhf_jax.data import batching
from rlhf_jax.simulation import gold, labelers
from rlhf_jax.train import loop, ppo, reward_model, schedules, sft
from rlhf_jax.train import state as state_lib

from . import methods, optimisers, sampling, tasks, watching
from . import start as start_lib
from .settings import Settings

STAGES = ("pretrain", "sft", "sft_mix", "comparisons", "reward_model", "ppo", "ppo_ptx", "evaluate")

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

    def key(self, stage: str) -> jax.Array:
        """The random key of a stage; ``ppo-more`` has that of ``ppo``."""
        return jax.random.fold_in(jax.random.key(self.settings.seed), 100 + STAGES.index(stage.partition("-")[0]))

    @functools.cached_property
    def ppo_step(self) -> parallel.JitStep:
        """An iteration of reinforcement learning by the method of the settings."""
        return parallel.jit_step(ppo.make_train_step(self.rollouts(), **methods.composed(self.settings.ppo)))

    def rollouts(self, *, axis_name: str | None = None) -> ppo.Models:
        """The models as reinforcement learning calls them."""
        settings, task = self.settings.ppo, self.task
        # What PPO writes while it runs is what its compiled step can see: ids, which gold reads only where they are
        # words.
        return ppo_models(
            self.cfg,
            _drawn(self.spec, self.settings),
            prompt_width=task.prompt_width,
            tables=task.world.tables if task.world and task.speaks_world else None,
            samples=settings.samples,
            critic=methods.has_critic(settings),
            axis_name=axis_name,
        )

    def new_policy(self, start: Params, reward: Params) -> ppo.PPOState:
        """What reinforcement learning begins with: a critic that starts as the reward model (InstructGPT C.4)."""
        settings = self.settings.ppo
        critic = reward if methods.has_critic(settings) else None
        return ppo.create(start, critic, self.ppo_tx, reference=None if settings.reference_ema is None else start)

    def programs(self) -> dict[str, int]:
        """How often each of the large programs was traced, which is how often it was compiled."""
        steps = {"supervised": self.supervised_step, "reward_model": self.reward_step, "ppo": self.ppo_step}
        return {name: step.traces for name, step in steps.items()} | {"sampling": self.sampler.traces}

    def fit(self, stage: str, train_step: parallel.JitStep, state: Any, steps: int, **how: Any) -> Any:
        """Run one stage's loop with the run's log (or another), progress and checkpoints."""
        self.progress.start(stage, steps)
        with self.checkpoints(stage) as checkpoints:
            state = loop.fit(
                train_step,
                state,
                steps=steps,
                rng=self.key(stage),
                stage=stage,
                checkpoints=checkpoints,
                save_every=max(1, -(-steps // self.settings.saves)),
                progress=self.progress.update,
                **{"log": self.log, **how},
            )
        self.progress.finish(stage)
        return state


def make_job(
    settings: Settings, task: tasks.Task, *, start: start_lib.Start | None, checkpoints: Any, log: Any, progress: Any
) -> Job:
    """Configure the model and build every compiled step; nothing is compiled before it is first called."""
    cfg = _new_model(settings, task) if start is None else start.cfg
    spec = generation.Sampling(max_new_tokens=task.response_width, stop_ids=task.fmt.stop_ids, pad_id=task.fmt.pad_id)
    models = ppo_models(cfg, spec, prompt_width=task.prompt_width)
    if not settings.ppo.correct_sampler:
        generation.check_on_policy(_drawn(spec, settings))
    token_logprobs = partial(lm.token_logprobs, cfg=cfg)
    return Job(
        settings=settings,
        task=task,
        cfg=cfg,
        spec=spec,
        checkpoints=checkpoints,
        log=log,
        progress=progress,
        base=None if start is None else start.params,
        sampler=sampling.Sampler(models, task=task),
        supervised_step=parallel.jit_step(sft.make_train_step(token_logprobs)),
        reward_step=parallel.jit_step(reward_model.make_train_step(partial(lm.score, cfg=cfg))),
        supervised_tx=optimisers.muon(),
        ppo_tx=methods.optimiser(settings.ppo),
    )


def _drawn(spec: generation.Sampling, settings: Settings) -> generation.Sampling:
    return dataclasses.replace(spec, top_k=settings.ppo.top_k, top_p=settings.ppo.top_p)


def _new_model(settings: Settings, task: tasks.Task) -> lm.LMConfig:
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
        state_lib.create(jax.jit(partial(lm.init, cfg=job.cfg))(key), job.supervised_tx),
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
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), demos, text)

    state = job.fit(
        stage,
        job.supervised_step,
        state_lib.create(base, job.supervised_tx),
        steps,
        batch_at=batch_at,
        hyper_at=lambda i: hyper(settings.sft.learning_rate * schedules.cosine(i, steps)),
    )
    return state.params


def comparisons(job: Job, policies: list[Params]) -> tuple[types.Comparisons, types.Comparisons, dict[str, Any]]:
    """Training and held-out comparisons with facts about them: from the file, or new ones from simulated labelers."""
    if job.task.comparisons is None:
        return collect_comparisons(job, policies)
    train, validation = job.task.comparisons
    job.progress.skip("comparisons")
    n = len(train.ranks_BK)
    return train, validation, {"training_prompts": n, "training_answers": 2 * n}


def collect_comparisons(
    job: Job, policies: list[Params]
) -> tuple[types.Comparisons, types.Comparisons, dict[str, Any]]:
    """Sample K answers a prompt from the policies in turn, ranked by labelers: (training, validation, facts)."""
    world = job.task.world
    assert world is not None
    settings, prompt_set = job.settings.comparisons, world.compare_prompts
    n, K = len(prompt_set), settings.max_k
    key = job.key("comparisons")
    k_B = np.random.default_rng([job.settings.seed, 500]).integers(settings.min_k, K + 1, size=n)
    job.progress.start("comparisons", n * K)
    where_BK = np.arange(K)[None, :] < k_B[:, None]
    prompt_R, place_R = np.nonzero(where_BK)
    drawn: list[Any] = []
    done = 0
    for j, policy in enumerate(policies):
        mine = np.flatnonzero(place_R % len(policies) == j)
        asked = prompt_set.at(prompt_R[mine])
        answers = job.sampler(policy, None, None, asked, jax.random.fold_in(key, j))
        drawn.append((mine, answers))
        done += len(mine)
        job.progress.update("comparisons", done, n * K)
    L = job.task.row_width
    tokens_BKL = np.full((n, K, L), job.task.fmt.pad_id, np.int32)
    mask_BKL = np.zeros((n, K, L), bool)
    features_BKF = np.zeros((n, K, len(labelers.FEATURES)), np.float32)
    for mine, answers in drawn:
        at = (prompt_R[mine], place_R[mine])
        tokens_BKL[at], mask_BKL[at] = answers.tokens_BL, answers.mask_BL
        features_BKF[at] = labelers.features(answers.gold)
    # Two labelers are to agree as often as people do, on pairs of these samples: that sets the noise.
    utility_BKR = np.asarray(labelers.utilities(world.pool, jnp.asarray(features_BKF)))
    noise = labelers.calibrated_temperature(utility_BKR[:, 0], utility_BKR[:, 1], target=job.settings.world.agreement)
    pool = world.pool.replace(temperature=jnp.float32(noise))  # type: ignore[attr-defined]
    keys_B = jax.random.split(jax.random.fold_in(key, 1000), n)
    labeler_B = jnp.arange(n) % job.settings.world.labelers
    ranks_BK = np.asarray(
        jax.jit(jax.vmap(labelers.rank, in_axes=(0, None, 0, 0, 0)))(keys_B, pool, labeler_B, features_BKF, where_BK)
    )
    ranks_BK = np.where(where_BK, ranks_BK, 0)
    everything = types.Comparisons(tokens_BKL, mask_BKL, ranks_BK, where_BK)  # type: ignore[arg-type]
    train, validation = (jax.tree.map(lambda x, s=s: x[s], everything) for s in _halves(world.n_compare, n))
    job.progress.finish("comparisons")
    facts = {"labeler_temperature": noise, "label_agreement": job.settings.world.agreement}
    return (
        train,
        validation,
        facts | {"training_prompts": world.n_compare, "training_answers": int(k_B[: world.n_compare].sum())},
    )


def _halves(cut: int, n: int) -> tuple[slice, slice]:
    return slice(0, cut), slice(cut, n)


def train_reward_model(job: Job, start: Params, train: types.Comparisons, *, stage: str = "reward_model") -> Params:
    """One epoch over the comparisons, all pairs of a prompt in one batch element."""
    settings, n = job.settings.reward_model, len(train.ranks_BK)
    batch = min(settings.batch, n)
    steps = n // batch
    key = job.key("reward_model")
    order = batching.epoch_batches(0, n=n, batch_size=batch, key=key, steps=steps)
    params = lm.with_head(jax.random.fold_in(key, 1), start, job.cfg)
    state = job.fit(
        stage,
        job.reward_step,
        state_lib.create(params, job.supervised_tx),
        steps,
        batch_at=lambda i: jax.tree.map(lambda x: jnp.asarray(x[order[i]]), train),
        hyper_at=lambda i: hyper(settings.learning_rate * schedules.cosine(i, steps)),
    )
    return state.params


def normalised(job: Job, params: Params, policy: Params) -> Params:
    """Scale scores to standard deviation 1 on samples of ``policy``; shift them so that demonstrations have mean 0.

    InstructGPT 3.5 centres on demonstrations; the scale makes the KL coefficient mean the same from run to run. Both
    are kept in the head, so they are saved with the model.
    """
    prompt_set = job.task.rl_prompts.take(sampling.CHUNK)
    key = jax.random.fold_in(job.key("reward_model"), 2)
    samples = job.sampler(policy, policy, params, prompt_set, key)
    params = lm.standardise(params, jnp.asarray(samples.scores_B))
    rows = job.task.demonstrations
    n = min(1024, len(rows.tokens_BL))
    scores = job.sampler.score(params, rows.tokens_BL[:n], rows.mask_BL[:n])
    return lm.centre(params, jnp.asarray(scores))


def optimise(job: Job, stage: str, start: Params, reward: Params, *, ptx_coef: float) -> Params:
    """PPO from ``start``, with ``start`` as the KL reference and the reward model as the critic's start."""
    batch_at, hyper_at = ppo_inputs(job, stage, ptx_coef=ptx_coef)
    state = job.fit(
        stage,
        job.ppo_step,
        job.new_policy(start, reward),
        job.settings.ppo.iterations,
        batch_at=batch_at,
        hyper_at=hyper_at,
        frozen=ppo.Frozen(reference=start, reward=reward),
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
            jnp.asarray(prompts_.tokens_BP[rows]),
            jnp.asarray(prompts_.mask_BP[rows]),
            tasks.text_batch(task.pretraining_BL[text_order[i]]),
        )

    return batch_at, lambda i: methods.hyper(settings, i, ptx_coef=ptx_coef)
