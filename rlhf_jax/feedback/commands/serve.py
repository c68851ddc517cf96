"""The command ``serve``, which opens the labelling page of a comparison store."""

from __future__ import annotations

import dataclasses

from tyro.conf import Positional


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve:
    """Serves the labelling page of a store."""

    store: Positional[str]
    """File of the store."""


def run(settings: Serve) -> None:
    """Serves the page until the process is stopped."""
    raise NotImplementedError(settings.store)
