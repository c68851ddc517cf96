"""Trains a student of one's own on the distributions of a teacher."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from finetune import outcome, stage_run, training
from launch import initial_model, run_folder
from launch.run_settings import SettingError
from recipe import engine

from distillation import distill_rows, distill_settings, teacher_stage
from distillation.distill_settings import OwnDistillSettings
from rlhf_jax import diagnostics, lm, parallel, types
from rlhf_jax.data import chat, errors, plain_text, tokenizers
from rlhf_jax.data.stores import record_file
from rlhf_jax.train import sft
from rlhf_jax.train.optim import schedules

_READ = 64
"""Number of held-out rows that are read from the file at a time."""


class _Inputs(NamedTuple):
    """What a run needs in addition to the student."""

    path: pathlib.Path | None
    """The teacher's file; None for a file in the run folder."""
    header: Mapping[str, Any]
    rows: distill_rows.Rows | None
    """The rows that the teacher reads; None if the file exists."""
    prompt: list[int]
    teacher: str | None
    """Folder of the teacher; None if it is the student or the file exists."""


def run(settings: OwnDistillSettings) -> dict[str, Any]:
    """Trains the student and returns the contents of results.json."""
    return stage_run.run(
        settings,
        counts=errors.DropCount(max_dropped=settings.data.max_dropped, flag="--data.max-dropped"),
        prepare=partial(_prepare, settings),
        train=partial(_train, settings),
        title="Distillation",
        rows=table,
    )


def _prepare(settings: OwnDistillSettings, mesh: Any, counts: errors.DropCount) -> stage_run.Prepared:
    """Loads the student and the rows, or the header of the file that has them."""
    path = None if settings.teacher_file is None else pathlib.Path(settings.teacher_file)
    if distill_settings.has_file(settings):
        header = record_file.RecordFile(settings.teacher_file or "").header
        counts.dropped |= header["dropped"]
        counts.truncated |= header["truncated"]
        return _with_file(settings, mesh, header)
    student, teacher, teacher_cfg = _models(settings, mesh)
    prompt = [] if settings.prompt is None else plain_text.encode_rendered(student.fmt.tokenizer, [settings.prompt])[0]
    limit = min(student.cfg.max_length, teacher_cfg.max_length - len(prompt))
    if limit < 2:
        raise SettingError(
            f"--prompt has {len(prompt)} tokens, which leave no room for a row within the {teacher_cfg.max_length} "
            "that the teacher can read; shorten it"
        )
    kept = distill_settings.kept(settings)
    for name, value, most in (("data.width", settings.data.width, limit), ("k", kept.k, student.cfg.vocab_size)):
        if value is not None and value > most:
            what = "the size of the vocabulary" if name == "k" else "what student and teacher can read after the prompt"
            raise SettingError(f"--{name} is {value}; it must be at most {most}, {what}")
    key = _key(settings.seed)
    made = distill_rows.make(settings, student.fmt, counts, key, max_width=limit)
    rows = made.rows
    digest = teacher or student.path
    header = {
        "k": kept.k,
        "mix": kept.mix if settings.data.pretraining is not None else 0.0,
        "held_out": kept.held_out,
        "seed": settings.seed,
        "teacher": initial_model.fingerprint(digest),
        "prompt": settings.prompt,
        "data": run_folder.data_digest(settings.data.path or ""),
        "pretraining": None if settings.data.pretraining is None else run_folder.data_digest(settings.data.pretraining),
        "tokenizer": teacher_stage.tokenizer_digest(student.fmt),
        "dtype": initial_model.with_compute(teacher_cfg, settings.compute).dtype,
        "width": made.width,
        "rows": [rows.n_train, len(rows.ids) - rows.n_train],
        "row_digest": rows.digest(),
        "clusters": rows.clusters,
        "prompt_tokens": len(prompt),
        "dropped": counts.dropped,
        "truncated": counts.truncated,
    }
    prepared = _prepared(settings, mesh, student, _Inputs(path, header, rows, prompt, teacher))
    return dataclasses.replace(prepared, notes=made.notes, remark=made.remark)


def _key(seed: int) -> jax.Array:
    return jax.random.fold_in(engine.stage_key(seed, "sft"), 11)


def _prepared(
    settings: OwnDistillSettings, mesh: Any, student: initial_model.InitialModel, inputs: _Inputs
) -> stage_run.Prepared:
    n_train, n_held_out = inputs.header["rows"]
    trained = training.rows_trained(settings, n_train, mesh)
    reading = 0 if inputs.rows is None else n_train + n_held_out
    return stage_run.Prepared(
        student,
        inputs=inputs,
        sizes={
            "training rows": n_train,
            "held-out rows": n_held_out,
            "tokens per row": inputs.header["width"],
            "prompt tokens": inputs.header["prompt_tokens"],
        },
        stages=[("teacher", 1.0 * reading), ("distill", 3.0 * trained), ("evaluate", 2.0 * n_held_out)],
        remark=f"the teacher's distributions are in {inputs.path}" if inputs.rows is None else "",
    )


def _models(settings: OwnDistillSettings, mesh: Any) -> tuple[initial_model.InitialModel, str | None, lm.LMConfig]:
    """Returns the student, the folder of a teacher other than the student, and the architecture of the teacher."""
    if settings.teacher is None:
        student = initial_model.load(settings.model, mesh=mesh, template=settings.template)
        return student, None, student.cfg
    flag = "--teacher"
    teacher_cfg = initial_model.check(settings.teacher, flag=flag)
    folder = initial_model.saved_in_run(settings.teacher, initial_model.LANGUAGE_MODEL, flag)
    try:
        fmt = chat.chat_format(tokenizers.load(folder), model_type=teacher_cfg.model_type)
    except (OSError, ValueError) as error:
        raise SettingError(f"cannot use {flag} {settings.teacher}: {error}") from error
    student = _student(settings, mesh, fmt)
    if teacher_stage.tokenizer_digest(fmt) != teacher_stage.tokenizer_digest(student.fmt):
        raise SettingError(
            f"--teacher {settings.teacher} and --model {settings.model} have different tokenizers, but distillation "
            "compares the probabilities of the same tokens; give models of one family"
        )
    return student, folder, teacher_cfg


def _student(settings: OwnDistillSettings, mesh: Any, fmt: chat.ChatFormat | None) -> initial_model.InitialModel:
    if not initial_model.is_architecture(settings.model):
        return initial_model.load(settings.model, mesh=mesh, template=settings.template)
    if fmt is None:
        raise SettingError(f"--model {settings.model} has random weights; give --teacher, whose tokenizer it gets")
    return initial_model.create(settings.model, fmt, jax.random.fold_in(_key(settings.seed), 2), mesh=mesh)


def _with_file(settings: OwnDistillSettings, mesh: Any, header: Mapping[str, Any]) -> stage_run.Prepared:
    """Prepares a run with a finished file; refuses settings that are given and from which it was not made."""
    path = pathlib.Path(settings.teacher_file or "")
    given: dict[str, Any] = {}
    if settings.teacher is not None:
        student, folder, _ = _models(settings, mesh)
        given["teacher"] = initial_model.fingerprint(folder or student.path)
    else:
        student = _student(settings, mesh, None)
    given["tokenizer"] = teacher_stage.tokenizer_digest(student.fmt)
    if settings.prompt is not None:
        given["prompt"] = settings.prompt
    for name, source in (("data", settings.data.path), ("pretraining", settings.data.pretraining)):
        if source is not None:
            given[name] = run_folder.data_digest(source)
    flags = {"k": settings.k, "mix": settings.mix, "held_out": settings.data.held_out, "width": settings.data.width}
    given |= {name: value for name, value in flags.items() if value is not None}
    teacher_stage.check_header(path, header, given)
    if header["width"] > student.cfg.max_length:
        raise SettingError(
            f"--teacher-file {path} has rows of {header['width']} tokens, more than the {student.cfg.max_length} of "
            f"--model {settings.model}"
        )
    return _prepared(settings, mesh, student, _Inputs(path, header, None, [], None))


def _train(
    settings: OwnDistillSettings, job: engine.Engine, folder: pathlib.Path, prepared: stage_run.Prepared
) -> stage_run.Trained:
    """Makes the teacher's file if it is missing, trains the student and measures its KL from the teacher."""
    inputs, initial, fmt = prepared.inputs, prepared.model.params, prepared.model.fmt
    path = inputs.path or folder / teacher_stage.NAME
    if inputs.rows is None:
        teacher_stage.use_finished(job, path)
    else:
        _write_file(settings, job, path, prepared)
    lessons = teacher_stage.Lessons(path, pad_id=fmt.pad_id)
    key = _key(settings.seed)
    start = training.trainable(settings.lora, job.cfg, initial, jax.random.fold_in(key, 3))
    planned = training.schedule(job, "distill", lessons.n_train, settings, key=jax.random.fold_in(key, 5))
    trained = training.fit(
        job,
        "distill",
        partial(sft.make_distillation_step, partial(lm.token_listed_logprobs, cfg=job.cfg)),
        start,
        None,
        settings,
        planned=planned,
        batch_at=lambda i: lessons.at(planned.order[i]),
        decay=schedules.linear,
        rng=jax.random.fold_in(key, 4),
    )
    params = start.merge(start.frozen, trained.params)
    before, after, cluster_B = _measure(job, lessons, (initial, params))
    results = {
        "rows": {"training": lessons.n_train, "held_out": lessons.n_held_out},
        "width": lessons.header["width"],
        "steps": planned.steps,
        "tokens_per_second": trained.tokens_per_second(float(lessons.at(planned.order[0]).mask_BL.sum())),
        "distillation": summary(before, after, cluster_B)
        | {"classes": lessons.header["k"] + 1, "prompt_tokens": lessons.header["prompt_tokens"]},
        "clusters": {"held-out KL": len(np.unique(cluster_B))},
    }
    return stage_run.Trained(params, results)


def _write_file(settings: OwnDistillSettings, job: engine.Engine, path: pathlib.Path, prepared: Any) -> None:
    inputs, model = prepared.inputs, prepared.model
    rows, bos = inputs.rows, model.fmt.tokenizer.bos_token_id
    keep_first = bos is not None and all(ids[0] == bos for ids in rows.ids)

    def load() -> teacher_stage.Reader:
        cfg, params = model.cfg, model.params
        if inputs.teacher is not None:
            teacher = initial_model.load(inputs.teacher, flag="--teacher", mesh=job.mesh)
            cfg, params = teacher.cfg, teacher.params
        return teacher_stage.Reader(
            initial_model.with_compute(cfg, settings.compute), params, inputs.prompt, keep_first
        )

    sizes: Any = {"k": inputs.header["k"], "width": inputs.header["width"], "pad_id": model.fmt.pad_id}
    teacher_stage.write(job, path, inputs.header, rows, load, **sizes)


def _measure(
    job: engine.Engine, lessons: teacher_stage.Lessons, models: tuple[types.Params, types.Params]
) -> tuple[Any, Any, np.ndarray]:
    """Returns ``(kl_B, tokens_B)`` of the held-out rows before and after training, and the cluster of each row."""
    sums = teacher_stage.make_listed_kl(job.cfg)
    step = parallel.JitStep(sums, donate_argnums=(), mesh=job.mesh, batch_args=(1,), replicated_args=())
    n, first = lessons.n_held_out, lessons.n_train
    job.progress.start("evaluate", len(models))
    found: list[Any] = []
    for number, params in enumerate(models):
        parts = [
            outcome.in_chunks(
                partial(step, params),
                lessons.at(range(first + start, first + min(start + _READ, n))),
                size=8,
                mesh=job.mesh,
            )
            for start in range(0, n, _READ)
        ]
        found.append(jax.tree.map(lambda *x: np.concatenate(x), *parts) if parts else None)
        job.progress.update("evaluate", number + 1, len(models))
    job.progress.finish("evaluate")
    return found[0], found[1], np.asarray(lessons.header["clusters"], int)


def summary(before: Any, after: Any, cluster_B: np.ndarray) -> dict[str, Any]:
    """Returns the KL per token before and after training, and the share that training has removed.

    Args:
        before: ``(kl_B, tokens_B)`` of the held-out rows: the KL summed over the tokens of a row, and their number.
        after: The same after training.
        cluster_B: Rows with the same number are not independent.

    Returns:
        ``kl_before``, ``kl_after`` and ``share_removed``, each ``[mean, low, high]``; None without held-out rows.
    """
    names = ("kl_before", "kl_after", "share_removed")
    if before is None:
        return dict.fromkeys(names)
    index_B = np.unique(cluster_B, return_inverse=True)[1]
    (kl, tokens), (left, _) = ([np.bincount(index_B, weights=np.float64(x)) for x in each] for each in (before, after))
    parts = ((kl, tokens), (left, tokens), (kl - left, kl))
    return {
        name: list(diagnostics.ratio_interval(part, whole, rate=False)) if whole.sum() > 0 else None
        for name, (part, whole) in zip(names, parts)
    }


def table(results: dict[str, Any]) -> list[tuple[str, Any]]:
    """Returns the rows of the table that is printed."""
    found = results["distillation"]
    return [
        ("KL(teacher || student) before, nats per token", found["kl_before"]),
        ("KL(teacher || student) after", found["kl_after"]),
        ("share of the KL removed", found["share_removed"]),
        ("steps", results["steps"]),
        ("tokens per second", results["tokens_per_second"]),
    ]
