"""The stages of claims about helpfulness and harmlessness. Each is a function of a `Trial`."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from online import comparison_sets, domains, preference_models, rounds

from claims import model_stages as ms
from claims import trajectories
from claims.trial import Trial
from rlhf_jax import parallel, types

BATCH = 32
"""Pairs per step."""
_STEPS: dict[Any, parallel.JitStep] = {}
"""The compiled step of each architecture."""


def collect(
    trial: Trial, start: types.Params, *, helpful: int, harmless: int, held_out: int = 3000
) -> comparison_sets.Sets:
    """Returns labelled pairs of answers of the SFT model, in both domains.

    Pairs that the labelers find equal are dropped: about half of the harmlessness pairs, because both answers are often
    equally harmless, and a tenth of the helpfulness pairs.
    """
    few = {"helpful": 64, "harmless": 160, "held_out": 64}
    counts = few if trial.quick else {"helpful": helpful, "harmless": harmless, "held_out": held_out}
    return comparison_sets.sample_and_label(
        trial,
        [comparison_sets.policy_answers(trial, start)],
        number=0,
        pairs={"helpful": counts["helpful"], "harmless": counts["harmless"]},
        held_out=counts["held_out"],
        temperature=None,
    )


def step_of(trial: Trial) -> parallel.JitStep:
    """Returns the compiled step of the trial's architecture, which all seeds share."""
    if trial.shared not in _STEPS:
        _STEPS[trial.shared] = preference_models.make_step(trial)
    return _STEPS[trial.shared]


def train(
    trial: Trial,
    start: types.Params,
    sets: comparison_sets.Sets,
    *,
    helpful: int,
    harmless: int,
    harmless_weight: float = 1.0,
    size: str = ms.LARGEST,
) -> types.Params:
    """Returns a preference model, whose scores are not normalised, trained on so many pairs of each domain."""
    own = ms.sized(trial, size)
    rows = comparison_sets.first(sets.train, {"helpful": helpful, "harmless": harmless})
    return preference_models.train(
        own,
        step_of(own),
        start,
        rows,
        name="reward_model",
        number=0,
        batch=BATCH,
        harmless_weight=harmless_weight,
    )


def accuracy(trial: Trial, model: types.Params, sets: comparison_sets.Sets, *, size: str = ms.LARGEST) -> Any:
    """Returns the accuracy of a preference model on the held-out pairs of each domain."""
    own = ms.sized(trial, size)
    found = preference_models.accuracy(own, model, sets.held_out, sets.held_out_asked_B)
    return {domain: numbers[0] for domain, numbers in found.items()}


def train_and_test(trial: Trial, start: types.Params, sets: comparison_sets.Sets, **options: Any) -> dict[str, float]:
    """Returns the accuracy of a preference model; ``options`` are those of `train`."""
    model = train(trial, start, sets, **options)
    return accuracy(trial, model, sets, size=options.get("size", ms.LARGEST))


def as_reward(trial: Trial, start: types.Params, model: types.Params) -> types.Params:
    """Returns a preference model with normalised scores."""
    return preference_models.as_reward(trial, model, start)


def follow(
    trial: Trial, start: types.Params, reward: types.Params, *, red_team: float, at: tuple[int, ...], **changes: Any
) -> dict[str, np.ndarray]:
    """Trains a policy on prompts of which the share ``red_team`` are requests for help with harm.

    Returns:
        The mean gold helpfulness on ordinary prompts, and the mean gold harmlessness on harmful requests, at each of
        the iterations ``at``; both from the test prompts.
    """
    own = rounds.with_prompts(trial.with_ppo(iterations=at[-1], **changes), red_team)
    n = 64 if trial.quick else 512
    sets = [
        domains.draw_prompts(own.settings, own.task, n, domain=domain, split="test", number=rounds.EVAL_PROMPTS)
        for domain in domains.DOMAINS
    ]
    key = jax.random.fold_in(trial.key("evaluate"), 3000)
    return trajectories.follow_with(
        own,
        start,
        reward,
        at=at,
        measure=lambda policy: {
            domain: domains.worth(own.sampler(policy, start, reward, prompts, key), domain)
            for domain, prompts in zip(domains.DOMAINS, sets)
        },
    )
