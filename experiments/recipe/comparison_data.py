"""Reads or collects the comparisons on which reward models are trained."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recipe import jobs
from rlhf_jax import checkpoint, diagnostics, types
from rlhf_jax.data import batching
from rlhf_jax.simulation import labelers


def load_or_collect(
    job: jobs.Job, policies: list[types.Params], *, stage: str = "comparisons"
) -> tuple[list[types.Comparisons], types.Comparisons, dict[str, Any]]:
    """Returns the comparisons of --data.path or, without a file, comparisons of samples from ``policies``.

    Args:
        job: The job of the run.
        policies: The policies to sample from.
        stage: Name under which `collect` saves the comparisons.

    Returns:
        ``(parts, held_out, facts)``: the training comparisons of each reward model, the held-out comparisons, and facts
        about the first part for results.json.
    """
    if job.task.comparisons is None:
        train, validation, facts = collect(job, policies, stage=stage)
    else:
        (train, validation), facts = job.task.comparisons, {}
        job.progress.skip("comparisons")
    n, parts = len(train.ranks_BK), [train]
    if job.settings.reward_model.heldout:
        halves = batching.split(
            n, fraction=0.5, key=jax.random.fold_in(job.key("comparisons"), 501), group_N=job.task.asked(train)
        )
        parts = [jax.tree.map(lambda x, h=h: x[h], train) for h in halves]
    sizes = {"training_prompts": len(parts[0].ranks_BK), "training_answers": int(np.sum(parts[0].where_BK))}
    return parts, validation, facts | sizes


def collect(
    job: jobs.Job, policies: list[types.Params], *, stage: str = "comparisons"
) -> tuple[types.Comparisons, types.Comparisons, dict[str, Any]]:
    """Samples several answers to each prompt, from each policy in turn, and ranks them with simulated labelers.

    The comparisons are saved as the checkpoint ``stage``, which a resumed run reads. The part of its name before a
    hyphen is the label of the progress bar. Returns training comparisons, validation comparisons and facts about the
    labels.
    """
    world = job.task.world
    assert world is not None
    with job.checkpoints(stage) as checkpoints:
        saved = checkpoints.latest() or 0
        try:
            found = checkpoints.restore(None)[1:] if saved else None
        except checkpoint.CheckpointError as error:
            job.note(stage, f"the comparisons are collected again, because {error}")
            found = None
        if found is None:
            comparisons, facts = sample_and_rank(job, policies, stage.partition("-")[0])
            fields = {each.name: getattr(comparisons, each.name) for each in dataclasses.fields(comparisons)}
            checkpoints.save(saved + 1, fields, facts)
        else:
            comparisons, facts = types.Comparisons(**jax.tree.map(np.asarray, found[0])), found[1]
            job.progress.skip(stage.partition("-")[0])
    train, validation = (
        jax.tree.map(lambda x, rows=rows: x[rows], comparisons)
        for rows in (slice(world.n_compare), slice(world.n_compare, None))
    )
    return train, validation, facts


def sample_and_rank(
    job: jobs.Job, policies: list[types.Params], stage: str
) -> tuple[types.Comparisons, dict[str, Any]]:
    """Returns comparisons of new samples, for training and for validation, and facts about the labels.

    Args:
        job: The job of the run.
        policies: The policies to sample from.
        stage: Name of the stage for the progress bar.
    """
    world = job.task.world
    assert world is not None
    settings, prompts = job.settings.comparisons, world.compare_prompts
    n, K = len(prompts), settings.max_k
    key = job.key("comparisons")
    k_B = np.random.default_rng([job.settings.seed, 500]).integers(settings.min_k, K + 1, size=n)
    job.progress.start(stage, n * K)
    where_BK = np.arange(K)[None, :] < k_B[:, None]
    prompt_R, slot_R = np.nonzero(where_BK)
    L = job.task.row_width
    tokens_BKL = np.full((n, K, L), job.task.fmt.pad_id, np.int32)
    mask_BKL = np.zeros((n, K, L), bool)
    features_BKF = np.zeros((n, K, len(labelers.FEATURES)), np.float32)
    done = 0
    for j, policy in enumerate(policies):
        rows = np.flatnonzero(slot_R % len(policies) == j)
        answers = job.sampler(policy, None, None, prompts.at(prompt_R[rows]), jax.random.fold_in(key, j))
        at = (prompt_R[rows], slot_R[rows])
        tokens_BKL[at], mask_BKL[at] = answers.tokens_BL, answers.mask_BL
        features_BKF[at] = labelers.features(answers.gold)
        done += len(rows)
        job.progress.update(stage, done, n * K)
    first_BK = _first_equal(np.where(mask_BKL, tokens_BKL, -1), where_BK)
    distinct_BK = where_BK & (first_BK == np.arange(K))
    # The noise is calibrated so that two labelers agree on a pair of these samples with probability --world.agreement.
    utility_BKR = np.asarray(labelers.utilities(world.pool, jnp.asarray(features_BKF)))
    noise = labelers.calibrated_temperature(utility_BKR[:, 0], utility_BKR[:, 1], target=job.settings.world.agreement)
    pool = world.pool.replace(temperature=jnp.float32(noise))  # type: ignore[attr-defined]
    rank_all = jax.jit(jax.vmap(labelers.rank, in_axes=(0, None, 0, 0, 0)))

    def ranks(number: int) -> np.ndarray:
        """Returns the ranks that different labelers give for each ``number``."""
        keys_B = jax.random.split(jax.random.fold_in(key, 1000 + number), n)
        labeler_B = (jnp.arange(n) + number) % job.settings.world.labelers
        distinct_ranks_BK = np.asarray(rank_all(keys_B, pool, labeler_B, features_BKF, distinct_BK))
        return np.where(where_BK, np.take_along_axis(distinct_ranks_BK, first_BK, axis=1), 0)

    ranks_BK = ranks(0)
    comparisons = types.Comparisons(tokens_BKL, mask_BKL, ranks_BK, where_BK)  # type: ignore[arg-type]
    job.progress.finish(stage)
    equal_BKK = (first_BK[:, :, None] == first_BK[:, None]) & where_BK[:, :, None] & where_BK[:, None]
    facts = {
        "pairs": int(np.sum(k_B * (k_B - 1) // 2)),
        "pairs_of_equal_answers_dropped": int((equal_BKK & np.tri(K, k=-1, dtype=bool)).sum()),
        "labeler_temperature": noise,
        "label_agreement": _agreement(ranks_BK, ranks(1), where_BK, prompts.asked_B),
        "label_agreement_target": job.settings.world.agreement,
    }
    return comparisons, facts


def _agreement(first_BK: np.ndarray, second_BK: np.ndarray, where_BK: np.ndarray, asked_B: np.ndarray) -> list[float]:
    """Returns the share of pairs that two labelers order equally, among those that neither ties, with its interval.

    The interval is clustered by ``asked_B``, what the prompts ask.
    """
    orders = [np.sign(ranks_BK[:, :, None] - ranks_BK[:, None]) for ranks_BK in (first_BK, second_BK)]
    pairs_BKK = where_BK[:, :, None] & where_BK[:, None] & np.tri(where_BK.shape[1], k=-1, dtype=bool)
    pairs_BKK &= (orders[0] != 0) & (orders[1] != 0)
    asked = asked_B[np.nonzero(pairs_BKK)[0]].tolist()
    return list(diagnostics.clustered_mean((orders[0] == orders[1])[pairs_BKK], asked, rate=True))


def _first_equal(tokens_BKL: np.ndarray, where_BK: np.ndarray) -> np.ndarray:
    """Returns the index of the first equal answer to the same prompt, ``[B, K]``; an answer is equal to itself.

    A labeler cannot prefer one of two equal texts. Equal answers therefore share the rank of the first of them, and no
    pair of them is trained on.
    """
    equal_BKK = (tokens_BKL[:, :, None] == tokens_BKL[:, None]).all(axis=-1) & where_BK[:, None, :]
    return np.where(where_BK, equal_BKK.argmax(axis=2), np.arange(tokens_BKL.shape[1]))
