"""The command ``export``, which writes items and judgements of a comparison store to a file."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Literal

from rich.console import Console
from rich.markup import escape
from tyro.conf import Positional, arg

from rlhf_jax.data.stores import argilla, hh_export, label_studio
from rlhf_jax.feedback import store as store_lib
from rlhf_jax.feedback import store_export
from rlhf_jax.feedback.commands import given_files

_EXPORTS: dict[str, Callable[..., Counter[str] | None]] = {
    "jsonl": store_export.export,
    "hh": hh_export.export,
    "preference": store_export.export_preferences,
    "label-studio": label_studio.export,
    "argilla": argilla.export,
    "judgements": store_export.export_judgements,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Writes the items or judgements of a store to a file.

    jsonl, hh and preference have one line for each comparison, decided by the mean of the votes; hh and preference have
    a line for each pair of a ranking. label-studio and argilla have all items except gold questions and hidden
    duplicates, judged or not, with the vote of each labeler. judgements has every judgement, with its labeler, time,
    strength, flags and comment and the texts of its item, for analysis.
    """

    store: Annotated[Positional[str], arg(metavar="STORE")]
    """File of the store."""
    file: Annotated[Positional[str], arg(metavar="FILE")]
    """File to write."""
    form: Literal["jsonl", "hh", "preference", "label-studio", "argilla", "judgements"]
    """Form of the file; see docs/labeling.md."""
    set: str | None = None
    """Set to write. None writes all sets."""
    overwrite: bool = False
    """Whether a file that exists is replaced. An SQLite database, such as a store, never is."""


def run(settings: Export) -> None:
    """Writes the file, and prints the number of items that are skipped, by reason."""
    with (
        given_files.output(settings.file, store=settings.store, overwrite=settings.overwrite),
        store_lib.Store(settings.store, read_only=True) as opened,
    ):
        if settings.set is not None:
            opened.require_set(settings.set)
        skipped = _EXPORTS[settings.form](opened, settings.file, set_name=settings.set)
    reasons = [f"{reason} {n}" for reason, n in sorted((skipped or Counter()).items())]
    Console(soft_wrap=True, highlight=False).print(escape("; ".join([f"wrote {settings.file}", *reasons])))
