"""Trains a reward model on a user's own comparisons, from a given model; see reward_model.py."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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
from rlhf_jax import diagnostics, lm, losses, parallel, types
from rlhf_jax.data import comparison_transforms, errors, packing
from rlhf_jax.report import results as results_lib
from rlhf_jax.train import loop, reward_model
from rlhf_jax.train.optim import partition

STAGE, PMP = "reward_model", "pmp"
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
    crowd, notes, first = None, data.notes, []
    if settings.pmp.path is not None:
        encoded, width, more = comparisons.load_crowd(settings, model, data.held_out_records, counts)
        rows, notes = encoded.rows, (*notes, *more)
        if settings.pmp.binary:
            n = model.cfg.vocab_size
            rows = comparison_transforms.add_control_tokens(rows, good_id=n, bad_id=n + 1, column=width)
        crowd = Crowd(rows, len(encoded))
        most = training.rows_trained(_phases(settings)[0], len(rows.ranks_BK), mesh)
        first = [(PMP, 3.0 * most * np.mean(np.sum(rows.where_BK, axis=1)))]
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
    sizes = data.sizes | ({} if crowd is None else {"crowd comparisons": crowd.comparisons})
    return stage_run.Prepared(model, (data, train, rows, crowd), sizes, [*first, *stages], notes=notes)


def _check_soft_labels(settings: OwnRewardSettings) -> None:
    """Raises SettingError for settings with which the soft labels of a file cannot be used."""
    soft = "--data.path has soft labels in its field 'preference'"
    if settings.training.loss in ("plackett-luce", "best"):
        raise SettingError(f"--training.loss {settings.training.loss}: {soft}, which only ranking and pairs can use")
    if settings.training.label_smoothing:
        raise SettingError(f"--training.label-smoothing has no effect: {soft}; leave it out")


class Crowd(NamedTuple):
    """The comparisons of preference-model pretraining."""

    rows: types.Comparisons
    """The rows that are trained on; with --pmp.binary, marked pairs."""
    comparisons: int
    """Number of prompts whose answers are compared."""


def _phases(settings: OwnRewardSettings) -> tuple[OwnRewardSettings, OwnRewardSettings]:
    """Returns the settings of preference-model pretraining and those of training on human comparisons."""
    pmp = settings.pmp
    rates = pmp.learning_rate, settings.learning_rate
    if pmp.pretraining_rate is not None:
        rates = 0.1 * pmp.pretraining_rate, 0.01 * pmp.pretraining_rate  # Bai et al. 2022, A.2
    return (
        dataclasses.replace(settings, learning_rate=rates[0], epochs=1, steps=None),
        dataclasses.replace(settings, learning_rate=rates[1]),
    )


def _pretrain_preferences(
    settings: OwnRewardSettings, job: engine.Engine, model: initial_model.InitialModel, rows: types.Comparisons
) -> tuple[types.Params, dict[str, Any]]:
    """Trains a preference model on a crowd's comparisons; returns it, with its head, and facts for results.json.

    The vocabulary has two more tokens during this stage if ``rows`` contain control tokens.
    """
    own, key, cfg, params = _phases(settings)[0], jax.random.fold_in(job.key(STAGE), 1000), job.cfg, model.params
    if settings.pmp.binary:
        cfg = dataclasses.replace(cfg, vocab_size=cfg.vocab_size + 2, max_length=cfg.max_length + 1)
        params = reward_stages.extend_embeddings(params, jax.random.fold_in(key, 1), cfg)
    job = dataclasses.replace(job, cfg=cfg)
    params = job.put_params(lm.with_head(jax.random.fold_in(key, 2), params, cfg))
    start = training.trainable(settings.lora, cfg, params, jax.random.fold_in(key, 3))
    planned = training.schedule(job, PMP, len(rows.ranks_BK), own, key=jax.random.fold_in(key, 4))
    batch_at, _ = _packed(own, job, rows, planned, model)
    options: dict[str, Any] = {"planned": planned, "batch_at": batch_at, "rng": jax.random.fold_in(key, 5)}
    trained = training.fit(job, PMP, _make_train_step(cfg), start, rows, own, **options)
    facts = {"steps": planned.steps, "rows": len(rows.ranks_BK), "learning_rate": training.learning_rate(own)}
    merged = start.merge(start.frozen, trained.params)
    return reward_stages.truncate_embeddings(merged, model.cfg), facts | {"training_seconds": trained.seconds}


def _make_train_step(cfg: lm.LMConfig, *, loss: Callable[..., jax.Array] = losses.ranking) -> Callable[..., Any]:
    """Returns the function that makes the train step of `training.fit`."""
    scores = partial(lm.packed_scores, cfg=cfg)
    return partial(reward_model.make_train_step, partial(lm.score, cfg=cfg), packed_scores=scores, loss=loss)


def _packed(
    settings: OwnRewardSettings,
    job: engine.Engine,
    rows: types.Comparisons,
    planned: training.Schedule,
    model: initial_model.InitialModel,
) -> tuple[Any, Any]:
    """Returns what `comparisons.packed_batches` does for rows of comparisons."""
    mask_BKL = np.asarray(rows.mask_BKL) & np.asarray(rows.where_BK)[:, :, None]
    return comparisons.packed_batches(
        settings,
        job.mesh,
        rows,
        planned,
        pack=packing.pack_comparisons,
        masks=[mask_BKL],
        pad_id=model.fmt.pad_id,
    )


def _train(
    settings: OwnRewardSettings, job: engine.Engine, folder: pathlib.Path, prepared: stage_run.Prepared
) -> stage_run.Trained:
    """Trains the reward model, measures it on held-out comparisons and normalises its scores."""
    del folder
    model, (data, train, rows, crowd) = prepared.model, prepared.inputs
    score = make_scorer(job, width=data.longest)
    pretrained: dict[str, Any] = {}
    if crowd is not None:
        params, facts = _pretrain_preferences(settings, job, model, crowd.rows)
        model = dataclasses.replace(model, params=params)
        facts["accuracy"] = _accuracy(score, params, data.held_out)
        pretrained = {"pmp": {"comparisons": crowd.comparisons, **facts}}
        settings = _phases(settings)[1]
    start = _trainable(settings, job, model, new_head=crowd is None)
    planned = training.schedule(job, STAGE, len(rows.ranks_BK), settings)
    mask_BKL = np.asarray(rows.mask_BKL) & np.asarray(rows.where_BK)[:, :, None]
    batch_at, saving = _packed(settings, job, rows, planned, model)
    trained = training.fit(
        job,
        STAGE,
        _make_train_step(job.cfg, loss=reward_stages.make_loss(settings.training)),
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
        **pretrained,
        "reward_model": facts | ({} if record is None else {"normalisation": dataclasses.asdict(record)}),
    }
    return stage_run.Trained(params, results, {"normalisation": record})


def _trainable(
    settings: OwnRewardSettings, job: engine.Engine, model: initial_model.InitialModel, *, new_head: bool
) -> training.Trainable:
    """Returns the parameters to train, with a new head unless the model's is to be trained on.

    An ensemble of heads is always new.
    """
    heads = None if settings.training.heads == 1 else settings.training.heads
    key = job.key(STAGE)
    params = model.params
    if new_head or heads is not None:
        params = lm.with_head(jax.random.fold_in(key, 1), params, job.cfg, heads=heads)
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


def _accuracy(score: Callable[..., np.ndarray], params: types.Params, held_out: comparisons.Encoded) -> list[float]:
    """Returns the share of held-out pairs that a model orders as labelled, with its interval."""
    scores_BK = _score_answers(score, params, held_out.rows)
    b, i, j = reward_diagnosis.better_pairs(held_out.rows)
    right_N = diagnostics.win_outcomes(scores_BK[b, i], scores_BK[b, j])
    return list(diagnostics.clustered_mean(right_N, held_out.conversation_B[b].tolist(), rate=True))


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
    rows: list[tuple[str, Any]] = []
    if "pmp" in results:
        rows.append(("accuracy after PMP, before the human comparisons", results["pmp"]["accuracy"]))
    rows += [
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
