"""Pairs of answers and marked answers, made of ranked ones and of scored ones; on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from launch import settings
from recipe import jobs, policy_sampling

from rlhf_jax import types
from rlhf_jax.simulation import labelers
from rlhf_jax.train import dpo, loop


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs, the better answer first, and which prompt each belongs to; pairs of one prompt stand together."""

    rows: types.Preferences
    prompt_B: np.ndarray

    def __len__(self) -> int:
        """How many there are."""
        return len(self.prompt_B)


def from_rankings(ranked: types.Comparisons, *, prompt_width: int, per_prompt: int, seed: int) -> Pairs:
    """Pairs of answers that differ in rank, at most ``per_prompt`` of each prompt, drawn at random; 0: all."""
    ranks_BK, where_BK = np.asarray(ranked.ranks_BK), np.asarray(ranked.where_BK)
    better_BKK = (ranks_BK[:, :, None] < ranks_BK[:, None, :]) & where_BK[:, :, None] & where_BK[:, None, :]
    b, i, j = np.nonzero(better_BKK)
    if per_prompt:
        order = np.random.default_rng([seed, 700]).permutation(len(b))
        order = order[np.argsort(b[order], kind="stable")]
        first = np.searchsorted(b[order], b[order])  # where each prompt's own begin
        kept = np.sort(order[np.arange(len(b)) - first < per_prompt])
        b, i, j = b[kept], i[kept], j[kept]
    if len(b) == 0:
        raise settings.SettingError("no two answers to a prompt differ in rank; there are no pairs to learn from")
    tokens, mask = (np.asarray(x) for x in (ranked.tokens_BKL, ranked.mask_BKL))
    sides = [(x[b, i], x[b, j]) for x in (tokens, mask)]
    return _pairs(*(np.stack(side, axis=1) for side in sides), prompt_B=b, prompt_width=prompt_width)


EQUAL_SCORES, ONE_TEXT = "equal scores", "one text"


def best_and_worst(
    found: policy_sampling.Answers, scores_BS: np.ndarray, *, prompt_width: int
) -> tuple[Pairs, dict[str, int]]:
    """The best answer to each prompt and the worst that is another text; and the prompts left out, by reason.

    A prompt is left out whose answers all have one score, or whose lower ones all read as the best does. Raises
    DivergedError, naming a prompt, for a score that is not finite.
    """
    n, samples = scores_BS.shape
    if (bad_BS := ~np.isfinite(scores_BS)).any():
        prompt = int(np.argmax(bad_BS.any(axis=1)))
        raise loop.DivergedError(
            f"{bad_BS.sum()} of {bad_BS.size} answers have a score that is not finite, the first of prompt {prompt}"
        )
    rows, best = np.arange(n), scores_BS.argmax(axis=1)
    tokens_BSL, mask_BSL = (x.reshape(n, samples, -1) for x in (found.tokens_BL, found.mask_BL))
    tokens_B1L, mask_B1L = (x[rows, best][:, None] for x in (tokens_BSL, mask_BSL))
    other_BS = ((tokens_BSL != tokens_B1L) & (mask_BSL | mask_B1L)).any(axis=-1)
    lower_BS = scores_BS < scores_BS[rows, best][:, None]
    worst = np.where(other_BS & lower_BS, scores_BS, np.inf).argmin(axis=1)
    apart = (other_BS & lower_BS).any(axis=1)
    at = rows[apart, None] * samples + np.stack([best, worst], axis=1)[apart]
    equal = int((~lower_BS.any(axis=1)).sum())
    left_out = {EQUAL_SCORES: equal, ONE_TEXT: int((~apart).sum()) - equal}
    pairs = _pairs(found.tokens_BL[at], found.mask_BL[at], prompt_B=rows[apart], prompt_width=prompt_width)
    return pairs, left_out


def _pairs(tokens_BKL: np.ndarray, mask_BKL: np.ndarray, *, prompt_B: np.ndarray, prompt_width: int) -> Pairs:
    rows: Any = types.Preferences(tokens_BKL, mask_BKL, mask_BKL[..., prompt_width:])  # type: ignore[arg-type]
    return Pairs(rows, prompt_B)


def singles(pairs: Pairs, *, prompt_width: int) -> types.Preferences:
    """Each answer by itself, marked good or bad, with mismatched ones beside it: what KTO takes."""
    prompt_N = np.concatenate([pairs.prompt_B, pairs.prompt_B])

    def apart(x: Any) -> np.ndarray:
        return np.concatenate([np.asarray(x)[:, :1], np.asarray(x)[:, 1:]])

    rows = pairs.rows
    made: Any = types.Preferences(
        tokens_BKL=apart(rows.tokens_BKL),  # type: ignore[arg-type]
        mask_BKL=apart(rows.mask_BKL),
        answer_BKC=apart(rows.answer_BKC),  # type: ignore[arg-type]
        good_BK=(np.arange(2 * len(pairs)) < len(pairs))[:, None],
    )
    N = len(prompt_N)
    for shift in range(N // 4 + 1, N):
        if not np.any(prompt_N == np.roll(prompt_N, shift)):
            crossed = jax.device_get(dpo.mismatched(made, prompt_width=prompt_width, shift=shift))
            return made.replace(mismatched=crossed)
    raise settings.SettingError("all pairs are of one prompt; kto needs answers to others for its baseline")


def judged_by_reward(found: policy_sampling.Answers, samples: int, key: jax.Array) -> np.ndarray:
    """The reward model's scores."""
    del samples, key
    return found.scores_B


def judged_by_labelers(
    job: jobs.Job, temperature: float
) -> Callable[[policy_sampling.Answers, int, jax.Array], np.ndarray]:
    """Simulated labelers, as they ranked the comparisons: one for each prompt, in turn."""
    world = job.task.world
    if world is None:
        raise settings.SettingError("--judge labelers needs the built-in world; leave --data.path out, or the judge")
    pool = world.pool.replace(temperature=jnp.float32(temperature))  # type: ignore[attr-defined]
    rank = jax.jit(jax.vmap(labelers.rank, in_axes=(0, None, 0, 0, None)))

    def judge(found: policy_sampling.Answers, samples: int, key: jax.Array) -> np.ndarray:
        features_BF = np.asarray(labelers.features(found.gold))
        n = len(features_BF) // samples
        keys_B, labeler_B = jax.random.split(key, n), jnp.arange(n) % job.settings.world.labelers
        features_BSF = jnp.asarray(features_BF.reshape(n, samples, -1))
        ranks_BS = rank(keys_B, pool, labeler_B, features_BSF, jnp.ones(samples, bool))
        return -np.asarray(ranks_BS, np.float32).reshape(-1)

    return judge


def judged_by_gold(found: policy_sampling.Answers, samples: int, key: jax.Array) -> np.ndarray:
    """The gold utility itself: a judge without error."""
    del samples, key
    if found.gold is None:
        raise settings.SettingError("--judge gold needs the built-in world; leave --data.path out, or the judge")
    return np.asarray(found.gold.total)
