"""Claims about diversity, unusual prompts, size and ensembles are decided as they should be, on synthetic data."""

import dataclasses

import claim_cases
import numpy as np
import pytest
from claims import model_stages
from claims.helpful_harmless import c23_size_and_skills, c24_unusual_prompts, c26_narrower_distribution
from claims.overoptimisation import c48_ensemble_penalty


def size_and_skills(rng, effect):
    measured = {}
    for place, size in enumerate(c23_size_and_skills.SIZES):
        before, rise = 1.3 - 0.1 * place, 0.1 - 0.03 * effect * place + 0.005 * rng.normal()
        losses = {"before": before, "after": before + rise}
        measured[size] = {name: {"pretraining_loss": loss, "skill_accuracy": 0.3} for name, loss in losses.items()}
    return measured


def unusual_prompts(rng, effect):
    areas = {"MD": 0.8, "SRMD": 0.8 + 0.05 * effect, "10-shot": 0.8 + 0.1 * effect, "1-shot": 0.7, "100-shot": 0.95}
    middle = {name: area + 0.01 * rng.normal() for name, area in areas.items()}
    return {"middle": middle, "1": middle, "2": middle}


def narrower_distribution(rng, effect):
    noise = 0.02 * rng.normal(size=3)
    start = {"entropy": 1.0, "diversity": 0.3, "matched_temperature": 1.0}
    narrowed = {"entropy": 1.0 - 0.3 * effect + noise[0], "diversity": 0.3 - 0.1 * effect + noise[1]}
    return {"start": start, "ppo": narrowed | {"matched_temperature": 1 - 0.3 * effect + noise[2]}}


def ensemble_penalty(rng, effect):
    kl_C = np.linspace(0, 16, len(c48_ensemble_penalty.AT))
    d_C, measured = np.sqrt(kl_C), {}
    for place, name in enumerate(c48_ensemble_penalty.COEFS):
        bend = 0.03 - 0.01 * effect * (place > 0)
        gold_C = 0.6 + d_C * (0.1 - bend * d_C) + 0.003 * rng.normal() * d_C
        measured[name] = {"kl": kl_C, "gold": gold_C, "disagreement": kl_C}
    return measured


CASES = {
    "C23": (c23_size_and_skills, size_and_skills),
    "C24": (c24_unusual_prompts, unusual_prompts),
    "C26": (c26_narrower_distribution, narrower_distribution),
    "C48": (c48_ensemble_penalty, ensemble_penalty),
}


@pytest.mark.parametrize("name", CASES)
def test_a_claim_is_shown_with_the_stated_effect_and_refuted_with_the_reverse(name):
    module, simulate = CASES[name]
    assert module.CLAIM.id == name
    claim_cases.check_effects(module, simulate)


@pytest.mark.parametrize("name", CASES)
def test_a_claim_is_rarely_shown_without_an_effect(name):
    claim_cases.check_noise(*CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_the_claim_is_described(name):
    module, _ = CASES[name]
    assert all(getattr(module.CLAIM, each.name) for each in dataclasses.fields(module.CLAIM) if each.name != "changes")


def test_temperatures_beyond_the_measured_range_are_named_in_the_plot():
    measured = narrower_distribution(np.random.default_rng(0), 1)
    measured["ppo"]["matched_temperature"] = 2.0
    assert "1 of 1 seeds beyond the measured range" in c26_narrower_distribution.plot([measured])
    measured["ppo"]["matched_temperature"] = 0.7
    assert "beyond" not in c26_narrower_distribution.plot([measured])


def test_the_slope_is_the_change_in_log_probability_for_each_doubling():
    sizes = model_stages.LOG_SIZES
    measured = {
        size: {"before": {"pretraining_loss": 1.5}, "after": {"pretraining_loss": 1.5 - 0.02 * (sizes[size] - 20)}}
        for size in c23_size_and_skills.SIZES
    }
    assert c23_size_and_skills.slope(measured) == pytest.approx(0.02)
    assert len(measured) == 4 and np.all(np.diff([sizes[size] for size in measured]) > 0.5)


def test_correlated_features_are_detected_by_the_relative_distance_and_examples_help():
    rng = np.random.default_rng(3)

    def usual(n):
        return rng.normal(size=(n, 1)) + 0.3 * rng.normal(size=(n, 6))

    def harmful(n):
        return usual(n) + np.array([0.5, -0.5, 0, 0, 0, 0])

    found = c24_unusual_prompts.detect(usual(2000), harmful(150), usual(2000), harmful(2000), rng=rng)
    assert 0.5 < found["MD"] < found["10-shot"] < found["100-shot"]
    assert list(found) == list(c24_unusual_prompts.NAMES)


def test_the_peak_and_the_fall_from_it():
    run = {"kl": np.array([0.0, 1.0, 4.0, 9.0]), "gold": np.array([0.5, 0.6, 0.7, 0.4])}
    assert c48_ensemble_penalty.fall(run) == pytest.approx(0.3) and c48_ensemble_penalty.peak_root(run) == 2
