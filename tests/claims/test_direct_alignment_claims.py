"""The claims about DPO, PPO and their comparison are decided by the stated effects."""

import claim_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from claims import catalogue
from claims.direct_alignment import (
    c39_dpo_frontier,
    c40_unseen_answers,
    c41_pair_shift,
    c43b_implicit_reward,
)
from claims.policy_optimisation import (
    c34_known_optimum,
    c42_implementation_details,
    c43a_early_updates,
    c43c_lambda_and_rloo,
)
from preferences import bandit_study


def c34(rng, effect):
    def gain(base):
        return {"gain": base + 0.01 * rng.normal(size=(6, 2)), "optimum": np.ones((6, 2)), "kl": np.ones((6, 2))}

    online = np.array([0.2 * effect, 0.0])
    return {
        "true reward": gain(0.85 + 0.1 * effect),
        "many labels": gain(0.8 + 0.12 * effect),
        "offline labels": gain(0.5),
        "online labels": gain(0.5 + online),
    }


def c39(rng, effect):
    kl = np.array([0.0, 1.0, 4.0, 9.0])
    return {
        name: {
            "kl": kl + 0.1 * rng.uniform(size=4) * (kl > 0),
            "gold": np.sqrt(kl) * (1 + 0.1 * sign * effect) + 0.01 * rng.normal(size=4),
            "wins": 0.7 - np.linspace(0, 0.1 * (1 - 0.5 * sign * effect), 5) + 0.005 * rng.normal(size=5),
        }
        for name, sign in (("DPO", 1), ("PPO", -1))
    }


def c40(rng, effect):
    def arm(unseen, loss):
        return {"unseen": unseen + 0.002 * rng.normal(size=8), "loss": loss + 0.01 * rng.normal(size=8)}

    return {
        "reference": arm(0.002, 0.69),
        "DPO": arm(0.012 + 0.05 * effect, 0.69 - 0.6 * effect),
        "PPO": arm(0.012 - 0.05 * effect, 0.69 - 0.2 * effect),
    }


def c41(rng, effect):
    rewards = {
        "PPO": 0.8,
        "PPO, shifted": 0.8,
        "PPO with a table": 0.8,
        "PPO with a table, shifted": 0.8 - 0.2 * effect,
        "DPO": 0.8,
        "DPO, shifted": 0.8 - 0.2 * effect,
        "DPO after SFT, shifted": 0.8,
        "iterated DPO, shifted": 0.8,
    }
    return {name: {"reward": reward + 0.03 * rng.normal(size=8), "kl": np.ones(8)} for name, reward in rewards.items()}


def c42(rng, effect):
    names = (*c42_implementation_details.STEPS, c42_implementation_details.LARGE_KL)
    return {
        name: {"score": effect * step + 0.1 * rng.normal(), "kl": 1.0, "gold": 0.0}
        for name, step in zip(names, (1, 2, 3, 4, 0))
    }


def c43a(rng, effect):
    kl = {"PyTorch": 2.4e-3, "TensorFlow 1": 2.4e-3 / 2 / 3**effect}
    clipped = {"PyTorch": 0.02, "TensorFlow 1": 0.02 - 0.015 * effect}
    return {
        name: {
            "approx_kl": kl[name] * np.exp(0.1 * rng.normal()),
            "clip_fraction": clipped[name] + 0.002 * rng.normal(),
        }
        for name in kl
    }


def c43b(rng, effect):
    return {
        "reward model": {"accuracy": 0.7 + 0.01 * rng.normal()},
        "DPO": {"accuracy": 0.7 - 0.04 * effect + 0.01 * rng.normal()},
    }


def c43c(rng, effect):
    scores = 2 + effect * np.array([0.0, 0.5, 1.0, 1.3, 1.5])
    return {
        name: {"score": score + 0.05 * rng.normal(), "kl": 5.0, "gold": 0.0, "clipped": 0.05 - 0.03 * effect}
        for name, score in zip(c43c_lambda_and_rloo.ARMS, scores)
    }


CASES = {
    "C34": (c34_known_optimum, c34),
    "C39": (c39_dpo_frontier, c39),
    "C40": (c40_unseen_answers, c40),
    "C41": (c41_pair_shift, c41),
    "C42": (c42_implementation_details, c42),
    "C43a": (c43a_early_updates, c43a),
    "C43b": (c43b_implicit_reward, c43b),
    "C43c": (c43c_lambda_and_rloo, c43c),
}


@pytest.mark.parametrize("name", CASES)
def test_a_claim_is_shown_with_the_stated_effect_and_refuted_with_the_reverse(name):
    module, simulate = CASES[name]
    assert module.CLAIM.id == name
    claim_cases.check_effects(module, simulate)


@pytest.mark.parametrize("name", CASES)
def test_a_claim_is_rarely_shown_without_an_effect(name):
    claim_cases.check_noise(*CASES[name])


def test_gold_utility_is_compared_at_equal_kl():
    measured = {
        "DPO": {"kl": [0.0, 8.0, 4.0], "gold": [0.0, 8.0, 6.0]},
        "PPO": {"kl": [0.0, 4.0], "gold": [0.0, 4.0]},
    }
    # At KLs of 1, 2, 3 and 4, DPO has 1.5 times the KL and PPO has the KL itself.
    assert c39_dpo_frontier.frontier_difference(measured) == pytest.approx(np.mean([0.5, 1.0, 1.5, 2.0]))


def test_only_pairs_of_seen_answers_are_seen_and_the_better_one_is_first():
    rng = np.random.default_rng(0)
    S, A = c40_unseen_answers.S, c40_unseen_answers.A
    rewards_SA, unseen_SA = rng.normal(size=(S, A)).astype(np.float32), rng.uniform(size=(S, A)) < 0.3
    tokens_N22, where_N = c40_unseen_answers.seen_pairs(jnp.asarray(rewards_SA), jnp.asarray(unseen_SA))
    found = {tuple(np.asarray(pair).ravel().tolist()) for pair in np.asarray(tokens_N22)[np.asarray(where_N)]}
    expected = {
        (s, a, s, b)
        for s in range(S)
        for a in range(A)
        for b in range(A)
        if rewards_SA[s, a] > rewards_SA[s, b] and not unseen_SA[s, a] and not unseen_SA[s, b]
    }
    assert found == expected


def test_the_optimum_is_worth_its_own_gain():
    """The optimum at any coefficient has the gain and the KL of the analytic frontier."""
    rewards_SA, reference_SA = jax.random.normal(jax.random.key(0), (2, bandit_study.S, bandit_study.A))
    world = bandit_study.Bandit(rewards_SA, reference_SA, reference_SA, jax.random.key(1))
    for coef in (0.1, 0.7, 3.0):
        logits_SA = jax.nn.log_softmax(reference_SA) + rewards_SA / coef
        found = c34_known_optimum.worth(world, logits_SA)
        probs, reference = (np.asarray(jax.nn.softmax(x), np.float64) for x in (logits_SA, reference_SA))
        gain = np.mean(np.sum((probs - reference) * np.asarray(rewards_SA), axis=1))
        kl = np.mean(np.sum(probs * np.log(probs / reference), axis=1))
        assert float(found["gain"]) == pytest.approx(gain, rel=1e-4)
        assert float(found["kl"]) == pytest.approx(kl, rel=1e-4)
        assert float(found["optimum"]) == pytest.approx(gain, rel=1e-3)


def test_pairs_have_different_answers_in_the_proportions_of_the_policy():
    """The share of each ordered pair equals the probability that a loop over answers computes."""
    rng = np.random.default_rng(0)
    logits_SA, rewards_SA = rng.normal(size=(2, 1, 3)).astype(np.float32)
    n = 40_000
    pairs = c34_known_optimum.sample_pairs(jax.random.key(0), jnp.asarray(logits_SA), jnp.asarray(rewards_SA), n=n)
    tokens_B22 = np.asarray(pairs.tokens_BKL)
    p_A = np.exp(logits_SA[0]) / np.exp(logits_SA[0]).sum()
    assert (tokens_B22[:, 0, 1] != tokens_B22[:, 1, 1]).all()
    for better in range(3):
        for worse in range(3):
            if better == worse:
                continue
            drawn = p_A[better] * p_A[worse] * (1 / (1 - p_A[better]) + 1 / (1 - p_A[worse]))
            expected = drawn / (1 + np.exp(rewards_SA[0, worse] - rewards_SA[0, better]))
            found = np.mean((tokens_B22[:, 0, 1] == better) & (tokens_B22[:, 1, 1] == worse))
            assert abs(found - expected) < 5 * np.sqrt(expected / n)


def test_ids_are_found_in_any_case():
    """The command looks up ``each.capitalize()``, so that c43A is C43a."""
    assert [name.swapcase().capitalize() for name in catalogue.CLAIMS] == list(catalogue.CLAIMS)
