"""Compiles the programs of later stages in a background thread while the first stages train."""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from recipe import jobs, stages
from rlhf_jax import lm, types
from rlhf_jax.train import ppo, sft
from rlhf_jax.train import state as state_lib

CompileRest = Callable[[concurrent.futures.Executor, types.Params], None]


@contextlib.contextmanager
def in_background(
    job: jobs.Job, rl_stages: Mapping[str, jobs.Job], *, compile_rest: CompileRest | None = None
) -> Iterator[None]:
    """Compiles the steps of all unfinished stages in a thread while the block runs, roughly in the order of use.

    Compilations that have not started are cancelled at the end of the block. On a mesh, nothing is compiled ahead,
    because the sharding of a train state is unknown until it is created.

    Args:
        job: The job of the run.
        rl_stages: The RL stages by name, each with the job whose ``ppo_step`` it calls.
        compile_rest: ``compile_rest(executor, policy)`` compiles the other steps of the command. ``policy`` has the
            structure and the shapes of the policy's parameters.
    """
    if job.mesh is not None:
        yield
        return
    executor = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="compile")
    try:
        policy = _submit(job, rl_stages, executor)
        if compile_rest is not None:
            compile_rest(executor, policy)
        yield
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _submit(job: jobs.Job, rl_stages: Mapping[str, jobs.Job], executor: concurrent.futures.Executor) -> Any:
    """Submits the supervised, sampling, reward-model and RL steps for compilation; returns the policy's shapes."""
    key = jax.random.key(0)
    policy = jax.eval_shape(partial(lm.init, cfg=job.cfg), key) if job.base is None else job.base
    reward = jax.eval_shape(partial(lm.with_head, cfg=job.cfg), key, policy)
    steps = {stage: _saved_steps(job, stage) for stage in ("reward_model", *rl_stages)}

    def training(params: types.Params) -> state_lib.TrainState:
        return jax.eval_shape(partial(state_lib.create, tx=job.supervised_tx), params)

    if not any(steps.values()):  # no later stage has a checkpoint
        B, L = job.settings.pretrain.batch, job.task.row_width
        text = sft.TokenBatch(_ints(B, L), _flags(B, L), _flags(B, L))
        job.supervised_step.compile_ahead(executor, training(policy), None, stages.hyper(0.0), text, key)
    job.sampler.compile_ahead(executor, policy, reward)
    if not any(steps[stage] for stage in rl_stages):
        job.reward_step.compile_ahead(executor, training(reward), None, stages.hyper(0.0), _comparisons(job), key)
    unfinished = [own for stage, own in rl_stages.items() if steps[stage] < own.settings.ppo.iterations]
    for own in {id(own.ppo_step): own for own in unfinished}.values():
        # This also creates the pretraining text, rows of which are part of PPO's batches.
        batch_at, hyper_at = stages.ppo_inputs(own, "ppo", ptx_coef=0.0)
        optimising = jax.eval_shape(own.new_policy, policy, reward)
        heldout = reward if own.settings.reward_model.heldout else None
        frozen = ppo.Frozen(reference=policy, reward=reward, heldout=heldout)
        own.ppo_step.compile_ahead(executor, optimising, frozen, hyper_at(0), batch_at(0), key)
    return policy


def _saved_steps(job: jobs.Job, stage: str) -> int:
    """Returns the step of a stage's newest checkpoint, or 0 if there is none."""
    with job.checkpoints(stage) as checkpoints:
        return checkpoints.latest() or 0


def _comparisons(job: jobs.Job) -> types.Comparisons:
    """Returns the shapes of a reward-model batch."""
    if job.task.comparisons is not None:
        train = job.task.comparisons[0]
        n, K, L = train.tokens_BKL.shape
    else:
        n, K, L = job.settings.comparisons.prompts, job.settings.comparisons.max_k, job.task.row_width
    B = min(job.settings.reward_model.batch, n // 2 if job.settings.reward_model.heldout else n)
    return types.Comparisons(_ints(B, K, L), _flags(B, K, L), _ints(B, K), _flags(B, K))


def _ints(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _flags(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.bool_)
