"""Critiques and revisions of responses by a language model (Bai et al. 2022, Constitutional AI, section 3.1).

A response is revised several times. Each time, a principle is sampled, the model is asked to criticise the response
according to it, and then to revise the response. Without critiques, it is asked for the revision at once (section 3.5).
The revision is the response that the next round starts from.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from rlhf_jax.feedback import asking
from rlhf_jax.feedback.principles import Principle


class Text(NamedTuple):
    """A generated text."""

    text: str
    tokens: int = 0
    """Number of tokens of request and text, as far as the model counts them."""


class Writer(Protocol):
    """Writes critiques and revisions."""

    def __call__(self, requests: Sequence[str], /, *, sample: int) -> Iterable[tuple[int, Text | Exception]]:
        """Yields the index of each request with its text, or with the error that prevented one, in any order.

        ``sample`` is the number of the round. A response that a revision leaves unchanged can meet the same principle
        again; the texts of the two rounds should then be independent samples.
        """
        ...


class RevisionExample(NamedTuple):
    """A response with a critique and a revision, which a request shows before it asks."""

    prompt: str
    response: str
    principle: Principle
    critique: str
    revision: str


class Revised(NamedTuple):
    """A response and its revisions."""

    responses: tuple[str, ...]
    """The first response and its revisions; fewer than were wanted if requests failed or the budget was used up."""
    critiques: tuple[str, ...]
    """The critique before each revision; empty without critiques."""
    principles: tuple[int, ...]
    """Index of the principle of each round."""


@dataclasses.dataclass(frozen=True)
class Revisions:
    """The revisions of N responses, and how they were obtained."""

    revised_N: list[Revised]
    asked: int
    """Number of requests that were made now."""
    stored: int
    """Number of requests whose texts were in the file."""
    tokens: int
    """Number of tokens of the texts that came now."""
    errors: dict[str, int]
    """How often each error prevented a text. An empty text counts as an error."""

    def complete(self, rounds: int) -> list[int]:
        """Returns the indices of the responses that were revised ``rounds`` times."""
        return [i for i, each in enumerate(self.revised_N) if len(each.responses) == rounds + 1]


_END = re.compile(r"\n\s*\n\s*\n|\n\s*(?:Conversation|Reply|Critique request|Critique|Revision request|Revision):")
"""Where the text of a model ends that continues with the next example or request."""


def critique_request(prompt: str, response: str, principle: Principle) -> str:
    """Returns a request for a critique, which ends where the critique follows."""
    return f"Conversation:\n{prompt}\n\nReply:\n{response}\n\nCritique request: {principle.critique}\n\nCritique:"


def revision_request(prompt: str, response: str, principle: Principle, *, critique: str | None = None) -> str:
    """Returns a request for a revision (Bai et al. 2022, Constitutional AI, section 3.1).

    Args:
        prompt: The prompt.
        response: The response to revise.
        principle: The principle.
        critique: The critique that the request follows; None to ask for the revision at once.

    Returns:
        The request, which ends where the revision follows.
    """
    if critique is None:
        before = f"Conversation:\n{prompt}\n\nReply:\n{response}"
    else:
        before = f"{critique_request(prompt, response, principle)} {critique}"
    return f"{before}\n\nRevision request: {principle.revision}\n\nRevision:"


def shown(example: RevisionExample, *, critique: bool, revision: bool) -> str:
    """Returns an example as it precedes a request for a critique or a revision."""
    prompt, response, principle, critique_text, revision_text = example
    if not revision:
        return f"{critique_request(prompt, response, principle)} {critique_text}\n\n\n"
    asked = revision_request(prompt, response, principle, critique=critique_text if critique else None)
    return f"{asked} {revision_text}\n\n\n"


def sampled_principles(n: int, *, rounds: int, principles: int, seed: int) -> np.ndarray:
    """Samples a principle for each response and round.

    Args:
        n: Number of responses.
        rounds: Number of rounds.
        principles: Number of principles.
        seed: Seed of the samples.

    Returns:
        Indices of principles, ``[n, rounds]``; those of the first responses do not depend on n.
    """
    return np.random.default_rng([seed, rounds, 0xCA1]).integers(principles, size=(n, rounds))


def revise(
    prompts: Sequence[str],
    responses: Sequence[str],
    generate: Writer,
    *,
    name: str,
    principles: Sequence[Principle],
    rounds: int = 4,
    critique: bool = True,
    examples: Sequence[RevisionExample] = (),
    seed: int = 0,
    answers: str | os.PathLike[str] | None = None,
    max_questions: int | None = None,
    max_tokens: int | None = None,
    batch: int = 64,
    on_answer: Callable[[int, int], None] = lambda done, total: None,
) -> Revisions:
    """Revises each response ``rounds`` times (Bai et al. 2022, Constitutional AI, section 3.1).

    Args:
        prompts: The prompts, N texts.
        responses: A response to each prompt.
        generate: Yields the index of each request with its text, or with the error that prevented one, such as
            `ModelWriter` or `endpoint.Endpoint.generate`.
        name: What the texts depend on besides request and round: the model and its settings. Part of the key of a
            stored text.
        principles: The principles, of which one is sampled for each response and round.
        rounds: Number of revisions of each response (4 in the paper).
        critique: Whether each revision follows a critique.
        examples: Examples that precede each request (few-shot; they prevent errors of point of view in the paper).
        seed: Seed of the principles.
        answers: JSON-lines file of texts. Requests that it answers are not made; new texts are appended as they arrive.
            None stores nothing.
        max_questions: Maximum number of requests that are made now; None for no limit.
        max_tokens: Number of tokens after which no more requests are made now; None for no limit.
        batch: Number of requests that ``generate`` receives at a time.
        on_answer: Called after each text or error with the number of requests so far and an upper bound of their total.

    Returns:
        The revisions. Repeat the call with the same file to make the requests that are still open.

    Raises:
        ValueError: The numbers of prompts and responses differ, there is no principle, or a limit is invalid.
    """
    if len(prompts) != len(responses) or not principles or rounds < 0:
        raise ValueError(
            f"{len(prompts)} prompts, {len(responses)} responses, {len(principles)} principles, {rounds} rounds: there "
            "must be one response to each prompt and at least one principle"
        )
    asker = asking.Asker(Text, name=name, path=answers, max_questions=max_questions, max_tokens=max_tokens, batch=batch)
    n, empty = len(prompts), 0
    total = n * rounds * (1 + critique)
    numbers_NR = sampled_principles(n, rounds=rounds, principles=len(principles), seed=seed)
    before = ["".join(shown(each, critique=critique, revision=r) for each in examples) for r in (False, True)]
    revised: list[tuple[list[str], list[str], list[int]]] = [([response], [], []) for response in responses]
    live, done = list(range(n)), 0

    def ask(requests: Sequence[str], r: int) -> list[str]:
        """Returns the texts of round r, which are empty for requests that failed."""
        nonlocal empty, done
        write = functools.partial(generate, sample=r)
        texts = asker(requests, write, sample=r, on_answer=lambda now, _: on_answer(done + now, total))
        cleaned = ["" if each is None else _END.split(f"{each.text.strip()}\n")[0].strip() for each in texts]
        empty += sum(each is not None and not text for each, text in zip(texts, cleaned))
        done += len(requests)
        on_answer(done, total)
        return cleaned

    for r in range(rounds):
        chosen = {i: principles[numbers_NR[i, r]] for i in live}
        critiques: dict[int, str] = {}
        if critique:
            texts = ask([before[0] + critique_request(prompts[i], revised[i][0][-1], chosen[i]) for i in live], r)
            critiques = {i: text for i, text in zip(live, texts) if text}
            live = list(critiques)
        texts = ask(
            [
                before[1] + revision_request(prompts[i], revised[i][0][-1], chosen[i], critique=critiques.get(i))
                for i in live
            ],
            r,
        )
        for i, text in zip(live, texts):
            if text:
                revised[i][0].append(text)
                revised[i][1].extend([critiques[i]] if critique else [])
                revised[i][2].append(int(numbers_NR[i, r]))
        live = [i for i, text in zip(live, texts) if text]
    errors = dict(asker.errors) | ({"empty text": empty} if empty else {})
    found = [Revised(tuple(each[0]), tuple(each[1]), tuple(each[2])) for each in revised]
    return Revisions(found, asked=asker.asked, stored=asker.stored, tokens=asker.tokens, errors=errors)
