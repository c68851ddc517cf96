"""The claim about context distillation is decided by the share of the KL and the difference in gold utility."""

import numpy as np
import pytest
from claims import verdicts
from claims.helpful_harmless import c27_context_distillation

SEEDS = 5


def simulate(rng, *, removed, relative):
    """Returns measurements of one seed with this share of the KL removed and this relative gold utility."""
    kl, gold = 0.15 + 0.01 * rng.normal(), 0.85 + 0.01 * rng.normal()
    return {
        "prompted": {"gold": gold, "kl": 0.0},
        "unprompted": {"gold": 0.7, "kl": kl},
        "distilled": {"gold": gold * (relative + 0.005 * rng.normal()), "kl": kl * (1 - removed + 0.01 * rng.normal())},
    }


def decided(rng, **effect):
    measured_S = [simulate(rng, **effect) for _ in range(SEEDS)]
    stored_S = [{name: each[name] for name in sorted(each)} for each in measured_S]
    assert c27_context_distillation.CLAIM.decide(stored_S) == c27_context_distillation.CLAIM.decide(measured_S)
    return [part.verdict for part in c27_context_distillation.CLAIM.decide(measured_S)]


@pytest.mark.parametrize(
    ("removed", "relative", "expected"),
    [
        (0.95, 1.0, ["shown", "shown"]),
        (0.5, 1.0, ["refuted", "shown"]),
        (0.95, 0.9, ["shown", "refuted"]),
        (0.95, 1.1, ["shown", "refuted"]),
        (0.95, 0.95, ["shown", "not shown"]),
        (-0.2, 0.8, ["refuted", "refuted"]),
    ],
)
def test_both_statistics_must_be_in_the_stated_range(removed, relative, expected):
    rng = np.random.default_rng(0)
    assert decided(rng, removed=removed, relative=relative) == expected


def test_a_share_at_the_bound_is_rarely_shown():
    rng = np.random.default_rng(1)
    shown = [decided(rng, removed=0.8, relative=1.0)[0] == "shown" for _ in range(200)]
    assert np.mean(shown) <= 0.06


def test_the_statistics_are_the_share_removed_and_the_relative_difference():
    measured = {
        "prompted": {"gold": 0.8, "kl": 0.0},
        "unprompted": {"gold": 0.6, "kl": 0.2},
        "distilled": {"gold": 0.84, "kl": 0.03},
    }
    parts = c27_context_distillation.CLAIM.decide([measured])
    assert [part.value for part in parts] == pytest.approx([0.85, 0.05])
    assert {part.verdict for part in parts} == {"not shown"}, "a single seed has no interval"
    assert verdicts.overall(parts) == "not shown"
    assert c27_context_distillation.CLAIM.plot([measured]).startswith("<svg")
