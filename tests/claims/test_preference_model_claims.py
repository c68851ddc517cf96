"""The claims about preference models are decided by the stated effects, and their parts compute what they say."""

import types as types_lib
from typing import Any

import jax
import numpy as np
import pytest
from claims import verdicts
from claims.preference_models import (
    c12_turns,
    c13_calibration,
    c14_high_scores,
    c28_preference_pretraining,
    c29_imitation,
    pair_stages,
)

from rlhf_jax.simulation import gold, labelers, lexicon, prompts
from rlhf_jax.simulation import world as world_lib

SEEDS = 5


def c12(rng, effect):
    return {"accuracy": 0.7 + np.array([0.03 * effect, 0, 0, 0]) + 0.003 * rng.normal(size=4)}


def c13(rng, effect):
    slopes = {1: (1.0, 1.3), 0: (1.0, 1.0), -1: (1.4, 0.8)}[effect]
    return {
        name: {"slope": slope + 0.03 * rng.normal(), "accuracy": 0.7}
        for name, slope in zip(("helpful", "mix"), slopes, strict=True)
    }


def c14(rng, effect):
    threshold_H = np.linspace(-1, 1, 9)
    return {
        size: {"threshold": threshold_H, "accuracy": 0.7 - 0.1 * effect * threshold_H + 0.01 * rng.normal(size=9)}
        for size in c14_high_scores.SIZES
    }


def c28(rng, effect):
    gains = {"none": (0.0, 0.0), "ranked": (0.02, 0.0), "binary": (0.05, 0.01)}
    return {
        form: {"accuracy": np.array([0.6, 0.7]) + effect * np.array(gain) + 0.003 * rng.normal(size=2)}
        for form, gain in gains.items()
    }


def c29(rng, effect):
    leads = {1: (0.1, 0.0), 0: (0.0, 0.0), -1: (-0.1, 0.2)}[effect]
    return {
        task: {"imitation": 0.7, "preference model": 0.7 + lead + 0.01 * rng.normal()}
        for task, lead in zip(("ranked", "binary"), leads, strict=True)
    }


CASES: dict[str, Any] = {
    "C12": (c12_turns, c12),
    "C13": (c13_calibration, c13),
    "C14": (c14_high_scores, c14),
    "C28": (c28_preference_pretraining, c28),
    "C29": (c29_imitation, c29),
}


@pytest.mark.parametrize("name", CASES)
def test_a_claim_is_shown_with_the_stated_effect_and_refuted_with_the_reverse(name):
    module, simulate = CASES[name]
    assert module.CLAIM.id == name
    rng = np.random.default_rng(0)
    for effect, verdict in ((1, "shown"), (-1, "refuted")):
        measured_S = [simulate(rng, effect) for _ in range(SEEDS)]
        assert verdicts.overall(module.decide(measured_S)) == verdict
        assert module.plot(measured_S).startswith("<svg")


@pytest.mark.parametrize("name", CASES)
def test_a_claim_is_rarely_shown_without_an_effect(name):
    module, simulate = CASES[name]
    rng = np.random.default_rng(1)
    shown = [verdicts.overall(module.decide([simulate(rng, 0) for _ in range(SEEDS)])) == "shown" for _ in range(200)]
    assert np.mean(shown) <= 0.05


def test_earlier_turns_are_between_the_padding_and_the_prompt():
    tokens_BKL = np.array([[[0, 5, 6, 7], [0, 5, 8, 0]], [[0, 0, 4, 9], [0, 0, 4, 3]]])
    mask_BKL = tokens_BKL > 0
    earlier = [np.array([11, 12]), np.array([13])]
    tokens, mask = c12_turns.prepend(tokens_BKL, mask_BKL, earlier, np.array([0, 2]), np.random.default_rng(0), width=8)
    np.testing.assert_array_equal(tokens[0], np.pad(tokens_BKL[0], ((0, 0), (4, 0))))
    drawn = np.concatenate([earlier[i] for i in np.random.default_rng(0).integers(2, size=2)])
    for k in range(2):
        expected = [*drawn, *tokens_BKL[1, k][mask_BKL[1, k]]]
        assert tokens[1, k][mask[1, k]].tolist() == expected, "all answers to a prompt have the same earlier turns"
    assert (mask[:, :, 4:] == mask_BKL).all()


def test_the_gold_utility_reads_the_last_turn_only():
    """A dialogue with earlier turns is worth what its last turn is worth, for which C12 needs no labels of its own."""
    facts = world_lib.make_world(seed=0)
    tables, T = gold.make_tables(facts), prompts.RESPONSE_WIDTH
    last = prompts.prompt_tokens([("user", "what color is the fox ?")])
    before = [
        *prompts.prompt_tokens([("user", "where is the owl ?")]),
        *prompts.answer_tokens("happy to help ."),
    ]
    for text in (f"sure , the fox is {facts.value('fox', world_lib.COLOR)} .", "the fox is bigger ."):
        answer = prompts.answer_tokens(text)
        values = []
        for ids in (last, [*before, *last]):
            width = max(prompts.PROMPT_WIDTH, len(ids))
            prompt = np.pad(np.array(ids), (width - len(ids), 0), constant_values=lexicon.PAD_ID)
            padded, mask = np.pad(np.array(answer), (0, T - len(answer))), np.arange(T) < len(answer)
            values.append(float(gold.utility(tables, prompt, padded, mask).total))
        assert values[0] == values[1] > 0


def test_the_accuracy_above_a_threshold_is_that_of_a_loop():
    rng = np.random.default_rng(0)
    first, second, share = rng.normal(size=(3, 20, 5)).round(1)
    share, where = 1 / (1 + np.exp(-share)), rng.random((20, 5)) < 0.8
    found = c14_high_scores.accuracy_above(first, second, share, where, np.array([-1.0, 0.0]))
    for threshold, accuracy in zip((-1.0, 0.0), found["accuracy"], strict=True):
        right = [
            0.5 if a == b else p if a > b else 1 - p
            for a, b, p, w in zip(first.ravel(), second.ravel(), share.ravel(), where.ravel())
            if w and a >= threshold and b >= threshold
        ]
        assert accuracy == pytest.approx(np.mean(right))


def test_pairs_of_equal_answers_are_left_out_and_the_chosen_one_is_ranked_first():
    tokens = np.array([[[1, 2], [1, 3]], [[1, 2], [1, 2]], [[4, 9], [4, 8]]])
    mask = np.ones(tokens.shape, bool)
    mask[2, :, 1] = False  # which makes the answers of the last pair equal
    rows = pair_stages.comparisons(tokens, mask, np.array([1, 0, 0]))
    assert np.asarray(rows.ranks_BK).tolist() == [[2, 1]] and np.asarray(rows.tokens_BKL).tolist() == [[[1, 2], [1, 3]]]


def test_labelers_choose_at_the_rate_of_agreement_that_sets_their_noise():
    """Two labelers of equal tastes agree with probability p² + (1 − p)²; each chooses the better answer with p."""
    n, F = 4000, len(labelers.FEATURES)
    pool = labelers.make_pool(jax.random.key(0), 2, spread=0.0)
    features = np.zeros((n, 2, F), np.float32)
    features[:, 0, 0] = 1.0  # correct
    chosen = pair_stages.choices(pool, features, agreement=0.68, key=jax.random.key(1))
    p = (1 + np.sqrt(2 * 0.68 - 1)) / 2
    assert np.mean(chosen == 0) == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / n))


def test_wrong_answers_of_the_binary_task_are_worth_less():
    fmt = types_lib.SimpleNamespace(pad_id=lexicon.PAD_ID)
    settings = types_lib.SimpleNamespace(seed=100)
    task = types_lib.SimpleNamespace(fmt=fmt, prompt_width=prompts.PROMPT_WIDTH, response_width=prompts.RESPONSE_WIDTH)
    trial: Any = types_lib.SimpleNamespace(settings=settings, task=task)
    tokens, mask = c29_imitation.right_and_wrong(trial, 60, held_out=True)
    tables, P = gold.make_tables(world_lib.make_world(100)), prompts.PROMPT_WIDTH
    assert 40 < len(tokens) < 60, "refusals cannot be wrong"
    for tokens_2L, mask_2L in zip(tokens[:20], mask[:20], strict=True):
        right, wrong = (gold.utility(tables, t[:P], t[P:], m[P:]) for t, m in zip(tokens_2L, mask_2L, strict=True))
        assert float(right.total) == pytest.approx(1.0, abs=1e-5) and float(wrong.total) < 0.95
        assert abs(int(right.length) - int(wrong.length)) <= 4
