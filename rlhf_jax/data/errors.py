"""What goes wrong with data: one sentence for a broken file, and a count by reason for broken records.

A broken file is an error. A broken record is left out, counted under its reason, reported, and an error once too many
records of a set are broken.
"""

from __future__ import annotations

import dataclasses
import os


class DataError(ValueError):
    """Data that cannot be used; the message is one sentence and names the file and the line where there are any."""


class Flaw(Exception):
    """Why a record is dropped, in the words it is counted under."""


class MissingError(DataError):
    """A record has none of some fields."""

    def __init__(self, *names: str) -> None:
        """The first of ``names`` is the one to be missed most."""
        others = " or ".join(map(repr, names[1:]))
        super().__init__(f"the record has no {names[0]!r}" + (f", and no {others} either" if others else ""))
        self.names = names


def at(path: str | os.PathLike[str], line: int) -> str:
    """Where in a file, ``path, line N``, as every message of the readers names it."""
    return f"{os.fspath(path)}, line {line}"


@dataclasses.dataclass
class DropCount:
    """Records that were left out or shortened, counted by reason.

    ``dropped`` holds records that are missing from the result: their share of all records is limited by
    ``max_dropped``. ``truncated`` holds records that are there but shortened, which long dialogues make common: it is
    reported, and limited only where ``max_truncated`` is given. Both limits are shares from 0 to 1.

    One object may go through a whole pipeline. Each stage counts in its own `stage`, whose share is checked against the
    records that this stage saw, and is then added here: no stage thins out the share of another.
    """

    max_dropped: float = 0.01
    max_truncated: float | None = None
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    truncated: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ValueError for a limit that is not a share."""
        for name, share in (("max_dropped", self.max_dropped), ("max_truncated", self.max_truncated)):
            if share is not None and not 0.0 <= share <= 1.0:
                raise ValueError(f"{name} is a share from 0 to 1, got {share}")

    def drop(self, reason: str) -> None:
        """Count one record that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def truncate(self, reason: str) -> None:
        """Count one record that is kept, but shortened."""
        self.truncated[reason] = self.truncated.get(reason, 0) + 1

    def stage(self) -> DropCount:
        """An empty count with the same limits."""
        return DropCount(max_dropped=self.max_dropped, max_truncated=self.max_truncated)

    def add(self, stage: DropCount, *, records: int, source: str) -> None:
        """Add the counts of a stage that saw ``records`` records, then check its share; see `check`."""
        for mine, theirs in ((self.dropped, stage.dropped), (self.truncated, stage.truncated)):
            for reason, n in theirs.items():
                mine[reason] = mine.get(reason, 0) + n
        stage.check(records, source=source)

    def check(self, records: int, *, source: str) -> None:
        """Raise DataError, naming the counts and ``source``, when their share of ``records`` is past its limit."""
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
        """One line with every count, such as ``dropped 8 (empty answer 4, prompts differ 4), truncated 0``."""
        parts = []
        for verb, counts in (("dropped", self.dropped), ("truncated", self.truncated)):
            reasons = f" ({_by_reason(counts)})" if counts else ""
            parts.append(f"{verb} {sum(counts.values())}{reasons}")
        return ", ".join(parts)


def _by_reason(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {n}" for reason, n in sorted(counts.items()))
