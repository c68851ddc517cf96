"""The claims about preference models are decided by the stated effects, and their parts compute what they say."""

import types as types_lib
from typing import Any

import claim_cases
import jax
import numpy as np
import pytest
from claims.preference_models import (
    c12_turns,
    c13_calibration,
    c14_high_scores,
    c15_elo,
    c28_preference_pretraining,
    c29_imitation,
    pair_stages,
)

from rlhf_jax import diagnostics
from rlhf_jax.diagnostics import ranking
from rlhf_jax.simulation import gold, labelers, lexicon, prompts
from rlhf_jax.simulation import world as world_lib


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


def c15(rng, effect):
    share = {1: 0.9545, 0: 0.97, -1: 0.8}[effect]
    found = {"score": 100.0, "preference model": 80.0, "labelers": 60.0, "formula": 6e-8 if effect >= 0 else 1e-4}
    return {name: found | {"inside": share + 0.003 * rng.normal()} for name in ("small SFT", "large PPO")}


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
    "C15": (c15_elo, c15),
    "C28": (c28_preference_pretraining, c28),
    "C29": (c29_imitation, c29),
}


@pytest.mark.parametrize("name", CASES)
def test_a_claim_is_shown_with_the_stated_effect_and_refuted_with_the_reverse(name):
    module, simulate = CASES[name]
    assert module.CLAIM.id == name
    claim_cases.check_effects(module, simulate)


@pytest.mark.parametrize("name", CASES)
def test_a_claim_is_rarely_shown_without_an_effect(name):
    claim_cases.check_noise(*CASES[name])


def test_earlier_turns_are_between_the_padding_and_the_prompt():
    tokens_BKL = np.array([[[0, 5, 6, 7], [0, 5, 8, 0]], [[0, 0, 4, 9], [0, 0, 4, 3]]])
    mask_BKL = tokens_BKL > 0
    earlier = [np.array([11, 12]), np.array([13])]
    tokens, mask = c12_turns.prepend(tokens_BKL, mask_BKL, earlier, np.array([0, 2]), np.random.default_rng(0), width=8)
    np.testing.assert_array_equal(tokens[0], np.pad(tokens_BKL[0], ((0, 0), (4, 0))))  # type: ignore[arg-type, call-overload]
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
            arrays: Any = (prompt, padded, mask)
            values.append(float(gold.utility(tables, *arrays).total))
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


def test_known_scores_are_recovered_from_matches_unless_the_elo_scale_is_wrong(monkeypatch):
    known_M, scores = np.array([0.0, 0.5, -1.0, 1.5]), np.array([0.3, -2.0, 5.0], np.float32)
    inside_M = c15_elo.recovered(known_M, 1, tournaments=200, seed=0)
    assert inside_M[1] == 1 and np.mean(np.delete(inside_M, 1)) == pytest.approx(0.9545, abs=0.025)
    assert c15_elo.formula_error(scores, -scores) < 1e-6
    for module in (diagnostics, ranking):
        monkeypatch.setattr(module, "ELO_PER_NAT", 200.0)
    assert np.delete(c15_elo.recovered(known_M, 1, tournaments=50, seed=0), 1).mean() < 0.9
    assert c15_elo.formula_error(scores, -scores) > 1e-3


def test_the_elo_scores_of_matches_between_constant_scores_are_these_scores():
    score_MN = np.repeat([[0.0], [1.0], [-0.5]], 20, axis=1)
    wins_MM = c15_elo.wins(lambda i, j: 1 / (1 + np.exp(score_MN[j] - score_MN[i])), 3)
    elo = [each.mean for each in diagnostics.bradley_terry(wins_MM).elo(reference=0)]
    np.testing.assert_allclose(elo, [0.0, diagnostics.ELO_PER_NAT, -diagnostics.ELO_PER_NAT / 2], atol=1e-6)


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
    assert len(tokens) == 60, "prompts to which the right answer is a refusal are replaced"
    for tokens_2L, mask_2L in zip(tokens[:20], mask[:20], strict=True):
        right, wrong = (gold.utility(tables, t[:P], t[P:], m[P:]) for t, m in zip(tokens_2L, mask_2L, strict=True))
        assert float(right.total) == pytest.approx(1.0, abs=1e-5) and float(wrong.total) < 0.95
        assert int(right.length) == int(wrong.length)


def test_wrong_answers_of_the_binary_task_differ_in_nothing_but_the_content():
    facts = world_lib.make_world(100)
    drawn = prompts.draw_prompts(prompts.split_prompts(facts, 100).train, 300, np.random.default_rng(0))
    two = {"describe", "yes_no_color", "yes_no_place"}  # two facts, or a verdict and the value that it implies
    for i, prompt in enumerate(drawn):
        right, wrong = (text.split() for text in c29_imitation.both_answers(facts, prompt, [100, i]))
        changed = sum(a != b for a, b in zip(right, wrong, strict=True))
        assert changed == (0 if prompt.kind == "harmful" else 2 if prompt.kind in two else 1), (right, wrong)


def fake_sampling(monkeypatch, equal_share):
    """Replaces the sampling of answers, of which a share of pairs is equal; returns the streams and prompts asked."""
    calls = []

    def sample(trial, start, asked, *, answers, stream):
        assert stream not in [each for each, _ in calls], "no random key is used twice"
        calls.append((stream, list(asked.ids)))
        rng, shape = np.random.default_rng(stream), (len(asked), answers)
        tokens = np.stack(
            [
                np.broadcast_to(np.array(asked.ids)[:, None], shape),
                rng.permuted(np.tile(np.arange(answers), (len(asked), 1)), axis=1),
            ],
            axis=-1,
        )
        tokens[rng.random(len(asked)) < equal_share, :, 1] = 7
        rows = {"tokens": tokens, "mask": np.ones(tokens.shape, bool)}
        return rows | {name: tokens[..., 1] / answers for name in ("helpful", "harmless", "features")}

    monkeypatch.setattr(pair_stages, "sample", sample)
    return calls


class FakePrompts:
    """Prompts with numbers in place of texts, of which every tenth is a harmful request."""

    def __init__(self, ids):
        self.ids = list(ids)
        self.categories = ["harmful" if i % 10 == 0 else "fact" for i in self.ids]

    def __len__(self):
        return len(self.ids)

    def at(self, rows):
        return FakePrompts(self.ids[i] for i in rows)


def test_equal_answers_are_replaced_so_that_all_pairs_are_there(monkeypatch):
    calls = fake_sampling(monkeypatch, 0.6)
    none: Any = None
    rows = pair_stages.sample_pairs(none, none, FakePrompts(range(700)), pairs=600, stream=50)  # type: ignore[arg-type]
    assert len(rows["tokens"]) == len(rows["helpful"]) == 600
    assert (rows["tokens"][:, 0] != rows["tokens"][:, 1]).any(axis=1).all()
    assert [stream for stream, _ in calls] == list(range(50, 50 + len(calls))) and len(calls) > 1
    assert [i for _, ids in calls for i in ids][:1400] == [*range(700), *range(700)], "prompts are used in order"
    fake_sampling(monkeypatch, 1.0)
    with pytest.raises(ValueError, match="none of 256 pairs"):
        pair_stages.sample_pairs(none, none, FakePrompts(range(9)), pairs=9, stream=0)  # type: ignore[arg-type]


def test_calibration_is_measured_on_as_many_pairs_of_both_kinds(monkeypatch):
    """One model is trained on both kinds in equal numbers, so it is tested on both in equal numbers too."""
    calls = fake_sampling(monkeypatch, 0.3)
    monkeypatch.setattr(c13_calibration.tasks, "more_prompts", lambda settings, task, n: FakePrompts(range(n)))
    trial: Any = types_lib.SimpleNamespace(
        settings=types_lib.SimpleNamespace(seed=100),
        task=types_lib.SimpleNamespace(eval_prompts=FakePrompts(range(1000, 1100))),
    )
    found = c13_calibration.sample(trial, None, train=400, test=300)  # type: ignore[arg-type]
    for kind, rows in found.items():
        assert [len(rows[part].ranks_BK) for part in ("train", "test")] == [400, 300]
        for part, held_out in (("train", False), ("test", True)):
            ids = np.asarray(rows[part].tokens_BKL)[:, 0, 0]
            assert ((ids % 10 == 0) == (kind == "harmful")).all() and ((ids >= 1000) == held_out).all()
    assert len(calls) >= 4


def test_the_labelers_and_the_crowd_label_as_many_pairs_as_stated(monkeypatch):
    fake_sampling(monkeypatch, 0.4)
    monkeypatch.setattr(
        c28_preference_pretraining.tasks, "more_prompts", lambda settings, task, n: FakePrompts(range(n))
    )
    monkeypatch.setattr(pair_stages, "choices", lambda pool, features, **options: np.zeros(len(features), int))
    world = types_lib.SimpleNamespace(labelers=2, spread=0.1, tie_width=0.0, lapse=0.0, agreement=0.75)
    trial: Any = types_lib.SimpleNamespace(
        settings=types_lib.SimpleNamespace(world=world),
        task=types_lib.SimpleNamespace(world=types_lib.SimpleNamespace(pool=None)),
        key=lambda name: jax.random.key(0),
    )
    found = c28_preference_pretraining.label(trial, None, pairs=500, crowd=700)  # type: ignore[arg-type]
    ids = {name: set(np.asarray(rows.tokens_BKL)[:, 0, 0].tolist()) for name, rows in found.items()}
    assert {name: len(rows) for name, rows in ids.items()} == {"labelers": 500, "crowd": 700}
    assert not ids["labelers"] & ids["crowd"], "no prompt is used twice"
