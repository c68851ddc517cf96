"""Methods without reinforcement learning on the pipeline's parts: DPO and its relatives, from given pairs or in rounds.

Names of losses exist on the command line alone; here each becomes a function and its numbers.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import operator
import pathlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from launch import mesh_settings, settings
from recipe import jobs, policy_sampling, tasks

from preferences import pairs as pairs_lib
from rlhf_jax import diagnostics, lm, parallel, types
from rlhf_jax.data import batching
from rlhf_jax.train import dpo, loop, objectives, reference
from rlhf_jax.train import state as state_lib
from rlhf_jax.train.optim import schedules

Loss = Literal["dpo", "cdpo", "robust", "ipo", "hinge", "kto", "orpo", "simpo", "dpo-sft", "dpo-norm"]


class Kind(NamedTuple):
    """What a name stands for."""

    objective: objectives.Objective
    numbers: dict[str, float]
    """Where they are not those of `dpo.Hyper`; a setting that is given replaces them."""
    reference: bool = True
    paired: bool = True


_NORMALISED = objectives.per_token(objectives.dpo)
KINDS: dict[str, Kind] = {
    "dpo": Kind(objectives.dpo, {"beta": 0.1}),
    "cdpo": Kind(objectives.dpo, {"beta": 0.1, "label_smoothing": 0.1}),
    "robust": Kind(objectives.robust_dpo, {"beta": 0.1, "label_smoothing": 0.1}),
    "ipo": Kind(objectives.ipo, {"beta": 0.5}),
    "hinge": Kind(objectives.hinge, {"beta": 0.1}),
    "kto": Kind(objectives.kto, {"beta": 0.1}, paired=False),
    "orpo": Kind(objectives.orpo, {"odds_weight": 1.0}, reference=False),
    "simpo": Kind(objectives.simpo, {"beta": 2.0, "margin": 0.5}, reference=False),
    "dpo-sft": Kind(objectives.with_sft(objectives.dpo), {"beta": 0.1, "sft_coef": 0.5}),
    "dpo-norm": Kind(_NORMALISED, {"beta": 1.0}),
}


@dataclasses.dataclass(frozen=True)
class Direct:
    """Settings of DPO and its relatives."""

    loss: Loss = "dpo"
    """Which loss; those on token means are ipo, orpo, simpo and dpo-norm, those without a reference orpo and simpo."""
    beta: float | None = None
    """Strength of the pull to the reference; none: 0.1, of ipo 0.5, of dpo-norm 1, of simpo (a scale) 2."""
    label_smoothing: float | None = None
    """Assumed share of flipped labels of cdpo and robust; none: 0.1."""
    desirable_weight: float = 1.0
    """Of kto's good answers."""
    undesirable_weight: float = 1.0
    """Of kto's bad answers."""
    odds_weight: float | None = None
    """Of orpo's odds beside its likelihood; none: 1."""
    margin: float | None = None
    """Of simpo, by how much its rewards should differ; none: 0.5."""
    sft_coef: float | None = None
    """Of dpo-sft's likelihood beside DPO; none: 0.5."""
    epochs: int = 1
    """Passes over the pairs."""
    batch: int = 64
    """Pairs a step; kto takes as many answers as they have."""
    micro_batches: int = 1
    """Parts of a batch that are held in memory one at a time; the gradient is the same."""
    learning_rate: float | None = None
    """Of a cosine to a tenth of it, which the first tenth of the steps warms up to and so does not quite reach; none:
    half of --ppo.learning-rate."""
    pairs: int = 4
    """Of each prompt with its ranked answers, drawn from all that differ in rank; 0: all of them."""


def check(asked: Direct) -> None:
    """Raise SettingError, naming the setting, for anything out of range or of no use to the loss."""
    for name, least in (("epochs", 1), ("batch", 1), ("micro_batches", 1), ("pairs", 0)):
        _require(getattr(asked, name) >= least, asked, name, f"at least {least}")
    for name in ("beta", "odds_weight", "margin", "sft_coef", "desirable_weight", "undesirable_weight"):
        given = getattr(asked, name)
        _require(given is None or 0 <= given < math.inf, asked, name, "at least 0 and finite")
    _require(asked.beta is None or asked.beta > 0, asked, "beta", "above 0")
    given = asked.learning_rate
    _require(given is None or 0 < given < math.inf, asked, "learning_rate", "positive and finite")
    given = asked.label_smoothing
    _require(given is None or 0 <= given < 0.5, asked, "label_smoothing", "at least 0 and below 0.5")
    divides = _rows(asked) % asked.micro_batches == 0
    _require(divides, asked, "micro_batches", f"a divisor of a batch's {_rows(asked)} rows")
    uses = {
        "beta": asked.loss != "orpo",
        "label_smoothing": asked.loss in ("cdpo", "robust"),
        "odds_weight": asked.loss == "orpo",
        "margin": asked.loss == "simpo",
        "sft_coef": asked.loss == "dpo-sft",
        "desirable_weight": asked.loss == "kto",
        "undesirable_weight": asked.loss == "kto",
    }
    plain = {field.name: field.default for field in dataclasses.fields(Direct)}
    for name, used in uses.items():
        _require(used or getattr(asked, name) == plain[name], asked, name, f"left out with --loss {asked.loss}")


def check_mesh(asked: Direct, mesh: settings.Mesh) -> None:
    """Raise SettingError for batches that do not divide over the devices."""
    rows = _rows(asked) // asked.micro_batches
    parts = f" by --micro-batches {asked.micro_batches}" if asked.micro_batches > 1 else ""
    mesh_settings.divides(mesh, "--batch" if rows == asked.batch else f"the rows of --batch {asked.batch}{parts}", rows)


def refuse_unread(asked: settings.Settings, flags: Iterable[str], *, program: str) -> None:
    """Raise SettingError, naming it, for the first of ``flags`` that is not as in the run's preset.

    They are names of settings with a dot, of a program that reads none of them.
    """
    preset = settings.preset(
        asked.preset, dialogues=asked.data.path is not None, started=asked.model is not None, published=asked.published
    )
    for flag in flags:
        read = operator.attrgetter(flag)
        if read(asked) != read(preset):
            raise settings.SettingError(
                f"--{flag.replace('_', '-').rstrip('-')} is not read by {program}; leave it out"
            )


def _require(ok: bool, asked: Direct, name: str, wanted: str) -> None:
    if not ok:
        flag = name.replace("_", "-")
        raise settings.SettingError(f"--{flag} is {getattr(asked, name)!r}; it must be {wanted}")


def _rows(asked: Direct) -> int:
    return asked.batch if KINDS[asked.loss].paired else 2 * asked.batch


class Plan(NamedTuple):
    """What training on some pairs comes to; a row is a pair or, of kto, an answer."""

    rows: int
    """Of a batch: no more than there are."""
    steps: int
    unseen: int
    """Rows that are in no batch: what a single epoch has over whole batches."""


def plan(asked: Direct, pairs: int, *, devices: int = 1) -> Plan:
    """How many pairs are trained on; raises SettingError where they do not fill the parts of a batch.

    ``devices`` are those that the rows of a batch lie on.
    """
    n = pairs if KINDS[asked.loss].paired else 2 * pairs
    parts = asked.micro_batches * devices
    rows = min(_rows(asked), n)
    rows -= rows % parts
    if rows == 0:
        over = f" over {devices} devices" if devices > 1 else ""
        raise settings.SettingError(f"--micro-batches is {asked.micro_batches}{over}; there are {n} rows to learn from")
    steps = asked.epochs * n // rows
    return Plan(rows, steps, max(0, n - steps * rows))


def numbers(asked: Direct, *, rate: float) -> dpo.Hyper:
    """The numbers of a step."""
    given = {name: getattr(asked, name) for name in ("beta", "label_smoothing", "odds_weight", "margin", "sft_coef")}
    made = KINDS[asked.loss].numbers | {name: value for name, value in given.items() if value is not None}
    made |= {"desirable_weight": asked.desirable_weight, "undesirable_weight": asked.undesirable_weight}
    plain = dpo.Hyper(**made, learning_rate=rate, max_grad_norm=1.0)
    return jax.tree.map(np.float32, plain)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """One loss on one job: its compiled step, and the compiled log-probabilities of answers."""

    job: jobs.Job
    asked: Direct
    train_step: parallel.JitStep
    score: parallel.JitStep
    folder: pathlib.Path
    """Where the reference's log-probabilities are kept."""

    @property
    def kind(self) -> Kind:
        """What the loss is."""
        return KINDS[self.asked.loss]

    @property
    def devices(self) -> int:
        """Over how many the rows of a batch lie."""
        return mesh_settings.rows_up(1, self.job.mesh)

    def compile_ahead(self, executor: concurrent.futures.Executor, policy: Any) -> None:
        """Compile the step in a thread, for parameters of these shapes."""
        task, rows = self.job.task, _rows(self.asked)
        K = 2 if self.kind.paired else 1

        def shaped(*shape: int, dtype: Any = jnp.bool_) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype)

        def batch(**more: Any) -> Any:
            L, T = task.row_width, task.response_width
            given = shaped(rows, K, dtype=jnp.float32) if self.kind.reference else None
            tokens = shaped(rows, K, L, dtype=jnp.int32)
            return types.Preferences(tokens, shaped(rows, K, L), shaped(rows, K, T), reference_BK=given, **more)

        whole = batch() if self.kind.paired else batch(good_BK=shaped(rows, K), mismatched=batch())
        state = jax.eval_shape(partial(state_lib.create, tx=self.job.ppo_tx), policy)
        self.train_step.compile_ahead(
            executor, state, None, numbers(self.asked, rate=0.0), whole, jax.eval_shape(lambda: jax.random.key(0))
        )

    def data(self, pairs: pairs_lib.Pairs, against: types.Params, *, name: str) -> types.Preferences:
        """Pairs in the form that the loss takes, with the log-probabilities of the reference where it has one."""
        made: Any = (
            pairs.rows if self.kind.paired else pairs_lib.singles(pairs, prompt_width=self.job.task.prompt_width)
        )
        if not self.kind.reference:
            return made
        return reference.attached(
            self.score,
            against,
            made,
            path=self.folder / f"{name}.npz",
            settings={"model": repr(self.job.cfg), "temperature": 1.0},
            rows=mesh_settings.rows_up(policy_sampling.LONG_CHUNK, self.job.mesh),
            tell=partial(self.job.progress.message, name),
        )

    def train(
        self,
        start: types.Params,
        pairs: pairs_lib.Pairs,
        *,
        name: str,
        seed: int,
        against: types.Params | None = None,
        asked: Direct | None = None,
        kept: str | None = None,
    ) -> types.Params:
        """Train from ``start`` on pairs, against it or another reference; what is finished is restored.

        ``asked`` may have other numbers than the trainer's own, not another loss or batch. ``kept`` names the file of
        the reference's log-probabilities, which runs on the same pairs against the same reference share; by default it
        has the run's name.
        """
        job, asked = self.job, asked or self.asked
        data = self.data(pairs, start if against is None else against, name=kept or name)
        n = len(data.tokens_BKL)
        rows, steps, _ = plan(asked, len(pairs), devices=self.devices)
        key = jax.random.fold_in(job.key("ppo"), 10_000 + seed)
        order = batching.epoch_batches(0, n=n, batch_size=rows, key=key, steps=steps)
        peak = asked.learning_rate or job.settings.ppo.learning_rate / 2

        def rate(i: int) -> Any:
            warm = schedules.constant_with_warmup(i, steps, warmup=max(1, steps // 10))
            return peak * warm * schedules.cosine(i, steps)

        state = job.fit(
            name,
            self.train_step,
            job.begin(partial(state_lib.create, tx=job.ppo_tx), start),
            steps,
            batch_at=lambda i: jax.tree.map(lambda x: jnp.asarray(x[order[i]]), data),
            hyper_at=lambda i: numbers(asked, rate=rate(i)),
            rng=key,
        )
        return state.params

    def accuracy(self, policy: types.Params, against: types.Params, held: pairs_lib.Pairs) -> list[float]:
        """How often the implicit reward ranks held-out pairs as labelled, with an interval that knows the prompts.

        Of kto, whose reward is the log-ratio, and of every loss: equal rewards count a half.
        """
        chunk = mesh_settings.rows_up(policy_sampling.LONG_CHUNK, self.job.mesh)
        theirs, ours = (reference.over_rows(self.score, each, held.rows, rows=chunk) for each in (against, policy))
        lengths = np.maximum(np.asarray(held.rows.answer_BKC).sum(axis=-1), 1).astype(np.float32)
        scored = objectives.Scored(*(jnp.asarray(x) for x in (ours, theirs, lengths)))
        objective = self.kind.objective if self.kind.paired else objectives.dpo
        _, rewards_BK = objective(scored, numbers(self.asked, rate=0.0))
        gap_B = np.asarray(rewards_BK[:, 0] - rewards_BK[:, 1])
        right_B = np.where(gap_B > 0, 1.0, np.where(gap_B == 0, 0.5, 0.0))
        prompts = np.unique(held.prompt_B, return_inverse=True)[1]
        return list(diagnostics.ratio_interval(np.bincount(prompts, right_B), np.bincount(prompts).astype(float)))


def make_trainer(job: jobs.Job, asked: Direct, folder: pathlib.Path) -> Trainer:
    """Build the programs; nothing is compiled yet."""
    logprobs = partial(lm.response_logprobs, cfg=job.cfg, prompt_width=job.task.prompt_width)
    kind = KINDS[asked.loss]
    how: dict[str, Any] = {} if kind.reference else {"reference": None}
    made = dpo.make_train_step(logprobs, kind.objective, micro_batches=asked.micro_batches, **how)
    whole = partial(dpo.answer_logprobs, logprobs)
    score = parallel.JitStep(whole, donate_argnums=(), mesh=job.mesh, batch_args=(1,), replicated_args=())
    check_mesh(asked, job.settings.mesh)
    return Trainer(job, asked, parallel.jit_step(made, mesh=job.mesh), score, folder / "reference")


class Round(NamedTuple):
    """What the policy that a round began with answered, and what became of its answers."""

    reward: float
    kl: float
    gold: float | None
    pairs: int
    left_out: dict[str, int]
    """Prompts that gave no pair, by reason."""
    unseen: int
    """See `Plan`."""


Judge = Callable[[policy_sampling.Answers, int, jax.Array], np.ndarray]
"""``(answers, samples, key) -> scores_B``, higher is better; the ``samples`` to one prompt stand next to each other."""


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
    latest: bool = True,
    asked: Direct | None = None,
) -> tuple[types.Params, list[Round]]:
    """Rounds of sampling, judging and training, each on prompts of its own (Xu 2024, 4.3).

    The best and the worst of ``samples`` answers to a prompt make a pair. The reference of a round is the policy that
    it begins with or, without ``latest``, always ``start``. Many rounds of a batch or two are online DPO.
    """
    job, policy, told = trainer.job, start, []
    key = jax.random.fold_in(job.key("ppo"), 20_000 + seed)
    n = len(prompts) // rounds
    for r in range(rounds):
        draw, label = jax.random.split(jax.random.fold_in(key, r))
        asked_of = prompts.at(np.repeat(np.arange(r * n, (r + 1) * n), samples))
        found = job.sampler(policy, start, reward, asked_of, draw)
        scores_BS = judge(found, samples, label).reshape(n, samples)
        try:
            pairs, left_out = pairs_lib.best_and_worst(found, scores_BS, prompt_width=job.task.prompt_width)
        except loop.DivergedError as error:
            raise loop.DivergedError(f"round {r} of {name}: {error}") from None
        if len(pairs) == 0:
            raise settings.SettingError(f"round {r} of {name}: the judge told no two answers apart; nothing is left")
        unseen = plan(asked or trainer.asked, len(pairs), devices=trainer.devices).unseen
        gold = None if found.gold is None else float(np.mean(found.gold.total))
        means = float(np.mean(found.scores_B)), float(np.mean(found.kl_B))
        told.append(Round(*means, gold, len(pairs), left_out, unseen))
        policy = trainer.train(
            policy,
            pairs,
            name=f"{name}-round{r}",
            seed=seed,
            against=policy if latest else start,
            asked=asked,
        )
    return policy, told
