"""Readers: each turns a whole source into a list of records, and counts the records it drops by reason.

Each reader accepts every form of its kind of record (see the table in `records`) from every kind of source (see the
table in `sources`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from rlhf_jax.data import errors, records, sources

Record = TypeVar("Record", bound=records.Prompt)


def read_demonstrations(
    source: sources.Source, *, counts: errors.DropCount | None = None
) -> tuple[list[records.Demonstration], errors.DropCount]:
    """Reads demonstrations: prompts with an answer to imitate.

    Reasons for dropping a record: ``"empty prompt"`` (the last turn is empty or is the system's), ``"prompt ends in an
    assistant turn"``, ``"empty answer"``, ``"ends in a human turn"``, ``"... is null"``; and ``"prompts differ"`` or
    ``"answers differ"`` if a record has both ``messages`` and the other form.

    Args:
        source: A path, a list of paths, or `sources.Tfds`.
        counts: Counts drops and limits their share; None creates a ``DropCount()``, whose limit is 1 %.

    Returns:
        ``(records, counts)``, the records in the order of the source.

    Raises:
        DataError: If the source cannot be read, a record has the wrong form, or too large a share is dropped.
    """
    return _read(source, records.parse_demonstration, counts, "prompt and response, or messages")


def read_rankings(
    source: sources.Source, *, counts: errors.DropCount | None = None
) -> tuple[list[records.Ranking], errors.DropCount]:
    """Reads compared answers, both pairs and rankings, with the arguments and results of `read_demonstrations`.

    A record is dropped for the reasons that hold for demonstrations, or for one of these: ``"prompts differ"``,
    ``"same answer twice"`` (with different ranks), ``"fewer than two answers"``,
    ``"ranks and answers differ in number"``, ``"rank is not a whole number"``, ``"rank below 1"``,
    ``"scores and answers differ in number"``, ``"score is not a finite number"``, ``"ranks and scores disagree"``,
    ``"margin below 0"``, ``"margin and scores disagree"`` (by more than 1 %, which allows for rounding),
    ``"margin of more than two answers"``, ``"all answers tied"``.
    """
    return _read(source, records.parse_ranking, counts, "chosen and rejected, or prompt, responses and ranks")


def read_judged(
    source: sources.Source, *, counts: errors.DropCount | None = None
) -> tuple[list[records.Judged], errors.DropCount]:
    """Reads answers labelled good or bad, with the arguments and results of `read_demonstrations`."""
    return _read(source, records.parse_judged, counts, "prompt, response and label")


def read_prompts(
    source: sources.Source, *, counts: errors.DropCount | None = None
) -> tuple[list[records.Prompt], errors.DropCount]:
    """Reads prompts, with the arguments and results of `read_demonstrations`."""
    return _read(source, records.parse_prompt, counts, "prompt")


def _read(
    source: sources.Source, parse: Callable[..., Record], counts: errors.DropCount | None, fields: str
) -> tuple[list[Record], errors.DropCount]:
    counts = errors.DropCount() if counts is None else counts
    stage = counts.stage()
    parsed: list[Record] = []
    n = 0
    for n, raw in enumerate(sources.raw_records(source, fields=fields), start=1):  # noqa: B007
        try:
            parsed.append(parse(raw.fields, location=raw.location))
        except errors.UnusableRecord as reason:
            stage.drop(str(reason))
        except errors.MissingFieldError as error:
            null = next((name for name in error.names if name in raw.fields), None)
            if null is None:
                raise errors.DataError(f"{raw.location}: {error}") from None
            stage.drop(f"{null} is null")
        except errors.DataError as error:
            raise errors.DataError(f"{raw.location}: {error}") from None
    counts.add(stage, records=n, source=sources.describe(source))
    return parsed, counts
