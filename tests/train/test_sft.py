import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import lm, losses, parallel, types
from rlhf_jax.train import reward_model, sft
from rlhf_jax.train import state as state_lib

CFG = lm.LMConfig(vocab_size=20, n_layers=1, d_model=16, n_heads=2, d_mlp=32, max_length=16)
SGD = optax.scale(-1.0)
B, L, K = 8, 10, 4
token_logprobs = jax.jit(functools.partial(lm.token_logprobs, cfg=CFG))
score = jax.jit(functools.partial(lm.score, cfg=CFG))


@functools.cache
def params():
    return jax.jit(lambda key: lm.with_head(key, lm.init(key, CFG), CFG))(jax.random.key(0))


def fresh():
    return state_lib.create(params(), SGD)


def hyper(learning_rate=0.1, max_grad_norm=np.inf):
    return {"learning_rate": np.float32(learning_rate), "max_grad_norm": np.float32(max_grad_norm)}


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def token_rows():
    """Returns left-padded rows of different lengths with a loss up to column 7; rows 6 and 7 have no loss."""
    rng = np.random.default_rng(0)
    columns = np.arange(L)[None, :]
    first, last = np.arange(B)[:, None] % 3, 6 + np.arange(B)[:, None] % 4
    mask = (columns >= first) & (columns <= last)
    learnt = mask & (columns >= 4) & (columns <= 7) & (np.arange(B)[:, None] < 6)
    tokens = rng.integers(1, 20, size=(B, L))
    return sft.TokenBatch(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask), jnp.asarray(learnt))


@functools.cache
def sft_step(micro_batches=1):
    return parallel.jit_step(sft.make_train_step(token_logprobs, micro_batches=micro_batches))


def sft_run(batch, micro_batches=1, **options):
    return sft_step(micro_batches)(fresh(), None, hyper(**options), batch, jax.random.key(0))


def test_loss_is_the_mean_over_response_tokens():
    batch = token_rows()
    _, logs = sft_run(batch)
    logprobs = np.asarray(token_logprobs(params(), batch.tokens_BL, mask_BL=batch.mask_BL), np.float64)
    learnt = np.asarray(batch.loss_mask_BL)
    expected = -sum(logprobs[b, t] for b in range(B) for t in range(L) if learnt[b, t]) / learnt.sum()
    np.testing.assert_allclose(logs["loss"].value(), expected, rtol=1e-5)
    # The mean of the per-row means differs.
    means = [-logprobs[b, learnt[b]].mean() for b in range(B) if learnt[b].any()]
    assert abs(np.mean(means) - expected) > 1e-3


def test_training_lowers_the_loss():
    step, state, batch = sft_step(), fresh(), token_rows()
    history = []
    for i in range(15):
        state, logs = step(state, None, hyper(0.2 / (1 + 0.1 * i), max_grad_norm=1.0 + i), batch, jax.random.key(0))
        history.append(float(logs["loss"].value()))
    assert history[-1] < 0.7 * history[0] and history == sorted(history, reverse=True)
    assert step.traces == 1 and int(state.step) == 15


def test_loss_depends_only_on_the_context_of_response_tokens():
    batch = token_rows()
    same, logs = sft_run(batch)
    tokens, mask, learnt = (np.array(x) for x in (batch.tokens_BL, batch.mask_BL, batch.loss_mask_BL))
    last = np.where(learnt, np.arange(L), -1).max(axis=1)
    reached = mask & (np.arange(L)[None, :] <= last[:, None])
    other = np.where(reached, tokens, (tokens + 5) % 20)  # padding, later tokens, rows without loss
    assert (~reached & mask).any() and (~reached & ~mask).any()
    moved, moved_logs = sft_run(sft.TokenBatch(jnp.asarray(other), batch.mask_BL, batch.loss_mask_BL))
    assert float(moved_logs["loss"].value()) == float(logs["loss"].value())
    close(moved.params, same.params, atol=1e-7)
    for where in (learnt, reached & ~learnt):  # a response, a prompt
        changed = np.where(where, (tokens + 5) % 20, tokens)
        _, changed_logs = sft_run(sft.TokenBatch(jnp.asarray(changed), batch.mask_BL, batch.loss_mask_BL))
        assert abs(float(changed_logs["loss"].value() - logs["loss"].value())) > 1e-4


def test_batch_without_loss_tokens_is_skipped():
    batch = token_rows()
    state, logs = sft_run(batch.replace(loss_mask_BL=jnp.zeros((B, L), bool)))  # type: ignore[attr-defined]
    close(state.params, params(), atol=0)
    assert float(logs["grad_norm"]) == 0 and float(logs["skipped"]) == 1


# --------------------------------------------------------------------------------------------------- reward models


def comparisons():
    """Returns prompts with up to four completions; prompt 2 has only ties, and prompt 5 has one completion."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 20, size=(B, K, L))
    mask = np.arange(L)[None, None, :] < rng.integers(4, L + 1, size=(B, K, 1))
    ranks = rng.integers(1, 4, size=(B, K))
    where = np.arange(K)[None, :] < np.array([4, 2, 4, 3, 4, 1, 3, 4])[:, None]
    ranks[2] = 2
    ranks[:, 0], ranks[[0, 1, 3, 4, 6, 7], 1] = 2, 1  # the other prompts have a pair to learn from
    ranks = np.where(where, ranks, 0)
    return types.Comparisons(*(jnp.asarray(x) for x in (tokens.astype(np.int32), mask, ranks, where)))


INFORMATIVE = np.array([0, 1, 3, 4, 6, 7])


@functools.cache
def reward_step(micro_batches=1):
    return parallel.jit_step(reward_model.make_train_step(score, micro_batches=micro_batches))


def reward_run(batch, micro_batches=1, **options):
    return reward_step(micro_batches)(fresh(), None, hyper(**options), batch, jax.random.key(0))


def test_reward_model_loss_is_the_mean_over_prompts_with_a_pair():
    batch = comparisons()
    _, logs = reward_run(batch)
    scores = np.asarray(reward_model.score_all(score, params(), batch))
    assert scores.shape == (B, K)
    for b, k in [(0, 3), (4, 1)]:
        alone = score(params(), batch.tokens_BKL[b, k][None], mask_BL=batch.mask_BKL[b, k][None])
        np.testing.assert_allclose(scores[b, k], alone[0], atol=1e-5)
    ranks, where = np.asarray(batch.ranks_BK), np.asarray(batch.where_BK)
    rows = [losses.ranking(jnp.asarray(scores[b]), batch.ranks_BK[b], where_K=batch.where_BK[b]) for b in range(B)]
    np.testing.assert_allclose(logs["loss"].value(), np.asarray(rows)[INFORMATIVE].mean(), rtol=1e-5)
    assert rows[2] == rows[5] == 0
    # Again, directly from the definition.
    by_hand = []
    for b in INFORMATIVE:
        n = where[b].sum()
        pairs = [(i, j) for i in range(n) for j in range(n) if ranks[b, i] < ranks[b, j]]
        by_hand.append(sum(np.log1p(np.exp(scores[b, j] - scores[b, i])) for i, j in pairs) / (n * (n - 1) / 2))
    np.testing.assert_allclose(logs["loss"].value(), np.mean(by_hand), rtol=1e-5)
    np.testing.assert_allclose(logs["score"].value(), scores[where].mean(), atol=1e-5)


def test_pairs_are_counted_with_ties_as_one_half():
    scores, ranks = jnp.array([3.0, 1.0, 1.0, 2.0, np.nan]), jnp.array([1, 2, 3, 3, 0])
    where = jnp.array([True, True, True, True, False])
    # Right: 0>1, 0>2, 0>3. Equal scores: 1>2. Wrong: 1>3. Tied ranks: 2 and 3. Missing: 4.
    right, total = reward_model.count_pairs(scores, ranks, where)
    assert (float(right), float(total)) == (3.5, 5.0)
    right, total = reward_model.count_pairs(scores, jnp.full(5, 1), where)
    assert (float(right), float(total)) == (0.0, 0.0)
    batch = comparisons()
    _, logs = reward_run(batch)
    counts = jax.vmap(reward_model.count_pairs)(
        reward_model.score_all(score, params(), batch), batch.ranks_BK, batch.where_BK
    )
    assert float(logs["accuracy"].weight) == float(counts.total.sum())
    np.testing.assert_allclose(logs["accuracy"].value(), counts.right.sum() / counts.total.sum(), rtol=1e-6)


def test_prompts_without_a_pair_and_missing_completions_do_not_matter():
    batch = comparisons()
    same, _ = reward_run(batch)
    tokens = np.array(batch.tokens_BKL)
    tokens[[2, 5]] = (tokens[[2, 5]] + 7) % 20
    tokens[~np.asarray(batch.where_BK)] = 3
    other, _ = reward_run(batch.replace(tokens_BKL=jnp.asarray(tokens)))  # type: ignore[attr-defined]
    close(other.params, same.params, atol=1e-7)


def test_reward_model_learns_the_given_order():
    step, state, batch = reward_step(), fresh(), comparisons()
    accuracy = []
    for i in range(40):
        state, logs = step(state, None, hyper(0.1 / (1 + 0.1 * i), max_grad_norm=1.0), batch, jax.random.key(0))
        accuracy.append(float(logs["accuracy"].value()))
    assert accuracy[-1] > 0.9 > accuracy[0]
    assert step.traces == 1


def test_batch_without_pairs_is_skipped():
    tied = comparisons().replace(ranks_BK=jnp.ones((B, K), jnp.int32))  # type: ignore[attr-defined]
    state, logs = reward_run(tied)
    assert float(logs["skipped"]) == 1 and float(logs["grad_norm"]) == 0
    close(state.params, params(), atol=0)


@pytest.mark.parametrize("stage", ["sft", "reward model"])
def test_gradients_are_clipped(stage):
    run: Any
    run, batch = (sft_run, token_rows()) if stage == "sft" else (reward_run, comparisons())
    plain, logs = run(batch)
    bound = 0.1 * float(logs["grad_norm"])
    clipped, _ = run(batch, max_grad_norm=bound)
    expected = jax.tree.map(lambda start, end: start + 0.1 * (end - start), params(), plain.params)
    close(clipped.params, expected, atol=1e-6)


@pytest.mark.parametrize("stage", ["sft", "reward model"])
def test_micro_batches_match_the_whole_batch(stage):
    run: Any
    batch: Any
    run, batch = (sft_run, token_rows()) if stage == "sft" else (reward_run, comparisons())
    whole, whole_logs = run(batch)
    parts, parts_logs = run(batch, micro_batches=4)
    close(parts.params, whole.params, atol=1e-6)
    assert max(np.abs(np.asarray(x - y)).max() for x, y in zip(*map(jax.tree.leaves, (whole.params, params())))) > 1e-3
    for name in whole_logs:
        if hasattr(whole_logs[name], "value"):
            np.testing.assert_allclose(parts_logs[name].value(), whole_logs[name].value(), rtol=1e-5)
    np.testing.assert_allclose(parts_logs["grad_norm"], whole_logs["grad_norm"], rtol=1e-4)
    # The parts have different counts.
    learnt = np.asarray(batch.loss_mask_BL).sum(1) if stage == "sft" else np.isin(np.arange(B), INFORMATIVE)
    assert len({int(learnt[i::4].sum()) for i in range(4)}) > 1


@pytest.mark.slow  # test_parallel.py compares the metrics of the stage
def test_reward_model_metrics_cover_all_devices():
    def score(params, tokens_BL, mask_BL):
        return params["w"] * jnp.sum(jnp.where(mask_BL, tokens_BL, 0), axis=1)

    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(0, 9, size=(4, 3, 5)).astype(np.int32), rng.random((4, 3, 5)) < 0.8
    ranks = np.stack([rng.permutation(3) + 1 for _ in range(4)]).astype(np.int32)
    where = np.array([[True, True, True], [True, True, False], [True, True, True], [True, True, False]])
    batch = jax.tree.map(jnp.asarray, types.Comparisons(tokens, mask, ranks, where))  # type: ignore[arg-type]
    state = state_lib.create({"w": jnp.float32(0.1)}, optax.sgd(1.0))
    hyper = {"learning_rate": jnp.float32(0.1), "max_grad_norm": jnp.float32(jnp.inf)}

    def update(batch, axis_name):
        step = reward_model.make_train_step(score, axis_name=axis_name)
        return step(state, None, hyper, batch, jax.random.key(0))

    whole, want = update(batch, None)
    halves = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), batch)
    spread, got = jax.vmap(lambda half: update(half, "d"), axis_name="d")(halves)
    np.testing.assert_allclose(spread.params["w"], [whole.params["w"]] * 2, rtol=1e-5)
    for name in ("loss", "accuracy", "score"):
        np.testing.assert_allclose(got[name].sum / got[name].weight, [want[name].value()] * 2, rtol=1e-5)


def test_gain_is_folded_into_the_kernel():
    cfg = lm.LMConfig(vocab_size=11, n_layers=1, d_model=8, n_heads=2, d_mlp=16, max_length=8)
    for heads in (None, 2):
        params = lm.with_head(jax.random.key(1), lm.init(jax.random.key(0), cfg), cfg, heads=heads)
        head = params["head"]
        params["head"] = {**head, "gain": head["gain"] * 1.7, "bias": head["bias"] + 0.3}
        absorbed = lm.heads.absorb_gain(params)
        hidden = jax.random.normal(jax.random.key(2), (3, 8))
        np.testing.assert_allclose(lm.heads.scalar(absorbed, hidden), lm.heads.scalar(params, hidden), rtol=1e-5)
        np.testing.assert_array_equal(absorbed["head"]["gain"], np.ones_like(head["gain"]))


def distillation_rows():
    batch = token_rows()
    teacher = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(5), x.shape), params())
    top = lm.token_top_k(teacher, batch.tokens_BL, cfg=CFG, k=K, mask_BL=batch.mask_BL)
    fields = (batch.tokens_BL, batch.mask_BL, batch.loss_mask_BL)
    return teacher, sft.DistillationBatch(*fields, ids_BLK=top.ids, logprobs_BLK=top.logprobs)


@functools.cache
def distillation_step(micro_batches=1):
    listed = functools.partial(lm.token_listed_logprobs, cfg=CFG)
    return parallel.jit_step(sft.make_distillation_step(listed, micro_batches=micro_batches))


def hidden(model, batch):
    return lm.forward(model, batch.tokens_BL, mask_BL=batch.mask_BL, cfg=CFG).hidden_BLD


def test_the_distillation_loss_is_the_mean_kl_over_k_tokens_and_the_rest():
    teacher, batch = distillation_rows()
    _, logs = distillation_step()(fresh(), None, hyper(), batch, None)
    p_BLV, q_BLV = (
        np.asarray(jax.nn.softmax(lm.logits(each, hidden(each, batch), cfg=CFG)), np.float64)
        for each in (teacher, params())
    )
    expected = []
    for b, i in np.argwhere(np.asarray(batch.loss_mask_BL)):
        ids = np.argsort(-p_BLV[b, i - 1])[:K]  # the position before predicts the token
        p, q = ([*x[b, i - 1, ids], 1 - x[b, i - 1, ids].sum()] for x in (p_BLV, q_BLV))
        expected.append(sum(a * np.log(a / c) for a, c in zip(p, q, strict=True)))
    assert float(logs["loss"].value()) == pytest.approx(np.mean(expected), rel=1e-4)


def test_a_student_equal_to_the_teacher_does_not_change():
    teacher, batch = distillation_rows()
    state, logs = distillation_step()(state_lib.create(teacher, SGD), None, hyper(), batch, None)
    assert float(logs["loss"].value()) == pytest.approx(0, abs=1e-6)
    close(state.params, teacher, atol=1e-6)


def test_distillation_does_not_depend_on_micro_batches():
    _, batch = distillation_rows()
    (one, _), (two, _) = (distillation_step(m)(fresh(), None, hyper(), batch, None) for m in (1, 2))
    close(one.params, two.params, rtol=1e-5, atol=1e-7)
