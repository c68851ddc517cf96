"""Trains, diagnoses, normalises and saves one reward model, and renders its results."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from recipe import comparison_data, jobs, policy_sampling, reward_diagnosis, run_setup, stages
from rich.console import Console
from rich.table import Table

from preferences import cross_validation_results, reward_stages
from preferences.reward_settings import RewardSettings
from rlhf_jax import diagnostics, lm, types
from rlhf_jax.data import comparison_transforms, errors
from rlhf_jax.train import loop

WEIGHTS = {"pretrain": 60.0, "sft": 15.0, "comparisons": 11.0, "reward_model": 20.0}
"""Expected seconds of each stage, for the estimate of the remaining time."""
PMP_WEIGHTS = {"crowd": 0.007, "pmp": 0.1}
"""Expected seconds per prompt of each stage of preference-model pretraining."""
NORMALISED_ON = {
    "demonstrations": "demonstrations",
    "references": "reference outputs",
    "policy": "policy samples",
    "held-out": "held-out",
}


def run(settings: RewardSettings, out: Console) -> tuple[pathlib.Path, dict[str, Any]]:
    """Runs all stages and saves the model in ``reward_model/``; returns the run's folder and its results."""
    weights = list(WEIGHTS.items())
    if settings.pmp.prompts:
        weights[-1:-1] = [(stage, seconds * settings.pmp.prompts) for stage, seconds in PMP_WEIGHTS.items()]
    with run_setup.open_run(settings, out, weights=weights, first_stages=()) as (folder, job):
        base = stages.pretrain(job)
        sft = stages.supervised(job, "sft", base, epochs=settings.sft.epochs, mix=0.0)
        (train, *_), validation, facts = comparison_data.load_or_collect(job, [sft])
        counts = errors.DropCount(max_dropped=1.0)  # labelers may rank all answers as equal
        train, validation = (comparison_transforms.drop_uninformative(each, counts) for each in (train, validation))
        if settings.training.limit is not None:
            train = jax.tree.map(lambda x: x[: settings.training.limit], train)
        start = reward_stages.pretrain_preference_model(job, settings, sft) if settings.pmp.prompts else sft
        trained = lm.heads.absorb_gain(reward_stages.train(job, settings, start, train, validation=validation))
        diagnosis = _diagnose(job, trained, train, validation)
        reward, record = _normalise(job, settings, trained, sft, validation)
    task = job.task
    lm.save(
        folder.path / "reward_model",
        job.cfg,
        reward,
        tokenizer=task.tokenizer,
        stop_ids=task.fmt.stop_ids,
        normalisation=record,
    )
    dropped = task.dropped.dropped | task.dropped.truncated | counts.dropped | counts.truncated
    facts |= {"training_prompts": len(train.ranks_BK), "training_answers": int(np.sum(train.where_BK))}
    normalisation = {} if record is None else {"normalisation": dataclasses.asdict(record)}
    incidents = folder.incidents()
    return folder.path, {"dropped": dropped, "incidents": incidents, "reward_model": diagnosis | facts | normalisation}


def _score(job: jobs.Job, params: types.Params, batch: types.Comparisons) -> np.ndarray:
    """Returns the scores ``[B, K]`` of all answers. Raises DivergedError if a score is not finite."""
    scores_BK = reward_diagnosis.score_answers(job, params, batch)
    _check_finite(scores_BK[np.asarray(batch.where_BK)])
    return scores_BK


def _score_margins(job: jobs.Job, params: types.Params, batch: types.Comparisons) -> tuple[np.ndarray, np.ndarray]:
    """Returns the margin (better score minus worse) of each pair with different ranks, and the index of its prompt."""
    scores_BK = _score(job, params, batch)
    b, i, j = reward_diagnosis.better_pairs(batch)
    return (scores_BK[b, i] - scores_BK[b, j]).astype(np.float64), b


def _accuracy(margin_N: np.ndarray, asked_N: np.ndarray) -> list[float]:
    """Returns the share of pairs ranked as labelled, and its interval, clustered by what their prompts ask."""
    outcome_N = diagnostics.win_outcomes(margin_N, np.zeros_like(margin_N))
    return cross_validation_results.over_groups(outcome_N, asked_N, rate=True)


def _diagnose(
    job: jobs.Job, params: types.Params, train: types.Comparisons, validation: types.Comparisons
) -> dict[str, Any]:
    """Returns the calibration and the accuracy of a model whose scores have not been normalised.

    The accuracy is computed on training and validation pairs. Calibration and groups use only validation pairs.
    """
    margin_N, prompt_N = _score_margins(job, params, validation)
    n = min(len(np.asarray(train.ranks_BK)), 4 * policy_sampling.CHUNK)
    asked_N = job.task.asked(validation)[prompt_N]
    seen = jax.tree.map(lambda x: x[:n], train)
    seen_margin_N, seen_prompt_N = _score_margins(job, params, seen)
    train_accuracy = _accuracy(seen_margin_N, job.task.asked(seen)[seen_prompt_N])
    accuracy = _accuracy(margin_N, asked_N)
    gap = diagnostics.difference(diagnostics.Estimate(*train_accuracy), diagnostics.Estimate(*accuracy))
    return {
        "accuracy": accuracy,
        "train_accuracy": train_accuracy,
        "gap": list(gap),
        "held_out_pairs": len(margin_N),
        "held_out_prompts": len(np.asarray(validation.ranks_BK)),
        "held_out_asked": len(np.unique(job.task.asked(validation))),
        **cross_validation_results.calibration(margin_N, asked_N),
        "groups": cross_validation_results.accuracy_by_group(
            _groups(job, validation, prompt_N), {"reward_model": margin_N}, asked_N
        ),
    }


def _groups(job: jobs.Job, batch: types.Comparisons, prompt_N: np.ndarray) -> dict[str, np.ndarray]:
    """Returns masks of the pairs, grouped by the mean length of the answers to their prompt and, if known, by turn."""
    turn_B = reward_diagnosis.count_turns(job.task, batch)
    length_BK = np.asarray(batch.mask_BKL)[:, :, job.task.prompt_width :].sum(axis=2)
    length_B = (length_BK * np.asarray(batch.where_BK)).sum(axis=1) / np.asarray(batch.where_BK).sum(axis=1)
    length_N = length_B[prompt_N]
    median = np.median(length_N)
    groups = {"shorter answers": length_N <= median, "longer answers": length_N > median}
    return groups if turn_B is None else groups | cross_validation_results.turn_groups(turn_B[prompt_N])


def _normalise(
    job: jobs.Job, settings: RewardSettings, params: types.Params, policy: types.Params, validation: types.Comparisons
) -> tuple[types.Params, lm.heads.Normalisation | None]:
    """Sets the head's gain and bias by the selected rule; returns the model and a record of the normalisation.

    Ziegler et al. also normalise on policy samples before training. This is not needed here, because the scores of a
    new head have standard deviation 1.
    """
    rule = settings.training.normalise
    if rule == "none":
        return params, None
    params = lm.heads.reset(params)
    if rule == "policy":
        prompts = job.task.rl_prompts.take(256)
        key = jax.random.fold_in(job.key("reward_model"), 2)
        samples = job.sampler(policy, policy, params, prompts, key)
        params = lm.heads.standardise(params, jnp.asarray(_check_finite(samples.scores_B)))
    elif rule == "held-out":
        scores = _score(job, params, validation)[np.asarray(validation.where_BK)]
        params = lm.heads.centre(params, jnp.asarray(scores))
    else:
        rows, n = job.task.demonstrations, len(job.task.demonstrations.tokens_BL)
        # Stiennon's reference outputs are human answers. The second half of the demonstrations replaces them here.
        part = slice(0, min(1024, n)) if rule == "demonstrations" else slice(max(n // 2, n - 1024), n)
        scores = job.sampler.score(params, rows.tokens_BL[part], rows.mask_BL[part])
        params = lm.heads.centre(params, jnp.asarray(_check_finite(scores)))
    return params, lm.heads.normalisation(params, NORMALISED_ON[rule])


def _check_finite(scores: np.ndarray) -> np.ndarray:
    if not np.isfinite(scores).all():
        raise loop.DivergedError(f"{(~np.isfinite(scores)).sum()} of {len(scores)} scores are not finite")
    return scores


def titled_tables(results: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """Returns the tables of the terminal output and the report, with their headings."""
    facts = results["reward_model"]
    rows = [
        {"group": "held-out", "pairs": facts["held_out_pairs"], "reward_model": facts["accuracy"]},
        {"group": "training", "pairs": "", "reward_model": facts["train_accuracy"]},
        *facts["groups"],
    ]
    slope = facts["calibration"]["slope"]
    numbers = Table("", "", show_header=False, box=None)
    for name, text in (
        ("log loss", f"{facts['log_loss'][0]:.4f}"),
        ("calibration error", f"{facts['calibration']['error']:.3f}"),
        ("calibration slope", "–" if not slope or slope[0] is None else f"{slope[0]:.2f}"),
        ("training prompts", str(facts["training_prompts"])),
        ("scores average 0 on", (facts.get("normalisation") or {}).get("rule", "nothing")),
    ):
        numbers.add_row(name, text)
    accuracy = cross_validation_results.groups_table(rows, {"reward_model": "accuracy, %"})
    return [("Accuracy", accuracy), ("Calibration and training", numbers)]
