"""Samples answers from policies and scores them; all policies share the compiled programs."""

from __future__ import annotations

import concurrent.futures
import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from launch import device_mesh, host_agreement

from recipe import tasks, world_words
from rlhf_jax import diagnostics, kl, parallel, types
from rlhf_jax.simulation import gold
from rlhf_jax.train import ppo

CHUNK, LONG_CHUNK = 512, 128
"""Numbers of prompts per call: ``CHUNK`` with the built-in world's tokenizer, ``LONG_CHUNK`` with others, which produce
longer rows. They are fixed so that each program compiles once."""


@struct.dataclass
class Answers:
    """Sampled answers as NumPy arrays on the host."""

    tokens_BL: np.ndarray
    mask_BL: np.ndarray
    response_mask_BT: np.ndarray
    lengths_B: np.ndarray
    stopped_B: np.ndarray
    scores_B: np.ndarray
    kl_B: np.ndarray
    """Log-ratio of policy to reference, summed over the answer's tokens, in nats; 0 without a reference."""
    gold: gold.Utility
    """Gold utility; None without the built-in world."""
    unknown_B: np.ndarray | None = None
    """Share of words that are not in the built-in world's vocabulary; None if the model has the world's tokenizer."""


def pooled_scores(answers: Answers, samples: int) -> np.ndarray:
    """Returns the scores of ``samples`` consecutive answers per prompt, ``[prompts, samples]``.

    Equal answers to a prompt get the score of one of them, because their scores may be rounded differently.
    """
    tokens_BNL = np.where(answers.mask_BL, answers.tokens_BL, -1).reshape(-1, samples, answers.tokens_BL.shape[-1])
    scores_BN = np.array(answers.scores_B).reshape(-1, samples)
    for tokens_NL, scores_N in zip(tokens_BNL, scores_BN):
        _, first, which = np.unique(tokens_NL, axis=0, return_index=True, return_inverse=True)
        scores_N[:] = scores_N[first[which.ravel()]]
    return scores_BN


def best_of_kl(answers: Answers, samples: int, ns: Sequence[int]) -> list[float]:
    """Returns the measured KL of best-of-n for each of ``ns``, averaged over prompts with ``samples`` answers each."""
    pools = pooled_scores(answers, samples)
    return np.mean([diagnostics.best_of_n_kl_estimate(scores, ns) for scores in pools], axis=0).tolist()


class Sampler:
    """Samples, scores and evaluates answers in chunks of a fixed number of prompts."""

    def __init__(
        self, models: ppo.Models, *, task: tasks.Task, temperature: float = 1.0, mesh: jax.sharding.Mesh | None = None
    ) -> None:
        """Builds the programs; each compiles when it is first called."""
        self._task, self._mesh, self._temperature = task, mesh, temperature
        self._chunk = device_mesh.round_rows_up(CHUNK if task.in_world_words else LONG_CHUNK, mesh)

        def run(
            policy: Any, reference: Any, reward: Any, prompts_BP: Any, mask_BP: Any, rng_B: Any, temperature: Any
        ) -> Any:
            rollout = models.generate(policy, rng_B, prompts_BP, mask_BP, temperature)
            kl_B = scores_B = jnp.zeros(prompts_BP.shape[0])
            if reference is not None:
                reference_BT, _ = models.logprobs(reference, rollout.tokens_BL, rollout.mask_BL, temperature)
                kl_B = jnp.where(rollout.response_mask_BT, kl.k1(rollout.logprobs_BT, reference_BT), 0.0).sum(axis=1)
            if reward is not None:
                scores_B = models.score(reward, rollout)
            return rollout, scores_B, kl_B

        def score(params: Any, tokens_BL: Any, mask_BL: Any) -> jax.Array:
            return models.score(params, types.Rollout(tokens_BL, mask_BL, mask_BL, tokens_BL, tokens_BL, tokens_BL))

        compiled = partial(parallel.JitStep, donate_argnums=(), mesh=mesh)
        self._run, self._measure = (compiled(run, batch_args=(3, 4, 5), replicated_args=(6,)) for _ in range(2))
        self._score = compiled(score, batch_args=(1, 2), replicated_args=())

    def with_task(self, task: tasks.Task) -> Sampler:
        """Returns a sampler for the prompts of another task with the same widths, which shares the programs."""
        other = copy.copy(self)
        other._task = task
        return other

    def compile_ahead(self, executor: concurrent.futures.Executor, policy: Any, reward: Any) -> None:
        """Compiles the programs for these parameters in a thread of ``executor``."""
        task, chunk = self._task, self._chunk
        ints, bools = (partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.int32, jnp.bool_))
        prompts = ints((chunk, task.prompt_width)), bools((chunk, task.prompt_width))
        rng_B = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), chunk))
        if task.comparisons is None:
            self._run.compile_ahead(executor, policy, None, None, *prompts, rng_B, np.float32(1.0))
        self._measure.compile_ahead(executor, policy, policy, reward, *prompts, rng_B, np.float32(1.0))
        self._score.compile_ahead(executor, reward, ints((chunk, task.row_width)), bools((chunk, task.row_width)))

    @property
    def traces(self) -> int:
        """Number of traces of the sampling and scoring programs.

        Includes sampling for comparisons, even if only an earlier process of the run sampled them.
        """
        sampling = max(self._run.traces, self._task.comparisons is None)
        return sampling + self._measure.traces + self._score.traces

    def __call__(
        self,
        policy: Any,
        reference: Any,
        reward: Any,
        prompts: tasks.PromptSet,
        rng: jax.Array,
        *,
        temperature: float | None = None,
    ) -> Answers:
        """Samples one answer to each prompt. The answer to prompt i depends on the policy, this prompt, ``rng`` and i.

        Args:
            policy: Parameters of the policy.
            reference: Parameters of the KL reference; None for no KL.
            reward: Parameters of the reward model; None for no scores.
            prompts: The prompts.
            rng: A random key; consumed.
            temperature: Temperature of policy and reference, in sampling and in the KL; by default that of the
                rollouts.

        Returns:
            The answers with their KL, scores and gold utility.
        """
        n, chunk = len(prompts), self._chunk
        rng_B = jax.random.split(rng, -(-n // chunk) * chunk)
        run = self._run if reference is None and reward is None else self._measure
        parts, number = [], np.float32(self._temperature if temperature is None else temperature)
        for start in range(0, n, chunk):
            rows = np.minimum(np.arange(start, start + chunk), n - 1)  # the last prompt fills up the last chunk
            inputs = prompts.tokens_BP[rows], prompts.mask_BP[rows], rng_B[start : start + chunk]
            parts.append(run(policy, reference, reward, *self._own_rows(inputs), number))
        # Results are fetched after all calls have been dispatched, so that the device does not wait for the host.
        rollout, scores_B, kl_B = jax.tree.map(lambda *x: np.concatenate(x)[:n], *host_agreement.to_numpy(parts))
        utility, unknown_B = self._evaluate(prompts, rollout)
        return Answers(
            tokens_BL=rollout.tokens_BL,
            mask_BL=rollout.mask_BL,
            response_mask_BT=rollout.response_mask_BT,
            lengths_B=rollout.lengths_B,
            stopped_B=rollout.finish_B == 1,
            scores_B=scores_B,
            kl_B=kl_B,
            gold=utility,
            unknown_B=unknown_B,
        )

    def _own_rows(self, rows: Any) -> Any:
        return rows if self._mesh is None else parallel.local_rows(rows, self._mesh)

    def _evaluate(self, prompts: tasks.PromptSet, rollout: types.Rollout) -> tuple[Any, np.ndarray | None]:
        """Returns the gold utility and, if answers are decoded to compute it, the share of unknown words."""
        task = self._task
        if task.world is None or prompts.words_BP is None:
            return None, None
        tokens_BT = np.asarray(rollout.tokens_BL)[:, task.prompt_width :]
        mask_BT = np.asarray(rollout.response_mask_BT)
        if task.in_world_words:
            return world_words.gold_utility(task.world.tables, prompts.words_BP, tokens_BT, mask_BT), None
        read = world_words.read(task.fmt, tokens_BT, mask_BT)
        return world_words.gold_utility(
            task.world.tables, prompts.words_BP, read.words_BT, read.mask_BT
        ), read.unknown_B

    def score(self, reward: Any, tokens_BL: np.ndarray, mask_BL: np.ndarray) -> np.ndarray:
        """Scores rows of tokens with the reward model ``reward``."""
        n, chunk = len(tokens_BL), self._chunk
        parts = []
        for start in range(0, n, chunk):
            rows = np.minimum(np.arange(start, start + chunk), n - 1)
            parts.append(
                host_agreement.to_numpy(self._score(reward, *self._own_rows((tokens_BL[rows], mask_BL[rows]))))
            )
        return np.concatenate(parts)[:n]
