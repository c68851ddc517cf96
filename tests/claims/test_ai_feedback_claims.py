"""The claims about constitutional AI are decided by the stated effects."""

import numpy as np
import pytest
from claims import catalogue, verdicts
from claims.ai_feedback import c44_soft_labels, c45_revisions

SEEDS = 5


def c44(rng, effect):
    def arm(harmless, deviation, refused):
        noisy = 0.01 * rng.normal(size=3) + (harmless, deviation, refused)
        return dict(zip(("harmlessness", "deviation", "refused"), noisy.tolist()))

    values = ((0.7 + 0.1 * effect, 1, 0.4), (0.7, 1, 0.4), (0.7, 1, 0.4), (0.7, 1 - 0.5 * effect, 0.4 - 0.1 * effect))
    return {name: arm(*each) for name, each in zip(c44_soft_labels.ARMS, values)} | {"SL-CAI": arm(0.5, 1, 0.3)}


def c45(rng, effect):
    def arm(harmless, helpful):
        steps_R1 = np.arange(5)[:, None]
        noise = rng.normal(size=(2, 5, 200)) * 0.1
        return {"harmless": 0.3 + harmless * steps_R1 + noise[0], "helpful": 0.8 + helpful * steps_R1 + noise[1]}

    names = (c45_revisions.LARGE_CRITIQUE, "1 principles", "4 principles")
    return {name: arm(0.15 * effect, -0.1 * effect) for name in names} | {
        c45_revisions.SMALL_CRITIQUE: arm(0.1, -0.1),
        c45_revisions.SMALL_DIRECT: arm(0.1, -0.1),
    }


CASES = {"C44": (c44_soft_labels, c44), "C45": (c45_revisions, c45)}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("effect", "expected"), [(1, "shown"), (-1, "refuted"), (0, "not shown")])
def test_a_claim_is_decided_by_its_effect(name, effect, expected):
    module, make = CASES[name]
    measured = [make(np.random.default_rng([seed, 7]), effect) for seed in range(SEEDS)]
    assert verdicts.overall(module.CLAIM.decide(measured)) == expected
    assert module.CLAIM.plot(measured).startswith("<svg") and catalogue.CLAIMS[name] is module.CLAIM


@pytest.mark.parametrize(("count", "part"), [(1, -2), (4, -1)])
def test_more_principles_must_not_matter(count, part):
    measured = [c45(np.random.default_rng(seed), 1) for seed in range(SEEDS)]
    for each in measured:
        each[f"{count} principles"]["harmless"] = each[f"{count} principles"]["harmless"] - 0.2
    parts = c45_revisions.decide(measured)
    assert parts[part].verdict == "refuted"
    assert [each.verdict for each in parts].count("refuted") == 1


def test_the_correlation_is_that_of_all_answers():
    steps = np.repeat(np.arange(3.0)[:, None], 4, axis=1)
    assert c45_revisions.correlation(steps) == pytest.approx(1.0)
    assert c45_revisions.correlation(-steps) == pytest.approx(-1.0)
    assert c45_revisions.correlation(np.ones((3, 4))) == 0.0
