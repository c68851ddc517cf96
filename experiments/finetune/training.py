"""Trains a model, or adapters on it, on rows of data with the settings of a command."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from launch import device_mesh, initial_model
from launch.run_settings import Lora, SettingError, StageSettings
from recipe import engine, optimiser_choice

from rlhf_jax import lm, parallel, types
from rlhf_jax.data import batching, errors
from rlhf_jax.train import state as state_lib
from rlhf_jax.train.optim import schedules, update


class Trainable(NamedTuple):
    """The parameters that are trained, and how the model is built from them."""

    params: types.Params
    frozen: Any
    """The first argument of ``join``; None if all parameters are trained."""
    join: Callable[[Any, Any], types.Params]
    """``(frozen, params) -> params`` builds the parameters that the functions of the model receive."""
    merge: Callable[[Any, Any], types.Params]
    """As ``join``, but returns an ordinary model, which can be saved."""


def trainable(lora: Lora, cfg: lm.LMConfig, params: types.Params, key: jax.Array) -> Trainable:
    """Returns all parameters or, with --lora.rank, new adapters together with the head of ``params``, if any.

    Raises:
        SettingError: --lora.pattern matches no kernel.
    """
    if lora.rank is None:
        return Trainable(params, None, update.all_trained, update.all_trained)
    try:
        adapters = lm.lora.init(key, cfg, rank=lora.rank, pattern=lora.pattern)
    except ValueError as error:
        raise SettingError(f"--lora.pattern {lora.pattern}: {error}") from error
    head = {"head": params["head"]} if "head" in params else {}
    attach, merge = (partial(each, scale=lora.scale) for each in (lm.lora.attach, lm.lora.merge))
    return Trainable({**adapters, **head}, params, attach, merge)


def learning_rate(settings: StageSettings) -> float:
    """Returns the peak learning rate, whose default depends on what is trained."""
    if settings.learning_rate is not None:
        return settings.learning_rate
    whole, adapters, new = settings.default_rates
    if settings.lora.rank is not None:
        return adapters
    return new if initial_model.is_architecture(settings.model) else whole


def count_steps(settings: StageSettings, rows: int, *, batch: int) -> int:
    """Returns the number of optimiser steps on ``rows`` rows."""
    return settings.steps or math.ceil(settings.epochs * rows / batch)


def rows_per_step(settings: StageSettings, rows: int, mesh: Any) -> int:
    """Returns the batch size for ``rows`` rows; raises SettingError if they are too few for a step."""
    if rows >= settings.batch:
        return settings.batch
    if rows < settings.micro_batches:
        raise SettingError(
            f"--micro-batches is {settings.micro_batches}; it must be at most {rows}, the number of rows of the data"
        )
    return device_mesh.round_rows_down(rows - rows % settings.micro_batches, mesh, "--batch")


def rows_trained(settings: StageSettings, rows: int, mesh: Any) -> int:
    """Returns the number of rows of all steps; raises SettingError if ``rows`` rows are too few for a step."""
    batch = rows_per_step(settings, rows, mesh)
    return batch * count_steps(settings, rows, batch=batch)


class Schedule(NamedTuple):
    """The rows of each step."""

    order: Any
    """``order[i]`` are the indices of the rows of step i."""
    steps: int
    batch: int


def schedule(
    run: engine.Engine, stage: str, rows: int, settings: StageSettings, *, key: jax.Array | None = None
) -> Schedule:
    """Returns the schedule of a stage on ``rows`` rows; notes batches that are smaller than --batch.

    Args:
        run: The engine.
        stage: Name of the stage.
        rows: Number of rows.
        settings: The settings of the command.
        key: Random key of the order; by default, that of the stage.
    """
    batch = rows_per_step(settings, rows, run.mesh)
    if batch < settings.batch:
        size, all_rows = errors.counted(batch, "rows"), errors.counted(rows, "rows")
        run.note(stage, f"a step has {size} instead of --batch {settings.batch}: the data has only {all_rows}")
    steps = count_steps(settings, rows, batch=batch)
    key = run.key(stage) if key is None else key
    order = batching.epoch_batches(0, n=rows, batch_size=batch, key=key, steps=steps)
    return Schedule(order, steps, batch)


class Trained(NamedTuple):
    """The result of `fit`."""

    params: types.Params
    """The trained parameters, without merging adapters."""
    seconds: float
    """Duration of the steps of this process, including compilation."""
    steps: int
    """Number of steps of this process; a resumed run repeats no finished step."""

    def tokens_per_second(self, per_step: float) -> float | None:
        """Returns the number of tokens per second, given that of a step; None if this process made no step."""
        return float(per_step * self.steps / self.seconds) if self.steps else None


def fit(
    run: engine.Engine,
    stage: str,
    make_train_step: Callable[..., Any],
    start: Trainable,
    data: Any,
    settings: StageSettings,
    *,
    hyper: dict[str, Any] | None = None,
    planned: Schedule | None = None,
    batch_at: Callable[[int], Any] | None = None,
    decay: Callable[[Any, Any], Any] = schedules.cosine,
    **options: Any,
) -> Trained:
    """Trains on shuffled rows.

    Args:
        run: The engine.
        stage: Name of the stage.
        make_train_step: Returns the train step; receives ``join`` and ``micro_batches``.
        start: What is trained.
        data: A pytree of NumPy arrays whose first axis is the rows.
        settings: The settings of the command.
        hyper: Further hyperparameters of the step.
        planned: The schedule, if the caller has already computed it.
        batch_at: Returns the batch of a step; by default, the rows of ``data`` that the schedule selects.
        decay: Schedule of the learning rate after the warmup, from `rlhf_jax.train.optim.schedules`.
        **options: Other arguments of `Engine.fit`.
    """
    order, steps, _ = planned or schedule(run, stage, len(jax.tree.leaves(data)[0]), settings)
    peak = learning_rate(settings)

    def hyper_at(i: int) -> dict[str, Any]:
        warmup = schedules.constant_with_warmup(i, steps, warmup=max(1, steps // 10))
        rate = np.float32(peak * warmup * decay(i, steps))
        return {"learning_rate": rate, "max_grad_norm": np.float32(settings.max_grad_norm), **(hyper or {})}

    step = make_train_step(join=start.join, micro_batches=settings.micro_batches)
    with run.checkpoints(stage) as saved:
        before = saved.latest() or 0
    began = time.monotonic()
    state = run.fit(
        stage,
        parallel.jit_step(step, mesh=run.mesh),
        run.create_on_mesh(partial(state_lib.create, tx=optimiser_choice.chosen(settings)), start.params),
        steps,
        batch_at=batch_at or (lambda i: jax.tree.map(lambda x: x[order[i]], data)),
        hyper_at=hyper_at,
        frozen=start.frozen,
        **options,
    )
    return Trained(state.params, time.monotonic() - began, steps - before)
