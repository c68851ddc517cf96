"""Exceptions for data that cannot be used, and counts of the records that are dropped or truncated.

An error is raised for a file that cannot be read and for a record that has the wrong form. A well-formed record that
cannot be used is dropped and counted by reason. Dropping records is an error only if their share exceeds a limit.
"""

from __future__ import annotations

import dataclasses
import os
import re


class DataError(ValueError):
    """Raised for data that cannot be used. The message is one sentence that names the file and line, if known."""


class UnusableRecord(Exception):
    """Raised for a well-formed record that must be dropped; the message is the reason under which it is counted."""


class MissingFieldError(DataError):
    """Raised for a record that lacks a required field."""

    def __init__(self, *names: str) -> None:
        """``names`` contains the missing field, followed by the fields that are accepted in its place."""
        fields = " nor ".join(map(repr, names))
        super().__init__(f"the record has {'no' if len(names) == 1 else 'neither'} {fields}")
        self.names = names


def location(path: str | os.PathLike[str], line: int) -> str:
    """Returns ``"PATH, line N"``, the form in which all messages refer to a line of a file."""
    return f"{os.fspath(path)}, line {line}"


def counted(n: int, things: str) -> str:
    """Returns a number with what it counts, whose first plural is made singular for one.

    >>> from rlhf_jax.data import errors
    >>> errors.counted(2, "held-out pairs"), errors.counted(1, "held-out pairs"), errors.counted(1, "policies")
    ('2 held-out pairs', '1 held-out pair', '1 policy')
    """
    if n == 1:
        things = re.sub(r"(ie)?s\b", lambda found: "y" * bool(found[1]), things, count=1)
    return f"{n} {things}"


@dataclasses.dataclass
class DropCount:
    """Numbers of dropped and truncated records, by reason.

    ``dropped`` counts records that are missing from the result, and ``max_dropped`` limits their share. ``truncated``
    counts records that were kept but shortened. ``noted`` counts records that were kept as they are, but about which
    the user should know, and the items of a comparison store that are no comparisons. Truncation is common for long
    dialogues, so the share of truncated records is limited only if ``max_truncated`` is given. Both limits are shares
    from 0 to 1.

    One object can collect the counts of a whole pipeline. Each stage of the pipeline counts in a separate object, which
    `stage` returns. `add` then adds these counts to the total and applies the limits to the records that this stage
    received, regardless of the records in other stages.

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
    unused: dict[str, int] = dataclasses.field(default_factory=dict)
    """Number of records by field that contains text and is not used, except as metadata."""
    noted: dict[str, int] = dataclasses.field(default_factory=dict)
    flag: str | None = None
    """What error messages call the limit of the share of dropped records; by default, ``max_dropped``."""

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

    def note(self, reason: str) -> None:
        """Counts one record of which the user should know something, given as the reason."""
        self.noted[reason] = self.noted.get(reason, 0) + 1

    def stage(self) -> DropCount:
        """Returns an empty count with the same limits."""
        return DropCount(max_dropped=self.max_dropped, max_truncated=self.max_truncated, flag=self.flag)

    def add(self, stage: DropCount, *, records: int, source: str) -> None:
        """Adds the counts of a stage that received ``records`` records, then calls `check` on the stage."""
        for name in ("dropped", "truncated", "unused", "noted"):
            totals = getattr(self, name)
            for reason, n in getattr(stage, name).items():
                totals[reason] = totals.get(reason, 0) + n
        stage.check(records, source=source)

    def check(self, records: int, *, source: str) -> None:
        """Raises DataError, naming ``source``, if the share of dropped or truncated records exceeds its limit."""
        limits = (
            ("dropped", self.dropped, self.max_dropped, self.flag or "max_dropped"),
            ("truncated", self.truncated, self.max_truncated, "max_truncated"),
        )
        for verb, counts, limit, name in limits:
            n = sum(counts.values())
            if limit is not None and n > limit * records:
                share = n / records if records else 1.0
                raise DataError(
                    f"{source}: {n} of {counted(records, 'records')} {'was' if n == 1 else 'were'} {verb} "
                    f"({_by_reason(counts)}), which is "
                    f"{share:.1%}, more than {name} = {limit:.1%}; correct these records or raise the limit"
                )

    def report(self) -> str:
        """Returns all counts in one line, such as ``dropped 8 (empty answer 4, prompts differ 4), truncated 0``.

        Fields that contain text and are not used are named at the end of the line, if there are any.
        """
        parts = []
        for verb, counts in (("dropped", self.dropped), ("truncated", self.truncated)):
            reasons = f" ({_by_reason(counts)})" if counts else ""
            parts.append(f"{verb} {sum(counts.values())}{reasons}")
        if self.unused:
            parts.append(
                f"fields with text that are not used: {_by_reason({repr(k): n for k, n in self.unused.items()})}"
            )
        if self.noted:
            parts.append(f"noted {sum(self.noted.values())} ({_by_reason(self.noted)})")
        return ", ".join(parts)


def _by_reason(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {n}" for reason, n in sorted(counts.items()))
