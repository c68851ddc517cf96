"""Checks of how claims are decided, on synthetic measurements.

``simulate(rng, effect)`` returns the measurements of one seed. An effect of 1 is the stated one, -1 is its reverse, and
0 is none.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from claims import claim_results, verdicts

SEEDS = 5
Simulate = Callable[[np.random.Generator, float], Any]


def check_effects(module: Any, simulate: Simulate) -> None:
    """Checks that the stated effect is shown, its reverse is refuted, both can be drawn, and arms can be exchanged."""
    rng = np.random.default_rng(0)
    for effect, verdict in ((1, "shown"), (-1, "refuted")):
        measured_S = [simulate(rng, effect) for _ in range(SEEDS)]
        assert verdicts.overall(module.decide(measured_S)) == verdict, module.decide(measured_S)
        svg = module.plot(measured_S)
        assert svg.startswith("<svg") and "$" not in svg, "LaTeX in a label"
    claim_results.null_rate(module.CLAIM, measured_S, shuffles=3)


def check_noise(module: Any, simulate: Simulate) -> None:
    """Checks that at most 5 % of measurements without an effect are shown."""
    rng = np.random.default_rng(1)
    shown = [verdicts.overall(module.decide([simulate(rng, 0) for _ in range(SEEDS)])) == "shown" for _ in range(200)]
    assert np.mean(shown) <= 0.05
