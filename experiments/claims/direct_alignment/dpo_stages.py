"""The stages of claims about DPO. Each is a function of a `Trial`."""

from __future__ import annotations

from typing import Any

import numpy as np
from preferences import ranked_dpo

from claims import model_stages as ms
from claims import reward_fits
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


def implicit_rewards(
    trial: Trial, policy: types.Params, start: types.Params, compared: tuple[types.Comparisons, dict[str, Any]]
) -> np.ndarray:
    """Returns the log-ratio of policy and reference for each answer of the validation comparisons, ``[B, K]``."""
    rows = ms.validation_rows(trial, compared[0])
    policy_BK, start_BK = (
        ranked_dpo.with_reference(trial, params, rows).loss_inputs["reference_K"] for params in (policy, start)
    )
    return policy_BK - start_BK


def explicit_rewards(
    trial: Trial, reward: types.Params, compared: tuple[types.Comparisons, dict[str, Any]]
) -> np.ndarray:
    """Returns the scores of a reward model for each answer of the validation comparisons, ``[B, K]``."""
    return reward_fits.score(trial, reward, ms.validation_rows(trial, compared[0]))
