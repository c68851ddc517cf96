"""Prompts and rows of constitutional.py in the built-in world, whose harmful requests are the red-team prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from launch.settings import Settings
from recipe import jobs, tasks

from rlhf_jax import types
from rlhf_jax.data import padding
from rlhf_jax.simulation import demonstrators, labelers, lexicon, prompts
from rlhf_jax.simulation import world as world_lib

HARMFUL = "harmful"
DEMONSTRATIONS, RED_TEAM, HELPFUL, COMPARE, PAIRS, HELD_OUT_PAIRS, RL, EVALUATE = range(40, 48)
"""Indices of independent random streams."""


def draw(
    settings: Settings, n: int, *, stream: int, harmful: bool | None = None, split: str = "train"
) -> list[prompts.Prompt]:
    """Draws prompts of the built-in world.

    Args:
        settings: Settings of the run.
        n: Number of prompts.
        stream: Index of the random stream.
        harmful: Whether to draw only harmful or only benign requests; None for both, as in the world.
        split: ``train``, ``validation`` or ``test``.
    """
    universe = getattr(prompts.split_prompts(world_lib.make_world(settings.seed), settings.seed), split)
    kinds = {name: rows for name, rows in universe.items() if harmful is None or (name == HARMFUL) == harmful}
    return prompts.draw_prompts(kinds, n, _rng(settings, stream, (None, False, True).index(harmful)))


def _rng(settings: Settings, stream: int, number: int) -> np.random.Generator:
    return np.random.default_rng([settings.seed, stream, 1 + number])  # NumPy ignores zeros at the end of a seed


class Prompts(NamedTuple):
    """Encoded prompts, and the text of the last turn of each."""

    encoded: tasks.PromptSet
    texts: list[str]


def prompts_of(job: jobs.Job, n: int, *, stream: int, harmful: bool, split: str = "train") -> Prompts:
    """Returns n encoded prompts, all harmful or all benign requests; the arguments are those of `draw`."""
    drawn = draw(job.settings, n, stream=stream, harmful=harmful, split=split)
    return Prompts(tasks.prompt_set(job.task, drawn), [prompt.turns[-1][1] for prompt in drawn])


def text_of(ids: Sequence[int] | np.ndarray) -> str:
    """Returns the words of an answer, without special tokens."""
    return " ".join(lexicon.VOCABULARY[i] for i in ids if i >= len(lexicon.SPECIAL_TOKENS))


def texts_of(job: jobs.Job, answers: Any) -> list[str]:
    """Returns the words of sampled answers."""
    P = job.task.prompt_width
    return [text_of(row[P:][mask]) for row, mask in zip(answers.tokens_BL, answers.response_mask_BT)]


def answer_rows(job: jobs.Job, encoded: tasks.PromptSet, answers: Sequence[str]) -> types.TokenBatch:
    """Returns training rows of prompts with answers; answers that are too long are truncated and counted."""
    task = job.task
    tokens_BT, mask_BT = padding.pad_answers(
        [prompts.answer_tokens(text) for text in answers],
        width=task.response_width,
        pad_id=task.fmt.pad_id,
        counts=task.dropped,
    )
    return types.TokenBatch(
        tokens_BL=np.concatenate([encoded.tokens_BP, tokens_BT], axis=1),
        mask_BL=np.concatenate([encoded.mask_BP, mask_BT], axis=1),
        loss_mask_BL=np.concatenate([np.zeros_like(encoded.mask_BP), mask_BT], axis=1),
    )


def sampled_rows(job: jobs.Job, answers: Any) -> types.TokenBatch:
    """Returns training rows of sampled answers."""
    loss_mask_BL = np.array(answers.mask_BL)
    loss_mask_BL[:, : job.task.prompt_width] = False
    return types.TokenBatch(np.asarray(answers.tokens_BL), np.asarray(answers.mask_BL), loss_mask_BL)


def joined(parts: Sequence[Any]) -> Any:
    """Returns pytrees of rows as one, in order."""
    return jax.tree.map(lambda *x: np.concatenate([np.asarray(each) for each in x]), *parts)


def with_task(job: jobs.Job, **changes: Any) -> Any:
    """Returns the job with another task, which shares the compiled steps and the text."""
    task = dataclasses.replace(job.task, text=lambda: (job.task.pretraining_BL, job.task.pretraining_held_out_BL))
    other = dataclasses.replace(job, task=dataclasses.replace(task, **changes))
    for name in ("supervised_step", "reward_step", "ppo_step"):
        other.__dict__[name] = getattr(job, name)  # cached properties
    return other


def helpful_job(job: jobs.Job) -> Any:
    """Returns the job with demonstrations of someone who is only helpful: who fulfils every request."""
    settings = job.settings
    drawn = draw(settings, settings.sft.demonstrations, stream=DEMONSTRATIONS)
    slips = demonstrators.Slips().scaled(settings.world.slips)
    answers = demonstrators.demonstrate_all(
        world_lib.make_world(settings.seed),
        drawn,
        _rng(settings, DEMONSTRATIONS, 3),
        slips=dataclasses.replace(slips, complying=1.0, refusing=0.0),
    )
    return with_task(job, demonstrations=answer_rows(job, tasks.prompt_set(job.task, drawn), answers))


def helpfulness_job(job: jobs.Job) -> Any:
    """Returns the job whose labelers compare answers to benign requests, and only by helpfulness."""
    world, settings = job.task.world, job.settings
    assert world is not None
    n = settings.comparisons.prompts
    drawn = draw(settings, n, stream=COMPARE, harmful=False)
    drawn += draw(settings, max(n // 10, 1), stream=COMPARE, harmful=False, split="validation")
    weights_RF = np.array(world.pool.weights_RF)
    weights_RF[:, labelers.FEATURES.index("harmless")] = 0.0
    compared = tasks.prompt_set(job.task, drawn)
    pool: Any = world.pool
    world = dataclasses.replace(
        world, compare_prompts=compared, n_compare=n, pool=pool.replace(weights_RF=jax.numpy.asarray(weights_RF))
    )
    return with_task(job, world=world, compared=(compared,))


def rl_job(job: jobs.Job, *, red_team: float) -> Any:
    """Returns the job whose RL prompts are harmful requests, in the share ``red_team``, and benign ones."""
    settings = job.settings
    n = settings.ppo.iterations * settings.ppo.batch // settings.ppo.samples
    n_red = round(red_team * n)
    drawn = draw(settings, n_red, stream=RL, harmful=True) + draw(settings, n - n_red, stream=RL, harmful=False)
    order = _rng(settings, RL, 3).permutation(n)
    return with_task(job, rl_prompts=tasks.prompt_set(job.task, [drawn[i] for i in order]))
