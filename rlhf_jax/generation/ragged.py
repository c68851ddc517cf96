"""Sampling of responses to prompts of different lengths, with a small number of compiled programs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import types
from rlhf_jax.generation import continuous
from rlhf_jax.generation import sampling as sampling_lib
from rlhf_jax.lm import config, embedding


class Answer(NamedTuple):
    """A response as Python lists on the host."""

    ids: list[int]
    """Token ids, including the stop token or sequence."""
    logprobs: list[float]
    """Log-probability of each token under the sampling distribution."""
    stopped: bool
    """Whether the response ended at a stop id or sequence instead of at the length limit."""


class RaggedSampler:
    """Samples responses to prompts of different lengths; each prompt is padded to the smallest of ``widths`` that fits.

    Example::

        sampler = RaggedSampler(cfg, sampling, widths=(64, 128, 256), slots=32)
        answers = sampler(params, rng, [tokenizer.encode(text) for text in texts])
        print(sampler.programs, "programs compiled")

    At each width, rows are added until their number is ``slots`` times a power of two. A run therefore compiles only a
    few programs per width, even if the number of prompts varies. The key of prompt i is ``fold_in(rng, i)``.

    Args:
        cfg: Configuration of the model.
        sampling: Sampling distribution and stop conditions.
        widths: Prompt widths to compile for, in tokens; the largest is the maximum length of a prompt.
        slots: Number of responses decoded at once.

    Raises:
        ValueError: If ``widths`` is empty, a width is not positive, or ``sampling`` has an id outside the vocabulary.

    Attributes:
        programs: Number of programs compiled so far.
    """

    def __init__(
        self, cfg: config.LMConfig, sampling: sampling_lib.Sampling, *, widths: Sequence[int], slots: int = 32
    ) -> None:
        """Stores the settings; programs are compiled when they are first needed."""
        if not widths or min(widths) < 1:
            raise ValueError(f"widths is {tuple(widths)}; it must contain only positive widths, at least one")
        sampling_lib.check_ids(sampling, cfg.vocab_size)
        self.programs = 0
        self._widths = sorted(set(widths))
        self._slots = slots
        self._pad_id, self._vocab_size = sampling.pad_id, cfg.vocab_size

        def run(params: types.Params, rng: jax.Array, prompts: jax.Array, mask: jax.Array, limits: jax.Array, sampling):
            self.programs += 1  # runs when a new shape is traced
            return continuous.generate(
                params, rng, prompts, mask, cfg=cfg, sampling=sampling, slots=slots, limits_N=limits
            )

        self._run = functools.partial(jax.jit(run), sampling=sampling)
        self._max_new_tokens = sampling.max_new_tokens

    def __call__(self, params: types.Params, rng: jax.Array, prompts: Sequence[Sequence[int]]) -> list[Answer]:
        """Returns a response to each prompt; ``rng`` is consumed.

        Raises:
            ValueError: If a prompt is empty or longer than the largest width, or has an id outside the vocabulary.
        """
        longest = self._widths[-1]
        for i, ids in enumerate(prompts):
            if not 0 < len(ids) <= longest:
                raise ValueError(f"prompt {i} has {len(ids)} tokens; it must have between 1 and {longest}")
            embedding.check_ids(ids, self._vocab_size, name=f"the ids of prompt {i}")
        buckets = np.searchsorted(self._widths, [len(ids) for ids in prompts])
        answers: dict[int, Answer] = {}
        for bucket in sorted(set(buckets.tolist())):
            indices, width = np.flatnonzero(buckets == bucket).tolist(), self._widths[bucket]
            rollout = self._answer(params, rng, [prompts[i] for i in indices], indices, width)
            lengths = np.asarray(rollout.lengths_B)
            tokens, logprobs = np.asarray(rollout.tokens_BL)[:, width:], np.asarray(rollout.logprobs_BT)
            for row, i in enumerate(indices):
                n = int(lengths[row])
                stopped = bool(rollout.finish_B[row])
                answers[i] = Answer(tokens[row, :n].tolist(), logprobs[row, :n].tolist(), stopped)
        return [answers[i] for i in range(len(prompts))]

    def _answer(
        self, params: types.Params, rng: jax.Array, prompts: list[Sequence[int]], indices: list[int], width: int
    ) -> types.Rollout:
        blocks = -(-len(prompts) // self._slots)
        rows = self._slots * (1 << (blocks - 1).bit_length())
        tokens, mask = np.full((rows, width), self._pad_id, np.int32), np.zeros((rows, width), bool)
        # Rows that were added to fill the batch generate one token.
        mask[:, -1], limits = True, np.where(np.arange(rows) < len(prompts), self._max_new_tokens, 1)
        for row, ids in enumerate(prompts):
            tokens[row, width - len(ids) :], mask[row, width - len(ids) :] = ids, True
        folds = np.zeros(rows, np.int32)
        folds[: len(indices)] = indices
        keys = jax.vmap(functools.partial(jax.random.fold_in, rng))(jnp.asarray(folds))
        return self._run(params, keys, jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(limits, jnp.int32))
