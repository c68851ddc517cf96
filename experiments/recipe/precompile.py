"""Compiling what a run needs late while it trains what comes first."""

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

Instead = Callable[[concurrent.futures.Executor, types.Params], None]


@contextlib.contextmanager
def in_background(job: jobs.Job, learners: Mapping[str, jobs.Job], *, instead: Instead | None = None) -> Iterator[None]:
    """Compile the steps of all stages in a thread, in the order in which they are needed.

    ``learners`` are the stages of reinforcement learning to come and the jobs whose ``ppo_step`` they call;
    ``instead(executor, policy)`` compiles what comes in their place, for a policy of these shapes. What only stages
    that are finished would call is left out. Whatever ends the block, what has not begun to be compiled is dropped.
    On a mesh nothing is compiled ahead: how states lie is known when they are there.
    """
    if job.mesh is not None:
        yield
        return
    executor = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="compile")
    try:
        policy = _submit(job, learners, executor)
        if instead is not None:
            instead(executor, policy)
        yield
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _submit(job: jobs.Job, learners: Mapping[str, jobs.Job], executor: concurrent.futures.Executor) -> Any:
    """The shapes of the policy, when all but what comes in the place of reinforcement learning is on its way."""
    key = jax.random.key(0)
    policy = jax.eval_shape(partial(lm.init, cfg=job.cfg), key) if job.base is None else job.base
    reward = jax.eval_shape(partial(lm.with_head, cfg=job.cfg), key, policy)
    steps = {stage: _saved(job, stage) for stage in ("reward_model", *learners)}

    def training(params: types.Params) -> state_lib.TrainState:
        return jax.eval_shape(partial(state_lib.create, tx=job.supervised_tx), params)

    if not any(steps.values()):  # nothing was saved of the stages that follow on supervised training
        B, L = job.settings.pretrain.batch, job.task.row_width
        text = sft.TokenBatch(_ints(B, L), _flags(B, L), _flags(B, L))
        job.supervised_step.compile_ahead(executor, training(policy), None, stages.hyper(0.0), text, key)
    job.sampler.compile_ahead(executor, policy, reward)
    if not any(steps[stage] for stage in learners):
        job.reward_step.compile_ahead(executor, training(reward), None, stages.hyper(0.0), _comparisons(job), key)
    unfinished = [own for stage, own in learners.items() if steps[stage] < own.settings.ppo.iterations]
    for own in {id(own.ppo_step): own for own in unfinished}.values():
        # From here on the text is there: its rows are in the batches of PPO.
        batch_at, hyper_at = stages.ppo_inputs(own, "ppo", ptx_coef=0.0)
        optimising = jax.eval_shape(own.new_policy, policy, reward)
        heldout = reward if own.settings.reward_model.heldout else None
        frozen = ppo.Frozen(reference=policy, reward=reward, heldout=heldout)
        own.ppo_step.compile_ahead(executor, optimising, frozen, hyper_at(0), batch_at(0), key)
    return policy


def _saved(job: jobs.Job, stage: str) -> int:
    """The iterations that the newest checkpoint of a stage stands at; 0 where it has none."""
    with job.checkpoints(stage) as checkpoints:
        return checkpoints.latest() or 0


def _comparisons(job: jobs.Job) -> types.Comparisons:
    """The shapes of a reward-model batch."""
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
