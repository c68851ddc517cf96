"""Preference models for helpfulness and harmlessness: one head for both, or one for each (Bai et al. 2022, 5.1)."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from recipe import jobs, reward_diagnosis, stages

from online import domains
from rlhf_jax import diagnostics, lm, parallel, types
from rlhf_jax.data import batching
from rlhf_jax.train import reward_model
from rlhf_jax.train import state as state_lib
from rlhf_jax.train.optim import schedules


def make_step(job: jobs.Job, *, separate: bool = False) -> parallel.JitStep:
    """Returns the compiled step. With ``separate``, each domain has its own head, which learns from its pairs only."""
    train_step = reward_model.make_train_step(partial(lm.score, cfg=job.cfg), head_of_domain=separate)
    return parallel.jit_step(train_step, mesh=job.mesh)


def train(
    job: jobs.Job,
    step: parallel.JitStep,
    start: types.Params,
    rows: types.Comparisons,
    *,
    name: str,
    number: int,
    batch: int,
    separate: bool = False,
    harmless_weight: float = 1.0,
) -> types.Params:
    """Trains a preference model for one epoch and returns it, with scores that are not normalised.

    Args:
        job: The job of the run.
        step: The step, from `make_step`.
        start: Initial parameters, those of the SFT model.
        rows: The pairs.
        name: Name of the stage.
        number: Number of the model, on which the order of the pairs depends.
        batch: Pairs per step.
        separate: Whether the model has a head for each domain.
        harmless_weight: Weight of a harmlessness pair in the loss, that of a helpfulness pair being 1 (lambda in HH
            5.1.2).
    """
    settings, n = job.settings.reward_model, len(rows.ranks_BK)
    key = jax.random.fold_in(job.key("reward_model"), 10_000 + number)
    batch = min(batch, n)
    steps = n // batch
    order = batching.epoch_batches(0, n=n, batch_size=batch, key=key, steps=steps)
    head_key = jax.random.fold_in(job.key("reward_model"), 1)  # the same in all rounds
    params = lm.with_head(head_key, start, job.cfg, heads=len(domains.DOMAINS) if separate else None)
    weights = {} if len(np.unique(rows.domain_B)) == 1 else {"domain_weights": domain_weights(rows, harmless_weight)}

    def hyper_at(i: int) -> dict[str, Any]:
        return {**stages.hyper(settings.learning_rate * schedules.cosine(i, steps)), **weights}

    state = job.fit(
        name,
        step,
        job.create_on_mesh(partial(state_lib.create, tx=job.supervised_tx), params),
        steps,
        batch_at=lambda i: jax.tree.map(lambda x: np.asarray(x)[order[i]], rows),
        hyper_at=hyper_at,
        rng=key,
    )
    return lm.heads.absorb_gain(state.params)


def domain_weights(rows: types.Comparisons, harmless_weight: float) -> jax.Array:
    """Returns the weights of the domains' mean losses with which a harmlessness pair has this weight on average."""
    share = float(np.mean(np.asarray(rows.domain_B) == domains.DOMAINS.index("harmless")))
    return jnp.array([1 - share, harmless_weight * share], jnp.float32)


def as_reward(
    job: jobs.Job, model: types.Params, start: types.Params, *, score_weights: tuple[float, float] = (1.0, 1.0)
) -> types.Params:
    """Returns a model with one head and normalised scores.

    Args:
        job: The job of the run.
        model: The preference model.
        start: The SFT model, whose answers normalise the scores.
        score_weights: For a model with a head for each domain, the weights of their scores, each first scaled to
            standard deviation 1.
    """
    if (heads := lm.heads.count_heads(model)) is not None:
        alone = [lm.heads.combine(model, jnp.eye(heads)[h]) for h in range(heads)]
        gains = [stages.normalise_scores(job, each, start)["head"]["gain"] for each in alone]
        model = lm.heads.combine(model, jnp.stack([weight * gain for weight, gain in zip(score_weights, gains)]))
    return job.put_params(stages.normalise_scores(job, model, start))


def accuracy(
    job: jobs.Job, model: types.Params, rows: types.Comparisons, asked_B: np.ndarray
) -> dict[domains.Domain, list[float]]:
    """Returns the share of pairs of each domain that a model orders as labelled, with 95 % intervals.

    The intervals are clustered by ``asked_B``, what the prompts ask.
    """
    found: dict[domains.Domain, list[float]] = {}
    if not len(asked_B):
        return found
    scores_B2 = reward_diagnosis.score_answers(job, model, rows)
    lead_B = np.where(np.asarray(rows.ranks_BK)[:, 0] == 1, 1, -1) * (scores_B2[:, 0] - scores_B2[:, 1])
    right_B = np.where(lead_B == 0, 0.5, lead_B > 0)
    for number, domain in enumerate(domains.DOMAINS):
        own_B = np.asarray(rows.domain_B) == number
        if own_B.any():
            found[domain] = list(diagnostics.clustered_mean(right_B[own_B], asked_B[own_B].tolist(), rate=True))
    return found
