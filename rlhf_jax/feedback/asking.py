"""Questions to a model, whose answers are stored in a file: nothing is asked twice, and a budget limits the number."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from rlhf_jax import atomic

A = TypeVar("A", bound=tuple[Any, ...])
Ask = Callable[[Sequence[str]], Iterable[tuple[int, A | Exception]]]
"""Yields the index of each question with its answer, or with the error that prevented one, in any order."""


class Asker(Generic[A]):
    """Asks questions in batches, and counts what was asked.

    The key of a stored answer is a digest of the name of the model, the question and the number of the sample.
    """

    def __init__(
        self,
        kind: type[A],
        *,
        name: str,
        path: str | os.PathLike[str] | None,
        max_questions: int | None = None,
        max_tokens: int | None = None,
        batch: int = 64,
    ) -> None:
        """Reads the stored answers.

        Args:
            kind: Named tuple of an answer, with a field ``tokens``.
            name: What the answers depend on besides the question.
            path: JSON-lines file of answers; None stores nothing.
            max_questions: Maximum number of questions that are asked, with or without success; None for no limit.
            max_tokens: Number of tokens after which no more questions are asked; None for no limit.
            batch: Number of questions that are asked at a time.

        Raises:
            ValueError: A limit is invalid, or the file has answers of another kind.
        """
        if batch < 1 or min(max_questions or 0, max_tokens or 0) < 0:
            raise ValueError(f"invalid batch {batch}, max_questions {max_questions} or max_tokens {max_tokens}")
        self._name, self._path = name, path
        self._most, self._max_tokens, self._batch = max_questions, max_tokens, batch
        self._known: dict[str, A] = _read(path, kind)
        self._seen: set[str] = set()
        self.asked, self.stored, self.tokens = 0, 0, 0
        self.errors = Counter[str]()

    def __call__(
        self,
        texts: Sequence[str],
        ask: Ask[A],
        *,
        sample: int = 0,
        on_answer: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[A | None]:
        """Returns the answer to each question; None if it failed or the budget is used up.

        Args:
            texts: The questions.
            ask: Answers questions.
            sample: Number of the sample, for answers that are sampled anew although the question is the same.
            on_answer: Called after each answer or error with their number and the number of open questions.
        """
        number = [sample] if sample else []
        keys = [hashlib.sha256(json.dumps([self._name, text, *number]).encode()).hexdigest() for text in texts]
        open_texts = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._known}
        self.stored += len(set(keys) - open_texts.keys() - self._seen)
        self._seen |= set(keys)
        pending, done = list(open_texts), 0
        while pending and not self.used_up:
            left = len(pending) if self._most is None else self._most - self.asked
            size = min(self._batch, left)
            now, pending = pending[:size], pending[size:]
            with contextlib.closing(_Lines(self._path)) as lines:
                for i, answer in ask([open_texts[key] for key in now]):
                    self.asked, done = self.asked + 1, done + 1
                    if isinstance(answer, Exception):
                        self.errors[f"{type(answer).__name__}: {answer}"] += 1
                    else:
                        self._known[now[i]] = answer
                        self.tokens += answer.tokens  # pyright: ignore[reportAttributeAccessIssue]
                        fields: Any = answer._asdict()  # pyright: ignore[reportAttributeAccessIssue]
                        lines.append({"key": now[i], **fields})
                    on_answer(done, len(open_texts))
        return [self._known.get(key) for key in keys]

    @property
    def used_up(self) -> bool:
        """Whether the budget is used up."""
        asked = self._most is not None and self.asked >= self._most
        return asked or (self._max_tokens is not None and self.tokens >= self._max_tokens)


def batches_of_width(lengths: Sequence[int], *, batch: int, multiple: int) -> Iterator[tuple[int, list[int]]]:
    """Yields batches of rows that are padded to the same width: the width and the indices of at most ``batch`` rows.

    The width of a row is the next multiple of ``multiple``, whatever the other rows, so that the numbers of a row do
    not depend on which rows are computed with it.
    """
    widths = [-(-length // multiple) * multiple for length in lengths]
    for width in sorted(set(widths)):
        rows = [i for i, each in enumerate(widths) if each == width]
        for start in range(0, len(rows), batch):
            yield width, rows[start : start + batch]


class _Lines:
    """Appends lines to a JSON-lines file, which is created with the first of them; without a path, does nothing."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._path, self._file = path, None

    def append(self, record: Any) -> None:
        if self._path is None:
            return
        if self._file is None:
            atomic.repair_last_line(self._path)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()  # a killed process loses no answer

    def close(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()


def _read(path: str | os.PathLike[str] | None, kind: type[A]) -> dict[str, A]:
    """Returns the stored answers by key. A line that an interrupted process left incomplete is skipped."""
    found: dict[str, A] = {}
    if path is None:
        return found
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomic.repair_last_line(path)
    if pathlib.Path(path).exists():
        for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines():
            record: dict[str, Any] = json.loads(line)
            key = record.pop("key")
            if record.keys() != set(kind._fields):  # pyright: ignore[reportAttributeAccessIssue]
                raise ValueError(f"{os.fspath(path)} has answers of another kind; choose another file")
            found[key] = kind(**record)
    return found
