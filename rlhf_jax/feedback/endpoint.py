"""A model behind an HTTP interface of OpenAI's form, ``/chat/completions``; as a judge, with log-probabilities.

It needs the packages httpx and tenacity: ``pip install 'rlhf_jax[feedback]'``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, TypeVar

import httpx
import numpy as np
import tenacity

from rlhf_jax.feedback.judge import Answer, choice_probability
from rlhf_jax.feedback.revision import Text

A = TypeVar("A")
THINK = "Think about both replies step by step. Do not name the better one yet."


class RefusedError(RuntimeError):
    """The server answered with an error, or with something that is not a completion."""


class Endpoint:
    """Answers questions and writes texts by requests to a server, several at a time.

    Failures of the connection, timeouts, the statuses 408, 429 and 5xx, and replies that are no completion are tried
    again, after growing pauses. After the last attempt, the question is answered with the error.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        key: str | None = None,
        think_tokens: int = 0,
        timeout: float = 60.0,
        attempts: int = 5,
        concurrency: int = 8,
        pause: float = 1.0,
        options: dict[str, Any] | None = None,
    ) -> None:
        """Stores the arguments.

        Args:
            url: Address of the interface, such as ``http://localhost:8000/v1``.
            model: Name of the model.
            key: Sent as the bearer token; not part of the name of the judge.
            think_tokens: Maximum number of tokens of a chain of thought that a first request asks for, at temperature
                1; 0 for none.
            timeout: Seconds to wait for the server, for each attempt.
            attempts: Number of attempts for each request.
            concurrency: Number of requests at a time.
            pause: Seconds before the second attempt; doubled for each further one, up to a minute.
            options: Further fields of a request.
        """
        self._url, self._model, self._think_tokens = url.rstrip("/"), model, think_tokens
        self._concurrency, self._options = concurrency, options or {}
        self._client = httpx.Client(timeout=timeout, headers={"Authorization": f"Bearer {key}"} if key else {})
        self._retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(attempts),
            wait=tenacity.wait_exponential(multiplier=pause, max=60.0),
            retry=tenacity.retry_if_exception_type((httpx.TransportError, RefusedError)),
            reraise=True,
        )
        self.name = json.dumps([model, think_tokens, self._options], sort_keys=True)

    def __call__(self, questions: Sequence[str]) -> Iterator[tuple[int, Answer | Exception]]:
        """Yields the answers as they arrive."""
        return self._run(self._answer, questions)

    def generate(
        self, requests: Sequence[str], *, max_tokens: int = 512, temperature: float = 1.0, sample: int = 0
    ) -> Iterator[tuple[int, Text | Exception]]:
        """Yields the texts that the model writes, as they arrive, for `feedback.revise`.

        Failures are tried again, as for questions.

        Args:
            requests: The requests.
            max_tokens: Maximum number of tokens of a text. Include it, if it is changed, in the name that is passed to
                `feedback.revise`.
            temperature: Temperature of the samples. Include it in the name, too.
            sample: Not used: the server samples each text anew.

        Returns:
            An iterator over the index of each request with its text, or with the error that prevented one.
        """
        del sample

        def write(text: str) -> Text:
            messages = [{"role": "user", "content": text}]
            fields = {"messages": messages, "max_tokens": max_tokens, "temperature": temperature}
            return Text(*self._retrying(self._post, fields, _content))

        return self._run(write, requests)

    def _run(self, answer: Callable[[str], A], texts: Sequence[str]) -> Iterator[tuple[int, A | Exception]]:
        """Yields what ``answer`` returns for each text, or its error, several at a time."""
        with futures.ThreadPoolExecutor(self._concurrency) as pool:
            running = {pool.submit(answer, text): i for i, text in enumerate(texts)}
            try:
                for each in futures.as_completed(running):
                    error = each.exception()
                    if error is not None and not isinstance(error, Exception):
                        raise error
                    yield running[each], each.result() if error is None else error
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, text: str) -> Answer:
        messages, thought_tokens = [{"role": "user", "content": text}], 0
        if self._think_tokens:
            messages = [{"role": "user", "content": text.removesuffix("Answer: (") + THINK}]
            fields = {"messages": messages, "max_tokens": self._think_tokens, "temperature": 1.0}
            thought, thought_tokens = self._retrying(
                self._post, fields, lambda choice: str(choice["message"]["content"])
            )
            messages += [{"role": "assistant", "content": thought}, {"role": "user", "content": "Answer with A or B."}]
        fields = {"messages": messages, "max_tokens": 1, "temperature": 0.0, "logprobs": True, "top_logprobs": 20}
        probability, tokens = self._retrying(self._post, fields, _probability)
        return Answer(probability, thought_tokens + tokens)

    def _post(self, fields: dict[str, Any], read: Callable[[Any], Any]) -> tuple[Any, int]:
        """Sends one request; returns what ``read`` finds in the completion, and the number of tokens."""
        response = self._client.post(
            f"{self._url}/chat/completions", json={"model": self._model} | fields | self._options
        )
        status = response.status_code
        if status in (408, 429) or status >= 500:
            raise RefusedError(f"status {status}")
        if status >= 400:
            raise ValueError(f"status {status}: {response.text[:200]}")  # another attempt would not help
        try:
            content = response.json()
            return read(content["choices"][0]), int((content.get("usage") or {}).get("total_tokens", 0))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise RefusedError(f"the reply is not {_EXPECTED[read is _probability]}") from error


_EXPECTED = "a completion", "a completion with log-probabilities"


def _content(choice: Any) -> str:
    """Returns the text of a completion."""
    content = choice["message"]["content"]
    if not isinstance(content, str):
        raise ValueError("the completion has no text")
    return content


def _probability(choice: Any) -> float | None:
    """Returns the probability of "A", given that the first token is "A" or "B"; None if neither is listed."""
    total = {"A": -np.inf, "B": -np.inf}
    for each in choice["logprobs"]["content"][0]["top_logprobs"]:
        letter, logprob = str(each["token"]).strip(" \n()*.:").upper(), float(each["logprob"])
        if not logprob < 1e-3:  # also NaN
            raise ValueError(f"{logprob} is not a log-probability")
        if letter in total:
            total[letter] = np.logaddexp(total[letter], logprob)
    return choice_probability(total["A"], total["B"]) if max(total.values()) > -np.inf else None
