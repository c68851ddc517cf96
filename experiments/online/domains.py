"""The two domains of HH: helpfulness on ordinary prompts, harmlessness on red-team prompts (Bai et al. 2022, 2.2)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import numpy as np
from launch.settings import Settings
from recipe import policy_sampling, tasks

from rlhf_jax.simulation import labelers, prompts
from rlhf_jax.simulation import world as world_lib

Domain = Literal["helpful", "harmless"]
DOMAINS: tuple[Domain, ...] = ("helpful", "harmless")
"""The index of a domain is its number in `types.Comparisons.domain_B`."""
_STREAM = 30
"""First index of the random streams of prompts; `recipe.tasks` uses smaller ones."""


def draw(settings: Settings, n: int, *, domain: Domain, split: str, number: int) -> list[prompts.Prompt]:
    """Draws prompts of a domain: ordinary requests, or requests for help with harm.

    Args:
        settings: The settings of the run, in the built-in world.
        n: Number of prompts.
        domain: The domain.
        split: ``train``, ``validation`` or ``test``; no question is in two of them.
        number: Number of the random stream.
    """
    sets = prompts.split_prompts(world_lib.make_world(settings.seed), settings.seed)
    universe = {
        kind: rows
        for kind, rows in getattr(sets, split).items()
        if (prompts.KINDS[prompts.KIND_INDEX[kind]].category == "harmful") == (domain == "harmless")
    }
    rng = np.random.default_rng([settings.seed, _STREAM, number, DOMAINS.index(domain)])
    return prompts.draw_prompts(universe, n, rng)


def draw_prompts(
    settings: Settings, task: tasks.Task, n: int, *, domain: Domain, split: str, number: int
) -> tasks.PromptSet:
    """Returns what `draw` returns, in the form of the task."""
    return tasks.prompt_set(task, draw(settings, n, domain=domain, split=split, number=number))


def mixed_prompts(
    settings: Settings, task: tasks.Task, n: int, *, red_team: float, split: str, number: int
) -> tasks.PromptSet:
    """Draws n prompts in random order, of which the share ``red_team`` are requests for help with harm."""
    counts = {"helpful": n - round(n * red_team), "harmless": round(n * red_team)}
    parts = [
        draw_prompts(settings, task, count, domain=domain, split=split, number=number)
        for domain in DOMAINS
        if (count := counts[domain])
    ]
    order = np.random.default_rng([settings.seed, _STREAM, number, len(DOMAINS)]).permutation(n)
    return tasks.concatenate(parts).at(order)


class Labelled(NamedTuple):
    """The labels of B pairs."""

    first_is_better_B: np.ndarray
    kept_B: np.ndarray
    """False for pairs that the labeler finds equal, which HH discards."""


def label(
    rng: jax.Array, pool: labelers.Pool, features_B2F: np.ndarray, *, domain: Domain, temperature: float
) -> Labelled:
    """Labels pairs with the labelers of the pool in turn, who compare only what the domain asks for.

    In the harmless domain, a labeler picks the less harmful answer, as if HH's labelers, who pick the more harmful
    one, had their choice exchanged. Choices follow the Bradley-Terry model; a ranking is random with the pool's
    probability of a lapse.

    Args:
        rng: A random key; consumed.
        pool: The labelers.
        features_B2F: Features of both answers, from `labelers.features`.
        domain: The domain.
        temperature: Scale of the noise, in units of utility.
    """
    utility_B2 = utilities(pool, features_B2F, domain=domain)
    gap_B = utility_B2[:, 0] - utility_B2[:, 1]
    lapsing, choosing = jax.random.split(rng)
    lapses_B = np.asarray(jax.random.uniform(lapsing, gap_B.shape)) < float(pool.lapse)
    p_B = np.where(lapses_B, 0.5, 1.0 / (1.0 + np.exp(-np.clip(gap_B / temperature, -50, 50))))
    chosen_B = np.asarray(jax.random.uniform(choosing, gap_B.shape)) < p_B
    return Labelled(chosen_B, np.abs(gap_B) > float(pool.tie_width))


def utilities(pool: labelers.Pool, features_B2F: np.ndarray, *, domain: Domain) -> np.ndarray:
    """Returns what each pair's labeler thinks of both answers, ``[B, 2]``; labeler b mod R labels pair b."""
    weights_RF = np.array(pool.weights_RF, np.float64)
    harmless = np.array([name == "harmless" for name in labelers.FEATURES])
    weights_RF[:, harmless if domain == "helpful" else ~harmless] = 0.0
    labeler_B = np.arange(len(features_B2F)) % len(weights_RF)
    return np.einsum("bkf,bf->bk", np.asarray(features_B2F, np.float64), weights_RF[labeler_B])


def calibrated_temperature(pool: labelers.Pool, features_B2F: np.ndarray, *, agreement: float) -> float:
    """Returns the noise with which two labelers agree on the helpfulness of these pairs at the rate ``agreement``."""
    weights_RF = np.array(pool.weights_RF, np.float64)
    weights_RF[:, labelers.FEATURES.index("harmless")] = 0.0
    utility_2BR = np.moveaxis(np.asarray(features_B2F, np.float64) @ weights_RF.T, 1, 0)
    return labelers.calibrated_temperature(*utility_2BR, target=agreement)


def worth(answers: policy_sampling.Answers, domain: Domain) -> np.ndarray:
    """Returns what the domain asks for: the gold helpfulness or harmlessness of each answer."""
    return np.asarray(getattr(answers.gold, domain))
