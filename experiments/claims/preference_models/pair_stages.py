"""Pairs of answers, labelled by simulated labelers, and preference models that are trained on them."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from recipe import stages, tasks

from claims.trial import Trial
from rlhf_jax import lm, parallel, types
from rlhf_jax.data import batching
from rlhf_jax.simulation import labelers
from rlhf_jax.train import reward_model
from rlhf_jax.train import state as state_lib
from rlhf_jax.train.optim import schedules

BATCH = 32
"""Pairs per step."""
_FEWEST = 256
"""The least number of pairs that are sampled at once."""


def sample(
    trial: Trial, start: types.Params, prompts: tasks.PromptSet, *, answers: int, stream: int
) -> dict[str, np.ndarray]:
    """Returns the tokens, mask, features and gold components of sampled answers, ``[prompts, answers, ...]``.

    Args:
        trial: The trial.
        start: Parameters of the policy.
        prompts: The prompts.
        answers: Number of answers to each prompt.
        stream: Index of the random key.
    """
    n = len(prompts)
    asked = prompts.at(np.repeat(np.arange(n), answers))
    found = trial.sampler(start, None, None, asked, jax.random.fold_in(trial.key("comparisons"), stream))
    rows = {
        "tokens": found.tokens_BL,
        "mask": found.mask_BL,
        "features": np.asarray(labelers.features(found.gold)),
        "gold": np.asarray(found.gold.total),
        "helpful": np.asarray(found.gold.helpful),
        "harmless": np.asarray(found.gold.harmless),
    }
    return {name: x.reshape(n, answers, *x.shape[1:]) for name, x in rows.items()}


def sample_pairs(
    trial: Trial, start: types.Params, prompts: tasks.PromptSet, *, pairs: int, stream: int
) -> dict[str, np.ndarray]:
    """Returns pairs of different answers in the form of `sample`, ``[pairs, 2, ...]``; equal answers are drawn again.

    Raises ValueError if all sampled answers to a prompt are equal.

    Args:
        trial: The trial.
        start: Parameters of the policy.
        prompts: The prompts, which are used in order and, if necessary, again.
        pairs: Number of pairs.
        stream: Index of the first random key; some of the following ones are used too.
    """
    parts: list[dict[str, np.ndarray]] = []
    first, missing = 0, pairs
    while missing > 0:
        n = max(missing, _FEWEST)
        asked = prompts.at(np.arange(first, first + n) % len(prompts))
        sampled = sample(trial, start, asked, answers=2, stream=stream + len(parts))
        different_N = different(sampled["tokens"], sampled["mask"])
        if not different_N.any():
            raise ValueError(f"none of {n} pairs of sampled answers differ")
        parts.append({name: x[different_N] for name, x in sampled.items()})
        first, missing = first + n, missing - int(different_N.sum())
    return {name: np.concatenate([part[name] for part in parts])[:pairs] for name in parts[0]}


def different(tokens_N2L: np.ndarray, mask_N2L: np.ndarray) -> np.ndarray:
    """Returns for each pair whether its answers differ, ``[N]``."""
    real_N2L = np.where(mask_N2L, tokens_N2L, -1)
    return (real_N2L[:, 0] != real_N2L[:, 1]).any(axis=1)


def choices(pool: labelers.Pool, features_N2F: np.ndarray, *, agreement: float, key: jax.Array) -> np.ndarray:
    """Returns the index of the answer that a labeler of the pool chooses for each pair, ``[N]``; there are no ties.

    Args:
        pool: The labelers, who take turns.
        features_N2F: Features of the answers.
        agreement: Rate at which two labelers agree, which sets their noise.
        key: A random key; consumed.
    """
    utility_NR = [np.asarray(labelers.utilities(pool, jnp.asarray(features_N2F[:, k]))) for k in range(2)]
    noise = labelers.calibrated_temperature(*utility_NR, target=agreement)
    noisy = pool.replace(temperature=jnp.float32(noise), tie_width=jnp.float32(0.0))  # type: ignore[attr-defined]
    n = len(features_N2F)
    keys_N, labeler_N = jax.random.split(key, n), np.arange(n) % utility_NR[0].shape[1]
    rank_all = jax.jit(jax.vmap(labelers.rank, in_axes=(0, None, 0, 0, None)))
    ranks_N2 = rank_all(keys_N, noisy, labeler_N, features_N2F, np.ones(2, bool))
    return np.asarray(ranks_N2).argmin(axis=1)


def comparisons(tokens_N2L: np.ndarray, mask_N2L: np.ndarray, chosen_N: np.ndarray) -> types.Comparisons:
    """Returns pairs as comparisons, without those of two equal answers."""
    different_N = different(tokens_N2L, mask_N2L)
    ranks_N2 = np.where(np.arange(2) == chosen_N[:, None], 1, 2).astype(np.int32)
    rows: Any = (tokens_N2L, mask_N2L, ranks_N2, np.ones(ranks_N2.shape, bool))
    return types.Comparisons(*(x[different_N] for x in rows))


@functools.cache
def _step(cfg: lm.LMConfig) -> parallel.JitStep:
    return parallel.jit_step(reward_model.make_train_step(partial(lm.score, cfg=cfg)))


def train(
    trial: Trial,
    params: types.Params,
    rows: types.Comparisons,
    *,
    rate: float,
    batch: int = BATCH,
    epochs: int = 1,
    stream: int = 0,
    cfg: lm.LMConfig | None = None,
) -> types.Params:
    """Returns a preference model, which keeps the head of ``params`` if they have one.

    Args:
        trial: The trial.
        params: Initial parameters.
        rows: The comparisons.
        rate: Peak learning rate.
        batch: Number of comparisons per step.
        epochs: Number of passes over them.
        stream: Index of the random key.
        cfg: Architecture; by default that of the trial.
    """
    cfg = cfg or trial.cfg  # type: ignore[assignment]
    key, n = jax.random.fold_in(trial.key("reward_model"), 200 + stream), len(rows.ranks_BK)
    batch = min(batch, n)
    steps = max(1, epochs * n // batch)
    order = batching.epoch_batches(0, n=n, batch_size=batch, key=key, steps=steps)
    if "head" not in params:
        params = lm.with_head(jax.random.fold_in(key, 1), params, cfg)  # type: ignore[arg-type]
    state = trial.fit(
        "reward_model",
        _step(cfg),  # type: ignore[arg-type]  # frozen, thus hashable
        trial.create_on_mesh(partial(state_lib.create, tx=trial.supervised_tx), params),
        steps,
        batch_at=lambda i: jax.tree.map(lambda x: np.asarray(x)[order[i]], rows),
        hyper_at=lambda i: stages.hyper(rate * schedules.cosine(i, steps)),
        rng=key,
    )
    return state.params


def scores(trial: Trial, params: types.Params, tokens_NKL: np.ndarray, mask_NKL: np.ndarray) -> np.ndarray:
    """Returns the scores of answers, ``[N, K]``."""
    rows = (x.reshape(-1, x.shape[-1]) for x in (tokens_NKL, mask_NKL))
    return np.round(trial.sampler.score(params, *rows).reshape(tokens_NKL.shape[:2]), 4)
