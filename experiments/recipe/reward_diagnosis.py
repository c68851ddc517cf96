"""Evaluates reward models on held-out comparisons for results.json."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from recipe import policy_sampling, tasks
from recipe.jobs import Job
from rlhf_jax import diagnostics, types
from rlhf_jax.data import errors, tokenizers


def measure(job: Job, reward: types.Params, validation: types.Comparisons, train: types.Comparisons) -> dict[str, Any]:
    """Measures accuracy, calibration, length bias and the generalisation gap of a reward model.

    The accuracy is also computed for each stratum and for pairs whose two scores both reach a threshold. Confidence
    intervals are clustered by what the prompts ask.

    Args:
        job: The objects that all stages of the run share; its sampler computes the scores.
        reward: Parameters of the reward model.
        validation: Held-out comparisons.
        train: Training comparisons, for the generalisation gap. At most `policy_sampling.CHUNK` answers, those to the
            first prompts, are scored.

    Returns:
        The ``reward_model`` entry of results.json.

    Raises:
        DataError: No two answers to a held-out prompt differ in rank.
    """
    n = max(1, min(len(np.asarray(train.ranks_BK)), policy_sampling.CHUNK // np.shape(train.ranks_BK)[1]))
    seen = jax.tree.map(lambda x: np.asarray(x)[:n], train)
    parts = (Scored(rows, score_answers(job, reward, rows), job.task.asked(rows)) for rows in (validation, seen))
    return diagnose(
        *parts,
        prompt_width=job.task.prompt_width,
        head=reward["head"],
        strata=partial(strata_of, job.task, validation),
    )


class Scored(NamedTuple):
    """Comparisons and their scores."""

    rows: types.Comparisons
    scores_BK: np.ndarray
    """Scores of all answers; those of missing answers are meaningless."""
    asked_B: np.ndarray
    """Index of what each prompt asks, by which intervals are clustered."""


def diagnose(
    held_out: Scored,
    seen: Scored,
    *,
    prompt_width: int,
    head: Any,
    strata: Callable[[np.ndarray], dict[str, list[str]]],
) -> dict[str, Any]:
    """Measures what `measure` describes, given the scores.

    Args:
        held_out: Held-out comparisons.
        seen: Training comparisons.
        prompt_width: Number of columns before the answers.
        head: Head of the reward model.
        strata: Returns labels of pairs by kind of stratum, given the index of each pair's prompt.

    Returns:
        The ``reward_model`` entry of results.json.

    Raises:
        DataError: No two answers to a held-out prompt differ in rank.
    """
    validation, scores_BK, asked_B = held_out
    where_BK = np.asarray(validation.where_BK)
    b, i, j = better_pairs(validation)
    if not len(b):
        raise errors.DataError(
            "no two answers to a held-out prompt differ in rank, so the reward model cannot be measured; use more "
            "--comparisons.prompts or a larger --data.held-out"
        )
    better, worse = scores_BK[b, i], scores_BK[b, j]
    asked = asked_B[b].tolist()
    # Dividing by the gain, which scales scores for RL, makes score differences log odds, as in training.
    gain = float(head["gain"])
    chosen, rejected = better / gain, worse / gain
    accuracy = diagnostics.clustered_mean(diagnostics.win_outcomes(chosen, rejected), asked, rate=True)
    curve = diagnostics.calibration_curve(chosen, rejected, bins=10, prompts=asked)
    length_BK = np.asarray(validation.mask_BKL)[:, :, prompt_width:].sum(axis=2)
    labels = strata(b) | {
        "tokens of the longer answer": diagnostics.quantile_buckets(np.maximum(length_BK[b, i], length_BK[b, j]))
    }
    bias = diagnostics.length_bias(chosen, rejected, length_BK[b, i], length_BK[b, j], prompts=asked)
    # The correlation counts each answer once, although an answer appears in many pairs.
    correlation = diagnostics.length_correlation(
        scores_BK[where_BK],
        length_BK[where_BK],
        groups=np.nonzero(where_BK)[0].tolist(),
        clusters=asked_B[np.nonzero(where_BK)[0]].tolist(),
    )
    slope = None  # undefined if all scores are equal
    if (chosen != rejected).any():
        slope = list(diagnostics.calibration_slope(chosen, rejected, prompts=asked))
    seen_BK, (seen_b, seen_i, seen_j) = seen.scores_BK / gain, better_pairs(seen.rows)
    facts: dict[str, Any] = {
        "accuracy": list(accuracy),
        "held_out_pairs": len(chosen),
        "held_out_prompts": len(scores_BK),
        "held_out_asked": len(np.unique(asked_B)),
        "calibration": {
            "bins": [dict(zip(curve._fields, map(float, each))) for each in zip(*curve)],
            "error": float(diagnostics.expected_calibration_error(chosen, rejected)),
            "slope": slope,
            "overconfidence": list(diagnostics.overconfidence(chosen, rejected, prompts=asked)),
        },
        "gain": gain,
        "bias": float(head["bias"]),
        "strata": {
            name: strata_as_json(diagnostics.accuracy_by_stratum(chosen, rejected, each, prompts=asked))
            for name, each in labels.items()
        },
        "thresholds": arrays_as_json(diagnostics.accuracy_above_threshold(better, worse, prompts=asked)),
        "length_bias": bias._replace(correlation=correlation, explained=correlation.mean**2)._asdict(),
    }
    if len(seen_b):
        gap = diagnostics.generalisation_gap(
            seen_BK[seen_b, seen_i],
            seen_BK[seen_b, seen_j],
            chosen,
            rejected,
            train_prompts=seen.asked_B[seen_b].tolist(),
            validation_prompts=asked,
        )
        facts["gap"] = gap._asdict()
    return facts


def score_answers(job: Job, reward: types.Params, batch: types.Comparisons) -> np.ndarray:
    """Returns the scores ``[B, K]`` of all answers; those of missing answers are meaningless."""
    B, K, L = np.shape(batch.tokens_BKL)
    flat = np.asarray(batch.tokens_BKL).reshape(B * K, L), np.asarray(batch.mask_BKL).reshape(B * K, L)
    return job.sampler.score(reward, *flat).reshape(B, K)


def better_pairs(batch: types.Comparisons) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the indices of the prompt, better answer and worse answer of each pair that is not tied."""
    ranks_BK, where_BK = np.asarray(batch.ranks_BK), np.asarray(batch.where_BK)
    better_BKK = (ranks_BK[:, :, None] < ranks_BK[:, None, :]) & where_BK[:, :, None] & where_BK[:, None, :]
    b, i, j = np.nonzero(better_BKK)
    return b, i, j


def strata_of(task: tasks.Task, validation: types.Comparisons, prompt: np.ndarray) -> dict[str, list[str]]:
    """Returns the stratum of each pair, as a dict from the kind of stratum to one label per pair.

    ``prompt`` has the index of each pair's prompt in ``validation``. The stratum is the prompt's category or, if the
    task does not use the built-in world, the number of user turns in the prompt. The dict is empty if `count_turns`
    returns None.
    """
    if task.world is not None:
        categories = task.world.compare_prompts.categories[task.world.n_compare :]
        return {"category": [categories[b] for b in prompt]}
    turn_B = count_turns(task, validation)
    return {} if turn_B is None else {"turn": [str(turn_B[b]) if turn_B[b] < 4 else "4 and on" for b in prompt]}


def count_turns(task: tasks.Task, batch: types.Comparisons) -> np.ndarray | None:
    """Counts the user turns in each prompt; returns None if the chat format is not this library's."""
    opening = task.tokenizer.get_vocab().get(tokenizers.USER)
    if opening is None or task.fmt.template != tokenizers.CHAT_TEMPLATE:
        return None
    P = task.prompt_width
    tokens_BL, mask_BL = (np.asarray(x)[:, 0, :P] for x in (batch.tokens_BKL, batch.mask_BKL))
    return ((tokens_BL == opening) & mask_BL).sum(axis=1)


def strata_as_json(strata: list[diagnostics.Stratum]) -> list[dict[str, Any]]:
    """Converts strata to dictionaries, with the names of buckets as strings."""
    return [
        each._asdict() | {"name": str(each.name) if isinstance(each.name, diagnostics.Bucket) else each.name}
        for each in strata
    ]


def arrays_as_json(values: Any) -> dict[str, Any]:
    """Converts a named tuple of arrays to a dictionary of lists."""
    return {name: each.tolist() if isinstance(each, np.ndarray) else each for name, each in values._asdict().items()}


def goodhart(start: policy_sampling.Answers, end: policy_sampling.Answers, asked_B: np.ndarray) -> dict[str, Any]:
    """Returns the gains in score and gold utility from optimisation, and whether the optimisation gamed the score.

    ``start`` and ``end`` are answers to the same prompts, before and after RL or best-of-n, and ``asked_B`` is what
    each prompt asks. ``gamed`` is true if the score rose and the gold utility fell, both significantly (see
    `diagnostics.fall_from_peak`).
    """
    asked = asked_B.tolist()
    scores, gold = (np.stack(each) for each in zip(*((x.scores_B, np.asarray(x.gold.total)) for x in (start, end))))
    return {
        "reward_gained": list(diagnostics.clustered_mean(scores[1] - scores[0], asked)),
        "gold_gained": list(diagnostics.clustered_mean(gold[1] - gold[0], asked)),
        "gamed": diagnostics.fall_from_peak(scores, gold, clusters=asked).gamed,
    }
