"""One reward model: trained, normalised, diagnosed, shown and saved."""

from __future__ import annotations

import dataclasses
import html
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from recipe import collection, jobs, policy_sampling, reward_diagnosis, session, stages
from rich.console import Console
from rich.table import Table
from sweeps import frontier_plot

from preferences import cross_validation_results, reward_stages
from preferences.reward_settings import RewardRun
from rlhf_jax import diagnostics, lm, types
from rlhf_jax.data import comparison_transforms, errors
from rlhf_jax.report import plots
from rlhf_jax.train import loop

WEIGHTS = {"pretrain": 60.0, "sft": 15.0, "comparisons": 11.0, "reward_model": 20.0}
"""Seconds that the stages are expected to take, for the estimate of the time left."""
PMP_WEIGHTS = {"crowd": 0.007, "pmp": 0.1}
"""The same of preference-model pretraining, for each of its prompts."""
NORMALISED_ON = {
    "demonstrations": "demonstrations",
    "references": "reference outputs",
    "policy": "policy samples",
    "held-out": "held-out",
}


def run(asked: RewardRun, out: Console) -> tuple[pathlib.Path, dict[str, Any]]:
    """All stages; returns where, and the numbers, and leaves the model in ``reward_model/`` there."""
    weights = list(WEIGHTS.items())
    if asked.pmp.prompts:
        weights[-1:-1] = [(stage, seconds * asked.pmp.prompts) for stage, seconds in PMP_WEIGHTS.items()]
    with session.opened(asked, out, kind="reward_model", weights=weights, shared=()) as (folder, job):
        base = stages.pretrain(job)
        sft = stages.supervised(job, "sft", base, epochs=asked.sft.epochs, mix=0.0)
        (train, *_), validation, facts = collection.gather(job, [sft])
        said = errors.DropCount(max_dropped=1.0)  # labelers may find answers equal
        train, validation = (comparison_transforms.drop_uninformative(each, said) for each in (train, validation))
        if asked.training.limit is not None:
            train = jax.tree.map(lambda x: x[: asked.training.limit], train)
        begun = reward_stages.pretrained(job, asked, sft) if asked.pmp.prompts else sft
        trained = lm.absorb_gain(reward_stages.train(job, asked, begun, train, validation=validation))
        judged = diagnose(job, trained, train, validation)
        reward, record = normalised(job, asked, trained, sft, validation)
    task = job.task
    lm.save(
        folder.path / "reward_model",
        job.cfg,
        reward,
        tokenizer=task.tokenizer,
        pad_id=task.fmt.pad_id,
        normalisation=record,
    )
    dropped = task.dropped.dropped | task.dropped.truncated | said.dropped | said.truncated
    facts |= {"training_prompts": len(train.ranks_BK), "training_answers": int(np.sum(train.where_BK))}
    kept = {} if record is None else {"normalisation": dataclasses.asdict(record)}
    incidents = folder.incidents()
    return folder.path, {"dropped": dropped, "incidents": incidents, "reward_model": judged | facts | kept}


def leads(job: jobs.Job, params: types.Params, batch: types.Comparisons) -> tuple[np.ndarray, np.ndarray]:
    """``(lead, prompt)``: by how much the better answer of each pair scores higher, and whose pair it is.

    Raises DivergedError where a score is not finite.
    """
    B, K, L = np.shape(batch.tokens_BKL)
    flat = np.asarray(batch.tokens_BKL).reshape(B * K, L), np.asarray(batch.mask_BKL).reshape(B * K, L)
    scores_BK = job.sampler.score(params, *flat).reshape(B, K)
    ranks_BK, where_BK = np.asarray(batch.ranks_BK), np.asarray(batch.where_BK)
    if not np.isfinite(scores_BK[where_BK]).all():
        n = int((~np.isfinite(scores_BK[where_BK])).sum())
        raise loop.DivergedError(f"{n} of {where_BK.sum()} answers have a score that is not finite")
    both_BKK = where_BK[:, :, None] & where_BK[:, None, :]
    b, i, j = np.nonzero(both_BKK & (ranks_BK[:, :, None] < ranks_BK[:, None, :]))
    return (scores_BK[b, i] - scores_BK[b, j]).astype(np.float64), b


def _accuracy(lead: np.ndarray, prompt: np.ndarray) -> list[float]:
    """Share of pairs in order, and its interval: Wilson's, or where prompts have several pairs one that knows which."""
    if len(np.unique(prompt)) == len(prompt):
        return list(diagnostics.win_rate(lead, np.zeros_like(lead)))
    right = diagnostics.win_outcomes(lead, np.zeros_like(lead))
    n = int(prompt.max()) + 1
    return list(diagnostics.ratio_interval(np.bincount(prompt, right, n), np.bincount(prompt, minlength=n)))


def diagnose(
    job: jobs.Job, params: types.Params, train: types.Comparisons, validation: types.Comparisons
) -> dict[str, Any]:
    """Accuracy, its gap to the training pairs, calibration, and accuracy by turn and by length, before normalising."""
    lead, prompt = leads(job, params, validation)
    n = min(len(np.asarray(train.ranks_BK)), 4 * policy_sampling.CHUNK)
    seen, seen_prompt = leads(job, params, jax.tree.map(lambda x: x[:n], train))
    curve = diagnostics.calibration_curve(lead, np.zeros_like(lead), bins=10)
    accuracy, seen_accuracy = _accuracy(lead, prompt), _accuracy(seen, seen_prompt)
    groups = _groups(job, validation, prompt)
    return {
        "accuracy": accuracy,
        "train_accuracy": seen_accuracy,
        "gap": seen_accuracy[0] - accuracy[0],
        "held_out_pairs": len(lead),
        "held_out_prompts": len(np.asarray(validation.ranks_BK)),
        "log_loss": float(np.logaddexp(0.0, -lead).mean()),
        "calibration": {
            "bins": [dict(zip(curve._fields, map(float, each))) for each in zip(*curve)],
            "error": diagnostics.expected_calibration_error(lead, np.zeros_like(lead)),
            "slope": list(diagnostics.calibration_slope(lead, np.zeros_like(lead))) if lead.any() else None,
        },
        "groups": [
            {"group": name, "pairs": int(mine.sum()), "reward_model": _accuracy(lead[mine], prompt[mine])}
            for name, mine in groups.items()
            if mine.sum() > 1
        ],
    }


def _groups(job: jobs.Job, batch: types.Comparisons, prompt: np.ndarray) -> dict[str, np.ndarray]:
    """Pairs by the turn of their prompt, as far as its user turns are within the width, and by the answers' length."""
    turn_B = reward_diagnosis.turns(job.task, batch)
    length_BK = np.asarray(batch.mask_BKL)[:, :, job.task.prompt_width :].sum(axis=2)
    length_B = (length_BK * np.asarray(batch.where_BK)).sum(axis=1) / np.asarray(batch.where_BK).sum(axis=1)
    length = length_B[prompt]
    middle = np.median(length)
    groups = {"shorter answers": length <= middle, "longer answers": length > middle}
    if turn_B is not None:
        turn = turn_B[prompt]
        groups |= {f"turn {n}": turn == n for n in (1, 2, 3)} | {"turn 4 and on": turn >= 4}
    return groups


def normalised(
    job: jobs.Job, asked: RewardRun, params: types.Params, policy: types.Params, validation: types.Comparisons
) -> tuple[types.Params, lm.Normalisation | None]:
    """Set gain and bias by one of the published rules, from gain 1 and bias 0; the record says which.

    Ziegler et al. normalise on policy samples before training too; here a fresh head of standard deviation 1 stands for
    that.
    """
    rule = asked.training.normalise
    if rule == "none":
        return params, None
    params = lm.reset(params)
    if rule == "policy":
        prompts = job.task.rl_prompts.take(256)
        key = jax.random.fold_in(job.key("reward_model"), 2)
        samples = job.sampler(policy, policy, params, prompts, key)
        params = lm.standardise(params, jnp.asarray(_finite(samples.scores_B)))
    elif rule == "held-out":
        B, K, L = np.shape(validation.tokens_BKL)
        flat = np.asarray(validation.tokens_BKL).reshape(B * K, L), np.asarray(validation.mask_BKL).reshape(B * K, L)
        scores = job.sampler.score(params, *flat)[np.asarray(validation.where_BK).reshape(-1)]
        params = lm.centre(params, jnp.asarray(_finite(scores)))
    else:
        rows, n = job.task.demonstrations, len(job.task.demonstrations.tokens_BL)
        # Reference outputs are what people wrote for prompts that the policy is measured on: those of the second half.
        mine = slice(0, min(1024, n)) if rule == "demonstrations" else slice(max(n // 2, n - 1024), n)
        scores = job.sampler.score(params, rows.tokens_BL[mine], rows.mask_BL[mine])
        params = lm.centre(params, jnp.asarray(_finite(scores)))
    return params, lm.normalisation(params, NORMALISED_ON[rule])


def _finite(scores: np.ndarray) -> np.ndarray:
    if not np.isfinite(scores).all():
        raise loop.DivergedError(f"{(~np.isfinite(scores)).sum()} of {len(scores)} scores are not finite")
    return scores


# ------------------------------------------------------------------------------------------------------ what is shown


def tables(results: Mapping[str, Any]) -> list[Table]:
    """What the terminal shows."""
    found = results["reward_model"]
    rows = [
        {"group": "held-out", "pairs": found["held_out_pairs"], "reward_model": found["accuracy"]},
        {"group": "training", "pairs": "", "reward_model": found["train_accuracy"]},
        *found["groups"],
    ]
    calibration = found["calibration"]
    numbers = Table(show_header=False, box=None)
    slope = calibration["slope"]
    for name, text in (
        ("log loss", f"{found['log_loss']:.4f}"),
        ("calibration error", f"{calibration['error']:.3f}"),
        ("calibration slope", "–" if not slope or slope[0] is None else f"{slope[0]:.2f}"),
        ("training prompts", str(found["training_prompts"])),
        ("scores 0 on average", (found.get("normalisation") or {}).get("rule", "nothing")),
    ):
        numbers.add_row(name, text)
    return [cross_validation_results.groups_table(rows, {"reward_model": "accuracy, %"}), numbers]


def write_page(path: pathlib.Path, results: Mapping[str, Any]) -> None:
    """One self-contained page: calibration as a figure, and the tables."""
    drawn = [svg for svg in [plots.calibration(results)] if svg]
    shown, numbers = tables(results)
    lines = "".join(
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(text))}</td></tr>"
        for name, text in zip(*(list(column.cells) for column in numbers.columns))
    )
    body = f"<h2>Accuracy</h2>{cross_validation_results.as_html(shown)}<table>{lines}</table>"
    frontier_plot.write_page(path, "A reward model", drawn, "Intervals are 95 %.", tables=body)
