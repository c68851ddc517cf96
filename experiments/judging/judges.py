"""Judges: reward models and Python functions that score the answers of policies, and the comparison of their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from finetune import reward_functions, sampling_settings
from launch import initial_model
from launch.run_settings import SettingError
from recipe import human_comparisons

from judging import compared_policies, reward_scores
from rlhf_jax import diagnostics, parallel
from rlhf_jax.data import chat, errors

Given = compared_policies.Given
Progress = compared_policies.Progress


def score_with_model(
    settings: sampling_settings.Sampling,
    path: str,
    policies: Sequence[Given],
    *,
    width: int | None,
    mesh: Any,
    counts: errors.DropCount,
    on_progress: Progress,
) -> np.ndarray:
    """Returns the scores of all answers under a reward model, ``[policies, N, S]``; NaN for prompts it cannot encode.

    The texts are encoded with the reward model's own chat template, so the policies may have other tokenizers. An
    answer that the policy did not end has no stop token.

    Args:
        settings: Batch size and number format.
        path: Folder of the reward model.
        policies: The policies, with the same N prompts and S answers to each.
        width: Maximum number of tokens of a prompt with its answer (see `reward_scores.encode`); None is the model's
            maximum length.
        mesh: The mesh; None for one device.
        counts: Counts shortened and dropped prompts and truncated answers.
        on_progress: Called with the numbers of finished and of all answers.

    Raises:
        SettingError: The folder has no usable reward model.
    """
    model = compared_policies.load(settings, path, flag="--reward-model", mesh=mesh, kind=initial_model.REWARD_MODEL)
    width = min(width or model.cfg.max_length, model.cfg.max_length)
    found = policies[0].records
    lines = [[line for given in policies for line in given.lines[row]] for row in range(len(found))]
    rows = reward_scores.encode(
        model.fmt,
        [record.prompt for record in found],
        [[line["response"] for line in each] for each in lines],
        width=width,
        counts=counts,
        tools=[record.tools for record in found],
        stopped=[[line.get("stopped", True) for line in each] for each in lines],
    )
    step = parallel.JitStep(
        partial(reward_scores.score_batch, cfg=model.cfg),
        donate_argnums=(),
        mesh=mesh,
        batch_args=(1, 2),
        replicated_args=(),
    )
    ids = [prompt + answer for prompt, each in zip(rows.prompts, rows.answers) for answer in each]
    scores = reward_scores.score_rows(
        ids,
        lambda *arrays: jax.device_get(step(model.params, *arrays)),
        batch=settings.batch,
        max_length=width,
        pad_id=model.fmt.pad_id,
        on_progress=lambda done: on_progress(done, len(ids)),
    )
    if not np.isfinite(scores).all():
        raise SettingError(f"--reward-model {path} computes scores that are not finite; use a different model")
    scores_NPS = np.full((len(found), len(policies), len(policies[0].lines[0])), np.nan)
    scores_NPS[rows.kept] = scores.reshape(-1, *scores_NPS.shape[1:])
    return scores_NPS.swapaxes(0, 1)


def score_with_function(
    function: reward_functions.ScoreAnswers, policies: Sequence[Given], *, batch: int, on_progress: Progress
) -> np.ndarray:
    """Returns the scores of all answers under a Python function, ``[policies, N, S]``.

    Args:
        function: ``(prompts, responses, records) -> scores``.
        policies: The policies, with the same N prompts and S answers to each.
        batch: Number of answers per call.
        on_progress: Called with the numbers of finished and of all answers.
    """
    rows = [
        (chat.messages(record.prompt), line["response"], record.metadata)
        for given in policies
        for record, lines in zip(given.records, given.lines)
        for line in lines
    ]
    scores = []
    for first in range(0, len(rows), batch):
        scores.append(function(*zip(*rows[first : first + batch])))
        on_progress(min(first + batch, len(rows)), len(rows))
    return np.concatenate(scores).reshape(len(policies), len(policies[0].lines), -1)


def clusters(policies: Sequence[Given], *, note: Callable[[str], None]) -> list[int]:
    """Returns a label of what is asked for each answer of a policy; answers to the same conversation share it."""
    asked_N = human_comparisons.conversation_ids(policies[0].records, warn=note)
    return np.repeat(asked_N, len(policies[0].lines[0])).tolist()


def compare(scores_PNS: np.ndarray, policies: Sequence[Given], asked: list[int]) -> list[dict[str, Any]]:
    """Returns each policy's mean score and its win rates against the first policy, as ``[mean, low, high]``.

    Sample k of a policy is compared with sample k of the first policy; a tie counts as one half. The win rate at equal
    length is that of `diagnostics.length_controlled_win_rates`, with lengths in characters, which do not depend on the
    tokenizer. Intervals are clustered by what is asked.
    """
    rows, lengths = [], [np.array([1 + len(line["response"]) for line in flat(given)]) for given in policies]
    for number, scores_NS in enumerate(scores_PNS):
        row: dict[str, Any] = {"score": list(diagnostics.clustered_mean(scores_NS.ravel(), asked))}
        if number > 0:
            outcomes = diagnostics.win_outcomes(scores_NS.ravel(), scores_PNS[0].ravel())
            row["win_rate"] = list(diagnostics.clustered_mean(outcomes, asked, rate=True))
            row["length_controlled_win_rate"] = _at_equal_length(outcomes, lengths[number], lengths[0], asked)
        rows.append(row)
    return rows


def _at_equal_length(outcomes: np.ndarray, lengths: Any, others: Any, asked: list[int]) -> list[float] | None:
    try:
        rates = diagnostics.length_controlled_win_rates(outcomes, lengths, others, clusters=asked).rates
    except ValueError:  # the ratio of the lengths is the same for all answers, so its effect is unknown
        return None
    return list(rates[0])


def describe(given: Given, asked: list[int]) -> dict[str, Any]:
    """Returns what depends neither on a judge nor on other policies: lengths and the share of finished answers.

    The model did not write the answers to prompts that a gate refused, so their share is reported instead.
    """
    refused = np.array([bool(line.get("refused")) for line in flat(given)])
    row: dict[str, Any] = {}
    if refused.any():
        row["refused"] = list(diagnostics.clustered_mean(refused, asked, rate=True))
    lines = [line for line, left_out in zip(flat(given), refused) if not left_out]
    asked = [i for i, left_out in zip(asked, refused) if not left_out]
    if not lines:
        return row
    if all("tokens" in line for line in lines):
        row["length"] = list(diagnostics.clustered_mean([float(line["tokens"]) for line in lines], asked))
    row["characters"] = list(diagnostics.clustered_mean([float(len(line["response"])) for line in lines], asked))
    if all("stopped" in line for line in lines):
        row["stopped"] = list(diagnostics.clustered_mean([line["stopped"] for line in lines], asked, rate=True))
    return row


def describe_diversity(policies: Sequence[Given], asked: list[int]) -> tuple[list[dict[str, Any]], int]:
    """Returns how diverse the answers of each policy are, and the number of pairs of words that are compared.

    ``diversity`` is the share of distinct pairs among all pairs of consecutive words, of which all policies have
    equally many. ``self_bleu`` compares the words of each answer with those of all others. Neither has an interval.
    The mean entropy per token is estimated from the log-probabilities of the answers, if they are known, and divided by
    that of the first policy if that has the same tokens.
    """
    words = [[line["response"].split() for line in flat(given)] for given in policies]
    rows: list[dict[str, Any]] = [
        {"diversity": ratio, "self_bleu": diagnostics.self_bleu(each)}
        for ratio, each in zip(diagnostics.equal_distinct_n(words, n=2), words)
    ]
    index = np.unique(asked, return_inverse=True)[1].ravel()
    first = _surprise(policies[0])
    for row, given in zip(rows, policies):
        own = _surprise(given)
        if own is None:
            continue
        row["entropy"] = list(
            diagnostics.ratio_interval(*(np.bincount(index, weights=each) for each in own), rate=False)
        )
        if first is not None and given is not policies[0] and given.vocabulary == policies[0].vocabulary:
            row["entropy_ratio"] = list(diagnostics.entropy_ratio(*own, *first, clusters=asked))
    return rows, diagnostics.fewest_ngrams(words, n=2)


def _surprise(given: Given) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the negative log-probability and the number of tokens of each answer; None if they are unknown."""
    if given.logprobs_NS is None:
        return None
    return -given.logprobs_NS.ravel().astype(np.float64), np.array([line["tokens"] for line in flat(given)], np.float64)


def flat(given: Given) -> list[dict[str, Any]]:
    """Returns the lines of all answers of a policy."""
    return [line for lines in given.lines for line in lines]
