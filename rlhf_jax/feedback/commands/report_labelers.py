"""The command ``report``, which measures the labelers of a comparison store."""

from __future__ import annotations

import dataclasses

from tyro.conf import Positional


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Measures the labelers of a store."""

    store: Positional[str]
    """File of the store."""


def run(settings: Report) -> None:
    """Prints the report."""
    raise NotImplementedError(settings.store)
