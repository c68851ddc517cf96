"""Lists of prompts of any length, answered by a handful of compiled programs."""

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
from rlhf_jax.lm import config


class Answer(NamedTuple):
    """One answer, on the host."""

    ids: list[int]
    """Its tokens, the stop among them."""
    logprobs: list[float]
    stopped: bool
    """Whether it stopped, rather than ran out of room."""


class RaggedSampler:
    """Answers prompts of any length from a few shapes: each goes into the narrowest of ``widths`` that holds it.

    Example::

        sampler = RaggedSampler(cfg, sampling, widths=(64, 128, 256), slots=32)
        answers = sampler(params, rng, [tokenizer.encode(text) for text in texts])
        print(sampler.programs, "programs compiled")

    The number of prompts of a width is rounded up to a power of two times the slots, so a run compiles at most a few
    programs a width, however many lists of prompts it answers. Prompt i is answered with ``fold_in(rng, i)``.
    """

    def __init__(
        self, cfg: config.LMConfig, sampling: sampling_lib.Sampling, *, widths: Sequence[int], slots: int = 32
    ) -> None:
        """Nothing is compiled yet. Raises ``ValueError`` where no width is given or one is not positive."""
        if not widths or min(widths) < 1:
            raise ValueError(f"widths is {tuple(widths)}; it must hold one width or more, all positive")
        self.programs = 0
        """How many shapes have been compiled."""
        self._widths = sorted(set(widths))
        self._slots = slots
        self._pad_id = sampling.pad_id

        def run(params: types.Params, rng: jax.Array, prompts: jax.Array, mask: jax.Array, limits: jax.Array, how):
            self.programs += 1  # runs when a new shape is traced
            return continuous.generate(params, rng, prompts, mask, cfg=cfg, sampling=how, slots=slots, limits_N=limits)

        self._run = functools.partial(jax.jit(run), how=sampling)
        self._most = sampling.max_new_tokens

    def __call__(self, params: types.Params, rng: jax.Array, prompts: Sequence[Sequence[int]]) -> list[Answer]:
        """Answer each prompt; ``rng`` is consumed. Raises ``ValueError`` for one that is empty or too long."""
        longest = self._widths[-1]
        for i, ids in enumerate(prompts):
            if not 0 < len(ids) <= longest:
                raise ValueError(f"prompt {i} has {len(ids)} tokens; it must have between 1 and {longest}")
        places = np.searchsorted(self._widths, [len(ids) for ids in prompts])
        answers: dict[int, Answer] = {}
        for place in sorted(set(places.tolist())):
            chosen = np.flatnonzero(places == place).tolist()
            rollout = self._answer(params, rng, [prompts[i] for i in chosen], chosen, self._widths[place])
            lengths, width = np.asarray(rollout.lengths_B), self._widths[place]
            tokens, logprobs = np.asarray(rollout.tokens_BL)[:, width:], np.asarray(rollout.logprobs_BT)
            for row, i in enumerate(chosen):
                n = int(lengths[row])
                stopped = bool(rollout.finish_B[row])
                answers[i] = Answer(tokens[row, :n].tolist(), logprobs[row, :n].tolist(), stopped)
        return [answers[i] for i in range(len(prompts))]

    def _answer(
        self, params: types.Params, rng: jax.Array, prompts: list[Sequence[int]], numbers: list[int], width: int
    ) -> types.Rollout:
        blocks = -(-len(prompts) // self._slots)
        rows = self._slots * (1 << (blocks - 1).bit_length())
        tokens, mask = np.full((rows, width), self._pad_id, np.int32), np.zeros((rows, width), bool)
        # Rows that are there to fill the shape ask for one token.
        mask[:, -1], limits = True, np.where(np.arange(rows) < len(prompts), self._most, 1)
        for row, ids in enumerate(prompts):
            tokens[row, width - len(ids) :], mask[row, width - len(ids) :] = ids, True
        ids = np.zeros(rows, np.int32)
        ids[: len(numbers)] = numbers
        keys = jax.vmap(functools.partial(jax.random.fold_in, rng))(jnp.asarray(ids))
        return self._run(params, keys, jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(limits, jnp.int32))
