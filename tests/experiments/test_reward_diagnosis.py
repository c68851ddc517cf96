"""Validation loss and diagnostics of reward models, compared with plain loops."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from launch import settings
from recipe import monitoring, policy_sampling, reward_diagnosis, validation_loss

from rlhf_jax import diagnostics, metrics, types
from rlhf_jax.data import errors

P, T, K = 2, 3, 4


def comparisons(n, seed=0):
    """Returns prompts with two to four answers; all tokens of an answer equal its score."""
    rng = np.random.default_rng(seed)
    where = np.arange(K) < rng.integers(2, K + 1, size=(n, 1))
    tokens = np.broadcast_to(rng.integers(0, 9, size=(n, K, 1)), (n, K, P + T)).astype(np.int32)
    mask = np.concatenate([np.ones((n, K, P), bool), np.arange(T) < rng.integers(1, T + 1, size=(n, K, 1))], axis=-1)
    ranks = np.where(where, rng.integers(1, 3, size=(n, K)), 0).astype(np.int32)
    batch: Any = types.Comparisons(tokens, mask & where[..., None], ranks, where)  # type: ignore[arg-type]
    return batch


def score(params, tokens_BL, mask_BL):
    assert mask_BL[:, P].all(), "missing answers are not scored"
    return params * tokens_BL[:, 0].astype(np.float32)


def test_the_validation_loss_averages_the_first_prompts_at_a_few_steps():
    batch = comparisons(400)
    callback = validation_loss.make_callback(score, batch, steps=83)
    rows = {done: callback(done, SimpleNamespace(params=0.3), {}) for done in range(1, 84)}
    known = {done: row["validation_loss"] for done, row in rows.items() if row}
    assert list(known) == [11, 22, 33, 44, 55, 66, 77, 83] and len(set(known.values())) == 1
    losses, answers = [], 0
    for b in range(400):
        answers += int(batch.where_BK[b].sum())
        if answers > policy_sampling.CHUNK:
            break
        leads = [
            0.3 * (float(batch.tokens_BKL[b, i, 0]) - float(batch.tokens_BKL[b, j, 0]))
            for i in range(K)
            for j in range(K)
            if batch.where_BK[b, [i, j]].all() and batch.ranks_BK[b, i] < batch.ranks_BK[b, j]
        ]
        if leads:
            answer_count = int(batch.where_BK[b].sum())
            losses.append(sum(math.log1p(math.exp(-lead)) for lead in leads) / math.comb(answer_count, 2))
    assert known[11] == pytest.approx(np.mean(losses), rel=1e-5)
    # With two heads, the validation loss is the mean over the heads.
    heads = validation_loss.make_callback(
        lambda *args: np.stack([score(*args), 2 * score(*args)], axis=1), batch, steps=1
    )
    both = [
        validation_loss.make_callback(score, batch, steps=1)(1, SimpleNamespace(params=scale), {})
        for scale in (0.3, 0.6)
    ]
    mean = np.mean([row["validation_loss"] for row in both if row])
    result = heads(1, SimpleNamespace(params=0.3), {})
    assert result is not None and result["validation_loss"] == pytest.approx(mean)


def test_an_overfitted_reward_model_raises_an_alarm(tmp_path):
    options, log = settings.preset("smoke"), metrics.MetricLog(tmp_path)
    rng, messages = np.random.default_rng(0), []
    watch = monitoring.watch_stage(log, "reward_model", options, messages.append)
    for step in range(1, 2 * validation_loss.TIMES + 1):
        row = {"loss": 0.7 - 0.02 * step}
        if step % 2 == 0:
            row["validation_loss"] = 0.6 + 0.002 * rng.normal() + 0.02 * max(0, step - validation_loss.TIMES)
        watch(step, row)
    assert len(messages) == 1 and "overfits" in messages[0]
    (alarm,) = monitoring.raised_alarms(log, options)
    assert (alarm["stage"], alarm["name"], alarm["step"]) == ("reward_model", "overfitted", 14)
    log.close()


def job(batch, categories, asked_of):
    world = SimpleNamespace(compare_prompts=SimpleNamespace(categories=["training"] * 5 + categories), n_compare=5)
    task = SimpleNamespace(prompt_width=P, world=world, asked=asked_of)
    scorer = SimpleNamespace(score=lambda params, *rows: params["head"]["gain"] * rows[0][:, 0].astype(np.float32))
    made: Any = SimpleNamespace(task=task, sampler=scorer)
    return made


def test_degenerate_held_out_comparisons_are_diagnosed_or_refused():
    batch, reward = comparisons(60), {"head": {"gain": np.float32(0.5), "bias": np.float32(0.0)}}
    made = job(batch, ["facts"] * 60, lambda rows: np.arange(len(rows.ranks_BK)))
    equal = batch.replace(tokens_BKL=np.ones_like(batch.tokens_BKL))
    assert reward_diagnosis.measure(made, reward, equal, batch)["calibration"]["slope"] is None
    tied = batch.replace(ranks_BK=np.ones_like(batch.ranks_BK))
    with pytest.raises(errors.DataError, match="no two answers to a held-out prompt differ in rank"):
        reward_diagnosis.measure(made, reward, tied, batch)


def test_the_diagnosis_equals_plain_loops_over_pairs():
    batch, train = comparisons(60, seed=1), comparisons(30, seed=2)
    categories = [("lists", "facts")[b % 2] for b in range(60)]
    reward = {"head": {"gain": np.float32(0.5), "bias": np.float32(0.25)}}

    def asked_of(rows):  # every other prompt asks the same as the one before it
        return np.arange(len(rows.ranks_BK)) // 2

    found = reward_diagnosis.measure(job(batch, categories, asked_of), reward, batch, train)
    pairs = [
        (b, i, j)
        for b in range(60)
        for i in range(K)
        for j in range(K)
        if batch.where_BK[b, [i, j]].all() and batch.ranks_BK[b, i] < batch.ranks_BK[b, j]
    ]
    lead = {(b, i, j): float(batch.tokens_BKL[b, i, 0]) - float(batch.tokens_BKL[b, j, 0]) for b, i, j in pairs}

    def plain(mine):
        return np.mean([0.5 if lead[pair] == 0 else lead[pair] > 0 for pair in mine])

    assert found["accuracy"][0] == pytest.approx(plain(pairs)) and found["held_out_pairs"] == len(pairs)
    facts, lists = found["strata"]["category"]
    assert (facts["name"], lists["name"]) == ("facts", "lists")
    for each in (facts, lists):
        mine = [pair for pair in pairs if categories[pair[0]] == each["name"]]
        assert each["count"] == len(mine) and each["accuracy"].mean == pytest.approx(plain(mine))
    # The intervals are clustered by what the prompts ask.
    assert found["held_out_asked"] == 30
    b = np.array([pair[0] // 2 for pair in pairs])
    right = np.array([0.5 if lead[pair] == 0 else float(lead[pair] > 0) for pair in pairs])
    want = diagnostics.ratio_interval(np.bincount(b, weights=right), np.bincount(b), rate=True)
    np.testing.assert_allclose(found["accuracy"], want, rtol=1e-6)
    assert sum(each["count"] for each in found["strata"]["tokens of the longer answer"]) == len(pairs)
    scan = found["thresholds"]
    assert scan["count"][0] == len(pairs) and scan["accuracy"][0] == pytest.approx(plain(pairs))
    assert scan["threshold"][0] == 0.5 * min(min(float(batch.tokens_BKL[b, k, 0]) for k in (i, j)) for b, i, j in pairs)
    bias = found["length_bias"]
    longer = [(b, i, j) for b, i, j in pairs if batch.mask_BKL[b, i].sum() > batch.mask_BKL[b, j].sum()]
    assert bias["accuracy_where_longer"].mean == pytest.approx(plain(longer)) and bias["count"] == len(pairs)
    mine = np.array([pair in longer for pair in pairs])
    want = diagnostics.ratio_interval(np.bincount(b, weights=right * mine), np.bincount(b, weights=mine), rate=True)
    np.testing.assert_allclose(bias["accuracy_where_longer"], want, rtol=1e-6)
    gap = found["gap"]
    leads = [
        float(train.tokens_BKL[c, i, 0]) - float(train.tokens_BKL[c, j, 0])
        for c in range(30)
        for i in range(K)
        for j in range(K)
        if train.where_BK[c, [i, j]].all() and train.ranks_BK[c, i] < train.ranks_BK[c, j]
    ]
    assert gap["train_loss"].mean == pytest.approx(np.mean(np.logaddexp(0.0, -np.array(leads))), rel=1e-6)
    np.testing.assert_allclose(gap["validation_accuracy"], found["accuracy"], rtol=1e-6)
    assert gap["accuracy_gap"].mean == pytest.approx(gap["train_accuracy"].mean - found["accuracy"][0])


def test_a_policy_that_games_its_score_is_detected():
    rng = np.random.default_rng(0)
    gold, scores = rng.normal(size=(2, 200))
    noise = 0.1 * rng.normal(size=(4, 200))

    def answers(score, judged):
        made: Any = SimpleNamespace(scores_B=score, gold=SimpleNamespace(total=judged))
        return made

    start = answers(scores, gold)
    asked = np.arange(200)
    gamed = reward_diagnosis.goodhart(start, answers(scores + 1 + noise[0], gold - 0.5 + noise[1]), asked)
    better = reward_diagnosis.goodhart(start, answers(scores + 1 + noise[2], gold + 0.5 + noise[3]), asked)
    assert gamed["gamed"] is True and better["gamed"] is False
    np.testing.assert_allclose(gamed["reward_gained"], diagnostics.mean_interval(1 + noise[0]), rtol=1e-6)
    np.testing.assert_allclose(gamed["gold_gained"], diagnostics.mean_interval(noise[1] - 0.5), rtol=1e-6)
    doubled = [np.repeat(x, 2) for x in (scores, gold, scores + 1 + noise[0], gold - 0.5 + noise[1])]
    twice = reward_diagnosis.goodhart(answers(*doubled[:2]), answers(*doubled[2:]), np.repeat(asked, 2))
    np.testing.assert_allclose(twice["gold_gained"], gamed["gold_gained"], rtol=1e-6)
