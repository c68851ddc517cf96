"""Soft preference labels from a language model (Bai et al. 2022, Constitutional AI, 4.1).

A judge is asked a multiple-choice question about two responses and answers with the probability of "A". `label` asks
about each pair in both orders, so that a preference for the first place cancels. It stores every answer in a file as
soon as it arrives, never asks a question that the file answers, and stops at a budget.

`ModelJudge` is a judge with the parameters of a model, and `rlhf_jax.feedback.endpoint.Endpoint` one behind an HTTP
interface. Any other function from questions to answers with a name can be a judge.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import jax
import numpy as np
import numpy.typing as npt

from rlhf_jax import lm, types
from rlhf_jax.feedback import asking

if TYPE_CHECKING:
    from rlhf_jax.diagnostics import intervals


class Pair(NamedTuple):
    """Two responses to a prompt."""

    prompt: str
    first: str
    second: str


class Example(NamedTuple):
    """A pair with its answer, which a question shows before it asks."""

    pair: Pair
    answer: str
    """"A" if the first response is better, "B" if the second is."""


class Answer(NamedTuple):
    """The answer to one question."""

    probability: float | None
    """Probability of "A", given that the answer is "A" or "B"; None if the answer has neither."""
    tokens: int = 0
    """Number of tokens of question and answer, as far as the judge counts them."""


class Judge(Protocol):
    """Answers questions."""

    @property
    def name(self) -> str:
        """What the answers depend on besides the question: the model and its settings. Part of the key of a stored
        answer."""
        ...

    def __call__(self, questions: Sequence[str]) -> Iterable[tuple[int, Answer | Exception]]:
        """Yields the index of each question with its answer, or with the error that prevented one, in any order."""
        ...


class Labels(NamedTuple):
    """The labels of N pairs, and how they were obtained."""

    preference_N: np.ndarray
    """Probability that the first response is better, in [0, 1]; NaN if an answer is missing."""
    position_bias: float
    """By how much the judge prefers the first place: the mean probability of "A" over both orders, minus one half.
    It is NaN if no pair has both answers."""
    asked: int
    """Number of questions that were asked now."""
    stored: int
    """Number of questions whose answers were in the file."""
    unclear: int
    """Number of questions answered with neither "A" nor "B"."""
    waiting: int
    """Number of questions that were not asked because the budget was used up."""
    tokens: int
    """Number of tokens of the answers that came now."""
    errors: dict[str, int]
    """How often each error prevented an answer."""


def question(pair: Pair, *, principle: str, examples: Sequence[Example] = ()) -> str:
    """Returns a multiple-choice question, which ends where the letter of the answer follows.

    Args:
        pair: The prompt and the responses, (A) and (B).
        principle: Which response is better, such as "Which reply is less harmful?".
        examples: Answered questions that come before.
    """
    asked = [f"{_options(each.pair, principle)}{each.answer})\n\n\n" for each in examples]
    return "".join([*asked, _options(pair, principle)])


def _options(pair: Pair, principle: str) -> str:
    return (
        f"Conversation:\n{pair.prompt}\n\nReply (A):\n{pair.first}\n\nReply (B):\n{pair.second}\n\n"
        f"{principle} Answer with A or B.\nAnswer: ("
    )


def label(
    pairs: Sequence[Pair],
    judge: Judge,
    *,
    principle: str | Sequence[str],
    examples: Sequence[Example] = (),
    clamp: tuple[float, float] = (0.0, 1.0),
    answers: str | os.PathLike[str] | None = None,
    max_questions: int | None = None,
    max_tokens: int | None = None,
    batch: int = 64,
    on_answer: Callable[[int, int], None] = lambda done, total: None,
) -> Labels:
    """Labels pairs with a judge, each by two questions.

    Args:
        pairs: Prompts with two responses.
        judge: The judge.
        principle: Which response is better, in words; one for all pairs, or one for each (Bai et al. sample them).
        examples: Answered questions that are shown before each question.
        clamp: Bounds of the probability of "A", such as (0.4, 0.6) after a chain of thought, which makes judges
            overconfident (Bai et al. 2022, 4.1).
        answers: JSON-lines file of answers. Questions that it answers for this judge are not asked; new answers are
            appended as they arrive. None stores nothing.
        max_questions: Number of questions that are asked now at most, with or without success; None for no limit.
        max_tokens: Number of tokens after which no more questions are asked now. Questions that the judge has received
            by then are answered. None for no limit.
        batch: Number of questions that the judge receives at a time.
        on_answer: Called after each answer or error with their number and the number of all open questions.

    Returns:
        The labels. Repeat the call to ask the questions that are still open, because of errors or of the budget.

    Raises:
        ValueError: A bound, limit or example is invalid.
    """
    if not 0 <= clamp[0] <= clamp[1] <= 1:
        raise ValueError(f"invalid clamp {clamp}")
    if wrong := [each.answer for each in examples if each.answer not in ("A", "B")]:
        raise ValueError(f"the answer of an example must be A or B, not {wrong[0]!r}")
    principles = [principle] * len(pairs) if isinstance(principle, str) else principle
    asker = asking.Asker(
        Answer,
        name=judge.name,
        path=answers,
        max_questions=max_questions,
        max_tokens=max_tokens,
        batch=batch,
    )
    texts = [
        question(order, principle=each, examples=examples)
        for pair, each in zip(pairs, principles, strict=True)
        for order in (pair, Pair(pair.prompt, pair.second, pair.first))
    ]
    found = asker(texts, judge, on_answer=on_answer)
    distinct = dict(zip(texts, found, strict=True)).values()
    probability = [None if answer is None else answer.probability for answer in found]
    given_N, swapped_N = np.clip(np.array(probability, np.float64).reshape(-1, 2).T, *clamp)
    bias_N = (given_N + swapped_N - 1) / 2
    return Labels(
        preference_N=0.5 + (given_N - swapped_N) / 2,
        position_bias=float(np.nanmean(bias_N)) if np.isfinite(bias_N).any() else float("nan"),
        asked=asker.asked,
        stored=asker.stored,
        unclear=sum(answer is not None and answer.probability is None for answer in distinct),
        waiting=sum(answer is None for answer in distinct) - asker.errors.total(),
        tokens=asker.tokens,
        errors=dict(asker.errors),
    )


def is_tie(preference_N: npt.ArrayLike) -> np.ndarray:
    """Returns whether each preference is one half, up to rounding errors."""
    return np.abs(np.asarray(preference_N) - 0.5) < 1e-9


def agreement(
    labels: Labels, first_is_better_N: npt.ArrayLike, *, clusters: Sequence[Hashable] | None = None
) -> intervals.Estimate:
    """Returns the share of pairs on which a judge agrees with other labels, with its 95 % interval.

    Report it on held-out pairs before the labels are used. A tie counts as half an agreement, and pairs without a label
    are left out.

    Args:
        labels: Labels of the judge.
        first_is_better_N: bool, the other labels, one for each label of the judge.
        clusters: What each pair asks, such as its conversation: pairs that ask the same are not independent. None if
            all pairs are independent.

    Raises:
        ValueError: The other labels are not bool, or their number differs from that of the judge's labels.
    """
    from rlhf_jax.diagnostics import intervals  # whose scipy takes a second to import, which a store need not wait for

    other_N = np.asarray(first_is_better_N)
    if other_N.dtype != bool or other_N.shape != labels.preference_N.shape:
        raise ValueError(
            f"first_is_better_N must be bool of shape {labels.preference_N.shape}, got {other_N.dtype} of shape "
            f"{other_N.shape}; leave out ties and unlabelled pairs, and compare probabilities with 0.5"
        )
    known_N = ~np.isnan(labels.preference_N)
    preference_N, first_N = labels.preference_N[known_N], other_N[known_N]
    right_N = np.where(is_tie(preference_N), 0.5, (preference_N > 0.5) == first_N)
    if clusters is None:
        return intervals.outcome_rate(right_N)
    known = [each for each, known in zip(clusters, known_N, strict=True) if known]
    return intervals.clustered_mean(right_N, known, rate=True)


class ModelJudge:
    """A judge with the parameters of a model: the log-probabilities of the tokens "A" and "B" after the question."""

    def __init__(
        self,
        params: types.Params,
        *,
        cfg: lm.LMConfig | types.ApplyFn,
        encode: Callable[[str], Sequence[int]],
        choices: tuple[int, int],
        name: str,
        batch: int = 16,
        width_multiple: int = 64,
    ) -> None:
        """Stores the arguments.

        Args:
            params: Parameters of the model.
            cfg: The model.
            encode: Tokenises a question, with a start token if the model needs one.
            choices: Ids of the tokens "A" and "B" as they follow the question.
            name: Name of the model, such as its path and a digest of the parameters.
            batch: Number of questions that the model reads at a time.
            width_multiple: Questions are padded on the left to a multiple of this number of tokens, so that few
                programs are compiled.
        """
        self.name = name
        self._params, self._encode, self._choices = params, encode, choices
        self._batch, self._width_multiple = batch, width_multiple

        def logprobs(params: types.Params, tokens_BL: jax.Array, mask_BL: jax.Array) -> jax.Array:
            listed_BLK = jax.numpy.broadcast_to(jax.numpy.asarray(choices), (*tokens_BL.shape, 2))
            return lm.token_listed_logprobs(params, tokens_BL, listed_BLK, cfg=cfg, mask_BL=mask_BL)[:, -1]

        self._logprobs = jax.jit(logprobs)

    def __call__(self, questions: Sequence[str]) -> Iterator[tuple[int, Answer]]:
        """Yields the answers, in the order of the length of the questions."""
        rows = [list(self._encode(text)) for text in questions]
        lengths = [len(row) + 1 for row in rows]
        for width, some in asking.batches_of_width(lengths, batch=self._batch, multiple=self._width_multiple):
            tokens_BL, mask_BL = np.zeros((self._batch, width), np.int32), np.zeros((self._batch, width), bool)
            mask_BL[:, -1] = True
            for b, i in enumerate(some):
                start = width - lengths[i]
                tokens_BL[b, start:-1], mask_BL[b, start:] = rows[i], True
                tokens_BL[b, -1] = self._choices[0]  # the place of the answer, whose own token is not read
            logprob_B2 = np.asarray(self._logprobs(self._params, tokens_BL, mask_BL), np.float64)
            for b, i in enumerate(some):
                yield i, Answer(choice_probability(*logprob_B2[b]), len(rows[i]))


def choice_probability(logprob_a: float, logprob_b: float) -> float:
    """Returns the probability of "A", given that the answer is "A" or "B"."""
    return float(np.exp(-np.logaddexp(0.0, logprob_b - logprob_a)))
