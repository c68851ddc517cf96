"""The command ``report``, which prints statistics on the labelers of a comparison store, and writes them as a page.

    python -m rlhf_jax.feedback report people.sqlite --researchers Ada Bo --html labelers.html

`rlhf_jax.feedback.labelers.labeler_report` computes the statistics.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from typing import Annotated

from rich.console import Console
from rich.markup import escape
from tyro.conf import Positional, arg

from rlhf_jax.feedback import store as store_lib
from rlhf_jax.feedback.commands import given_files
from rlhf_jax.feedback.labelers import labeler_report
from rlhf_jax.report import labeler_page

_Names = Annotated[tuple[str, ...], arg(metavar="NAME [NAME ...]", help_behavior_hint="(default: nobody)")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Prints the agreement, the biases and the screening of labelers, and the Elo scores of policies."""

    store: Annotated[Positional[str], arg(metavar="STORE")]
    """File of the store."""
    set: str | None = None
    """Set of items to report on. None uses all sets."""
    researchers: _Names = ()
    """Labelers whose majority is a reference for the others."""
    held_out: _Names = ()
    """Labelers of a second group, whose agreement with the first is reported."""
    min_agreement: float = 0.75
    """Cut-off of the agreement with gold questions and with researchers, from 0 to 1."""
    min_score: float = 6.0
    """Cut-off of the mean rating of a labeler's demonstrations, from 1 to 7."""
    min_seconds: float = 2.0
    """Number of seconds, at least 0, below which judgements are counted as too fast."""
    html: str | None = None
    """HTML file to write. None writes none."""
    overwrite: bool = False
    """Whether --html replaces a file that exists. An SQLite database, such as a store, is never replaced."""


def run(settings: Report) -> None:
    """Prints the report; raises ValueError if the store cannot be read or lacks a set or labeler that is named."""
    _check(settings)
    with contextlib.ExitStack() as stack:
        if settings.html is not None:
            stack.enter_context(given_files.output(settings.html, store=settings.store, overwrite=settings.overwrite))
        opened = stack.enter_context(store_lib.Store(settings.store, read_only=True))
        found = labeler_report.report(
            opened,
            settings.set,
            researchers=settings.researchers,
            held_out=settings.held_out,
            min_agreement=settings.min_agreement,
            min_score=settings.min_score,
            min_seconds=settings.min_seconds,
        )
        if settings.html is not None:
            labeler_page.write_page(settings.html, found, title=f"Labelers of {pathlib.Path(settings.store).name}")
    out = Console(highlight=False)
    out.print(escape(labeler_page.headline(found)), soft_wrap=True)
    for table in labeler_page.console_tables(found):
        out.print()
        out.print(table)
    if settings.html is not None:
        out.print(escape(f"\nwrote {settings.html}"), soft_wrap=True)


def _check(settings: Report) -> None:
    """Raises StoreError for settings that have no effect or are outside their range."""
    reason = None
    if settings.overwrite and settings.html is None:
        reason = "--overwrite has no effect without --html; leave it out"
    elif not 0 <= settings.min_agreement <= 1:
        reason = f"--min-agreement is {settings.min_agreement}; it must be between 0 and 1"
    elif not 1 <= settings.min_score <= 7:
        reason = f"--min-score is {settings.min_score}; it must be between 1 and 7"
    elif not settings.min_seconds >= 0:
        reason = f"--min-seconds is {settings.min_seconds}; it must be at least 0"
    if reason is not None:
        raise store_lib.StoreError(reason)
