"""The command ``report``, which prints statistics on the labelers of a comparison store, and writes them as a page.

    python -m rlhf_jax.feedback report people.sqlite --researchers Ada Bo --html labelers.html

`rlhf_jax.feedback.labelers.labeler_report` computes the statistics.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated

from rich.console import Console
from rich.markup import escape
from tyro.conf import Positional, arg

from rlhf_jax.feedback import store
from rlhf_jax.feedback.labelers import labeler_report
from rlhf_jax.report import labeler_page


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Prints the agreement, the biases and the screening of labelers, and the Elo scores of policies."""

    store: Positional[str]
    """File of the store."""
    set: str | None = None
    """Set of items to report on. None uses all sets."""
    researchers: Annotated[tuple[str, ...], arg(metavar="NAME [NAME ...]")] = ()
    """Labelers whose majority is a reference for the others."""
    held_out: Annotated[tuple[str, ...], arg(metavar="NAME [NAME ...]")] = ()
    """Labelers of a second group, whose agreement with the first is reported."""
    min_agreement: float = 0.75
    """Cut-off of the agreement with gold questions and with researchers."""
    min_score: float = 6.0
    """Cut-off of the mean rating of a labeler's demonstrations, from 1 to 7."""
    min_seconds: float = 2.0
    """Number of seconds below which judgements are counted as too fast."""
    html: str | None = None
    """HTML file to write. None writes none."""


def run(settings: Report) -> None:
    """Prints the report; raises ValueError if the store cannot be read or lacks a set or labeler that is named."""
    with store.Store(settings.store, read_only=True) as opened:
        found = labeler_report.report(
            opened,
            settings.set,
            researchers=settings.researchers,
            held_out=settings.held_out,
            min_agreement=settings.min_agreement,
            min_score=settings.min_score,
            min_seconds=settings.min_seconds,
        )
    out = Console(highlight=False)
    out.print(escape(labeler_page.headline(found)), soft_wrap=True)
    for table in labeler_page.console_tables(found):
        out.print()
        out.print(table)
    if settings.html is not None:
        labeler_page.write_page(settings.html, found, title=f"Labelers of {pathlib.Path(settings.store).name}")
        out.print(escape(f"\nwrote {settings.html}"), soft_wrap=True)
