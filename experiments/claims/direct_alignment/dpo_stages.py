"""The stages of claims about DPO. Each is a function of a `Trial`."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from preferences import ranked_dpo

from claims import model_stages as ms
from claims.trial import Trial
from rlhf_jax import parallel, types

_STEPS: dict[Any, parallel.JitStep] = {}
"""The compiled step of each architecture."""


def train_dpo(
    trial: Trial,
    start: types.Params,
    compared: tuple[types.Comparisons, dict[str, Any]],
    *,
    beta: float,
    learning_rate: float = 6e-4,
    epochs: int = 1,
) -> types.Params:
    """Returns the policy that DPO trains on the comparisons of the reward model; ``start`` is also the reference."""
    if trial.shared not in _STEPS:
        _STEPS[trial.shared] = ranked_dpo.make_step(trial)
    ranked = ranked_dpo.with_reference(trial, start, ms.train_rows(trial, compared[0]))
    return ranked_dpo.train(
        trial,
        _STEPS[trial.shared],
        start,
        ranked,
        name="dpo",
        seed=0,
        beta=beta,
        learning_rate=learning_rate,
        epochs=epochs,
    )


def validation_rows(trial: Trial, comparisons: types.Comparisons) -> types.Comparisons:
    """Returns the comparisons that no model is trained on."""
    assert trial.task.world is not None
    n = trial.task.world.n_compare
    return jax.tree.map(lambda x: x[n:], comparisons)


def implicit_rewards(
    trial: Trial, policy: types.Params, start: types.Params, compared: tuple[types.Comparisons, dict[str, Any]]
) -> np.ndarray:
    """Returns the log-ratio of policy and reference for each answer of the validation comparisons, ``[B, K]``."""
    rows = validation_rows(trial, compared[0])
    policy_BK, start_BK = (
        ranked_dpo.with_reference(trial, params, rows).loss_inputs["reference_K"] for params in (policy, start)
    )
    return policy_BK - start_BK


def explicit_rewards(
    trial: Trial, reward: types.Params, compared: tuple[types.Comparisons, dict[str, Any]]
) -> np.ndarray:
    """Returns the scores of a reward model for each answer of the validation comparisons, ``[B, K]``."""
    rows = validation_rows(trial, compared[0])
    B, K, L = np.shape(rows.tokens_BKL)
    tokens_RL, mask_RL = (np.asarray(x).reshape(B * K, L) for x in (rows.tokens_BKL, rows.mask_BKL))
    return trial.sampler.score(reward, tokens_RL, mask_RL).reshape(B, K)


def labels(trial: Trial, compared: tuple[types.Comparisons, dict[str, Any]]) -> dict[str, np.ndarray]:
    """Returns the ranks of the validation comparisons, and which answers exist."""
    rows = validation_rows(trial, compared[0])
    return {"ranks_BK": np.asarray(rows.ranks_BK), "where_BK": np.asarray(rows.where_BK)}


def pair_accuracy(score_BK: np.ndarray, ranks_BK: np.ndarray, where_BK: np.ndarray) -> float:
    """Returns the share of the pairs that differ in rank whose better answer has the higher score.

    Equal scores count one half.
    """
    better_BKK = (ranks_BK[:, :, None] < ranks_BK[:, None]) & where_BK[:, :, None] & where_BK[:, None]
    gap_BKK = score_BK[:, :, None] - score_BK[:, None]
    return float(np.mean((np.sign(gap_BKK)[better_BKK] + 1) / 2))
