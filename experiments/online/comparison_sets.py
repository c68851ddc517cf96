"""Comparison sets of HH: pairs of answers from the SFT model, by rejection sampling, or of online policies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from recipe import jobs, policy_sampling, tasks

from online import domains
from rlhf_jax import checkpoint, types
from rlhf_jax.simulation import labelers

STATIC_SET = 100
"""Number of the set on which the static policy is trained; those of the rounds are smaller."""

Answerer = Callable[[tasks.PromptSet, jax.Array], policy_sampling.Answers]
"""Samples one answer to each prompt, given a random key."""
Source = Literal["base", "rejection", "online"]
"""Whose answers a set has: the SFT model's, the best of several by the preference model, or those of RL policies."""


class Sets(NamedTuple):
    """Pairs of one or more comparison sets, for training and held out, and facts about them."""

    train: types.Comparisons
    held_out: types.Comparisons
    held_out_asked_B: np.ndarray
    """What the prompt of each held-out pair asks."""
    facts: dict[str, Any]


def policy_answers(job: jobs.Job, policy: types.Params) -> Answerer:
    """Returns a function that samples answers of a policy."""
    return lambda prompts, key: job.sampler(policy, None, None, prompts, key)


def best_of_answers(job: jobs.Job, policy: types.Params, reward: types.Params, *, samples: int) -> Answerer:
    """Returns a function that samples several answers of a policy and keeps the one with the highest score."""

    def answer(prompts: tasks.PromptSet, key: jax.Array) -> policy_sampling.Answers:
        repeated = prompts.at(np.repeat(np.arange(len(prompts)), samples))
        answers = job.sampler(policy, None, reward, repeated, key)
        best_B = np.arange(len(prompts)) * samples + answers.scores_B.reshape(-1, samples).argmax(axis=1)
        return jax.tree.map(lambda x: x[best_B], answers)

    return answer


class Part(NamedTuple):
    """Pairs of answers to B prompts of one split and domain, without labels."""

    split: str
    domain: domains.Domain
    prompts: tasks.PromptSet
    rows: types.Comparisons
    features_B2F: np.ndarray
    key: jax.Array
    """A random key for the labels."""

    @property
    def name(self) -> str:
        """The name of the part, such as train_helpful."""
        return f"{self.split}_{self.domain}"


def collect(
    job: jobs.Job,
    answerers: Sequence[Answerer],
    *,
    number: int,
    pairs: Mapping[domains.Domain, int],
    held_out: int,
    temperature: float | None,
    make: Callable[..., Sets] | None = None,
) -> Sets:
    """Samples two answers to each prompt and has them labelled; the set is saved, and a resumed run reads it.

    Args:
        job: The job of the run.
        answerers: Each answer comes from one of them, drawn at random.
        number: Number of the set, on which its prompts and samples depend.
        pairs: Number of training prompts in each domain.
        held_out: Number of prompts of each domain, from the validation split, whose pairs are held out.
        temperature: Noise of the labelers; None calibrates it on the helpfulness pairs of this set.
        make: Makes the set, given the other arguments; None is `sample_and_label`.
    """
    stage = f"comparisons-{number}"
    with job.checkpoints(stage) as checkpoints:
        saved = checkpoints.latest() or 0
        try:
            found = checkpoints.restore(None)[1:] if saved else None
        except checkpoint.CheckpointError as error:
            job.note(stage, f"the comparisons are collected again, because {error}")
            found = None
        if found is None:
            sets = (make or sample_and_label)(
                job, answerers, number=number, pairs=pairs, held_out=held_out, temperature=temperature
            )
            arrays: dict[str, Any] = {"train": _fields(sets.train)}
            if len(sets.held_out_asked_B):  # empty arrays cannot be saved
                arrays |= {"held_out": _fields(sets.held_out), "asked_B": sets.held_out_asked_B}
            checkpoints.save(saved + 1, arrays, sets.facts)
            return sets
        job.progress.skip(stage)
        arrays, facts = jax.tree.map(np.asarray, found[0]), found[1]
        train = types.Comparisons(**arrays["train"])
        held = types.Comparisons(**arrays["held_out"]) if "held_out" in arrays else none_of(train)
        return Sets(train, held, arrays.get("asked_B", np.zeros(0, int)), facts)


def _fields(rows: types.Comparisons) -> dict[str, Any]:
    names = ("tokens_BKL", "mask_BKL", "ranks_BK", "where_BK", "domain_B")
    inputs = {} if rows.loss_inputs is None else {"loss_inputs": rows.loss_inputs}
    return {name: np.asarray(getattr(rows, name)) for name in names} | inputs


def sample_and_label(
    job: jobs.Job,
    answerers: Sequence[Answerer],
    *,
    number: int,
    pairs: Mapping[domains.Domain, int],
    held_out: int,
    temperature: float | None,
) -> Sets:
    """Does what `collect` does with simulated labelers, but neither reads nor saves the set."""
    assert job.task.world is not None
    labelled = []
    for part in sample(job, answerers, number=number, pairs=pairs, held_out=held_out):
        if temperature is None:  # on the first set, whose first part is helpfulness
            agreement = job.settings.world.agreement
            temperature = domains.calibrated_temperature(job.task.world.pool, part.features_B2F, agreement=agreement)
        labels = domains.label(
            jax.random.fold_in(part.key, 1),
            job.task.world.pool,
            part.features_B2F,
            domain=part.domain,
            temperature=temperature,
        )
        labelled.append((part, with_labels(part.rows, labels, domain=part.domain), labels.kept_B))
    return joined(labelled, {"labeler_temperature": temperature})


def sample(
    job: jobs.Job,
    answerers: Sequence[Answerer],
    *,
    number: int,
    pairs: Mapping[domains.Domain, int],
    held_out: int,
    saved: Mapping[str, tuple[types.Comparisons, np.ndarray]] | None = None,
) -> list[Part]:
    """Samples the pairs of a set, those for training first.

    Args:
        job: The job of the run.
        answerers: Each answer comes from one of them, drawn at random.
        number: Number of the set, on which its prompts and samples depend.
        pairs: Number of training prompts in each domain.
        held_out: Number of held-out prompts in each domain; with 0, none of the parts is held out.
        saved: What `sample_pairs` returned before for each part, by its name; None samples the pairs.
    """
    stage, key = f"comparisons-{number}", jax.random.fold_in(job.key("comparisons"), 5000 + number)
    total, done = sum(pairs.values()) + held_out * len(pairs), 0
    parts: list[Part] = []
    job.progress.start(stage, total)
    splits = ("train", "validation") if held_out else ("train",)
    cells: list[tuple[str, domains.Domain]] = [(split, domain) for split in splits for domain in pairs]
    for split, domain in cells:
        n = pairs[domain] if split == "train" else held_out
        own = jax.random.fold_in(key, len(parts))
        prompts = domains.draw_prompts(job.settings, job.task, n, domain=domain, split=split, number=number)
        width = job.task.row_width
        found = sample_pairs(answerers, prompts, own, width=width) if saved is None else saved[f"{split}_{domain}"]
        parts.append(Part(split, domain, prompts, *found, own))
        done += n
        job.progress.update(stage, done, total)
    job.progress.finish(stage)
    return parts


def joined(labelled: Sequence[tuple[Part, types.Comparisons, np.ndarray]], facts: dict[str, Any]) -> Sets:
    """Returns the set of parts, each with its labelled pairs and the mask of the pairs that these are."""
    rows: dict[str, list[types.Comparisons]] = {"train": [], "validation": []}
    asked: list[np.ndarray] = []
    counts = {}
    for part, kept, kept_B in labelled:
        rows[part.split].append(kept)
        if part.split == "validation":
            asked.append((part.prompts.asked_B + 100_000 * len(asked))[kept_B])  # differ between domains
        counts[part.name] = {"labelled": len(kept_B), "kept": int(kept_B.sum())}
    train = merge(rows["train"])
    held = merge(rows["validation"]) if asked else none_of(train)
    return Sets(train, held, np.concatenate([*asked, np.zeros(0, int)]), counts | facts)


def sample_pairs(
    answerers: Sequence[Answerer], prompts: tasks.PromptSet, key: jax.Array, *, width: int
) -> tuple[types.Comparisons, np.ndarray]:
    """Samples two answers to each prompt.

    Args:
        answerers: Each answer comes from one of them, drawn at random.
        prompts: The prompts.
        key: A random key; consumed.
        width: Number of tokens in a row.

    Returns:
        The pairs, all tied, and the features of the answers, ``[B, 2, F]``.
    """
    n = len(prompts)
    which_R = np.asarray(jax.random.randint(jax.random.fold_in(key, 0), (2 * n,), 0, len(answerers)))
    tokens_RL, mask_RL = np.zeros((2 * n, width), np.int32), np.zeros((2 * n, width), bool)
    features_RF = np.zeros((2 * n, len(labelers.FEATURES)), np.float32)
    for i, answerer in enumerate(answerers):
        rows = np.flatnonzero(which_R == i)
        if len(rows):
            answers = answerer(prompts.at(rows // 2), jax.random.fold_in(key, 100 + i))
            tokens_RL[rows], mask_RL[rows] = answers.tokens_BL, answers.mask_BL
            features_RF[rows] = labelers.features(answers.gold)
    rows = unlabelled(tokens_RL.reshape(n, 2, width), mask_RL.reshape(n, 2, width))
    return rows, features_RF.reshape(n, 2, -1)


def unlabelled(tokens_B2L: np.ndarray, mask_B2L: np.ndarray) -> types.Comparisons:
    """Returns pairs of answers, all tied."""
    n = len(tokens_B2L)
    arrays: Any = (tokens_B2L, mask_B2L, np.ones((n, 2), np.int32), np.ones((n, 2), bool))
    return types.Comparisons(*arrays)


def with_labels(rows: types.Comparisons, labelled: domains.Labelled, *, domain: domains.Domain) -> types.Comparisons:
    """Returns the pairs that the labelers do not find equal, with their ranks and the number of the domain."""
    first_B = labelled.first_is_better_B
    ranks_BK = np.stack([np.where(first_B, 1, 2), np.where(first_B, 2, 1)], axis=1).astype(np.int32)
    number_B = np.full(len(first_B), domains.DOMAINS.index(domain), np.int32)
    ranked = dataclasses.replace(rows, ranks_BK=ranks_BK, domain_B=number_B)  # type: ignore[arg-type]
    return jax.tree.map(lambda x: x[labelled.kept_B], ranked)


def merge(parts: Sequence[types.Comparisons]) -> types.Comparisons:
    """Returns the pairs of all parts."""
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def none_of(rows: types.Comparisons) -> types.Comparisons:
    """Returns no pairs, in arrays like those of ``rows``."""
    return jax.tree.map(lambda x: x[:0], rows)


def of_domain(rows: types.Comparisons, domain: domains.Domain) -> types.Comparisons:
    """Returns the pairs of one domain."""
    own_B = np.asarray(rows.domain_B) == domains.DOMAINS.index(domain)
    return jax.tree.map(lambda x: x[own_B], rows)


def first(rows: types.Comparisons, counts: Mapping[domains.Domain, int]) -> types.Comparisons:
    """Returns the first pairs of each domain; raises ValueError if a domain has fewer."""
    parts = []
    for domain, count in counts.items():
        own = of_domain(rows, domain)
        if (n := len(own.ranks_BK)) < count:
            raise ValueError(f"the {domain} domain has {n} pairs, not {count}")
        parts.append(jax.tree.map(lambda x, count=count: x[:count], own))
    return merge(parts)
