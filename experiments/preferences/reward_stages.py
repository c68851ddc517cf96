"""The stages of reward_model.py that the main job does not have: preference-model pretraining, and every loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from launch import mesh_settings
from launch.settings import SettingError
from recipe import collection, jobs, stages, tasks

from preferences.reward_settings import RewardRun, Training
from rlhf_jax import lm, losses, parallel, types
from rlhf_jax.data import batching, comparison_transforms
from rlhf_jax.simulation import labelers
from rlhf_jax.train import reward_model
from rlhf_jax.train import state as state_lib
from rlhf_jax.train.optim import partition, schedules
from rlhf_jax.train.optim import update as step_lib


def loss_of(training: Training) -> Callable[..., jax.Array]:
    """The loss of one prompt that the settings ask for."""
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
    asked: RewardRun,
    begin: types.Params,
    data: types.Comparisons,
    *,
    validation: types.Comparisons | None = None,
) -> types.Params:
    """The reward model on the labelers' comparisons; several heads become one that gives their mean."""
    training, how = asked.training, asked.reward_model
    batch = how.batch
    if training.loss == "pairs":
        prompts = len(np.asarray(data.ranks_BK))
        data = comparison_transforms.split_into_pairs(data)
        # As many pairs a step as grouped batches hold on average, and so as many steps.
        batch = max(1, round(batch * len(np.asarray(data.ranks_BK)) / prompts))
    key = job.key("reward_model")
    heads = None if training.heads == 1 else training.heads
    params = (
        begin
        if "head" in begin and heads is None
        else lm.with_head(jax.random.fold_in(key, 1), begin, job.cfg, heads=heads)
    )
    rate = how.learning_rate
    if asked.pmp.prompts and asked.pmp.tuning_rate is not None:
        rate = asked.pmp.tuning_rate * asked.pretrain.learning_rate
    trained = _fit(
        job,
        "reward_model",
        data,
        params,
        cfg=job.cfg,
        loss=loss_of(training),
        trains=training.trains,
        batch=batch,
        epochs=training.epochs,
        learning_rate=rate,
        validation=validation,
    )
    return trained if heads is None else lm.combine(trained, jnp.full(heads, 1 / heads))


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
    batch = mesh_settings.rows_down(min(batch, n), job.mesh, "--reward-model.batch")
    steps = max(1, epochs * n // batch)
    key = job.key("reward_model") if stage == "reward_model" else jax.random.fold_in(job.key("reward_model"), 1000)
    order = batching.epoch_batches(0, n=n, batch_size=batch, key=key, steps=steps)
    own, frozen, join = params, None, step_lib.all_trained
    if trains:
        try:
            own, frozen = partition.split(params, trains)
        except ValueError as error:
            raise SettingError(f"--training.trains: {error}") from error
        join = partition.join
    step = parallel.jit_step(
        reward_model.make_train_step(partial(lm.score, cfg=cfg), loss=loss, join=join), mesh=job.mesh
    )
    watch: dict[str, Any] = {}
    if validation is not None:
        watch = stages.validated(
            job, stage, validation, steps=steps, loss=loss, params_of=lambda state: join(frozen, state.params)
        )
    state = job.fit(
        stage,
        step,
        job.begin(partial(state_lib.create, tx=job.supervised_tx), own),
        steps,
        batch_at=lambda i: jax.tree.map(lambda x: jnp.asarray(x[order[i]]), data),
        hyper_at=lambda i: stages.hyper(learning_rate * schedules.cosine(i, steps)),
        rng=key,
        frozen=frozen,
        **watch,
    )
    return job.placed(join(frozen, state.params))


# ------------------------------------------------------------------------------------- preference-model pretraining


def pretrained(job: jobs.Job, asked: RewardRun, policy: types.Params) -> types.Params:
    """A preference model of the crowd's rankings, from which the labelers' comparisons go on; with a head.

    The control tokens are two ids behind the vocabulary, and are taken off again: what goes on has the tokenizer's ids.
    """
    source = crowd_comparisons(job, asked, policy)
    n = job.cfg.vocab_size
    cfg, params, key = job.cfg, policy, jax.random.fold_in(job.key("reward_model"), 1001)
    if asked.pmp.binary:
        source = comparison_transforms.add_control_tokens(source, good_id=n, bad_id=n + 1, column=job.task.prompt_width)
        cfg = dataclasses.replace(cfg, vocab_size=n + 2, max_length=cfg.max_length + 1)
        params = widened(params, key, cfg)
    params = _fit(
        job,
        "pmp",
        source,
        lm.with_head(jax.random.fold_in(key, 1), params, cfg),
        cfg=cfg,
        loss=losses.ranking,
        trains="",
        # As many pairs a step as the labelers' comparisons have, whose prompts hold several.
        batch=8 * asked.reward_model.batch if asked.pmp.binary else asked.reward_model.batch,
        epochs=1,
        learning_rate=asked.pmp.rate * asked.pretrain.learning_rate,
    )
    return narrowed(params, job.cfg)


def widened(params: types.Params, key: jax.Array, cfg: lm.LMConfig) -> types.Params:
    """``params`` with fresh rows for the ids that ``cfg`` has more; of the same scale as an embedding that is drawn."""
    more = lm.init(key, cfg)
    grown = {**params, "embed": {**params["embed"]}}
    n = params["embed"]["tokens"].shape[0]
    grown["embed"]["tokens"] = jnp.concatenate([params["embed"]["tokens"], more["embed"]["tokens"][n:]])
    if "positions" in params["embed"]:
        held = params["embed"]["positions"].shape[0]
        grown["embed"]["positions"] = jnp.concatenate([params["embed"]["positions"], more["embed"]["positions"][held:]])
    if "unembed" in params:
        kernel = jnp.concatenate([params["unembed"]["kernel"], more["unembed"]["kernel"][:, n:]], axis=1)
        grown["unembed"] = {"kernel": kernel}
    return grown


def narrowed(params: types.Params, cfg: lm.LMConfig) -> types.Params:
    """Undo `widened`."""
    cut = {**params, "embed": {**params["embed"], "tokens": params["embed"]["tokens"][: cfg.vocab_size]}}
    if "positions" in params["embed"]:
        cut["embed"]["positions"] = params["embed"]["positions"][: cfg.position_offset + cfg.max_length]
    if "unembed" in params:
        cut["unembed"] = {"kernel": params["unembed"]["kernel"][:, : cfg.vocab_size]}
    return cut


def crowd_comparisons(job: jobs.Job, asked: RewardRun, policy: types.Params) -> types.Comparisons:
    """Samples on other prompts than the labelers', ranked by a crowd with another taste and more noise."""
    task, settings = job.task, asked.world
    world = task.world
    assert world is not None
    crowd = labelers.make_pool(
        jax.random.fold_in(job.key("comparisons"), 2000),
        settings.labelers,
        spread=2 * settings.spread,
        polite_taste=asked.pmp.polite_taste,
        tie_width=settings.tie_width,
        lapse=settings.lapse,
    )
    asked_prompts = tasks.more_prompts(asked, task, asked.pmp.prompts)
    source = dataclasses.replace(world, pool=crowd, compare_prompts=asked_prompts, n_compare=asked.pmp.prompts)
    other = dataclasses.replace(
        job,
        task=dataclasses.replace(task, world=source),
        settings=dataclasses.replace(
            asked, seed=asked.seed + 1, world=dataclasses.replace(settings, agreement=asked.pmp.agreement)
        ),
    )
    found, _, _ = collection.collect_comparisons(other, [policy], stage="crowd")
    return found
