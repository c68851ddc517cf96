"""Claims about InstructGPT and the size of reward models are decided as they should be, on synthetic measurements."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from claims import claim_results, model_stages, reward_fits, reward_sizes, trial, verdicts
from claims.instructgpt import (
    c01_alignment_beats_size,
    c02_pair_batches,
    c03_sft_epochs,
    c04_labeler_agreement,
    c05_labeler_groups,
    c06_heldout_labelers,
    c07_alignment_tax,
    c08_ptx_versus_kl,
    c09_kl_coefficient,
    c10_learning_rates,
)
from claims.overoptimisation import (
    c11_scaling,
    c18_reward_size,
    c25_best_of_k,
    c36a_reward_size_and_beta,
    c36b_data_or_epochs,
)
from recipe import tasks

from rlhf_jax import losses, types
from rlhf_jax.simulation import labelers

Make = Callable[[np.random.Generator, float], dict[str, Any]]
"""Returns measurements of one seed with an effect of this size: 1 as stated, -1 reversed, 0 none."""


def pair_batches(rng, effect):
    base, more = 0.6 + 0.01 * rng.normal(), {"shuffled": 0.05 * effect, "3 epochs": 0.04 * effect}
    return {name: {"loss": base + more.get(name, 0) + 0.002 * rng.normal()} for name in c02_pair_batches.ARMS}


def sft_epochs(rng, effect):
    measured = {}
    for place, epoch in enumerate(c03_sft_epochs.EPOCHS):
        rise = effect * 0.05 * place
        measured[str(epoch)] = {name: rise + 0.01 * rng.normal() for name in ("loss", "score", "gold")}
    return measured


def labeler_groups(rng, effect):
    common = 0.68 + 0.005 * rng.normal(size=5)
    gaps = {"in-group": 0.025 * effect, "held-out": 0.0}
    return {name: {"accuracy": common + gap + 0.002 * rng.normal(size=5)} for name, gap in gaps.items()}


def ptx_versus_kl(rng, effect):
    arms = {"start": (1.0, 0.6), "ppo": (1.0 + 0.1 * effect, 0.7)}
    arms |= {f"ptx {c:g}": (1.0 - 0.1 * effect, 0.7 if effect > 0 else 0.6) for c in c08_ptx_versus_kl.PTX}
    arms |= {f"kl {c:g}": (1.0 + 0.1 * effect, 0.68) for c in c08_ptx_versus_kl.KL}
    return {
        name: {"loss": loss + 0.01 * rng.normal(), "gold": gold + 0.005 * rng.normal()}
        for name, (loss, gold) in arms.items()
    }


def learning_rates(rng, effect):
    rises = {"PPO": [0.1, 1.0 + 0.5 * effect, 3.0], "PPO-ptx": [0.1, 1.0 - 0.5 * effect, 3.0]}
    arms = {
        f"{name}, rate x {rate}": {"gain": 0.1, "rise": rise + 0.02 * rng.normal()}
        for name, rises in rises.items()
        for rate, rise in zip(c10_learning_rates.RATES, rises)
    }
    for place, ratio in enumerate(c10_learning_rates.RATIOS):
        arms[f"PPO-ptx, ratio {ratio:g}"] = {"gain": 0.1, "rise": 0.2 - 0.05 * effect * place + 0.01 * rng.normal()}
    return arms


def reward_curves(rng, effect):
    d = np.sqrt(np.log(reward_sizes.NS) - 1 + 1 / np.array(reward_sizes.NS))
    curves = {}
    for place, size in enumerate((*reward_sizes.SIZES, model_stages.LARGEST)):
        bend = 0.02 - 0.004 * effect * place
        noise = 0.002 * rng.normal() * d
        curves[size] = {"proxy": 1.2 * d, "gold": d * (0.1 - bend * d) + noise + 0.001 * rng.normal(size=len(d)) * d}
    return curves


def reward_sizes_in_rl(rng, effect):
    d, arms = np.linspace(0, 4, 12), {}
    for place, size in enumerate((*reward_sizes.SIZES, model_stages.LARGEST)):
        bend = 0.06 - 0.01 * effect * place
        gain = d * (0.1 - bend * np.log(np.maximum(d, 1e-3))) + 0.001 * rng.normal(size=len(d)) * d
        arms[size] = {"kl": d**2, "gain": gain + 0.004 * rng.normal() * d}
    return arms


def data_or_epochs(rng, effect):
    arms = {c36b_data_or_epochs.ALL: 0.1} | dict.fromkeys(c36b_data_or_epochs.QUARTER, 0.1 - 0.03 * effect)
    return {name: {"gain": gain + 0.005 * rng.normal()} for name, gain in arms.items()}


def labeler_agreement(rng, effect):
    rates = {"closed form": 0.73, "one labeler": 0.73, "majority of three": 0.73 + 0.03 * effect}
    return {name: rate + 0.003 * rng.normal() for name, rate in rates.items()}


def heldout_labelers(rng, effect):
    gap = {1: 0.0, 0: 0.03, -1: 0.08}[int(effect)]  # without an effect, it is on the border of the range
    rates = {"training labelers": 0.65 + 0.01 * rng.normal(), "held-out labelers": 0.0}
    rates["held-out labelers"] = rates["training labelers"] - gap
    return {name: {k: v + 0.005 * rng.normal() for k, v in rates.items()} for name in c06_heldout_labelers.OPTIONS}


def alignment_tax(rng, effect):
    skills = {
        "start": 0.5,
        "ppo": 0.5 - 0.08 * effect,
        "ppo_ptx": 0.5 + 0.05 * effect,
        "longer ppo": 0.5 - 0.2 * effect,
    }
    return {
        name: {
            "skill_accuracy": skill + 0.01 * rng.normal(),
            "pretraining_loss": 1.5 - skill + 0.01 * rng.normal(),
            "gold": rng.normal(size=4000),
        }
        for name, skill in skills.items()
    }


def kl_coefficient(rng, effect):
    peak = 0.1 * effect * np.array([0, 1, 3, 2, 0])
    return {
        f"{coef:g}": {"gold": 0.7 + gold + 0.01 * rng.normal(), "score": 0.0, "kl": 1.0}
        for coef, gold in zip(c09_kl_coefficient.COEFS, peak, strict=True)
    }


def best_of_k(rng, effect):
    """Answers to 100 prompts; the best of k is better by the same amount at each step."""
    measured = {}
    for step, k in enumerate(c25_best_of_k.SIZES):
        halves = {half: 0.2 * effect * step + rng.normal(size=(100, 64 // k)) for half in ("first", "second")}
        measured[f"best of {k}"] = {"gold": float(halves["first"].mean())} | halves
    return measured


def alignment_beats_size(rng, effect):
    level = {"base": -2.0, "prompted": -1.0, "sft": 0.0, "ppo": 1.0, "ppo_ptx": 1.0}
    difference = {"small": -0.5, "large": 0.0}
    return {
        f"{size} {arm}": {"gold": effect * level[arm] + less + rng.normal(size=2000)}
        for size, less in difference.items()
        for arm in c01_alignment_beats_size.ARMS
    }


def scaling(rng, effect):
    return {
        f"{size}, 1 / {share}": {
            "accuracy": 0.6
            + 0.02 * effect * (model_stages.LOG_SIZES[size] - 13)
            - 0.02 * effect * np.log2(share)
            + 0.003 * rng.normal()
        }
        for size in c11_scaling.SIZES
        for share in c11_scaling.SHARES
    }


CASES = [
    (c01_alignment_beats_size.CLAIM, alignment_beats_size),
    (c11_scaling.CLAIM, scaling),
    (c02_pair_batches.CLAIM, pair_batches),
    (c03_sft_epochs.CLAIM, sft_epochs),
    (c04_labeler_agreement.CLAIM, labeler_agreement),
    (c05_labeler_groups.CLAIM, labeler_groups),
    (c06_heldout_labelers.CLAIM, heldout_labelers),
    (c07_alignment_tax.CLAIM, alignment_tax),
    (c09_kl_coefficient.CLAIM, kl_coefficient),
    (c25_best_of_k.CLAIM, best_of_k),
    (c08_ptx_versus_kl.CLAIM, ptx_versus_kl),
    (c10_learning_rates.CLAIM, learning_rates),
    (c18_reward_size.CLAIM, reward_curves),
    (c36a_reward_size_and_beta.CLAIM, reward_sizes_in_rl),
    (c36b_data_or_epochs.CLAIM, data_or_epochs),
]
each_case = pytest.mark.parametrize(("claim", "make"), CASES, ids=[claim.id for claim, _ in CASES])


def decided(claim, make: Make, effect: float, rng: np.random.Generator) -> str:
    return verdicts.overall(claim.decide([make(rng, effect) for _ in range(5)]))


@each_case
def test_a_stated_effect_is_shown_and_the_reverse_is_refuted(claim, make):
    rng = np.random.default_rng(0)
    measured_S = [make(rng, 1.0) for _ in range(5)]
    stored_S = [{name: measured[name] for name in sorted(measured)} for measured in measured_S]
    assert claim.decide(stored_S) == claim.decide(measured_S)  # arms are stored in alphabetical order
    assert [decided(claim, make, 1.0, rng) for _ in range(5)] == ["shown"] * 5
    assert [decided(claim, make, -1.0, rng) for _ in range(5)] == ["refuted"] * 5


@each_case
def test_a_claim_without_an_effect_is_rarely_shown(claim, make):
    rng = np.random.default_rng(1)
    assert np.mean([decided(claim, make, 0.0, rng) == "shown" for _ in range(200)]) <= 0.05
    measured_S = [make(rng, 0.0) for _ in range(5)]
    assert claim_results.null_rate(claim, measured_S, shuffles=100) <= 0.05


@each_case
def test_a_claim_can_be_drawn_and_decided_with_a_single_seed(claim, make):
    measured_S = [make(np.random.default_rng(2), 1.0)]
    assert claim.plot(measured_S).startswith("<svg")
    assert {part.verdict for part in claim.decide(measured_S)} == {"not shown"}


def test_alpha_and_the_beta_of_each_run_are_recovered():
    runs, betas = [], [0.05, 0.01]
    for beta, kl_C in zip(betas, (np.linspace(0, 9, 12), np.linspace(0, 30, 12))):
        d_C = np.sqrt(kl_C)
        runs.append({"kl": kl_C, "gain": d_C * (0.1 - beta * np.log(np.maximum(d_C, 1e-3)))})
    alpha, fitted = c36a_reward_size_and_beta.fit(runs)
    np.testing.assert_allclose([alpha, *fitted], [0.1, *betas], rtol=1e-9)


def comparisons(rng, n=6, k=4, width=3):
    where_BK = rng.random((n, k)) < 0.8
    where_BK[:, :2] = True
    tokens_BKL = rng.integers(5, size=(n, k, width))
    return types.Comparisons(tokens_BKL, tokens_BKL > 0, rng.integers(1, 4, size=(n, k)), where_BK)


def test_pair_numbers_equal_a_loop_over_pairs():
    rng = np.random.default_rng(3)
    rows, scores_BK = comparisons(rng), rng.integers(-2, 3, size=(6, 4)) / 2.0
    pair_losses, right = [], []
    for b, i, j in np.ndindex(6, 4, 4):
        if rows.where_BK[b, i] and rows.where_BK[b, j] and rows.ranks_BK[b, i] < rows.ranks_BK[b, j]:
            lead = scores_BK[b, i] - scores_BK[b, j]
            pair_losses.append(np.log1p(np.exp(-lead)))
            right.append(0.5 if lead == 0 else float(lead > 0))
    numbers = reward_fits.pair_numbers(scores_BK, rows)
    np.testing.assert_allclose([numbers["loss"], numbers["accuracy"]], [np.mean(pair_losses), np.mean(right)])


def test_shuffled_pairs_have_the_ranking_loss_of_the_prompts_they_come_from():
    rng = np.random.default_rng(4)
    rows: Any = comparisons(rng)
    pairs = reward_fits.pairs_of(rows)
    weights_L = rng.normal(size=3)
    n_pairs_B = (reward_fits.better(rows.ranks_BK, rows.where_BK)).sum(axis=(1, 2))
    assert len(pairs.ranks_BK) == n_pairs_B.sum()
    of_pairs = [losses.ranking(s, r) for s, r in zip(pairs.tokens_BKL @ weights_L, pairs.ranks_BK)]
    of_prompts = [
        losses.ranking(s, r, where_K=w, ties_in_divisor=False) * n
        for s, r, w, n in zip(rows.tokens_BKL @ weights_L, rows.ranks_BK, rows.where_BK, n_pairs_B)
    ]
    np.testing.assert_allclose(sum(of_pairs), sum(of_prompts), rtol=1e-5)
    np.testing.assert_array_equal(pairs.mask_BKL, pairs.tokens_BKL > 0)


def test_accuracy_is_the_expected_agreement_with_simulated_choices():

    rng = np.random.default_rng(5)
    pool = labelers.make_pool(jax.random.key(0), 6, n_groups=2, group_spread=0.5, temperature=0.3)
    features_BKF = rng.random((3, 3, len(labelers.FEATURES))).astype(np.float32)
    features_BKF[0, 1] = features_BKF[0, 0]  # equal answers do not count
    scores_BK, where_BK = rng.normal(size=(3, 3)), np.ones((3, 3), bool)
    where_BK[2, 2] = False
    group = c05_labeler_groups.part(pool, np.array([0, 2, 4]))
    assert set(np.asarray(group.group_R).tolist()) == {0}
    wins = []
    for b, i, j in np.ndindex(3, 3, 3):
        if i < j and where_BK[b, j] and (b, i, j) != (0, 0, 1):
            for weights_F in np.asarray(pool.weights_RF)[[0, 2, 4]]:
                p = 1 / (1 + np.exp(-(features_BKF[b, i] - features_BKF[b, j]) @ weights_F / 0.3))
                wins.append(p if scores_BK[b, i] > scores_BK[b, j] else 1 - p)
    accuracy = c05_labeler_groups.accuracy(scores_BK, features_BKF, where_BK, group)
    np.testing.assert_allclose(accuracy, np.mean(wins), rtol=1e-5)


def test_the_threshold_of_the_learning_rate_is_interpolated():
    log_rates = np.log2(c10_learning_rates.RATES)
    assert c10_learning_rates.threshold([1.1, 0.2, 0.2]) == log_rates[0]
    assert c10_learning_rates.threshold([0.1, 0.2, 0.3]) == log_rates[-1]
    middle = c10_learning_rates.threshold([0.5, 2.5, 0.3])
    assert middle == pytest.approx(log_rates[0] + (log_rates[1] - log_rates[0]) / 4)


def test_demonstrations_with_the_prompt_of_a_training_one_are_not_held_out():
    prompts_BP = np.array([[1, 2], [3, 4], [1, 2], [5, 6], [3, 4], [7, 8]])
    assert c03_sft_epochs.new_rows(prompts_BP, 2).tolist() == [3, 5]


def test_the_curve_of_a_perfect_reward_model_is_that_of_order_statistics():
    rng = np.random.default_rng(6)
    gold_PN = rng.normal(size=(400, 64))
    curve = reward_sizes.curve(3 * gold_PN + 1, gold_PN)
    expected = [0.0] + [rng.normal(size=(4000, n)).max(axis=1).mean() for n in reward_sizes.NS[1:]]
    np.testing.assert_allclose(curve["gold"], expected, atol=0.06)
    np.testing.assert_allclose(curve["proxy"], curve["gold"], rtol=0.03, atol=0.01)
    assert np.all(np.diff(list(model_stages.LOG_SIZES.values())) > 0.5)


def test_accuracy_counts_pairs_of_different_gold_utility():
    rng = np.random.default_rng(0)
    scores_PN, gold_PN = rng.integers(4, size=(2, 6, 9)) / 4
    right = []
    for p in range(6):
        for i in range(9):
            for j in range(9):
                if gold_PN[p, i] > gold_PN[p, j]:
                    right.append(0.5 * (1 + np.sign(scores_PN[p, i] - scores_PN[p, j])))
    assert c11_scaling.accuracy(scores_PN, gold_PN) == pytest.approx(np.mean(right))


def test_the_regression_finds_the_slopes_of_both_logarithms():
    rng = np.random.default_rng(0)
    exact = {
        f"{size}, 1 / {share}": {"accuracy": 0.5 + 0.01 * model_stages.LOG_SIZES[size] - 0.02 * np.log2(share)}
        for size in c11_scaling.SIZES
        for share in c11_scaling.SHARES
    }
    assert c11_scaling.regress(exact) == pytest.approx((0.01, 0.02, 1.0))
    noise = {name: {"accuracy": rng.normal()} for name in exact}
    assert c11_scaling.regress(noise)[2] < 0.8


def test_prompts_are_written_like_questions_of_the_corpus():
    task = tasks.make_task(trial.settings_of(100, quick=True))
    written = c01_alignment_beats_size.as_in_corpus(task)
    texts = [task.tokenizer.decode(row[mask]) for row, mask in zip(written.tokens_BP, written.mask_BP)]
    followed = next(i for i, text in enumerate(written.texts) if "assistant:" in text)
    assert written.texts[followed].endswith(texts[followed].removesuffix(" answer :").split(" . ")[-1])
    assert all(text.startswith("question : ") and text.endswith(" answer :") for text in texts)
    assert written.tokens_BP.shape == task.eval_prompts.tokens_BP.shape
    assert "<|user|>" not in " ".join(texts) and "assistant" not in " ".join(texts)


def test_the_best_of_k_is_the_sample_with_the_highest_score():
    rng = np.random.default_rng(0)
    score_PN, gold_PN = rng.normal(size=(2, 5, 12))
    best_PG = c25_best_of_k._best(score_PN, gold_PN, 4)
    for p in range(5):
        for g in range(3):
            group = range(4 * g, 4 * g + 4)
            assert best_PG[p, g] == gold_PN[p, max(group, key=lambda n: score_PN[p, n])]


def test_different_labelers_judge_a_pair_and_follow_their_tastes():
    pool = labelers.make_pool(jax.random.key(0), 6, spread=0.2, temperature=1e-4)
    features_NF = np.random.default_rng(1).random((60, len(labelers.FEATURES))).astype(np.float32)
    votes_NL = c04_labeler_agreement._votes(jax.random.key(1), pool, features_NF, features_NF[::-1])
    share_N = np.asarray(labelers.preference_share(pool, jnp.asarray(features_NF), jnp.asarray(features_NF[::-1])))
    assert (votes_NL[share_N == 1] == 1).all() and (votes_NL[share_N == 0] == 0).all()
    assert 0 < np.mean(votes_NL[(share_N > 0) & (share_N < 1)] == 1) < 1
    assert votes_NL.shape == (60, c04_labeler_agreement.LABELERS)


def test_ties_do_not_count_in_the_agreement_of_labelers():
    pool = labelers.make_pool(jax.random.key(0), 6, tie_width=1e9)
    features_NF = np.random.default_rng(1).random((60, len(labelers.FEATURES))).astype(np.float32)
    votes_NL = c04_labeler_agreement._votes(jax.random.key(1), pool, features_NF, features_NF[::-1])
    assert np.isnan(votes_NL).all()


def test_all_claims_are_described():
    for claim, _ in CASES:
        assert all(getattr(claim, each.name) for each in dataclasses.fields(claim) if each.name != "changes")
