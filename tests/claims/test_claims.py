"""Claims are decided as they should be, on synthetic measurements."""

import types as types_lib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from claims import trajectories, trial, verdicts
from claims.instructgpt import c09_kl_coefficient
from claims.overoptimisation import (
    c16_sqrt_kl,
    c17_train_and_test_models,
    c31_reward_model_overoptimised,
    c35_functional_forms,
    c37_policy_size,
    c38_kl_penalty_frontier,
)
from claims.policy_optimisation import c30_small_policy, c32_separate_critic, c33_adaptive_kl
from recipe import tasks

from rlhf_jax.simulation import labelers

KL_C = np.array([0.0, 0.3, 1.0, 2.2, 4.0, 6.0, 9.0, 12.0, 16.0])
D_C = np.sqrt(KL_C)


def c16(rng, effect, noise=0.02):
    """Effect 1 is a line in the root of the KL, -1 one in the KL with slopes that differ between sizes."""
    curve_C, slopes = (D_C, (1.0, 1.0, 1.0)) if effect > 0 else (KL_C, (0.5, 1.0, 2.0))
    noises = rng.normal(size=(3, len(D_C))) * noise
    if effect == 0:
        return {name: {"kl": KL_C, "gain": noises[i]} for i, name in enumerate(c16_sqrt_kl.SIZES)}
    return {
        name: {"kl": KL_C, "gain": slope * curve_C + noises[i]}
        for i, (name, slope) in enumerate(zip(c16_sqrt_kl.SIZES, slopes, strict=True))
    }


def c17(rng, effect, noise=0.02):
    share_C = np.linspace(0, 1, len(c17_train_and_test_models.AT)) ** 2
    arms = ("train model", "test model", "labelers")
    gains = {"train model": effect * share_C, "test model": 0 * share_C, "labelers": 0 * share_C}
    return {
        name: {
            "gain": share_C + gains[name] + noise * rng.normal(size=len(share_C)) * (share_C > 0),
            "win_rate": 0.6 + 0.2 * gains[name] + noise * rng.normal(size=len(share_C)),
        }
        for name in arms
    }


def c30(rng, effect):
    rates = {"small SFT": 0.4, "small PPO": 0.5 + 0.1 * effect}
    return {
        arm: {
            size: {"win_rate": rate + 0.01 * rng.normal(), "at equal lengths": rate + 0.01 * rng.normal()}
            for size in c30_small_policy.SFT
        }
        for arm, rate in rates.items()
    }


def c31(rng, effect, noise=0.02):
    kl_C = np.array([16.0, 9.0, 6.0, 4.0, 2.2, 0.3])
    d_C = np.sqrt(kl_C)
    gold_C = {1: d_C - 0.2 * d_C**2, -1: 0.2 * d_C**2 - d_C, 0: 0 * d_C}[effect]
    return {
        f"{coef:g}": {
            "kl": kl_C[i],
            "gold": gold_C[i] + noise * rng.normal(),
            "score": (d_C[i] if effect else 0.0) + noise * rng.normal(),
        }
        for i, coef in enumerate(c09_kl_coefficient.COEFS)
    }


def c32(rng, effect, noise=0.02):
    gains = dict.fromkeys(c32_separate_critic.ARMS, 0.0) | {c32_separate_critic.SEPARATE: 0.2 * effect}
    return {
        name: {"reward": np.append(rng.normal(size=6), gain + noise * rng.normal(size=6))}
        for name, gain in gains.items()
    }


def c33(rng, effect, noise=0.0):
    spread = {1: (0.5, 0.02), -1: (0.05, 0.8), 0: (0.3, 0.3)}[effect]
    return {
        name: {"kl": c33_adaptive_kl.TARGET * np.exp(each * rng.normal(size=3))}
        for name, each in zip(c33_adaptive_kl.ARMS, spread, strict=True)
    }


def c35(rng, effect, noise=0.002):
    """Effect 1 has the curves of the paper, -1 exchanges the two methods."""
    kl_M = np.linspace(0.25, 9.0, 12)
    d_M = np.sqrt(kl_M)
    curves = [d_M * (1 - 0.25 * d_M), d_M * (1 - 0.6 * np.log(d_M))]
    if effect == 0:
        curves = [0.01 * rng.normal(size=len(d_M)) for _ in range(2)]
    return {
        name: {"kl": kl_M, "gain": curve_M + noise * rng.normal(size=len(d_M))}
        for name, curve_M in zip(c35_functional_forms.FORMS, curves[:: 1 if effect >= 0 else -1], strict=True)
    }


def c37(rng, effect, noise=0.002):
    ns = np.array(c37_policy_size.NS)
    best_kl_M = np.log(ns) - (ns - 1) / ns
    d_M = np.sqrt(best_kl_M)
    spent, more = {1: (4.0, 0.2), -1: (0.25, -0.2), 0: (1.0, 0.0)}[effect]
    measured = {}
    for name, gain in (("small", 0.1 * (1 + more)), ("large", 0.1)):
        peak = 2.0 if effect < 0 and name == "small" else 1.0
        gain = gain + noise * rng.normal()
        measured[name] = {
            "rl": {"kl": KL_C, "score": np.sqrt(KL_C / spent) * np.exp(0.1 * rng.normal()), "gold": KL_C},
            "best of n": {
                "kl": best_kl_M,
                "score": np.sqrt(best_kl_M) * np.exp(0.1 * rng.normal()),
                "gold": 0.6 + gain * d_M * (2 - d_M / peak) / peak,
            },
        }
    return measured


def c38(rng, effect, noise=0.005):
    gains = {1: (0.0, 0.2), -1: (0.1, -0.2), 0: (0.0, 0.0)}[effect]
    return {
        name: {
            "kl": KL_C,
            "gold": np.sqrt(KL_C) + (gains[0] * (KL_C > 0) if name != "no penalty" else 0) + shift,
            "score": np.sqrt(KL_C) + (gains[1] * (KL_C > 0) if name != "no penalty" else 0) + shift,
        }
        for name, shift in zip(c38_kl_penalty_frontier.COEFS, noise * rng.normal(size=3), strict=True)
    }


CASES = {
    "C16": (c16_sqrt_kl, c16),
    "C17": (c17_train_and_test_models, c17),
    "C30": (c30_small_policy, c30),
    "C31": (c31_reward_model_overoptimised, c31),
    "C32": (c32_separate_critic, c32),
    "C33": (c33_adaptive_kl, c33),
    "C35": (c35_functional_forms, c35),
    "C37": (c37_policy_size, c37),
    "C38": (c38_kl_penalty_frontier, c38),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("effect", "verdict"), [(1, "shown"), (-1, "refuted")])
def test_an_effect_is_shown_and_the_reverse_refuted(name, effect, verdict):
    module, make = CASES[name]
    rng = np.random.default_rng(0)
    parts = module.decide([make(rng, effect) for _ in range(5)])
    assert verdicts.overall(parts) == verdict, parts


@pytest.mark.parametrize("name", CASES)
def test_noise_is_rarely_shown(name):
    module, make = CASES[name]
    rng = np.random.default_rng(1)
    shown = [verdicts.overall(module.decide([make(rng, 0) for _ in range(5)])) == "shown" for _ in range(200)]
    assert np.mean(shown) <= 0.05


def test_values_at_equal_kl_are_interpolated_between_checkpoints():
    roots_K = np.array([0.5, 1.5, 2.0])
    kl_C, values_C = np.array([0.0, 4.0, 1.0]), np.array([0.0, 3.0, 1.0])  # not sorted
    expected = [0.5, 2.0, 3.0]
    np.testing.assert_allclose(trajectories.at_root(trajectories.root(kl_C), values_C, roots_K), expected)
    np.testing.assert_array_equal(trajectories.root([-0.1, 4.0]), [0.0, 2.0])


def test_the_kl_at_one_score_is_interpolated():
    run = {"score": np.array([0.0, 1.0, 3.0, 2.0]), "kl": np.array([0.0, 1.0, 9.0, 16.0])}
    assert c37_policy_size.first_root(run, 2.0) == pytest.approx(2.0)
    assert c37_policy_size.first_root(run, 0.0) == pytest.approx(0.0)
    other = run | {"kl": run["kl"] / 4}
    assert c37_policy_size.kl_ratio(run, other) == pytest.approx(np.log(4))


def test_the_parabola_of_gold_utility_has_no_constant():
    d_C = np.array([0.5, 1.0, 2.0, 3.0])
    assert c31_reward_model_overoptimised.bend(d_C, 2 * d_C - 0.5 * d_C**2) == pytest.approx(-0.5)


def test_the_implied_win_rate_uses_scores_before_normalisation():
    score_CN, gain = np.array([[0.0, 1.0], [2.0, 0.0]]), 0.5
    expected = np.mean([1 / (1 + np.exp(-4.0)), 1 / (1 + np.exp(2.0))])
    implied_C = c17_train_and_test_models.implied(score_CN, {"head": {"gain": gain}})
    np.testing.assert_allclose(implied_C, np.array([0.5, expected]))


def test_predictions_beyond_the_fitted_range_are_exact_for_the_form_of_the_points():
    kl_M = np.linspace(0.25, 9.0, 12)
    points = {"kl": kl_M[::-1], "gain": (np.sqrt(kl_M) * (1 - 0.2 * np.sqrt(kl_M)))[::-1]}
    own, other = (c35_functional_forms.error(points, form) for form in c35_functional_forms.FORMS.values())
    assert own < 1e-9 < 0.01 < other


def test_labelers_who_like_long_answers_have_the_other_tastes_of_the_training_labelers():
    settings = trial.settings_of(100, quick=True)
    own: Any = types_lib.SimpleNamespace(settings=settings)
    world = tasks.make_task(settings).world
    assert world is not None
    length, known_RF = labelers.FEATURES.index("length"), np.asarray(world.pool.weights_RF)
    for taste in (0.0, 0.3):
        weights_RF = np.asarray(c30_small_policy.labelers_of(own, taste).weights_RF)
        np.testing.assert_array_equal(np.delete(weights_RF, length, axis=1), np.delete(known_RF, length, axis=1))
        assert np.mean(weights_RF[:, length]) == pytest.approx(taste, abs=0.05)


def test_answers_that_are_only_longer_win_half_the_time_at_equal_lengths():
    rng, length = np.random.default_rng(0), labelers.FEATURES.index("length")
    weights_RF = np.zeros((4, len(labelers.FEATURES)))
    weights_RF[:, length] = 0.3
    pool: Any = labelers.make_pool(jax.random.key(0), 4, temperature=0.2)
    judges = pool.replace(weights_RF=jnp.asarray(weights_RF))
    reference, *answers = rng.random((3, 500, len(labelers.FEATURES))).astype(np.float32)
    for features, factor in ((reference, 1.0), (answers[0], 1.0), (answers[1], 1.5)):
        features[:, length] = 0.45 * factor * np.exp(0.1 * rng.normal(size=500))
    sft, ppo = c30_small_policy.win_rates(judges, answers, reference).values()
    by_hand = np.mean(1 / (1 + np.exp(-0.3 * (answers[1] - reference)[:, length] / 0.2)))
    assert ppo["win_rate"] == pytest.approx(by_hand, abs=1e-5) and by_hand > 0.55
    assert ppo["at equal lengths"] == pytest.approx(0.5, abs=0.02)
    assert ppo["length ratio"] == pytest.approx(1.5, abs=0.02)
    assert sft["win_rate"] == pytest.approx(0.5, abs=0.01)
