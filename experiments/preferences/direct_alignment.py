"""Trains with DPO and related losses, on given pairs or in rounds of sampling and labelling."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from launch import device_mesh
from launch import settings as settings_lib
from recipe import jobs, policy_sampling, tasks

from preferences import direct_settings
from preferences import pairs as pairs_lib
from preferences.direct_settings import DirectSettings
from rlhf_jax import diagnostics, lm, parallel, types
from rlhf_jax.data import batching
from rlhf_jax.train import dpo, loop, objectives
from rlhf_jax.train import reference as reference_lib
from rlhf_jax.train import state as state_lib
from rlhf_jax.train.optim import schedules


class LossSpec(NamedTuple):
    """The objective and the default hyperparameters for one value of ``--loss``."""

    objective: objectives.Objective
    defaults: dict[str, float]
    """Defaults that replace those of `dpo.Hyper`; settings override them."""


LOSSES: dict[str, LossSpec] = {
    "dpo": LossSpec(objectives.dpo, {"beta": 0.1}),
    "cdpo": LossSpec(objectives.dpo, {"beta": 0.1, "label_smoothing": 0.1}),
    "robust": LossSpec(objectives.robust_dpo, {"beta": 0.1, "label_smoothing": 0.1}),
    "ipo": LossSpec(objectives.ipo, {"beta": 0.5}),
    "hinge": LossSpec(objectives.hinge, {"beta": 0.1}),
    "kto": LossSpec(objectives.kto, {"beta": 0.1}),
    "orpo": LossSpec(objectives.orpo, {"odds_weight": 1.0}),
    "simpo": LossSpec(objectives.simpo, {"beta": 2.0, "margin": 0.5}),
    "dpo-sft": LossSpec(objectives.with_sft(objectives.dpo), {"beta": 0.1, "sft_coef": 0.5}),
    "dpo-norm": LossSpec(objectives.per_token(objectives.dpo), {"beta": 1.0}),
}


class Schedule(NamedTuple):
    """The division of pairs into batches. A row is a pair or, for kto, an answer."""

    rows: int
    """Number of rows per batch."""
    steps: int
    unseen: int
    """Number of rows that no step uses, because they do not fill a batch."""


def schedule(settings: DirectSettings, pairs: int, *, devices: int = 1) -> Schedule:
    """Returns the schedule for ``pairs`` pairs if the rows of a batch are sharded over ``devices`` devices.

    Raises SettingError if a batch would have fewer rows than micro-batches times devices.
    """
    n = pairs if settings.paired else 2 * pairs
    parts = settings.micro_batches * devices
    rows = min(settings.batch_rows, n)
    rows -= rows % parts
    if rows == 0:
        over, fewer = (f" over {devices} devices", " or use fewer devices") if devices > 1 else ("", "")
        raise settings_lib.SettingError(
            f"--micro-batches {settings.micro_batches}{over} needs at least {parts} rows, but there are only {n}; "
            f"lower it{fewer}"
        )
    steps = settings.epochs * n // rows
    return Schedule(rows, steps, max(0, n - steps * rows))


def hyperparameters(settings: direct_settings.LossSettings, *, learning_rate: float) -> dpo.Hyper:
    """Returns the hyperparameters of a step: the loss's defaults, overridden by the settings that are not None."""
    names = ("beta", "label_smoothing", "odds_weight", "margin", "sft_coef", "desirable_weight", "undesirable_weight")
    values = {name: value for name in names if (value := getattr(settings, name)) is not None}
    hyper = dpo.Hyper(**LOSSES[settings.loss].defaults | values, learning_rate=learning_rate, max_grad_norm=1.0)
    return jax.tree.map(np.float32, hyper)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Trains with one loss in one job. Holds the jitted functions for train steps and for answer log-probabilities."""

    job: jobs.Job
    settings: DirectSettings
    train_step: parallel.JitStep
    score: parallel.JitStep
    folder: pathlib.Path
    """Folder for the reference's log-probabilities."""

    @property
    def loss(self) -> LossSpec:
        """The specification of the loss."""
        return LOSSES[self.settings.loss]

    @property
    def devices(self) -> int:
        """Number of devices that the rows of a batch are sharded over."""
        return device_mesh.round_rows_up(1, self.job.mesh)

    def compile_ahead(self, executor: concurrent.futures.Executor, policy: Any) -> None:
        """Compiles the train step in a thread, for parameters with the shapes of ``policy``."""
        task, rows = self.job.task, self.settings.batch_rows
        K = 2 if self.settings.paired else 1

        def shaped(*shape: int, dtype: Any = jnp.bool_) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype)

        def batch(**more: Any) -> Any:
            L, T = task.row_width, task.response_width
            reference_BK = shaped(rows, K, dtype=jnp.float32) if self.settings.has_reference else None
            tokens = shaped(rows, K, L, dtype=jnp.int32)
            return types.Preferences(tokens, shaped(rows, K, L), shaped(rows, K, T), reference_BK=reference_BK, **more)

        whole = batch() if self.settings.paired else batch(good_BK=shaped(rows, K), mismatched=batch())
        state = jax.eval_shape(partial(state_lib.create, tx=self.job.ppo_tx), policy)
        hyper = hyperparameters(self.settings, learning_rate=0.0)
        self.train_step.compile_ahead(executor, state, None, hyper, whole, jax.eval_shape(lambda: jax.random.key(0)))

    def data(self, pairs: pairs_lib.Pairs, reference: types.Params, *, name: str) -> types.Preferences:
        """Returns the rows that the loss trains on, with the reference's log-probabilities if the loss needs them.

        The log-probabilities are saved in ``name.npz`` in the trainer's folder.
        """
        rows: Any = pairs.rows
        if not self.settings.paired:
            rows = pairs_lib.singles(pairs, prompt_width=self.job.task.prompt_width)
        if not self.settings.has_reference:
            return rows
        return reference_lib.attach_logprobs(
            self.score,
            reference,
            rows,
            path=self.folder / f"{name}.npz",
            settings={"model": repr(self.job.cfg), "temperature": self.job.settings.ppo.temperature},
            rows=device_mesh.round_rows_up(policy_sampling.LONG_CHUNK, self.job.mesh),
            warn=partial(self.job.progress.message, name),
        )

    def train(
        self,
        start: types.Params,
        pairs: pairs_lib.Pairs,
        *,
        name: str,
        seed: int,
        reference: types.Params | None = None,
        settings: DirectSettings | None = None,
        reference_file: str | None = None,
    ) -> types.Params:
        """Trains a policy from ``start`` on pairs and returns its parameters. A finished run is restored, not trained.

        Args:
            start: The initial parameters.
            pairs: The pairs to train on.
            name: Name of the run in its checkpoints and its log.
            seed: Seed of the batch order.
            reference: The reference model; ``start`` by default.
            settings: Settings to use instead of the trainer's. The loss, the batch size and the number of micro-batches
                must be the same.
            reference_file: Name of the file of the reference's log-probabilities, which runs with the same pairs and
                the same reference can share; ``name`` by default.
        """
        job, settings = self.job, settings or self.settings
        data = self.data(pairs, start if reference is None else reference, name=reference_file or name)
        n = len(data.tokens_BKL)
        rows, steps, _ = schedule(settings, len(pairs), devices=self.devices)
        key = jax.random.fold_in(job.key("ppo"), 10_000 + seed)
        order = batching.epoch_batches(0, n=n, batch_size=rows, key=key, steps=steps)
        peak = settings.learning_rate or job.settings.ppo.learning_rate / 2

        def learning_rate(i: int) -> Any:
            warmup = schedules.constant_with_warmup(i, steps, warmup=max(1, steps // 10))
            return peak * warmup * schedules.cosine(i, steps)

        state = job.fit(
            name,
            self.train_step,
            job.create_on_mesh(partial(state_lib.create, tx=job.ppo_tx), start),
            steps,
            batch_at=lambda i: jax.tree.map(lambda x: jnp.asarray(x[order[i]]), data),
            hyper_at=lambda i: hyperparameters(settings, learning_rate=learning_rate(i)),
            rng=key,
        )
        return state.params

    def accuracy(self, policy: types.Params, reference: types.Params, pairs: pairs_lib.Pairs) -> list[float]:
        """Returns the share of pairs that the implicit reward ranks as labelled, with its 95 % interval.

        Equal rewards count as one half. The interval is clustered by what the prompts ask. kto uses the implicit reward
        of DPO.
        """
        chunk = device_mesh.round_rows_up(policy_sampling.LONG_CHUNK, self.job.mesh)
        policy_BK, reference_BK = (
            reference_lib.answer_logprobs(self.score, params, pairs.rows, rows=chunk) for params in (policy, reference)
        )
        lengths_BK = np.maximum(np.asarray(pairs.rows.answer_BKC).sum(axis=-1), 1).astype(np.float32)
        scored = objectives.Scored(*(jnp.asarray(x) for x in (policy_BK, reference_BK, lengths_BK)))
        objective = self.loss.objective if self.settings.paired else objectives.dpo
        _, rewards_BK = objective(scored, hyperparameters(self.settings, learning_rate=0.0))
        outcome_B = diagnostics.win_outcomes(np.asarray(rewards_BK[:, 0]), np.asarray(rewards_BK[:, 1]))
        asked = self.job.task.asked(pairs.rows).tolist()
        return list(diagnostics.clustered_mean(outcome_B, asked, rate=True))


def make_trainer(job: jobs.Job, settings: DirectSettings, folder: pathlib.Path) -> Trainer:
    """Builds a trainer without compiling its functions. Raises SettingError if the mesh cannot split a batch evenly."""
    direct_settings.check_mesh(settings, job.settings.mesh)
    task, temperature = job.task, job.settings.ppo.temperature
    logprobs = partial(lm.token_logprobs, cfg=job.cfg, prompt_width=task.prompt_width, temperature=temperature)
    loss = LOSSES[settings.loss]
    options: dict[str, Any] = {} if settings.has_reference else {"reference": None}
    train_step = dpo.make_train_step(logprobs, loss.objective, micro_batches=settings.micro_batches, **options)
    answer_logprobs = partial(dpo.answer_logprobs, logprobs)
    score = parallel.JitStep(answer_logprobs, donate_argnums=(), mesh=job.mesh, batch_args=(1,), replicated_args=())
    return Trainer(job, settings, parallel.jit_step(train_step, mesh=job.mesh), score, folder / "reference")


class Round(NamedTuple):
    """Means over the answers sampled at the start of a round, and counts of the resulting pairs."""

    reward: float
    kl: float
    gold: float | None
    pairs: int
    left_out: dict[str, int]
    """Number of prompts without a pair, by reason."""
    unseen: int
    """Number of rows that no step uses; see `Schedule`."""


Judge = Callable[[policy_sampling.Answers, int, jax.Array], np.ndarray]
"""A function ``(answers, samples, key) -> scores_B``; higher is better. The ``samples`` answers to a prompt are
consecutive."""


def iterate(
    trainer: Trainer,
    start: types.Params,
    reward: types.Params,
    prompts: tasks.PromptSet,
    *,
    judge: Judge,
    name: str,
    seed: int,
    rounds: int,
    samples: int,
    hold_reference: bool = False,
    settings: DirectSettings | None = None,
) -> tuple[types.Params, list[Round]]:
    """Trains in rounds of sampling, judging and training, each on different prompts (Xu 2024, section 4.3).

    The best and the worst of the ``samples`` answers to a prompt form a pair. The reference of a round is the policy at
    its start or, with ``hold_reference``, always ``start``. Many rounds of one or two batches each amount to online
    DPO.

    Returns:
        The final policy, and the results of each round.

    Raises:
        SettingError: A round has no pairs, because the judge gives all different answers to a prompt the same score.
        DivergedError: The judge returns a score that is not finite.
    """
    job, policy, results = trainer.job, start, []
    key = jax.random.fold_in(job.key("ppo"), 20_000 + seed)
    n = len(prompts) // rounds
    for r in range(rounds):
        draw, label = jax.random.split(jax.random.fold_in(key, r))
        repeated = prompts.at(np.repeat(np.arange(r * n, (r + 1) * n), samples))
        answers = job.sampler(policy, start, reward, repeated, draw)
        scores_BS = judge(answers, samples, label).reshape(n, samples)
        try:
            pairs, left_out = pairs_lib.best_and_worst(answers, scores_BS, prompt_width=job.task.prompt_width)
        except loop.DivergedError as error:
            raise loop.DivergedError(f"round {r} of {name}: {error}") from None
        if len(pairs) == 0:
            raise settings_lib.SettingError(
                f"round {r} of {name} has no pairs to train on, because the judge gives all different answers to a "
                "prompt the same score; use fewer --rounds, more --samples or another judge"
            )
        unseen = schedule(settings or trainer.settings, len(pairs), devices=trainer.devices).unseen
        gold = None if answers.gold is None else float(np.mean(answers.gold.total))
        means = float(np.mean(answers.scores_B)), float(np.mean(answers.kl_B))
        results.append(Round(*means, gold, len(pairs), left_out, unseen))
        policy = trainer.train(
            policy,
            pairs,
            name=f"{name}-round{r}",
            seed=seed,
            reference=start if hold_reference else policy,
            settings=settings,
        )
    return policy, results
