"""Runs context distillation in the built-in world: trains a teacher, distils it and compares it with the student."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import jax
import numpy as np
from finetune import outcome
from launch import settings as settings_lib
from launch.run_settings import SettingError
from recipe import engine, evaluation, jobs, optimiser_choice, policy_sampling, run_setup, stages, tasks
from rich.console import Console

from distillation import distill_rows, prompted_world, student_training, teacher_stage
from distillation.distill_settings import WorldDistillSettings
from rlhf_jax import lm, parallel, types
from rlhf_jax.data import batching, errors
from rlhf_jax.train import sft
from rlhf_jax.train import state as state_lib
from rlhf_jax.train.optim import schedules

_STAGES = (("pretrain", 60.0), ("sft", 25.0), ("teacher", 8.0), ("distill", 20.0), ("evaluate", 12.0))
"""The stages with their durations in seconds."""
_PER_PASS = 64


def run(settings: WorldDistillSettings) -> dict[str, Any]:
    """Runs all stages and returns the contents of results.json."""
    out = Console()
    if finished := outcome.show_finished(settings, out, table):
        return finished
    recipe = recipe_settings(settings)

    def prepare(resolved: Any, mesh: Any) -> tuple[Any, Any]:
        task = tasks.make_task(recipe)
        try:
            prompt = prompted_world.prompt_ids(task, settings.prompt)
        except errors.DataError as error:
            raise SettingError(f"--prompt {settings.prompt!r}: {error}; use words of the built-in world") from error
        if not prompt:
            raise SettingError("--prompt is empty; give words of the built-in world")
        size = len(task.tokenizer)
        if settings.k > size:
            raise SettingError(f"--k is {settings.k}; it must be at most {size}, the size of the vocabulary")
        return settings, (task, prompt)

    with run_setup.open_folder(settings, out, stages=_STAGES, prepare=prepare) as opened:
        task, prompt = opened.prepared
        fields: dict[str, Any] = opened.engine_fields | {"settings": recipe}
        job = jobs.make_job(task=task, model=None, **fields)
        run_setup.describe(opened, job.cfg, out)
        base = stages.pretrain(job)
        dialogues = prompted_world.draw_dialogues(job, settings.teacher.demonstrations)
        teacher = prompted_world.train_teacher(job, base, dialogues, prompt, epochs=settings.teacher.epochs)
        rows = prompted_world.distillation_rows(job, dialogues, n=settings.rows, mix=settings.mix)
        path = opened.folder.path / teacher_stage.NAME
        header = header_of(rows, k=settings.k, width=task.row_width, prompt=settings.prompt)
        load = lambda: teacher_stage.Reader(job.cfg, teacher, prompt, keep_first=False)  # noqa: E731
        made = distill_rows.Rows(rows, len(rows), [])
        sizes: Any = {"k": settings.k, "width": task.row_width, "pad_id": task.fmt.pad_id, "per_pass": _PER_PASS}
        teacher_stage.write(job, path, header, made, load, **sizes)
        lessons = teacher_stage.Lessons(path, pad_id=task.fmt.pad_id)
        student, steps = train_student(
            job,
            teacher,
            lessons.at,
            n=len(rows),
            batch=settings.batch,
            epochs=settings.epochs,
            rate=_rate(settings),
            tx=optimiser_choice.chosen(settings),
        )
        found = compare(job, teacher, student, prompt, transcripts=settings.transcripts)
    results = {
        "preset": settings.preset,
        "rows": {"training": len(rows), "held_out": 0},
        "steps": steps,
        **found,
        "dropped": task.dropped.dropped | task.dropped.truncated,
    }
    outcome.save_model(opened.folder, job.cfg, student, task.fmt)
    return outcome.finish(opened.folder, settings, results, out, title="Context distillation", rows=table)


def header_of(rows: list[list[int]], *, k: int, width: int, prompt: str) -> dict[str, Any]:
    """Returns the header of the teacher's file; the run folder identifies the teacher."""
    return {"k": k, "width": width, "prompt": prompt, "rows": [len(rows), 0]}


def recipe_settings(settings: WorldDistillSettings) -> settings_lib.Settings:
    """Returns the settings of the stages that the command shares with instructgpt.py."""
    teacher = settings.teacher
    return settings_lib.Settings(
        seed=settings.seed,
        saves=settings.saves,
        max_skipped=settings.max_skipped,
        mesh=settings.mesh,
        compute=settings.compute,
        net=settings.net,
        pretrain=settings.pretrain,
        world=settings_lib.World(slips=teacher.slips),
        sft=settings_lib.SFT(demonstrations=1, learning_rate=teacher.learning_rate),
        comparisons=settings_lib.Comparisons(prompts=1),
        ppo=settings_lib.PPO(iterations=1, batch=4),
        evaluation=settings_lib.Evaluation(prompts=settings.held_out, skills=4),
    )


def _rate(settings: WorldDistillSettings) -> float:
    return 0.05 * settings.pretrain.learning_rate if settings.learning_rate is None else settings.learning_rate


def train_student(
    job: jobs.Job,
    start: types.Params,
    batch_of: Any,
    *,
    n: int,
    batch: int,
    epochs: int,
    rate: float,
    tx: Any,
) -> tuple[types.Params, int]:
    """Trains a student on the teacher's distributions, with linear decay of the learning rate to 0 (Bai et al., A.1).

    Args:
        job: The job of the run.
        start: Initial parameters, those of the teacher.
        batch_of: Returns the `DistillationBatch` of the rows at some indices.
        n: Number of rows.
        batch: Rows per step; fewer if there are fewer rows.
        epochs: Number of passes over the rows.
        rate: Peak learning rate.
        tx: The optimiser, with a learning rate of 1.

    Returns:
        ``(params, steps)``.
    """
    batch = min(batch, n)
    steps = -(-epochs * n // batch)
    key = jax.random.fold_in(engine.stage_key(job.settings.seed, "sft"), 11)
    order = batching.epoch_batches(0, n=n, batch_size=batch, key=jax.random.fold_in(key, 0), steps=steps)
    state = job.fit(
        "distill",
        _compiled_step(job.cfg, job.mesh),  # type: ignore[arg-type]  # frozen, thus hashable
        job.create_on_mesh(partial(state_lib.create, tx=tx), jax.tree.map(np.array, start)),
        steps,
        batch_at=lambda i: batch_of(order[i]),
        hyper_at=lambda i: stages.hyper(rate * schedules.linear(i, steps)),
        rng=jax.random.fold_in(key, 1),
    )
    return state.params, steps


@functools.cache
def _compiled_step(cfg: lm.LMConfig, mesh: jax.sharding.Mesh | None) -> parallel.JitStep:
    return parallel.jit_step(sft.make_distillation_step(partial(lm.token_listed_logprobs, cfg=cfg)), mesh=mesh)


def compare(
    job: jobs.Job, teacher: types.Params, student: types.Params, prompt: list[int], *, transcripts: int
) -> dict[str, Any]:
    """Compares the student with the teacher, with and without its prompt, on held-out questions.

    Args:
        job: The job of the run.
        teacher: Parameters of the teacher, with which the student started.
        student: Parameters of the student.
        prompt: Token ids of the prompt.
        transcripts: Number of questions whose answers are returned.

    Returns:
        The entries of results.json.
    """
    held_out, key = job.task.eval_prompts, job.key("evaluate")
    made, asked_B = prompted_world.make_evaluator(job, prompt), held_out.asked_B
    job.progress.start("evaluate", 4)
    answers = {"prompted_teacher": prompted_world.prompted_answers(made, teacher, key)}
    for number, (name, params) in enumerate((("teacher", teacher), ("student", student))):
        job.progress.update("evaluate", number + 1, 4)
        answers[name] = job.sampler(params, None, None, held_out, jax.random.fold_in(key, number + 1))
    job.progress.update("evaluate", 3, 4)
    before, after = (
        prompted_world.token_kls(made, teacher, params, answers["prompted_teacher"]) for params in (teacher, student)
    )
    job.progress.update("evaluate", 4, 4)
    job.progress.finish("evaluate")
    pairs = (("student", "prompted_teacher"), ("student", "teacher"), ("prompted_teacher", "teacher"))
    return {
        "distillation": student_training.summary(before, after, asked_B) | {"prompt_tokens": len(prompt)},
        "policies": {name: _numbers(each, asked_B) for name, each in answers.items()},
        "gold_differences": {
            f"{a} − {b}".replace("_", " "): prompted_world.gold_difference(answers[a], answers[b], asked_B)
            for a, b in pairs
        },
        "held_out": {"prompts": len(held_out), "asked": len(np.unique(asked_B))},
        "transcripts": _transcripts(job.task, made.prompted_task.prompt_width, answers, transcripts),
    }


def _numbers(answers: policy_sampling.Answers, asked_B: np.ndarray) -> dict[str, Any]:
    return {
        "gold": evaluation.mean(answers.gold.total, asked_B, rate=True),
        "gold_helpful": evaluation.mean(answers.gold.helpful, asked_B, rate=True),
        "gold_harmless": evaluation.mean(answers.gold.harmless, asked_B, rate=True),
        "length": evaluation.mean(answers.lengths_B, asked_B),
        "stopped": evaluation.mean(answers.stopped_B, asked_B, rate=True),
    }


def _transcripts(
    task: tasks.Task, prompted_width: int, answers: dict[str, policy_sampling.Answers], n: int
) -> list[dict[str, Any]]:
    rows = []
    for i in range(min(n, len(task.eval_prompts))):
        row: dict[str, Any] = {"prompt": task.eval_prompts.texts[i], "answers": {}, "gold": {}}
        row["category"] = task.eval_prompts.categories[i]
        for name, each in answers.items():
            width = prompted_width if name == "prompted_teacher" else task.prompt_width
            ids = each.tokens_BL[i, width:][each.response_mask_BT[i]]
            row["answers"][name] = task.tokenizer.decode(ids, skip_special_tokens=True)
            row["gold"][name] = float(each.gold.total[i])
        rows.append(row)
    return rows


def table(results: dict[str, Any]) -> list[tuple[str, Any]]:
    """Returns the rows of the table that is printed."""
    found, policies = results["distillation"], results["policies"]
    return [
        ("KL(prompted teacher || student) before, nats per token", found["kl_before"]),
        ("KL(prompted teacher || student) after", found["kl_after"]),
        ("share of the KL removed", found["share_removed"]),
        *((f"gold utility, {name.replace('_', ' ')}", each["gold"]) for name, each in policies.items()),
        *((f"gold utility, {name}", each) for name, each in results["gold_differences"].items()),
        ("steps", results["steps"]),
    ]
