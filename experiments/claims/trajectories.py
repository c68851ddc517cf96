"""Policies in the course of RL, also of other sizes than the reward model: what their answers are worth over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from recipe import stages

from claims import model_stages as ms
from claims.trial import Trial
from rlhf_jax import types
from rlhf_jax.train import ppo

AT = (0, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24)
"""Iterations after which policies are measured; the last is the length of training."""


def iterations(trial: Trial, at: tuple[int, ...] = AT) -> tuple[int, ...]:
    """Returns ``at`` or, with --quick, as many iterations from 0 on."""
    return tuple(range(len(at))) if trial.quick else at


def follow(
    trial: Trial,
    start: types.Params,
    reward: types.Params,
    test: types.Params | None = None,
    *,
    at: tuple[int, ...],
    size: str = ms.LARGEST,
    **changes: Any,
) -> dict[str, np.ndarray]:
    """Trains a policy and returns what its answers to the held-out prompts are worth, ``[C, N, ...]``.

    Args:
        trial: The trial.
        start: SFT model from which RL starts.
        reward: The reward model, which is also the initial critic.
        test: Another reward model, whose ``test_score`` is returned too; None for none.
        at: Iterations after which the answers are sampled; the last is the number of iterations.
        size: Size of the policy.
        **changes: Other --ppo settings.

    Returns:
        Gold utility, score, KL, features and, with ``test``, ``test_score`` of each answer at each of ``at``.
    """
    own = ms.sized(trial, size, policy_only=True).with_ppo(iterations=at[-1], **changes)
    return follow_with(own, start, reward, at=at, measure=lambda policy: _worth(own, policy, start, reward, test))


def follow_with(
    own: Trial,
    start: types.Params,
    reward: types.Params,
    *,
    at: tuple[int, ...],
    measure: Callable[[types.Params], dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Trains a policy with the settings of ``own`` and returns what ``measure`` returns at each of ``at``, stacked."""
    rows = [measure(start)]
    batch_at, hyper_at = stages.ppo_inputs(own, "ppo", ptx_coef=0.0)

    def callback(done: int, state: Any, metrics: Any) -> None:
        del metrics
        if done in at:
            rows.append(measure(state.ema))

    own.fit(
        "ppo",
        own.ppo_step,
        own.new_policy(start, reward),
        at[-1],
        batch_at=batch_at,
        hyper_at=hyper_at,
        frozen=ppo.Frozen(start, reward),
        callbacks=[callback],
    )
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _worth(trial: Trial, policy: Any, start: Any, reward: Any, test: Any) -> dict[str, np.ndarray]:
    key = jax.random.fold_in(trial.key("evaluate"), 2000)
    answers = trial.sampler(policy, start, reward, trial.task.eval_prompts, key)
    tested = {} if test is None else {"test_score": trial.sampler.score(test, answers.tokens_BL, answers.mask_BL)}
    return tested | ms.worth(answers)


def means(measured: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the mean over prompts of gold utility, score and KL at each checkpoint, ``[C]``."""
    return {name: measured[name].mean(axis=1, dtype=np.float64) for name in ("gold", "score", "kl")}


def at_root(root_kl_C: np.ndarray, values_C: np.ndarray, roots_K: np.ndarray) -> np.ndarray:
    """Returns values at given square roots of the KL, by linear interpolation between the checkpoints."""
    order = np.argsort(root_kl_C)
    return np.interp(roots_K, root_kl_C[order], values_C[order])


def root(kl: Any) -> np.ndarray:
    """Returns the square root of estimates of a KL, some of which may be slightly negative."""
    return np.sqrt(np.maximum(np.asarray(kl, np.float64), 0.0))
