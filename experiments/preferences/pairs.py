"""Builds preference pairs and labelled single answers on the host, from rankings or from scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from launch.settings import SettingError
from recipe import jobs, policy_sampling, reward_diagnosis

from rlhf_jax import types
from rlhf_jax.simulation import labelers
from rlhf_jax.train import dpo, loop


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Preference pairs, sorted by prompt, and the prompt index of each pair. The preferred answer is first."""

    rows: types.Preferences
    prompt_B: np.ndarray

    def __len__(self) -> int:
        """Returns the number of pairs."""
        return len(self.prompt_B)


def count(ranked: types.Comparisons) -> dict[str, int]:
    """Returns the numbers of pairs of answers that differ in rank, of answers and of prompts."""
    pairs = len(reward_diagnosis.better_pairs(ranked)[0])
    return {"pairs": pairs, "answers": int(np.sum(ranked.where_BK)), "prompts": len(ranked.ranks_BK)}


def from_rankings(ranked: types.Comparisons, *, prompt_width: int, per_prompt: int, seed: int) -> Pairs:
    """Returns pairs of answers that differ in rank.

    At most ``per_prompt`` pairs per prompt are drawn at random; 0 keeps all. Raises SettingError if there are no pairs.
    """
    b, i, j = reward_diagnosis.better_pairs(ranked)
    if per_prompt:
        order = np.random.default_rng([seed, 700]).permutation(len(b))
        order = order[np.argsort(b[order], kind="stable")]
        first = np.searchsorted(b[order], b[order])  # index of the first pair of each prompt
        kept = np.sort(order[np.arange(len(b)) - first < per_prompt])
        b, i, j = b[kept], i[kept], j[kept]
    if len(b) == 0:
        raise SettingError(
            "no two answers to a prompt differ in rank, so there are no pairs to train on; use other comparisons"
        )
    tokens_BKL, mask_BKL = np.asarray(ranked.tokens_BKL), np.asarray(ranked.mask_BKL)
    rows = (np.stack([x[b, i], x[b, j]], axis=1) for x in (tokens_BKL, mask_BKL))
    return _pairs(*rows, prompt_B=b, prompt_width=prompt_width)


def best_and_worst(
    answers: policy_sampling.Answers, scores_BS: np.ndarray, *, prompt_width: int
) -> tuple[Pairs, dict[str, int]]:
    """Pairs the best answer to each prompt with the worst answer whose text differs from it.

    Returns the pairs and the number of prompts without a pair, by reason: all answers have the same score, or all
    answers with a lower score have the same text as the best. Raises DivergedError for a score that is not finite.
    """
    n, samples = scores_BS.shape
    if (bad_BS := ~np.isfinite(scores_BS)).any():
        prompt = int(np.argmax(bad_BS.any(axis=1)))
        raise loop.DivergedError(
            f"{bad_BS.sum()} of {bad_BS.size} answers have a score that is not finite; the first one answers prompt "
            f"{prompt}"
        )
    rows, best = np.arange(n), scores_BS.argmax(axis=1)
    tokens_BSL, mask_BSL = (x.reshape(n, samples, -1) for x in (answers.tokens_BL, answers.mask_BL))
    tokens_B1L, mask_B1L = (x[rows, best][:, None] for x in (tokens_BSL, mask_BSL))
    other_BS = ((tokens_BSL != tokens_B1L) & (mask_BSL | mask_B1L)).any(axis=-1)
    lower_BS = scores_BS < scores_BS[rows, best][:, None]
    worse_BS = other_BS & lower_BS
    worst = np.where(worse_BS, scores_BS, np.inf).argmin(axis=1)
    usable_B = worse_BS.any(axis=1)
    at = rows[usable_B, None] * samples + np.stack([best, worst], axis=1)[usable_B]
    equal = int((~lower_BS.any(axis=1)).sum())
    left_out = {"equal scores": equal, "one text": int((~usable_B).sum()) - equal}
    pairs = _pairs(answers.tokens_BL[at], answers.mask_BL[at], prompt_B=rows[usable_B], prompt_width=prompt_width)
    return pairs, left_out


def _pairs(tokens_BKL: np.ndarray, mask_BKL: np.ndarray, *, prompt_B: np.ndarray, prompt_width: int) -> Pairs:
    rows: Any = types.Preferences(tokens_BKL, mask_BKL, mask_BKL[..., prompt_width:])  # type: ignore[arg-type]
    return Pairs(rows, prompt_B)


def singles(pairs: Pairs, *, prompt_width: int) -> types.Preferences:
    """Returns the single answers that KTO trains on, labelled good or bad.

    For KTO's baseline, ``mismatched`` pairs each prompt with an answer to a different one. Raises SettingError if more
    than half of the pairs have the same prompt.
    """

    def split(x: Any) -> Any:
        return np.concatenate([np.asarray(x)[:, :1], np.asarray(x)[:, 1:]])

    rows = pairs.rows
    answers: Any = types.Preferences(
        tokens_BKL=split(rows.tokens_BKL),
        mask_BKL=split(rows.mask_BKL),
        answer_BKC=split(rows.answer_BKC),
        good_BK=(np.arange(2 * len(pairs)) < len(pairs))[:, None],
    )
    try:
        mismatched = dpo.mismatched(answers, prompt_width=prompt_width, shift=len(pairs) // 2 + 1)
    except ValueError as error:
        raise SettingError(
            "--loss kto needs answers to several prompts for its baseline, but more than half of the pairs have the "
            "same prompt; use more prompts"
        ) from error
    return answers.replace(mismatched=jax.device_get(mismatched))


def reward_judge(answers: policy_sampling.Answers, samples: int, key: jax.Array) -> np.ndarray:
    """Judges answers by their reward-model scores."""
    del samples, key
    return answers.scores_B


def make_labeler_judge(
    job: jobs.Job, temperature: float
) -> Callable[[policy_sampling.Answers, int, jax.Array], np.ndarray]:
    """Returns a judge that ranks answers as a simulated labeler does; the labelers alternate over prompts.

    ``temperature`` is the noise of the labelers' choices.
    """
    world = job.task.world
    assert world is not None
    pool = world.pool.replace(temperature=jnp.float32(temperature))  # type: ignore[attr-defined]
    rank = jax.jit(jax.vmap(labelers.rank, in_axes=(0, None, 0, 0, None)))

    def judge(answers: policy_sampling.Answers, samples: int, key: jax.Array) -> np.ndarray:
        features_BF = np.asarray(labelers.features(answers.gold))
        n = len(features_BF) // samples
        keys_B, labeler_B = jax.random.split(key, n), jnp.arange(n) % job.settings.world.labelers
        features_BSF = jnp.asarray(features_BF.reshape(n, samples, -1))
        ranks_BS = rank(keys_B, pool, labeler_B, features_BSF, jnp.ones(samples, bool))
        return -np.asarray(ranks_BS, np.float32).reshape(-1)

    return judge


def gold_judge(answers: policy_sampling.Answers, samples: int, key: jax.Array) -> np.ndarray:
    """Judges answers by their gold utility in the built-in world, without errors."""
    del samples, key
    return np.asarray(answers.gold.total)
