"""Readers: whole sources into lists of records, with what is dropped counted by reason.

Each reader takes every form that its kind of record has (the table of `records`) from every kind of source (the table
of `files`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from rlhf_jax.data import errors, files, records

Record = TypeVar("Record", bound=records.Prompt)


def read_demonstrations(
    source: files.Source, *, counts: errors.DropCount | None = None
) -> tuple[list[records.Demonstration], errors.DropCount]:
    """Read answers to imitate.

    Dropped and counted: ``"empty prompt"`` (the last turn says nothing, or is the system's), ``"prompt ends in an
    assistant turn"``, ``"empty answer"``, ``"ends in a human turn"``, ``"... is null"``; ``"prompts differ"`` and
    ``"answers differ"``, where ``messages`` stands beside the other form.

    Args:
      source: a path, a list of paths, or `files.Tfds`.
      counts: where to count, and how many drops to allow; a fresh ``DropCount()`` with its limit of 1 % by default.

    Returns:
      ``(records, counts)``, the records in the order of the source.

    Raises:
      DataError: the source cannot be read; a record is of the wrong form; too large a share is dropped.
    """
    return _read(source, records.parse_demonstration, counts, "prompt and response, or messages")


def read_rankings(
    source: files.Source, *, counts: errors.DropCount | None = None
) -> tuple[list[records.Ranking], errors.DropCount]:
    """Read compared answers, pairs and rankings alike; arguments, result and errors as of `read_demonstrations`.

    Dropped and counted: what a demonstration is dropped for, and ``"prompts differ"``, ``"same answer twice"`` (with
    different ranks), ``"fewer than two answers"``, ``"ranks and answers differ in number"``,
    ``"rank is no whole number"``, ``"rank below 1"``, ``"scores and answers differ in number"``,
    ``"score is no finite number"``, ``"ranks and scores disagree"``, ``"margin below 0"``,
    ``"margin and scores disagree"`` (by more than rounding, 1 %), ``"margin of more than two answers"``,
    ``"all tied"`` (there is nothing to learn).
    """
    return _read(source, records.parse_ranking, counts, "chosen and rejected, or prompt, responses and ranks")


def read_judged(
    source: files.Source, *, counts: errors.DropCount | None = None
) -> tuple[list[records.Judged], errors.DropCount]:
    """Read answers with a thumb up or down; all as of `read_demonstrations`."""
    return _read(source, records.parse_judged, counts, "prompt, response and label")


def read_prompts(
    source: files.Source, *, counts: errors.DropCount | None = None
) -> tuple[list[records.Prompt], errors.DropCount]:
    """Read prompts; all as of `read_demonstrations`."""
    return _read(source, records.parse_prompt, counts, "prompt")


def _read(
    source: files.Source, parse: Callable[..., Record], counts: errors.DropCount | None, fields: str
) -> tuple[list[Record], errors.DropCount]:
    counts = errors.DropCount() if counts is None else counts
    stage = counts.stage()
    found: list[Record] = []
    n = 0
    for n, raw in enumerate(files.raw_records(source, fields=fields), start=1):  # noqa: B007
        try:
            found.append(parse(raw.fields, where=raw.where))
        except errors.Flaw as flaw:
            stage.drop(str(flaw))
        except errors.MissingError as error:
            null = next((name for name in error.names if name in raw.fields), None)
            if null is None:
                raise errors.DataError(f"{raw.where}: {error}") from None
            stage.drop(f"{null} is null")
        except errors.DataError as error:
            raise errors.DataError(f"{raw.where}: {error}") from None
    counts.add(stage, records=n, source=files.source_name(source))
    return found, counts
