"""Stages of reward_model.py that instructgpt.py lacks: training with any loss, and preference-model pretraining."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from launch import device_mesh
from launch.settings import SettingError
from recipe import comparison_data, jobs, stages, tasks

from preferences.reward_settings import RewardLoss, RewardSettings
from rlhf_jax import lm, losses, parallel, types
from rlhf_jax.data import batching, comparison_transforms
from rlhf_jax.lm import params as lm_params
from rlhf_jax.simulation import labelers
from rlhf_jax.train import reward_model
from rlhf_jax.train import state as state_lib
from rlhf_jax.train.optim import partition, schedules
from rlhf_jax.train.optim import update as step_lib


def make_loss(training: RewardLoss) -> Callable[..., jax.Array]:
    """Returns the loss function of one prompt."""
    if training.loss == "plackett-luce":
        return losses.plackett_luce
    if training.loss == "best":
        return losses.best_choice
    return partial(
        losses.ranking,
        ties_in_divisor=training.ties_in_divisor,
        margin=training.margin,
        target=1.0 - training.label_smoothing,
        centering=training.centering,
    )


def train(
    job: jobs.Job,
    settings: RewardSettings,
    start: types.Params,
    data: types.Comparisons,
    *,
    validation: types.Comparisons | None = None,
) -> types.Params:
    """Trains the reward model on ``data``, and merges several heads into one that averages them."""
    training, batch = settings.training, settings.reward_model.batch
    if training.loss == "pairs":
        prompts = len(np.asarray(data.ranks_BK))
        data = comparison_transforms.split_into_pairs(data)
        # A step has as many pairs as a batch of prompts has on average, so that the number of steps is the same.
        batch = max(1, round(batch * len(np.asarray(data.ranks_BK)) / prompts))
    heads = None if training.heads == 1 else training.heads
    params = start
    if "head" not in start or heads is not None:
        params = lm.with_head(jax.random.fold_in(job.key("reward_model"), 1), start, job.cfg, heads=heads)
    learning_rate = settings.reward_model.learning_rate
    if settings.pmp.prompts and settings.pmp.tuning_rate is not None:
        learning_rate = settings.pmp.tuning_rate * settings.pretrain.learning_rate
    trained = _fit(
        job,
        "reward_model",
        data,
        params,
        cfg=job.cfg,
        loss=make_loss(training),
        trains=training.trains,
        batch=batch,
        epochs=training.epochs,
        learning_rate=learning_rate,
        validation=validation,
    )
    return trained if heads is None else lm.heads.combine(trained, jnp.full(heads, 1 / heads))


def _fit(
    job: jobs.Job,
    stage: str,
    data: types.Comparisons,
    params: types.Params,
    *,
    cfg: lm.LMConfig,
    loss: Callable[..., jax.Array],
    trains: str,
    batch: int,
    epochs: int,
    learning_rate: float,
    validation: types.Comparisons | None = None,
) -> types.Params:
    n = len(np.asarray(data.ranks_BK))
    batch = device_mesh.round_rows_down(min(batch, n), job.mesh, "--reward-model.batch")
    steps = max(1, epochs * n // batch)
    key = job.key("reward_model") if stage == "reward_model" else jax.random.fold_in(job.key("reward_model"), 1000)
    order = batching.epoch_batches(0, n=n, batch_size=batch, key=key, steps=steps)
    trained, frozen, join = params, None, step_lib.all_trained
    if trains:
        try:
            trained, frozen = partition.split(params, trains)
        except ValueError as error:
            raise SettingError(f"--training.trains: {error}") from error
        join = partition.join
    step = parallel.jit_step(
        reward_model.make_train_step(partial(lm.score, cfg=cfg), loss=loss, join=join), mesh=job.mesh
    )
    validate: dict[str, Any] = {}
    if validation is not None:
        validate = stages.validation_options(
            job, stage, validation, steps=steps, loss=loss, params_of=lambda state: join(frozen, state.params)
        )
    state = job.fit(
        stage,
        step,
        job.create_on_mesh(partial(state_lib.create, tx=job.supervised_tx), trained),
        steps,
        batch_at=lambda i: jax.tree.map(lambda x: jnp.asarray(x[order[i]]), data),
        hyper_at=lambda i: stages.hyper(learning_rate * schedules.cosine(i, steps)),
        rng=key,
        frozen=frozen,
        **validate,
    )
    return job.put_params(join(frozen, state.params))


# ------------------------------------------------------------------------------------- preference-model pretraining


def pretrain_preference_model(job: jobs.Job, settings: RewardSettings, policy: types.Params) -> types.Params:
    """Trains a preference model on answers ranked by a crowd; the reward model starts from this model.

    With ``pmp.binary``, the vocabulary is extended by two control tokens during this stage.
    """
    data = _crowd_comparisons(job, settings, policy)
    n = job.cfg.vocab_size
    cfg, params, key = job.cfg, policy, jax.random.fold_in(job.key("reward_model"), 1001)
    if settings.pmp.binary:
        data = comparison_transforms.add_control_tokens(data, good_id=n, bad_id=n + 1, column=job.task.prompt_width)
        cfg = dataclasses.replace(cfg, vocab_size=n + 2, max_length=cfg.max_length + 1)
        params = extend_embeddings(params, key, cfg)
    params = _fit(
        job,
        "pmp",
        data,
        lm.with_head(jax.random.fold_in(key, 1), params, cfg),
        cfg=cfg,
        loss=losses.ranking,
        trains="",
        # Each pair of a ranking becomes two binary rows, so a batch needs more rows than without ``binary``.
        batch=8 * settings.reward_model.batch if settings.pmp.binary else settings.reward_model.batch,
        epochs=1,
        learning_rate=settings.pmp.rate * settings.pretrain.learning_rate,
    )
    return truncate_embeddings(params, job.cfg)


def extend_embeddings(params: types.Params, key: jax.Array, cfg: lm.LMConfig) -> types.Params:
    """Adds newly initialised rows for the token ids and positions that only ``cfg`` has."""
    drawn = ("embed/", "unembed/")  # the layers of a large model need not be drawn
    fresh = lm_params.draw(key, {name: spec for name, spec in lm_params.table(cfg).items() if name.startswith(drawn)})
    n = params["embed"]["tokens"].shape[0]
    embed = {name: jnp.concatenate([rows, fresh["embed"][name][len(rows) :]]) for name, rows in params["embed"].items()}
    extended = {**params, "embed": embed}
    if "unembed" in params:
        kernel = jnp.concatenate([params["unembed"]["kernel"], fresh["unembed"]["kernel"][:, n:]], axis=1)
        extended["unembed"] = {"kernel": kernel}
    return extended


def truncate_embeddings(params: types.Params, cfg: lm.LMConfig) -> types.Params:
    """Undoes `extend_embeddings`: drops the rows for token ids and positions that ``cfg`` does not have."""
    rows = {"tokens": cfg.vocab_size, "positions": cfg.position_offset + cfg.max_length}
    truncated = {**params, "embed": {name: x[: rows[name]] for name, x in params["embed"].items()}}
    if "unembed" in params:
        truncated["unembed"] = {"kernel": params["unembed"]["kernel"][:, : cfg.vocab_size]}
    return truncated


def _crowd_comparisons(job: jobs.Job, settings: RewardSettings, policy: types.Params) -> types.Comparisons:
    """Returns answers to new prompts, ranked by a crowd with more noise and other preferences than the labelers."""
    world, pmp = settings.world, settings.pmp
    assert job.task.world is not None
    crowd = labelers.make_pool(
        jax.random.fold_in(job.key("comparisons"), 2000),
        world.labelers,
        spread=2 * world.spread,
        polite_taste=pmp.polite_taste,
        tie_width=world.tie_width,
        lapse=world.lapse,
    )
    prompts = tasks.more_prompts(settings, job.task, pmp.prompts)
    crowd_world = dataclasses.replace(job.task.world, pool=crowd, compare_prompts=prompts, n_compare=pmp.prompts)
    crowd_job = dataclasses.replace(
        job,
        task=dataclasses.replace(job.task, world=crowd_world),
        settings=dataclasses.replace(
            settings, seed=settings.seed + 1, world=dataclasses.replace(world, agreement=pmp.agreement)
        ),
    )
    comparisons, _, _ = comparison_data.collect(crowd_job, [policy], stage="crowd")
    return comparisons
