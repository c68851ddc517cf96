"""The claims about helpfulness and harmlessness are decided by the stated effects."""

import claim_cases
import numpy as np
import pytest
from claims import model_stages as ms
from claims import trial
from claims.helpful_harmless import (
    c19_tension,
    c20_loss_weight,
    c21_helpful_policies,
    c22_online,
    c46_skill_mixing,
    c47_size_by_domain,
)

from rlhf_jax.simulation import lexicon


def c19(rng, effect):
    shares = np.array(c19_tension.SHARES)

    def accuracy(size, own_M):
        bend = 0.06 * effect * (3 - size) * (2 * own_M - 1) ** 2
        return 0.5 + 0.25 * np.sqrt(own_M) - bend - 0.08 * effect * (own_M == 0) + 0.005 * rng.normal(size=len(own_M))

    return {
        name: {
            f"{share:g}": {"helpful": helpful, "harmless": harmless}
            for share, helpful, harmless in zip(shares, accuracy(number, 1 - shares), accuracy(number, shares))
        }
        for number, name in enumerate(c19_tension.SIZES)
    }


def c20(rng, effect):
    gain_L = np.array([0.0, 0.03, 0.04, 0.03, 0.02])
    fall_L = np.array([0.0, 0.01, 0.02, 0.03, 0.08])
    return {
        size: {
            f"{weight:g}": {
                "helpful": 0.7 - effect * part * fall + 0.004 * rng.normal(),
                "harmless": 0.6 + effect * (2 * gain + part * fall) + 0.004 * rng.normal(),
            }
            for weight, gain, fall in zip(c20_loss_weight.LAMBDAS, gain_L, fall_L)
        }
        for size, part in ((c20_loss_weight.SMALL, 1.0), (c20_loss_weight.LARGE, 0.2))
    }


def c21(rng, effect):
    t_C = np.array(c21_helpful_policies.AT, float)

    def course(end, rate):
        return 0.4 + end * (1 - np.exp(-t_C * rate)) + 0.003 * rng.normal(size=len(t_C)) * (t_C > 0)

    found = {name: {"helpful": course(0.2, 0.2), "harmless": course(0.2, 0.2)} for name in c21_helpful_policies.ARMS}
    found[c21_helpful_policies.HELPFUL] = {
        "helpful": course(0.2 + 0.05 * effect, 0.2),
        "harmless": course(0.2 - 0.1 * effect, 0.2),
    }
    rate = 0.2 * np.exp(0.1 * rng.normal())
    found[c21_helpful_policies.BOTH] = {
        "helpful": course(0.2, rate),
        "harmless": course(0.2, rate * 2.0**effect),
    }
    return found


def c22(rng, effect):
    elo = np.array([100, 80, 100 + 30 * effect]) + 5 * rng.normal(size=3)
    accuracy = 0.7 - effect * np.array([0.0, 0.03, 0.06]) + 0.008 * rng.normal(size=3)
    return {
        source: {"helpful": x, "harmless": x, "overall": x, "accuracy": y}
        for source, x, y in zip(c22_online.SETS, elo, accuracy, strict=True)
    }


def c46(rng, effect):
    # The reverse of no loss is a loss, and so is the absence of the effect.
    loss = {1: 0.0, 0: 0.03, -1: 0.06}[effect]
    rows = {name: {"dialogues": 0.65, "skills": 0.85} for name in c46_skill_mixing.ARMS}
    rows["all"] = {"dialogues": 0.65 - loss, "skills": 0.85 - loss}
    return {name: {kind: x + 0.004 * rng.normal() for kind, x in row.items()} for name, row in rows.items()}


def c47(rng, effect):
    return {
        size: {
            "helpful": 0.5 + 0.012 * effect * ms.LOG_SIZES[size] + 0.005 * rng.normal(),
            "harmless": 0.7 + 0.005 * rng.normal(),
        }
        for size in c47_size_by_domain.SIZES
    }


CASES = {
    "C19": (c19_tension, c19),
    "C20": (c20_loss_weight, c20),
    "C21": (c21_helpful_policies, c21),
    "C22": (c22_online, c22),
    "C46": (c46_skill_mixing, c46),
    "C47": (c47_size_by_domain, c47),
}


@pytest.mark.parametrize("name", CASES)
def test_a_claim_is_shown_with_the_stated_effect_and_refuted_with_the_reverse(name):
    module, simulate = CASES[name]
    assert module.CLAIM.id == name
    claim_cases.check_effects(module, simulate)


@pytest.mark.parametrize("name", CASES)
def test_a_claim_is_rarely_shown_without_an_effect(name):
    claim_cases.check_noise(*CASES[name])


def test_saturation_is_where_nine_tenths_of_the_gain_are_reached():
    at = np.array(c21_helpful_policies.AT, float)
    assert c21_helpful_policies.saturation(np.minimum(at, 10.0)) == pytest.approx(9.0)
    assert c21_helpful_policies.saturation(0.3 - np.minimum(at, 4.0)) == at[-1], "without a gain, nothing saturates"


def test_skill_pairs_have_one_right_answer_in_random_places():
    class Task:
        prompt_width, row_width = 20, 38

    class Some:
        settings, task = trial.settings_of(3), Task()

    rows = c46_skill_mixing.skill_pairs(Some(), 400, held_out=False, flipped=0.25)  # type: ignore[arg-type]
    tokens, mask, ranks = (np.asarray(x) for x in (rows.tokens_BKL, rows.mask_BKL, rows.ranks_BK))
    assert 0.4 < np.mean(ranks[:, 0] == 1) < 0.6 and (ranks.sum(axis=1) == 3).all()
    texts = [
        {each.text for each in c46_skill_mixing.problems(Some(), 400, held_out=held_out)}  # type: ignore[arg-type]
        for held_out in (False, True)
    ]
    assert not texts[0] & texts[1]
    words = [
        [" ".join(lexicon.VOCABULARY[t] for t in tokens[b, k][mask[b, k]]) for k in range(2)]
        for b in range(len(tokens))
    ]
    right = 0
    for b, (first, second) in enumerate(words):
        assert first != second and first.split(" = ")[0] == second.split(" = ")[0]
        if "copy :" in first:
            asked, answer = first.split("copy : ")[1].split(" = ")
            right += answer.split()[:3] == asked.split() if ranks[b, 0] == 1 else answer.split()[:3] != asked.split()
    assert 80 < right < 118  # of 133 or 134 copied texts, about a quarter have the wrong label
