"""The comparisons that reward models learn from: ranked by simulated labelers, or as people made them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recipe import jobs
from rlhf_jax import types
from rlhf_jax.simulation import labelers


def gather(
    job: jobs.Job, policies: list[types.Params]
) -> tuple[list[types.Comparisons], types.Comparisons, dict[str, Any]]:
    """Training and held-out comparisons with facts about them: from the file, or new ones from simulated labelers.

    Those for training are in one part for each reward model; the facts are of the first.
    """
    if job.task.comparisons is None:
        train, validation, facts = collect_comparisons(job, policies)
    else:
        (train, validation), facts = job.task.comparisons, {}
        job.progress.skip("comparisons")
    n, parts = len(train.ranks_BK), [train]
    if job.settings.reward_model.heldout:
        order = np.random.default_rng([job.settings.seed, 501]).permutation(n)
        parts = [jax.tree.map(lambda x, h=h: x[h], train) for h in (order[: n // 2], order[n // 2 : n // 2 * 2])]
    used = {"training_prompts": len(parts[0].ranks_BK), "training_answers": int(np.sum(parts[0].where_BK))}
    return parts, validation, facts | used


def collect_comparisons(
    job: jobs.Job, policies: list[types.Params], *, stage: str = "comparisons"
) -> tuple[types.Comparisons, types.Comparisons, dict[str, Any]]:
    """Sample K answers a prompt from the policies in turn, ranked by labelers: (training, validation, facts).

    Progress is told of as ``stage``.
    """
    world = job.task.world
    assert world is not None
    settings, prompt_set = job.settings.comparisons, world.compare_prompts
    n, K = len(prompt_set), settings.max_k
    key = job.key("comparisons")
    k_B = np.random.default_rng([job.settings.seed, 500]).integers(settings.min_k, K + 1, size=n)
    job.progress.start(stage, n * K)
    where_BK = np.arange(K)[None, :] < k_B[:, None]
    prompt_R, place_R = np.nonzero(where_BK)
    drawn: list[Any] = []
    done = 0
    for j, policy in enumerate(policies):
        mine = np.flatnonzero(place_R % len(policies) == j)
        asked = prompt_set.at(prompt_R[mine])
        answers = job.sampler(policy, None, None, asked, jax.random.fold_in(key, j))
        drawn.append((mine, answers))
        done += len(mine)
        job.progress.update(stage, done, n * K)
    L = job.task.row_width
    tokens_BKL = np.full((n, K, L), job.task.fmt.pad_id, np.int32)
    mask_BKL = np.zeros((n, K, L), bool)
    features_BKF = np.zeros((n, K, len(labelers.FEATURES)), np.float32)
    for mine, answers in drawn:
        at = (prompt_R[mine], place_R[mine])
        tokens_BKL[at], mask_BKL[at] = answers.tokens_BL, answers.mask_BL
        features_BKF[at] = labelers.features(answers.gold)
    # Two labelers are to agree as often as people do, on pairs of these samples: that sets the noise.
    utility_BKR = np.asarray(labelers.utilities(world.pool, jnp.asarray(features_BKF)))
    noise = labelers.calibrated_temperature(utility_BKR[:, 0], utility_BKR[:, 1], target=job.settings.world.agreement)
    pool = world.pool.replace(temperature=jnp.float32(noise))  # type: ignore[attr-defined]
    keys_B = jax.random.split(jax.random.fold_in(key, 1000), n)
    labeler_B = jnp.arange(n) % job.settings.world.labelers
    ranks_BK = np.asarray(
        jax.jit(jax.vmap(labelers.rank, in_axes=(0, None, 0, 0, 0)))(keys_B, pool, labeler_B, features_BKF, where_BK)
    )
    ranks_BK = np.where(where_BK, ranks_BK, 0)
    everything = types.Comparisons(tokens_BKL, mask_BKL, ranks_BK, where_BK)  # type: ignore[arg-type]
    train, validation = (jax.tree.map(lambda x, s=s: x[s], everything) for s in _halves(world.n_compare, n))
    job.progress.finish(stage)
    facts = {"labeler_temperature": noise, "label_agreement": job.settings.world.agreement}
    return train, validation, facts


def _halves(cut: int, n: int) -> tuple[slice, slice]:
    return slice(0, cut), slice(cut, n)
