"""Context distillation in the built-in world: a teacher whose answers depend on a prompt, its rows and its evaluation.

The teacher is fine-tuned on flawless answers to questions that follow the prompt, and on the demonstrators' ordinary
answers to questions that do not. The gold utility of an answer depends on the question only, not on what precedes it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from launch import host_agreement
from recipe import evaluation, jobs, policy_sampling, stages, tasks

from distillation import distill_rows
from rlhf_jax import generation, lm, parallel, types
from rlhf_jax.data import batching, padding, plain_text
from rlhf_jax.simulation import demonstrators, lexicon, prompts
from rlhf_jax.simulation import world as world_lib
from rlhf_jax.train import ppo, ppo_models
from rlhf_jax.train import state as state_lib
from rlhf_jax.train.optim import schedules

_STREAM = 9
"""Index of the random stream of the demonstrations, after those of `tasks`."""
_CHUNK = 128
"""Number of held-out prompts for which the KL is computed at a time."""


def prompt_ids(task: tasks.Task, text: str) -> list[int]:
    """Returns the token ids of the teacher's prompt."""
    return plain_text.encode_texts(task.tokenizer, [text])[0]


@dataclasses.dataclass(frozen=True)
class Dialogues:
    """Training prompts as token ids, each with a flawless and an ordinary answer."""

    prompts: list[list[int]]
    flawless: list[list[int]]
    ordinary: list[list[int]]


def draw_dialogues(job: jobs.Job, n: int) -> Dialogues:
    """Draws ``n`` training prompts and the demonstrators' answers to them."""
    settings = job.settings
    world, rng = world_lib.make_world(settings.seed), np.random.default_rng([settings.seed, _STREAM])
    asked = prompts.draw_prompts(prompts.split_prompts(world, settings.seed).train, n, rng)
    slips = demonstrators.Slips().scaled(settings.world.slips)
    answers = (
        demonstrators.demonstrate_all(world, asked, rng, slips=each) for each in (demonstrators.Slips.none(), slips)
    )
    ids = ([prompts.answer_tokens(text)[: prompts.RESPONSE_WIDTH] for text in texts] for texts in answers)
    return Dialogues([prompts.prompt_tokens(each.turns) for each in asked], *ids)


def teacher_rows(job: jobs.Job, dialogues: Dialogues, prompt: Sequence[int]) -> types.TokenBatch:
    """Returns the rows of the teacher's SFT: flawless answers after ``prompt``, then ordinary answers without it."""
    begins = [[*prompt, *ids] for ids in dialogues.prompts] + dialogues.prompts
    answers = dialogues.flawless + dialogues.ordinary
    width = len(prompt) + job.task.row_width
    ids = [[*begin, *answer] for begin, answer in zip(begins, answers)]
    rows: Any = distill_rows.padded(ids, width=width, pad_id=lexicon.PAD_ID)
    for row, begin in enumerate(begins):
        rows.loss_mask_BL[row, : len(begin)] = False
    return rows


def train_teacher(
    job: jobs.Job, base: types.Params, dialogues: Dialogues, prompt: Sequence[int], *, epochs: int
) -> types.Params:
    """Fine-tunes the base model on `teacher_rows` and, in a tenth of each batch, on pretraining text."""
    rows, settings = teacher_rows(job, dialogues, prompt), job.settings
    batch, key, width = settings.pretrain.batch, job.key("sft"), rows.tokens_BL.shape[1]
    n_text = round(batch * settings.sft.mix)
    steps = max(1, epochs * len(rows.tokens_BL) // (batch - n_text))
    text_BL = job.task.pretraining_BL
    text = distill_rows.padded([*text_BL], width=width, pad_id=lexicon.PAD_ID)
    order, text_order = (
        batching.epoch_batches(0, n=n, batch_size=size, key=jax.random.fold_in(key, i), steps=steps)
        for i, (n, size) in enumerate(((len(rows.tokens_BL), batch - n_text), (len(text_BL), max(n_text, 1))))
    )

    def batch_at(i: int) -> types.TokenBatch:
        parts = [tasks.token_batch(rows, order[i])]
        parts += [tasks.token_batch(text, text_order[i])] if n_text else []
        return jax.tree.map(lambda *x: np.concatenate(x), *parts)

    state = job.fit(
        "sft",
        job.supervised_step,
        job.create_on_mesh(partial(state_lib.create, tx=job.supervised_tx), base),
        steps,
        batch_at=batch_at,
        hyper_at=lambda i: stages.hyper(settings.sft.learning_rate * schedules.cosine(i, steps)),
    )
    return state.params


def distillation_rows(job: jobs.Job, dialogues: Dialogues, *, n: int, mix: float) -> list[list[int]]:
    """Returns the first n dialogues and, for the share ``mix`` of all rows, pretraining text after a user token.

    Bai et al. 2022 (A.1) use equal shares of both and the best answers to questions as dialogues. The dialogues here
    have flawless answers.
    """
    rows = [[*prompt, *answer] for prompt, answer in zip(dialogues.prompts[:n], dialogues.flawless)]
    n_text = round(len(rows) * mix / (1 - mix))
    text_BL = job.task.pretraining_BL
    chosen = np.arange(n_text) % len(text_BL)
    return rows + [[lexicon.USER_ID, *row[:-1].tolist()] for row in text_BL[chosen]]


def with_prompt(job: jobs.Job, prompt: Sequence[int]) -> tasks.Task:
    """Returns the task with ``prompt`` before each held-out prompt."""
    task, held_out = job.task, job.task.eval_prompts
    ids = [[*prompt, *tokens_P[mask_P].tolist()] for tokens_P, mask_P in zip(held_out.tokens_BP, held_out.mask_BP)]
    width = task.prompt_width + len(prompt)
    tokens_BP, mask_BP = padding.pad_prompts(ids, width=width, pad_id=task.fmt.pad_id)
    prompted = dataclasses.replace(held_out, tokens_BP=tokens_BP, mask_BP=mask_BP)
    return dataclasses.replace(task, prompt_width=width, eval_prompts=prompted)


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Answers held-out prompts and measures the KL from the teacher with its prompt on the teacher's answers."""

    job: jobs.Job
    prompted_task: tasks.Task
    prompted_sampler: policy_sampling.Sampler
    kl: Callable[..., Any]


def make_evaluator(job: jobs.Job, prompt: Sequence[int]) -> Evaluator:
    """Returns the evaluator, whose programs compile when they are first called. Jobs of equal sizes share them."""
    task = with_prompt(job, prompt)
    models, kl, samplers = _programs(job.cfg, job.spec, task.prompt_width, job.task.prompt_width, job.mesh)  # type: ignore[arg-type]
    if not samplers:
        samplers.append(policy_sampling.Sampler(models, task=task, mesh=job.mesh))
    return Evaluator(job, task, samplers[0].with_task(task), kl)


@functools.cache
def _programs(
    cfg: lm.LMConfig, spec: generation.Sampling, prompted_width: int, width: int, mesh: jax.sharding.Mesh | None
) -> tuple[ppo.Models, parallel.JitStep, list[policy_sampling.Sampler]]:
    """Returns the functions of the model, the compiled KL, and a list for the sampler, which needs a task."""

    def kl(teacher: Any, student: Any, prompted: Any, unprompted: Any) -> jax.Array:
        (tokens_BL, mask_BL), (other_BL, other_mask_BL) = prompted, unprompted
        return lm.token_kl(
            teacher,
            student,
            tokens_BL,
            cfg=cfg,
            mask_BL=mask_BL,
            prompt_width=prompted_width,
            other_tokens_BL=other_BL,
            other_mask_BL=other_mask_BL,
            other_prompt_width=width,
        )

    compiled = parallel.JitStep(kl, donate_argnums=(), mesh=mesh, batch_args=(2, 3), replicated_args=())
    return ppo_models.from_config(cfg, spec, prompt_width=prompted_width), compiled, []


def prompted_answers(made: Evaluator, teacher: types.Params, rng: jax.Array) -> policy_sampling.Answers:
    """Samples the answers of the teacher with its prompt to the held-out prompts."""
    return made.prompted_sampler(teacher, None, None, made.prompted_task.eval_prompts, rng)


def token_kls(
    made: Evaluator, teacher: types.Params, student: types.Params, answers: policy_sampling.Answers
) -> tuple[np.ndarray, np.ndarray]:
    """Returns ``(kl_B, tokens_B)``: the KL(teacher with its prompt || student), summed over the teacher's answers.

    The KL is exact over the vocabulary at each token, in nats. The student reads the question without the prompt.
    """
    job, P = made.job, made.prompted_task.prompt_width
    held_out, n = job.task.eval_prompts, len(answers.lengths_B)
    tokens_BL = np.concatenate([held_out.tokens_BP, answers.tokens_BL[:, P:]], axis=1)
    mask_BL = np.concatenate([held_out.mask_BP, answers.mask_BL[:, P:]], axis=1)
    sums = []
    for start in range(0, n, _CHUNK):
        rows = np.minimum(np.arange(start, start + _CHUNK), n - 1)
        inputs: Any = ((answers.tokens_BL[rows], answers.mask_BL[rows]), (tokens_BL[rows], mask_BL[rows]))
        inputs = inputs if job.mesh is None else parallel.local_rows(inputs, job.mesh)
        sums.append(host_agreement.to_numpy(made.kl(teacher, student, *inputs)).sum(axis=1))
    return np.concatenate(sums)[:n], answers.response_mask_BT.sum(axis=1)


def gold_difference(answers: policy_sampling.Answers, other: policy_sampling.Answers, asked_B: np.ndarray) -> Any:
    """Returns ``[mean, low, high]`` of the differences in gold utility of two answers to the same questions."""
    difference_B = np.asarray(answers.gold.total, np.float64) - np.asarray(other.gold.total, np.float64)
    return evaluation.mean(difference_B, asked_B)
