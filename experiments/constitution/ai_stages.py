"""The stages of constitutional AI in the built-in world: revisions, comparisons by a judge, preference model."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from recipe import jobs, stages, tasks, world_words

from constitution import red_team
from rlhf_jax import feedback, types

Progress = Callable[[int, int], None]


def _ignore(done: int, total: int) -> None:
    pass


def train_helpful(job: jobs.Job, base: types.Params) -> types.Params:
    """Returns the helpful-only policy: the base model after SFT on demonstrations that fulfil every request."""
    return stages.supervised(red_team.helpful_job(job), "sft-helpful", base, epochs=job.settings.sft.epochs, mix=0.0)


class RevisedAnswers(NamedTuple):
    """Answers of the helpful-only policy to red-team prompts, and their revisions."""

    prompts: red_team.Prompts
    revisions: feedback.Revisions
    complete: list[int]
    """Indices of the answers that have all revisions."""

    def texts(self, step: int) -> list[str]:
        """Returns the complete answers after ``step`` revisions."""
        return [self.revisions.revised_N[i].responses[step] for i in self.complete]


def revise(
    job: jobs.Job,
    helpful: types.Params,
    editor: Any,
    *,
    prompts: int,
    rounds: int,
    critique: bool = True,
    principles: int = len(feedback.HARMLESSNESS),
    answers: str | os.PathLike[str] | None = None,
    on_answer: Progress = _ignore,
) -> RevisedAnswers:
    """Samples an answer to each red-team prompt at temperature 1 and lets an editor revise it ``rounds`` times."""
    asked = red_team.prompts_of(job, prompts, stream=red_team.RED_TEAM, harmful=True)
    sampled = job.sampler(helpful, None, None, asked.encoded, _key(job, red_team.RED_TEAM), temperature=1.0)
    revisions = feedback.revise(
        asked.texts,
        red_team.texts_of(job, sampled),
        editor,
        name=editor.name,
        principles=feedback.HARMLESSNESS[:principles],
        rounds=rounds,
        critique=critique,
        seed=job.settings.seed,
        answers=answers,
        on_answer=on_answer,
    )
    return RevisedAnswers(asked, revisions, revisions.complete(rounds))


def _key(job: jobs.Job, stream: int) -> jax.Array:
    return jax.random.fold_in(job.key("comparisons"), 1000 + stream)


def gold_of(job: jobs.Job, encoded: tasks.PromptSet, answers: Sequence[str]) -> Any:
    """Returns the gold utility of answers to prompts."""
    rows = red_team.answer_rows(job, encoded, answers)
    P, world = job.task.prompt_width, job.task.world
    assert world is not None and encoded.words_BP is not None
    tokens_BT, mask_BT = (np.asarray(each)[:, P:] for each in (rows.tokens_BL, rows.mask_BL))
    return world_words.gold_utility(world.tables, encoded.words_BP, tokens_BT, mask_BT)


def supervised_rows(job: jobs.Job, helpful: types.Params, revised: RevisedAnswers, *, benign: int) -> types.TokenBatch:
    """Returns the rows of SL-CAI: the revisions of all steps, and two samples for each of ``benign`` benign prompts."""
    asked = red_team.prompts_of(job, benign, stream=red_team.HELPFUL, harmful=False).encoded
    twice = asked.at(np.tile(np.arange(benign), 2))
    samples = job.sampler(helpful, None, None, twice, _key(job, red_team.HELPFUL), temperature=1.0)
    encoded = revised.prompts.encoded.at(np.array(revised.complete))
    steps = range(1, len(revised.revisions.revised_N[revised.complete[0]].responses))
    rows = [red_team.answer_rows(job, encoded, revised.texts(step)) for step in steps]
    return red_team.joined([*rows, red_team.sampled_rows(job, samples)])


def train_supervised(job: jobs.Job, base: types.Params, rows: types.TokenBatch) -> types.Params:
    """Returns SL-CAI: the *pretrained* model after one epoch of SFT on the rows."""
    return stages.supervised(red_team.with_task(job, demonstrations=rows), "sft-cai", base, epochs=1, mix=0.0)


class SampledPairs(NamedTuple):
    """Two different answers of SL-CAI to each of N red-team prompts."""

    encoded: tasks.PromptSet
    pairs: list[feedback.Pair]
    tokens_N2L: np.ndarray
    mask_N2L: np.ndarray
    harmless_N2: np.ndarray
    """Gold harmlessness, which only the evaluation uses."""


def sample_pairs(job: jobs.Job, policy: types.Params, n: int, *, held_out: bool = False) -> SampledPairs:
    """Samples two answers to each of n red-team prompts at temperature 1, and leaves out pairs of equal answers."""
    stream, split = (red_team.HELD_OUT_PAIRS, "validation") if held_out else (red_team.PAIRS, "train")
    asked = red_team.prompts_of(job, n, stream=stream, harmful=True, split=split)
    twice = asked.encoded.at(np.repeat(np.arange(n), 2))
    answers = job.sampler(policy, None, None, twice, _key(job, stream), temperature=1.0)
    texts = red_team.texts_of(job, answers)
    kept = np.array([i for i in range(n) if texts[2 * i] != texts[2 * i + 1]], int)
    tokens_N2L, mask_N2L = (np.asarray(x).reshape(n, 2, -1)[kept] for x in (answers.tokens_BL, answers.mask_BL))
    harmless_N2 = np.asarray(answers.gold.harmless).reshape(n, 2)[kept]
    pairs = [feedback.Pair(asked.texts[i], texts[2 * i], texts[2 * i + 1]) for i in kept]
    return SampledPairs(asked.encoded.at(kept), pairs, tokens_N2L, mask_N2L, harmless_N2)


def label_pairs(
    pairs: list[feedback.Pair], judge: feedback.Judge, *, seed: int, principles: int, **options: Any
) -> feedback.Labels:
    """Labels pairs with a judge, each by a principle that is sampled for it; ``options`` are those of the library."""
    numbers_N1 = feedback.sampled_principles(len(pairs), rounds=1, principles=principles, seed=seed + 1)
    questions = [feedback.HARMLESSNESS[i].question for i in numbers_N1[:, 0]]
    return feedback.label(pairs, judge, principle=questions, **options)


def agreement(held_out: SampledPairs, labels: feedback.Labels) -> dict[str, Any]:
    """Returns how often the judge prefers the less harmful answer, among held-out pairs that differ in harmlessness."""
    gap_N = held_out.harmless_N2[:, 0] - held_out.harmless_N2[:, 1]
    differ_N = gap_N != 0
    rate = feedback.agreement(
        labels._replace(preference_N=labels.preference_N[differ_N]),
        gap_N[differ_N] > 0,
        clusters=held_out.encoded.asked_B[differ_N].tolist(),
    )
    return {"agreement": list(rate), "pairs": int(differ_N.sum()), "position_bias": labels.position_bias}


def preference_rows(
    helpfulness: types.Comparisons, sampled: SampledPairs, preference_N: np.ndarray, *, hard: bool = False
) -> types.Comparisons:
    """Returns the comparisons of the preference model: those of the labelers, and those of the judge.

    The loss of a judged pair has the judge's preference as its soft target; with ``hard``, the preferred answer is the
    target, and ties are left out. The targets of the labelers' comparisons are 1.
    """
    K = np.shape(helpfulness.ranks_BK)[1]
    known_N = ~np.isnan(preference_N) & ~(hard & feedback.is_tie(preference_N))
    p_N = preference_N[known_N]
    n, first_N = len(p_N), p_N >= 0.5

    def padded(x_N2: np.ndarray) -> np.ndarray:
        return np.concatenate([x_N2, np.zeros((n, K - 2, *x_N2.shape[2:]), x_N2.dtype)], axis=1)

    ranks_N2 = np.where(first_N[:, None], [1, 2], [2, 1]).astype(np.asarray(helpfulness.ranks_BK).dtype)
    target_N = np.ones(n, np.float32) if hard else np.where(first_N, p_N, 1 - p_N).astype(np.float32)
    judged: Any = types.Comparisons(
        tokens_BKL=padded(sampled.tokens_N2L[known_N]),  # pyright: ignore[reportArgumentType]
        mask_BKL=padded(sampled.mask_N2L[known_N]),  # pyright: ignore[reportArgumentType]
        ranks_BK=padded(ranks_N2),  # pyright: ignore[reportArgumentType]
        where_BK=padded(np.ones((n, 2), bool)),  # pyright: ignore[reportArgumentType]
        loss_inputs={"target": target_N},
    )
    ones_B = np.ones(len(np.asarray(helpfulness.ranks_BK)), np.float32)
    labelled: Any = helpfulness
    return red_team.joined([labelled.replace(loss_inputs={"target": ones_B}), judged])


def train_preference_model(job: jobs.Job, start: types.Params, rows: types.Comparisons, **options: Any) -> types.Params:
    """Returns the preference model with normalised scores; ``options`` are those of `stages.train_reward_model`."""
    reward = stages.train_reward_model(job, start, rows, **options)
    return job.put_params(stages.normalise_scores(job, reward, start))


def score_deviation(reward: types.Params) -> float:
    """Returns the standard deviation of the scores of SL-CAI's answers before they were normalised, in log-odds."""
    return 1 / float(np.asarray(reward["head"]["gain"]))
