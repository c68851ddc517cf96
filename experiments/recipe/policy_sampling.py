"""Answers of a policy with everything that is known about them, from one compiled program for all policies and uses."""

from __future__ import annotations

import concurrent.futures
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from launch import host_agreement, mesh_settings

from recipe import tasks, world_words
from rlhf_jax import kl, parallel, types
from rlhf_jax.simulation import gold
from rlhf_jax.train import ppo

CHUNK, LONG_CHUNK = 512, 128
"""Prompts a call, in the words of the built-in world and in longer rows: one shape, so one program."""


@struct.dataclass
class Answers:
    """What was answered, on the host; N answers."""

    tokens_BL: np.ndarray
    mask_BL: np.ndarray
    response_mask_BT: np.ndarray
    lengths_B: np.ndarray
    stopped_B: np.ndarray
    scores_B: np.ndarray
    kl_B: np.ndarray
    """Log-ratio of policy and reference, summed over the answer, in nats; 0 where there was no reference."""
    gold: gold.Utility
    """Judgement by the gold utility; None where there is no gold."""
    unknown_B: np.ndarray | None = None
    """Share of words that the built-in world does not know, where answers had to be read as text."""


class Sampler:
    """Samples, scores and judges in chunks of fixed shape."""

    def __init__(self, models: ppo.Models, *, task: tasks.Task, mesh: jax.sharding.Mesh | None = None) -> None:
        """Build the programs; nothing is compiled yet."""
        self._task, self._mesh = task, mesh
        self._chunk = mesh_settings.rows_up(CHUNK if task.speaks_world else LONG_CHUNK, mesh)

        def run(policy: Any, reference: Any, reward: Any, prompts_BP: Any, mask_BP: Any, rng_B: Any) -> Any:
            rollout = models.generate(policy, rng_B, prompts_BP, mask_BP, 1.0)
            kl_B = scores_B = jnp.zeros(prompts_BP.shape[0])
            if reference is not None:
                theirs_BT, _ = models.logprobs(reference, rollout.tokens_BL, rollout.mask_BL, 1.0)
                kl_B = jnp.where(rollout.response_mask_BT, kl.k1(rollout.logprobs_BT, theirs_BT), 0.0).sum(axis=1)
            if reward is not None:
                scores_B = models.score(reward, rollout)
            return rollout, scores_B, kl_B

        def score(params: Any, tokens_BL: Any, mask_BL: Any) -> jax.Array:
            return models.score(params, types.Rollout(tokens_BL, mask_BL, mask_BL, tokens_BL, tokens_BL, tokens_BL))

        compiled = partial(parallel.JitStep, donate_argnums=(), mesh=mesh, replicated_args=())
        self._run, self._measure = compiled(run, batch_args=(3, 4, 5)), compiled(run, batch_args=(3, 4, 5))
        self._score = compiled(score, batch_args=(1, 2))

    def compile_ahead(self, executor: concurrent.futures.Executor, policy: Any, reward: Any) -> None:
        """Compile in a thread of ``executor`` for parameters of these shapes, in the order in which a run samples."""
        task, chunk = self._task, self._chunk
        ints, bools = (partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.int32, jnp.bool_))
        asked = ints((chunk, task.prompt_width)), bools((chunk, task.prompt_width))
        rng_B = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), chunk))
        if task.comparisons is None:
            self._run.compile_ahead(executor, policy, None, None, *asked, rng_B)
        self._measure.compile_ahead(executor, policy, policy, reward, *asked, rng_B)
        self._score.compile_ahead(executor, reward, ints((chunk, task.row_width)), bools((chunk, task.row_width)))

    @property
    def traces(self) -> int:
        """How many programs were traced for sampling and scoring."""
        return self._run.traces + self._measure.traces + self._score.traces

    def __call__(self, policy: Any, reference: Any, reward: Any, prompts: tasks.PromptSet, rng: jax.Array) -> Answers:
        """One answer to each prompt; ``rng`` is consumed. Row i's sample depends on its own prompt and i alone.

        Without a ``reference`` or a ``reward`` (None), there is no KL and no score, and neither costs anything.
        """
        n, chunk = len(prompts), self._chunk
        rng_B = jax.random.split(rng, -(-n // chunk) * chunk)
        run = self._run if reference is None and reward is None else self._measure
        parts = []
        for start in range(0, n, chunk):
            rows = np.minimum(np.arange(start, start + chunk), n - 1)  # the last prompt fills the last chunk
            asked = prompts.tokens_BP[rows], prompts.mask_BP[rows], rng_B[start : start + chunk]
            parts.append(run(policy, reference, reward, *self._own(asked)))
        # Read when all are on their way: the device goes from one to the next without waiting for the host.
        rollout, scores_B, kl_B = jax.tree.map(lambda *x: np.concatenate(x)[:n], *host_agreement.on_host(parts))
        judged, unknown_B = self._judged(prompts, rollout)
        return Answers(
            tokens_BL=rollout.tokens_BL,
            mask_BL=rollout.mask_BL,
            response_mask_BT=rollout.response_mask_BT,
            lengths_B=rollout.lengths_B,
            stopped_B=rollout.finish_B == 1,
            scores_B=scores_B,
            kl_B=kl_B,
            gold=judged,
            unknown_B=unknown_B,
        )

    def _own(self, rows: Any) -> Any:
        return rows if self._mesh is None else parallel.local_rows(rows, self._mesh)

    def _judged(self, prompts: tasks.PromptSet, rollout: types.Rollout) -> tuple[Any, np.ndarray | None]:
        """Gold judgement where there is gold; the share of unknown words where answers are read as text for it."""
        task = self._task
        if task.world is None or prompts.words_BP is None:
            return None, None
        tokens_BT = np.asarray(rollout.tokens_BL)[:, task.prompt_width :]
        mask_BT = np.asarray(rollout.response_mask_BT)
        if task.speaks_world:
            return world_words.judge(task.world.tables, prompts.words_BP, tokens_BT, mask_BT), None
        read = world_words.read(task.fmt, tokens_BT, mask_BT)
        return world_words.judge(task.world.tables, prompts.words_BP, read.words_BT, read.mask_BT), read.unknown_B

    def score(self, reward: Any, tokens_BL: np.ndarray, mask_BL: np.ndarray) -> np.ndarray:
        """Reward-model scores of given rows."""
        n, chunk = len(tokens_BL), self._chunk
        parts = []
        for start in range(0, n, chunk):
            rows = np.minimum(np.arange(start, start + chunk), n - 1)
            parts.append(host_agreement.on_host(self._score(reward, *self._own((tokens_BL[rows], mask_BL[rows])))))
        return np.concatenate(parts)[:n]
