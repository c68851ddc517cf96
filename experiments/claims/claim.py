"""Defines `Claim`: a published result, the experiment that tests it, and the statistics that decide it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from claims.trial import Trial
from claims.verdicts import Part

Measured = dict[str, Any]
"""What an experiment measures with one seed: for each arm, numbers and arrays."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """A published result and its experiment."""

    id: str
    paper: str
    """The paper and its figure, table or section."""
    claim: str
    """The result, in one sentence."""
    published: str
    """The paper's own numbers."""
    differs: str
    """What differs from the paper: scale, labels, task."""
    measure: Callable[[Trial], Measured]
    """Runs all arms with one seed."""
    decide: Callable[[Sequence[Measured]], list[Part]]
    """Computes the statistics from what was measured with each seed."""
    plot: Callable[[Sequence[Measured]], str]
    """Draws what was measured, as an SVG."""
    changes: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Settings of the trial that differ from those of other claims, by part and name. ``--quick`` leaves them out."""
