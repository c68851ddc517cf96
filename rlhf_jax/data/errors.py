"""Exceptions for data that cannot be used, and counts of the records that are dropped or truncated.

A file that cannot be read is an error. A record that cannot be used is dropped and counted by reason, up to a limited
share of the records.
"""

from __future__ import annotations

import dataclasses
import os


class DataError(ValueError):
    """Data that cannot be used. The message is one sentence, which names the file and line if there are any."""


class UnusableRecord(Exception):
    """A well-formed record that is dropped; the message is the reason under which it is counted."""


class MissingFieldError(DataError):
    """A record lacks a field."""

    def __init__(self, *names: str) -> None:
        """``names``: the missing field, then other fields that could have replaced it."""
        others = " or ".join(map(repr, names[1:]))
        super().__init__(f"the record has no {names[0]!r}" + (f", and no {others} either" if others else ""))
        self.names = names


def location(path: str | os.PathLike[str], line: int) -> str:
    """Returns ``"PATH, line N"``, the form in which every message names a line of a file."""
    return f"{os.fspath(path)}, line {line}"


@dataclasses.dataclass
class DropCount:
    """Numbers of dropped and truncated records, by reason.

    ``dropped`` counts records that are missing from the result; their share is limited by ``max_dropped``.
    ``truncated`` counts records that were kept but shortened, which is common for long dialogues: their share is
    limited only if ``max_truncated`` is given. Both limits are shares from 0 to 1.

    One object can collect the counts of a whole pipeline. Each stage counts in a separate object (`stage`). `add`
    merges its counts and checks their share of the records that the stage received, so that the records of other stages
    do not dilute it.

    >>> from rlhf_jax.data import errors
    >>> counts = errors.DropCount(max_dropped=0.5)
    >>> stage = counts.stage()
    >>> stage.drop("empty answer")
    >>> counts.add(stage, records=4, source="pairs.jsonl")
    >>> counts.report()
    'dropped 1 (empty answer 1), truncated 0'
    """

    max_dropped: float = 0.01
    max_truncated: float | None = None
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    truncated: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ValueError if a limit is not between 0 and 1."""
        for name, share in (("max_dropped", self.max_dropped), ("max_truncated", self.max_truncated)):
            if share is not None and not 0.0 <= share <= 1.0:
                raise ValueError(f"{name} must be a share from 0 to 1, got {share}")

    def drop(self, reason: str) -> None:
        """Counts one dropped record."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def truncate(self, reason: str) -> None:
        """Counts one truncated record."""
        self.truncated[reason] = self.truncated.get(reason, 0) + 1

    def stage(self) -> DropCount:
        """Returns an empty count with the same limits."""
        return DropCount(max_dropped=self.max_dropped, max_truncated=self.max_truncated)

    def add(self, stage: DropCount, *, records: int, source: str) -> None:
        """Adds the counts of a stage that received ``records`` records, then checks its share as `check` does."""
        for totals, added in ((self.dropped, stage.dropped), (self.truncated, stage.truncated)):
            for reason, n in added.items():
                totals[reason] = totals.get(reason, 0) + n
        stage.check(records, source=source)

    def check(self, records: int, *, source: str) -> None:
        """Raises DataError, naming ``source`` and the counts, if their share of ``records`` exceeds a limit."""
        limits = (
            ("dropped", self.dropped, self.max_dropped, "max_dropped"),
            ("truncated", self.truncated, self.max_truncated, "max_truncated"),
        )
        for verb, counts, limit, name in limits:
            n = sum(counts.values())
            if limit is not None and n > limit * records:
                share = n / records if records else 1.0
                raise DataError(
                    f"{source}: {n} of {records} records {verb} ({_by_reason(counts)}), which is "
                    f"{share:.1%}, more than {name} = {limit:.1%}"
                )

    def report(self) -> str:
        """Returns all counts in one line, such as ``dropped 8 (empty answer 4, prompts differ 4), truncated 0``."""
        parts = []
        for verb, counts in (("dropped", self.dropped), ("truncated", self.truncated)):
            reasons = f" ({_by_reason(counts)})" if counts else ""
            parts.append(f"{verb} {sum(counts.values())}{reasons}")
        return ", ".join(parts)


def _by_reason(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {n}" for reason, n in sorted(counts.items()))
