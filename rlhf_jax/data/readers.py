"""Readers, which convert a whole source to a list of records and count dropped records by reason.

The table in `records` lists the forms in which each kind of record can be written, and the table in `sources` lists the
supported kinds of source. Each reader accepts all forms of its kind of record from all kinds of source.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from rlhf_jax.data import errors, records, sources

Record = TypeVar("Record", bound=records.Prompt)


def read_demonstrations(
    source: sources.Source, *, counts: errors.DropCount | None = None
) -> tuple[list[records.Demonstration], errors.DropCount]:
    """Reads demonstrations, which are prompts with an answer to imitate.

    A record is dropped for one of these reasons:

    - ``"empty prompt"``: the last turn of the prompt is empty or a system turn
    - ``"prompt ends in an assistant turn"``
    - ``"empty answer"``
    - ``"does not end in an assistant turn"``: the last turn of a dialogue is not an assistant turn
    - ``"... is null"``, with the name of the null field
    - ``"the weight of the answer is 0"``
    - ``"system texts differ"``: the system turn differs from the field ``system`` or ``system_prompt``
    - ``"content has a part of type ..."`` or ``"... beside the prompt"``: the prompt contains an image or other media
    - ``"a character is not UTF-8"`` or ``"a character is a lone surrogate"``
    - ``"prompts differ"`` or ``"answers differ"``: the record has ``messages`` and also a ``prompt`` or an answer that
      does not agree with them

    Args:
        source: A path, a list of paths, or `sources.Tfds`.
        counts: Counts dropped records and limits their share; None creates a ``DropCount()``, whose limit is 1 %. It
            also counts the records in which a field contains text that is not used (``counts.unused``).

    Returns:
        ``(records, counts)``, with the records in the order of the source.

    Raises:
        DataError: If the source cannot be read, a record has the wrong form, or too many records are dropped.
    """
    return read(source, records.parse_demonstration, counts=counts, fields="prompt and response, or messages")


def read_rankings(
    source: sources.Source, *, counts: errors.DropCount | None = None
) -> tuple[list[records.Ranking], errors.DropCount]:
    """Reads compared answers, both pairs and rankings; see `read_demonstrations` for arguments, results and errors.

    A record is dropped for the reasons that apply to demonstrations, except ``"answers differ"``, or for one of these:

    - ``"prompts differ"``: the dialogues of a pair have different prompts, or ``prompt`` does not agree with them
    - ``"fewer than two answers"`` or ``"all answers tied"``
    - ``"same answer twice"``: equal answers have different ranks
    - ``"ranks and answers differ in number"``, ``"rank is not a whole number"`` or ``"rank below 1"``
    - ``"scores and answers differ in number"`` or ``"ranks and scores disagree"``
    - ``"score is not a finite number"``: a score, the margin or the difference of two scores is not finite, or an entry
      of ``scores`` is not a number
    - ``"margin below 0"``, or ``"margin of more than two answers"``: only two answers can have a margin
    - ``"margin and scores disagree"``: the margin deviates from the difference of the scores by more than 1 % of the
      largest absolute value among the margin and the scores
    """
    return read(
        source, records.parse_ranking, counts=counts, fields="chosen and rejected, or prompt, responses and ranks"
    )


def read_judged(
    source: sources.Source, *, counts: errors.DropCount | None = None
) -> tuple[list[records.Judged], errors.DropCount]:
    """Reads answers labelled good or bad; see `read_demonstrations` for drop reasons, arguments, results and errors."""
    return read(source, records.parse_judged, counts=counts, fields="prompt, response and label")


def read_prompts(
    source: sources.Source, *, counts: errors.DropCount | None = None
) -> tuple[list[records.Prompt], errors.DropCount]:
    """Reads prompts; see `read_demonstrations` for drop reasons, arguments, results and errors."""
    return read(source, records.parse_prompt, counts=counts, fields="prompt")


def read(
    source: sources.Source,
    parse: Callable[..., Record],
    *,
    counts: errors.DropCount | None = None,
    fields: str = "named fields",
) -> tuple[list[Record], errors.DropCount]:
    """Reads records of any kind; see `read_demonstrations` for drop reasons and errors.

    Args:
        source: A path, a list of paths, or `sources.Tfds`.
        parse: ``parse(fields, location=...)`` returns a record, or raises DataError or `errors.UnusableRecord`.
        counts: Counts dropped records and limits their share; None creates a ``DropCount()``.
        fields: Description of the expected fields for error messages.

    Returns:
        ``(records, counts)``, with the records in the order of the source.

    Raises:
        DataError: If the source cannot be read, a record has the wrong form, or too many records are dropped.
    """
    counts = errors.DropCount() if counts is None else counts
    stage = counts.stage()
    parsed: list[Record] = []
    n = 0
    for raw in sources.raw_records(source, fields=fields):
        if raw.skipped is not None:
            stage.note(raw.skipped)
            continue
        n += 1
        try:
            if raw.flaw is not None:
                raise errors.UnusableRecord(raw.flaw)
            record = parse(raw.fields, location=raw.location)
        except errors.UnusableRecord as reason:
            stage.drop(str(reason))
        except errors.MissingFieldError as error:
            null = next((name for name in error.names if name in raw.fields), None)
            if null is None:
                present = ", ".join(map(repr, raw.fields)) or "none"
                raise errors.DataError(
                    f"{raw.location}: {error}; its fields are {present}: rename or convert them to one of the forms in "
                    "docs/data.md"
                ) from None
            stage.drop(f"{null} is null")
        except errors.DataError as error:
            raise errors.DataError(f"{raw.location}: {error}") from None
        else:
            parsed.append(record)
            for name in record.unused:
                stage.unused[name] = stage.unused.get(name, 0) + 1
    counts.add(stage, records=n, source=sources.describe(source))
    return parsed, counts
