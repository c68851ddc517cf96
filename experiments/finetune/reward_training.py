"""Trains a reward model on a user's own comparisons, from a given model; see reward_model.py."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from launch import initial_model
from launch.run_settings import SettingError
from preferences import pairs as pairs_lib
from preferences import reward_stages
from recipe import engine, monitoring, policy_sampling, reward_diagnosis, validation_loss

from finetune import comparisons, outcome, stage_run, training
from finetune.preference_settings import OwnRewardSettings
from rlhf_jax import diagnostics, lm, parallel, types
from rlhf_jax.data import comparison_transforms, errors, packing
from rlhf_jax.report import results as results_lib
from rlhf_jax.train import loop, reward_model
from rlhf_jax.train.optim import partition

STAGE = "reward_model"
_SCORED_TOKENS = 8192
"""Number of tokens that are scored at once."""
NORMALISED_PROMPTS = 1024
"""Maximum number of training prompts on whose chosen answers scores are normalised."""
NORMALISED_ON = {"chosen": "chosen training answers", "held-out": "held-out"}


def run(settings: OwnRewardSettings) -> dict[str, Any]:
    """Trains the reward model and returns the contents of results.json."""
    return stage_run.run(
        settings,
        counts=errors.DropCount(max_dropped=settings.data.max_dropped, flag="--data.max-dropped"),
        prepare=partial(_prepare, settings),
        train=partial(_train, settings),
        title="A reward model",
        rows=table,
    )


def _prepare(settings: OwnRewardSettings, mesh: Any, counts: errors.DropCount) -> stage_run.Prepared:
    """Loads the model and the comparisons."""
    model, data = comparisons.load(settings, mesh, counts)
    train = data.train.take(settings.training.limit)
    rows = train.rows
    if rows.loss_inputs is not None:
        _check_soft_labels(settings)
    if settings.training.loss == "pairs":
        rows = comparison_transforms.split_into_pairs(rows)
    trained = training.rows_trained(settings, len(rows.ranks_BK), mesh)
    # In forward passes of an answer.
    held_out, most = float(np.sum(data.held_out.rows.where_BK)), policy_sampling.CHUNK
    normalised = {"chosen": min(len(train), NORMALISED_PROMPTS), "held-out": held_out, "none": 0}
    stages = [
        (STAGE, 3.0 * trained * np.mean(np.sum(rows.where_BK, axis=1)) + validation_loss.TIMES * min(held_out, most)),
        ("evaluate", held_out + most + normalised[settings.training.normalise]),
    ]
    return stage_run.Prepared(model, (data, train, rows), data.sizes, stages, notes=data.notes)


def _check_soft_labels(settings: OwnRewardSettings) -> None:
    """Raises SettingError for settings with which the soft labels of a file cannot be used."""
    soft = "--data.path has soft labels in its field 'preference'"
    if settings.training.loss in ("plackett-luce", "best"):
        raise SettingError(f"--training.loss {settings.training.loss}: {soft}, which only ranking and pairs can use")
    if settings.training.label_smoothing:
        raise SettingError(f"--training.label-smoothing has no effect: {soft}; leave it out")


def _train(
    settings: OwnRewardSettings, job: engine.Engine, folder: pathlib.Path, prepared: stage_run.Prepared
) -> stage_run.Trained:
    """Trains the reward model, measures it on held-out comparisons and normalises its scores."""
    del folder
    model, (data, train, rows) = prepared.model, prepared.inputs
    start = _trainable(settings, job, model)
    planned = training.schedule(job, STAGE, len(rows.ranks_BK), settings)
    mask_BKL = np.asarray(rows.mask_BKL) & np.asarray(rows.where_BK)[:, :, None]
    batch_at, saving = comparisons.packed_batches(
        settings,
        job.mesh,
        rows,
        planned,
        pack=packing.pack_comparisons,
        masks=[mask_BKL],
        pad_id=model.fmt.pad_id,
    )
    score = make_scorer(job, width=data.longest)
    trained = training.fit(
        job,
        STAGE,
        partial(
            reward_model.make_train_step,
            partial(lm.score, cfg=job.cfg),
            packed_scores=partial(lm.packed_scores, cfg=job.cfg),
            loss=reward_stages.make_loss(settings.training),
        ),
        start,
        rows,
        settings,
        planned=planned,
        batch_at=batch_at,
        **_validation(settings, job, score, start, data.held_out.rows, planned.steps),
    )
    params = whole = start.merge(start.frozen, trained.params)
    if (heads := settings.training.heads) > 1:
        params = lm.heads.combine(params, jnp.full(heads, 1 / heads))
    params = lm.heads.absorb_gain(params)
    job.progress.start("evaluate", 2)
    facts = _diagnose(score, params, train, data)
    params = lm.heads.absorb_gain(whole) if settings.training.keep_heads else params
    job.progress.update("evaluate", 1, 2)
    params, record = _normalise(settings, score, params, train, data.held_out)
    job.progress.update("evaluate", 2, 2)
    job.progress.finish("evaluate")
    results = {
        "comparisons": {"training": len(train), "held_out": len(data.held_out)},
        "pairs": pairs_lib.count(train.rows)["pairs"],
        "widths": {"prompt": data.prompt_width, "response": data.response_width},
        "steps": planned.steps,
        "packing": saving,
        "training_seconds": trained.seconds,
        "tokens_per_second": trained.tokens_per_second(mask_BKL.sum() / len(mask_BKL) * planned.batch),
        "alarms": [
            {"stage": STAGE, "step": alarm.step, "name": alarm.name, "message": alarm.message}
            for alarm in _watch(settings, job, lambda text: None).alarms
        ],
        "reward_model": facts | ({} if record is None else {"normalisation": dataclasses.asdict(record)}),
    }
    return stage_run.Trained(params, results, {"normalisation": record})


def _trainable(
    settings: OwnRewardSettings, job: engine.Engine, model: initial_model.InitialModel
) -> training.Trainable:
    """Returns the parameters to train, with a new head."""
    heads = None if settings.training.heads == 1 else settings.training.heads
    key = job.key(STAGE)
    params = lm.with_head(jax.random.fold_in(key, 1), model.params, job.cfg, heads=heads)
    if not settings.training.trains:
        return training.trainable(settings.lora, job.cfg, params, jax.random.fold_in(key, 2))
    try:
        trained, frozen = partition.split(params, settings.training.trains)
    except ValueError as error:
        raise SettingError(f"--training.trains: {error}") from error
    return training.Trainable(trained, frozen, partition.join, partition.join)


def _validation(
    settings: OwnRewardSettings,
    job: engine.Engine,
    score: Callable[..., np.ndarray],
    start: training.Trainable,
    held_out: types.Comparisons,
    steps: int,
) -> dict[str, Any]:
    """Returns the arguments of `Engine.fit` that log the held-out loss and raise alarms about it."""
    measure = validation_loss.make_callback(
        score,
        held_out,
        steps=steps,
        loss=reward_stages.make_loss(settings.training),
        params_of=lambda state: start.join(start.frozen, state.params),
    )
    return {"callbacks": [measure], "log": _watch(settings, job, partial(job.progress.message, STAGE))}


def _watch(settings: OwnRewardSettings, job: engine.Engine, print_alarm: Callable[[str], None]) -> Any:
    return monitoring.watch(job.log, STAGE, print_alarm, stop=settings.on_alarm == "stop", dtype=job.cfg.dtype)


def make_scorer(job: engine.Engine, *, width: int) -> Callable[..., np.ndarray]:
    """Returns ``score(params, tokens_BL, mask_BL)``, the scores of any number of rows as a NumPy array.

    The rows, of which each has at most ``width`` real tokens, are packed.
    """

    def scores(params: types.Params, rows: tuple[jax.Array, ...]) -> jax.Array:
        tokens_RW, segments_RW, segment_RS, end_RS = rows
        row_RS = jnp.broadcast_to(jnp.arange(len(end_RS))[:, None], end_RS.shape)
        places: Any = types.Places(row=row_RS, segment=segment_RS, end=end_RS)
        return lm.packed_scores(params, tokens_RW, segments_RW, places, cfg=job.cfg)

    step = parallel.JitStep(scores, donate_argnums=(), mesh=job.mesh, batch_args=(1,), replicated_args=())
    size = max(1, _SCORED_TOKENS // width)

    def score(params: types.Params, tokens_BL: Any, mask_BL: Any) -> np.ndarray:
        sequences = [tokens[mask] for tokens, mask in zip(np.asarray(tokens_BL), np.asarray(mask_BL))]
        packed = packing.pack(sequences, width=width, pad_id=0, counts=errors.DropCount(max_dropped=0.0))
        place_N: Any = packed.places
        most = 1 << int(place_N.segment.max() - 1).bit_length()  # few different shapes, since each is compiled
        segment_RS, end_RS = np.zeros((2, len(packed.tokens_BL), most), np.int32)
        at = place_N.row, place_N.segment - 1
        segment_RS[at], end_RS[at] = place_N.segment, place_N.end
        rows = packed.tokens_BL, packed.segments_BL, segment_RS, end_RS
        found = outcome.in_chunks(partial(step, params), rows, size=size, mesh=job.mesh)[at]
        if not np.isfinite(found).all():
            raise loop.DivergedError(f"{(~np.isfinite(found)).sum()} of {found.size} scores are not finite")
        return found

    return score


def _score_answers(score: Callable[..., np.ndarray], params: types.Params, rows: types.Comparisons) -> np.ndarray:
    """Returns the scores ``[B, K]``; those of missing answers are 0."""
    where_BK = np.asarray(rows.where_BK)
    scores_BK = np.zeros(where_BK.shape, np.float32)
    scores_BK[where_BK] = score(params, np.asarray(rows.tokens_BKL)[where_BK], np.asarray(rows.mask_BKL)[where_BK])
    return scores_BK


def _diagnose(
    score: Callable[..., np.ndarray], params: types.Params, train: comparisons.Encoded, data: comparisons.Data
) -> dict[str, Any]:
    """Returns accuracy, calibration, length bias and groups of a model whose scores have not been normalised."""
    held_out, K = data.held_out, np.shape(train.rows.where_BK)[1]
    seen = train.take(max(1, policy_sampling.CHUNK // K))
    scored = [
        reward_diagnosis.Scored(part.rows, _score_answers(score, params, part.rows), part.conversation_B)
        for part in (held_out, seen)
    ]
    facts = reward_diagnosis.diagnose(
        *scored, prompt_width=data.prompt_width, head=params["head"], strata=held_out.strata
    )
    b, i, j = reward_diagnosis.better_pairs(held_out.rows)
    margin_N = np.float64(scored[0].scores_BK[b, i] - scored[0].scores_BK[b, j])
    groups = held_out.conversation_B[b].tolist()
    facts["log_loss"] = list(diagnostics.clustered_mean(np.logaddexp(0.0, -margin_N), groups))
    return facts


def _normalise(
    settings: OwnRewardSettings,
    score: Callable[..., np.ndarray],
    params: types.Params,
    train: comparisons.Encoded,
    held_out: comparisons.Encoded,
) -> tuple[types.Params, lm.heads.Normalisation | None]:
    """Shifts the scores by the rule of the settings; returns the model and a record of the shift."""
    rule = settings.training.normalise
    if rule == "none":
        return params, None
    params = lm.heads.reset(params)
    if rule == "chosen":
        rows = train.take(NORMALISED_PROMPTS).rows
        ranks_BK = np.where(np.asarray(rows.where_BK), np.asarray(rows.ranks_BK), np.iinfo(np.int32).max)
        at = np.arange(len(ranks_BK)), ranks_BK.argmin(axis=1)
        scores = score(params, np.asarray(rows.tokens_BKL)[at], np.asarray(rows.mask_BKL)[at])
    else:
        rows = held_out.rows
        where_BK = np.asarray(rows.where_BK)
        scores = score(params, np.asarray(rows.tokens_BKL)[where_BK], np.asarray(rows.mask_BKL)[where_BK])
    params = lm.heads.centre(params, jnp.asarray(scores))
    return params, lm.heads.normalisation(params, NORMALISED_ON[rule])


def table(results: dict[str, Any]) -> list[tuple[str, Any]]:
    """Returns the rows of the table that the command prints."""
    facts = results["reward_model"]
    bias, calibration = facts["length_bias"], facts["calibration"]
    rows: list[tuple[str, Any]] = [
        (f"accuracy on {errors.counted(facts['held_out_pairs'], 'held-out pairs')}", facts["accuracy"]),
    ]
    if "gap" in facts:
        rows.append(("training accuracy minus held-out accuracy", facts["gap"]["accuracy_gap"]))
    rows += [
        ("log loss, nats per pair", facts["log_loss"]),
        ("calibration error", calibration["error"]),
        ("calibration slope", calibration["slope"]),
        ("correlation of score and length", bias["correlation"]),
    ]
    for kind, strata in facts["strata"].items():
        for each in strata:
            mark = results_lib.ROUGH_MARK * results_lib.is_rough(each)
            name = f"accuracy, {kind} {each['name']} ({errors.counted(each['count'], 'pairs')}){mark}"
            rows.append((name, each["accuracy"]))
    return [*rows, ("steps", results["steps"]), ("tokens per second", results["tokens_per_second"])]
