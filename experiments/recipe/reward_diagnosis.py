"""What a reward model is worth on held-out comparisons, in the form that results.json and the report have."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recipe import policy_sampling, tasks
from recipe.jobs import Job
from rlhf_jax import diagnostics, types
from rlhf_jax.data import tokenizers
from rlhf_jax.train import reward_model


def measure(job: Job, reward: types.Params, validation: types.Comparisons, train: types.Comparisons) -> dict[str, Any]:
    """Accuracy, calibration, strata, length and high scores on held-out comparisons, and the gap to training pairs.

    Every interval knows that a prompt's pairs belong together. Of the training pairs one call's worth is scored.
    """
    scores_BK = _scores(job, reward, validation)
    ranks_BK, where_BK = np.asarray(validation.ranks_BK), np.asarray(validation.where_BK)
    pairs = jax.vmap(reward_model.count_pairs)(jnp.asarray(scores_BK), jnp.asarray(ranks_BK), jnp.asarray(where_BK))
    accuracy = diagnostics.ratio_interval(np.asarray(pairs.right), np.asarray(pairs.total))
    b, i, j = _pairs(validation)
    better, worse = scores_BK[b, i], scores_BK[b, j]
    # The scale that RL wants (standard deviation 1) is undone: as trained, a gap in scores is a claim in log odds.
    gain = float(reward["head"]["gain"])
    chosen, rejected = better / gain, worse / gain
    curve = diagnostics.calibration_curve(chosen, rejected, bins=10)
    length_BK = np.asarray(validation.mask_BKL)[:, :, job.task.prompt_width :].sum(axis=2)
    labels = strata_of(job.task, validation, b) | {
        "tokens of the longer answer": diagnostics.quantile_buckets(np.maximum(length_BK[b, i], length_BK[b, j]))
    }
    bias = diagnostics.length_bias(chosen, rejected, length_BK[b, i], length_BK[b, j], prompts=b.tolist())
    # A prompt's answers come back in many pairs: the correlation is that of the answers.
    of = diagnostics.length_correlation(scores_BK[where_BK], length_BK[where_BK], groups=np.nonzero(where_BK)[0])
    n = max(1, min(len(np.asarray(train.ranks_BK)), policy_sampling.CHUNK // np.shape(train.ranks_BK)[1]))
    seen = jax.tree.map(lambda x: np.asarray(x)[:n], train)
    seen_BK, (seen_b, seen_i, seen_j) = _scores(job, reward, seen) / gain, _pairs(seen)
    facts: dict[str, Any] = {
        "accuracy": list(accuracy),
        "held_out_pairs": len(chosen),
        "held_out_prompts": len(scores_BK),
        "calibration": {
            "bins": [dict(zip(curve._fields, map(float, each))) for each in zip(*curve)],
            "error": float(diagnostics.expected_calibration_error(chosen, rejected)),
            "slope": float(diagnostics.calibration_slope(chosen, rejected)[0]),
        },
        "gain": gain,
        "bias": float(reward["head"]["bias"]),
        "strata": {
            name: strata_as_json(diagnostics.accuracy_by_stratum(chosen, rejected, each, prompts=b.tolist()))
            for name, each in labels.items()
        },
        "thresholds": arrays_as_json(diagnostics.accuracy_above_threshold(better, worse, prompts=b.tolist())),
        "length_bias": bias._replace(correlation=of, explained=of.mean**2)._asdict(),
    }
    if len(seen_b):
        gap = diagnostics.generalisation_gap(
            seen_BK[seen_b, seen_i],
            seen_BK[seen_b, seen_j],
            chosen,
            rejected,
            train_prompts=seen_b.tolist(),
            validation_prompts=b.tolist(),
        )
        facts["gap"] = gap._asdict()
    return facts


def _scores(job: Job, reward: types.Params, batch: types.Comparisons) -> np.ndarray:
    B, K, L = np.shape(batch.tokens_BKL)
    flat = np.asarray(batch.tokens_BKL).reshape(B * K, L), np.asarray(batch.mask_BKL).reshape(B * K, L)
    return job.sampler.score(reward, *flat).reshape(B, K)


def _pairs(batch: types.Comparisons) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompt, better and worse answer of every pair that was told apart."""
    ranks_BK, where_BK = np.asarray(batch.ranks_BK), np.asarray(batch.where_BK)
    better_BKK = (ranks_BK[:, :, None] < ranks_BK[:, None, :]) & where_BK[:, :, None] & where_BK[:, None, :]
    b, i, j = np.nonzero(better_BKK)
    return b, i, j


def strata_of(task: tasks.Task, validation: types.Comparisons, prompt: np.ndarray) -> dict[str, list[str]]:
    """Labels of the pairs whose prompts are ``prompt``: their category in the built-in world, their turn in a file."""
    if task.world is not None:
        categories = task.world.compare_prompts.categories[task.world.n_compare :]
        return {"category": [categories[b] for b in prompt]}
    turn_B = count_turns(task, validation)
    return {} if turn_B is None else {"turn": [str(turn_B[b]) if turn_B[b] < 4 else "4 and on" for b in prompt]}


def count_turns(task: tasks.Task, batch: types.Comparisons) -> np.ndarray | None:
    """Which turn each prompt asks for, as far as its user turns are within the width; None in others' chat formats."""
    opening = task.tokenizer.get_vocab().get(tokenizers.USER)
    if opening is None or task.fmt.template != tokenizers.CHAT_TEMPLATE:
        return None
    P = task.prompt_width
    tokens_BL, mask_BL = (np.asarray(x)[:, 0, :P] for x in (batch.tokens_BKL, batch.mask_BKL))
    return ((tokens_BL == opening) & mask_BL).sum(axis=1)


def strata_as_json(found: list[diagnostics.Stratum]) -> list[dict[str, Any]]:
    """Strata as JSON holds them; a bucket by its name."""
    return [
        each._asdict() | {"name": str(each.name) if isinstance(each.name, diagnostics.Bucket) else each.name}
        for each in found
    ]


def arrays_as_json(found: Any) -> dict[str, Any]:
    """A named tuple of arrays as JSON holds it."""
    return {name: each.tolist() if isinstance(each, np.ndarray) else each for name, each in found._asdict().items()}


def goodhart(start: policy_sampling.Answers, end: policy_sampling.Answers) -> dict[str, Any]:
    """What a policy gained over its start on the same prompts: in the score, in gold, and whether it gamed the score.

    ``gamed`` says that the one rose and the other fell, both beyond chance (`diagnostics.fall_from_peak`).
    """
    scores, judged = (np.stack(each) for each in zip(*((x.scores_B, np.asarray(x.gold.total)) for x in (start, end))))
    return {
        "reward_gained": list(diagnostics.mean_interval(scores[1] - scores[0])),
        "gold_gained": list(diagnostics.mean_interval(judged[1] - judged[0])),
        "gamed": diagnostics.fall_from_peak(scores, judged).gamed,
    }
