"""The train step of DPO and related methods: values, invariances, and composition."""

import dataclasses
import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from objective_cases import FAMILY, WITHOUT_REFERENCE

from rlhf_jax import lm, losses, parallel, types
from rlhf_jax.lm import lora
from rlhf_jax.train import dpo, objectives, reference
from rlhf_jax.train import state as state_lib

CFG = lm.LMConfig(vocab_size=20, n_layers=1, d_model=16, n_heads=2, d_mlp=32, max_length=24)
SGD = optax.scale(-1.0)
B, P, T = 8, 4, 6
response = functools.partial(lm.token_logprobs, cfg=CFG, prompt_width=P)
row_logprobs = functools.partial(lm.token_logprobs, cfg=CFG)
one_row = jax.jit(row_logprobs)
KEY = jax.random.key(0)


@functools.cache
def params(seed=0):
    return jax.jit(lambda key: lm.init(key, CFG))(jax.random.key(seed))


def fresh(overrides=None):
    return state_lib.create(params() if overrides is None else overrides, SGD)


def hyper(**numbers: Any) -> Any:
    overrides = {"learning_rate": 0.1, "beta": 0.5, "label_smoothing": 0.1, **numbers}
    result = dpo.Hyper(**overrides)
    return dpo.Hyper(**{f.name: np.float32(getattr(result, f.name)) for f in dataclasses.fields(result)})


def pairs(seed=0) -> Any:
    """Returns pairs with left-padded prompts and answers of different lengths."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 20, size=(B, 2, P + T))
    tokens[:, 1, :P] = tokens[:, 0, :P]
    prompt = np.broadcast_to(np.arange(P) >= rng.integers(0, P, size=(B, 1, 1)), (B, 2, P))
    answer = np.arange(T) < rng.integers(1, T + 1, size=(B, 2, 1))
    mask = np.concatenate([prompt, answer], axis=-1)
    return types.Preferences(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask), jnp.asarray(answer))


def marked(seed=0, K=1) -> Any:
    rows = pairs(seed)
    cut = [x[:, :K] for x in (rows.tokens_BKL, rows.mask_BKL, rows.answer_BKC)]
    good = jnp.asarray(np.random.default_rng(seed).random((B, K)) < 0.5).at[0, 0].set(True).at[1, 0].set(False)
    result = types.Preferences(*cut, good_BK=good)
    return result.replace(mismatched=dpo.mismatched(result, prompt_width=P))  # type: ignore[attr-defined]


def batch_of(name):
    return marked() if name == "kto" else pairs()


def reference_of(name) -> Any:
    return {"reference": None} if name in WITHOUT_REFERENCE else {}


@functools.cache
def made_step(name="dpo", logprobs: Any = response, micro_batches=1):
    return parallel.jit_step(
        dpo.make_train_step(logprobs, FAMILY[name], micro_batches=micro_batches, **reference_of(name))
    )


def run(batch, name="dpo", *, frozen: Any = "other", logprobs: Any = response, micro_batches=1, **numbers):
    frozen = params(1) if isinstance(frozen, str) else frozen
    frozen = None if name in WITHOUT_REFERENCE else frozen
    return made_step(name, logprobs, micro_batches)(fresh(), frozen, hyper(**numbers), batch, KEY)


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def moved(state):
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.params, params())))


def sums(weights, batch):
    """Returns the log-probabilities of the answers, computed one row at a time with padding at the end."""
    totals = np.zeros(batch.tokens_BKL.shape[:2])
    for b, k in np.ndindex(totals.shape):
        real = np.asarray(batch.mask_BKL[b, k])
        tokens, end = np.zeros((1, P + T), np.int32), int(real.sum())
        tokens[0, :end] = np.asarray(batch.tokens_BKL[b, k])[real]
        first = end - int(np.asarray(batch.answer_BKC[b, k]).sum())
        logprobs = np.asarray(one_row(weights, tokens, mask_BL=np.arange(P + T)[None] < end))
        totals[b, k] = logprobs[0, first:end].sum(dtype=np.float64)
    return totals


def test_step_matches_hand_computed_values():
    batch = pairs()
    policy, frozen_sums = sums(params(), batch), sums(params(1), batch)
    state, logs = run(batch)
    values = {name: float(m.value()) for name, m in logs.items() if hasattr(m, "value")}
    ratios = policy - frozen_sums
    h = 0.5 * (ratios[:, 0] - ratios[:, 1])
    expected = 0.9 * np.logaddexp(0, -h) + 0.1 * np.logaddexp(0, h)
    np.testing.assert_allclose(values["loss"], expected.mean(), rtol=1e-4)
    np.testing.assert_allclose(values["margin"], h.mean(), rtol=1e-4, atol=1e-5)
    assert values["accuracy"] == np.mean(h > 0) and 0 < values["accuracy"] < 1
    for k, side in enumerate(("chosen", "rejected")):
        np.testing.assert_allclose(values[f"{side}_logprob"], policy[:, k].mean(), rtol=1e-4)
        np.testing.assert_allclose(values[f"{side}_reward"], 0.5 * ratios[:, k].mean(), rtol=1e-3, atol=1e-5)
    assert float(logs["skipped"]) == 0 and moved(state) > 1e-4
    # At the start of training, policy and reference are equal.
    _, logs = run(batch, frozen=params(), label_smoothing=0.0)
    np.testing.assert_allclose(logs["loss"].value(), np.log(2), rtol=1e-5)
    assert float(logs["margin"].value()) == 0 and float(logs["accuracy"].value()) == 0.5


def test_step_averages_over_the_tokens_of_each_answer():
    batch = pairs()
    means = sums(params(), batch) / np.asarray(batch.answer_BKC).sum(axis=2)
    _, logs = run(batch, "simpo", margin=0.4)
    expected = np.logaddexp(0, 0.4 - 0.5 * (means[:, 0] - means[:, 1])).mean()
    np.testing.assert_allclose(logs["loss"].value(), expected, rtol=1e-4)
    empty = batch.replace(answer_BKC=batch.answer_BKC.at[0, 1].set(False))
    state, logs = run(empty, "simpo")
    assert np.isfinite(logs["loss"].value()) and float(logs["skipped"]) == 0 and moved(state) > 1e-5


def test_gradients_are_clipped():
    plain, logs = run(pairs())
    assert float(logs["grad_norm"]) > 0.02
    clipped, logs = run(pairs(), max_grad_norm=0.01)
    factor = 0.01 / float(logs["grad_norm"])
    expected = jax.tree.map(lambda start, end: start + factor * (end - start), params(), plain.params)
    close(clipped.params, expected, atol=1e-6)


SHORT = ("dpo", "kto", "simpo")
LONG = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILY if name not in SHORT]


@pytest.mark.parametrize("name", [*SHORT, *LONG])
def test_micro_batches_match_the_whole_batch(name):
    whole, whole_logs = run(batch_of(name), name)
    parts, parts_logs = run(batch_of(name), name, micro_batches=4)
    assert moved(whole) > 1e-5
    close(parts.params, whole.params, atol=1e-6)
    for metric in whole_logs:
        values = (x.value() if hasattr(x, "value") else x for x in (parts_logs[metric], whole_logs[metric]))
        np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-6, err_msg=metric)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_cached_and_computed_references_lead_to_the_same_step(name):
    """With the cache, the step needs no parameters of the reference."""
    batch = batch_of(name)
    score = jax.jit(functools.partial(dpo.answer_logprobs, response))
    cached = reference.attach_logprobs(score, params(1), batch, rows=3)
    in_step, logs = run(batch, name)
    from_cache, cached_logs = run(cached, name, frozen=None)
    close(from_cache.params, in_step.params, atol=1e-6)
    np.testing.assert_allclose(cached_logs["loss"].value(), logs["loss"].value(), rtol=1e-5)


def test_position_and_content_of_padding_do_not_matter():
    """Pads the same tokens on the left or on the right, with different ids."""
    batch, L = pairs(), P + T
    expected, logs = run(batch)
    for side in ("left", "right"):
        tokens, mask, answer = (np.zeros((B, 2, L), d) for d in (np.int32, bool, bool))
        rng = np.random.default_rng(5)
        for b, k in np.ndindex(B, 2):
            real = np.asarray(batch.mask_BKL[b, k])
            ids, n = np.asarray(batch.tokens_BKL[b, k])[real], int(np.asarray(batch.answer_BKC[b, k]).sum())
            at = np.arange(L - len(ids), L) if side == "left" else np.arange(len(ids))
            tokens[b, k] = rng.integers(1, 20, size=L)
            tokens[b, k, at], mask[b, k, at], answer[b, k, at[-n:]] = ids, True, True
        result = types.Preferences(*(jnp.asarray(x) for x in (tokens, mask, answer)))
        state, got = run(result, logprobs=row_logprobs)
        np.testing.assert_allclose(got["loss"].value(), logs["loss"].value(), rtol=1e-5)
        close(state.params, expected.params, atol=1e-6)


def test_rows_without_padding_need_no_mask():
    batch = pairs()
    full = batch.replace(mask_BKL=jnp.ones_like(batch.mask_BKL), answer_BKC=jnp.ones_like(batch.answer_BKC))
    expected, _ = run(full)
    state, _ = run(full.replace(mask_BKL=None))
    close(state.params, expected.params, atol=1e-6)


def test_reference_free_methods_need_no_reference_and_others_raise_without_it():
    for name in WITHOUT_REFERENCE:
        state, logs = run(pairs(), name)
        assert moved(state) > 1e-5 and np.isfinite(float(logs["loss"].value()))
    with pytest.raises(ValueError, match="reference"):
        run(pairs(), "dpo", frozen=None)
    with pytest.raises(ValueError, match="columns"):
        run(pairs(), "dpo", logprobs=row_logprobs)


def test_kto_baseline_comes_from_answers_to_other_prompts():
    batch = marked()
    crossed = batch.mismatched
    np.testing.assert_array_equal(crossed.tokens_BKL[..., :P], batch.tokens_BKL[..., :P])
    np.testing.assert_array_equal(crossed.tokens_BKL[1:, :, P:], batch.tokens_BKL[:-1, :, P:])
    np.testing.assert_array_equal(crossed.answer_BKC[0], batch.answer_BKC[-1])
    policy, frozen_sums = sums(params(), batch), sums(params(1), batch)
    baseline = max(float(np.mean(sums(params(), crossed) - sums(params(1), crossed))), 0.0)
    _, logs = run(batch, "kto")
    np.testing.assert_allclose(logs["baseline"], baseline, rtol=1e-3, atol=1e-5)
    by_hand = losses.kto(jnp.asarray(policy), jnp.asarray(frozen_sums), batch.good_BK, baseline, beta=0.5)
    np.testing.assert_allclose(logs["loss"].value(), by_hand.mean(), rtol=1e-4)
    good = np.asarray(batch.good_BK)
    right = (policy - frozen_sums - baseline > 0) == good
    np.testing.assert_allclose(logs["accuracy"].value(), right.mean())
    np.testing.assert_allclose(logs["chosen_logprob"].value(), policy[good].mean(), rtol=1e-4)
    np.testing.assert_allclose(logs["rejected_logprob"].value(), policy[~good].mean(), rtol=1e-4)
    with pytest.raises(ValueError, match="mismatched"):
        run(batch.replace(mismatched=None), "kto")


def answers_to(prompts: list[int]) -> Any:
    """Returns marked answers; a prompt is one token, and answer i consists of the token 10 + i."""
    n = len(prompts)
    tokens = np.stack([np.full(n, 9), prompts, 10 + np.arange(n), 10 + np.arange(n)], axis=1)[:, None].astype(np.int32)
    mask = np.broadcast_to([False, True, True, True], tokens.shape)
    tokens[:, 0, 0] = np.arange(n)  # padding may have any id
    return types.Preferences(tokens, mask, mask[..., 2:], good_BK=np.arange(n)[:, None] % 2 == 0)  # pyright: ignore


@hypothesis.given(st.lists(st.integers(1, 4), min_size=1, max_size=9), st.integers(1, 10))
@hypothesis.settings(deadline=None)
def test_no_row_is_matched_with_an_answer_to_its_own_prompt(prompts, shift):
    batch, n = answers_to(prompts), len(prompts)
    if 2 * max(prompts.count(x) for x in prompts) > n:
        with pytest.raises(ValueError, match=f"of {n} rows have the same prompt"):
            dpo.mismatched(batch, prompt_width=2, shift=shift)
        return
    crossed = dpo.mismatched(batch, prompt_width=2, shift=shift)
    sources = np.asarray(crossed.tokens_BKL)[:, 0, 2] - 10
    assert sorted(sources) == list(range(n))  # every answer is used once
    assert all(prompts[i] != prompts[j] for i, j in enumerate(sources))
    np.testing.assert_array_equal(crossed.tokens_BKL[..., :2], batch.tokens_BKL[..., :2])
    plain = [(i - shift) % n for i in range(n)]
    if all(prompts[i] != prompts[j] for i, j in enumerate(plain)):
        assert sources.tolist() == plain
    np.testing.assert_array_equal(crossed.answer_BKC, np.asarray(batch.answer_BKC)[sources])


def test_a_batch_of_one_has_no_mismatched_answer_also_under_jit():
    for match in (dpo.mismatched, jax.jit(dpo.mismatched, static_argnames="prompt_width")):
        with pytest.raises(ValueError, match="1 of 1 rows have the same prompt"):
            match(answers_to([3]), prompt_width=2)
    traced = jax.jit(dpo.mismatched, static_argnames="prompt_width")(answers_to([3, 4, 5]), prompt_width=2)
    np.testing.assert_array_equal(traced.tokens_BKL, dpo.mismatched(answers_to([3, 4, 5]), prompt_width=2).tokens_BKL)


def test_training_separates_chosen_from_rejected_and_compiles_once():
    step, state, batch = made_step("dpo"), fresh(params(1)), pairs()
    traces, history = step.traces, []
    for i in range(30):
        numbers = hyper(learning_rate=0.5 / (1 + 0.1 * i), beta=0.5 + 0.01 * i, label_smoothing=0.0, max_grad_norm=1.0)
        state, logs = step(state, params(1), numbers, batch, KEY)
        history.append({name: float(m.value()) for name, m in logs.items() if hasattr(m, "value")})
    assert history[-1]["accuracy"] > 0.9 and history[-1]["loss"] < 0.6 * history[0]["loss"]
    assert history[-1]["margin"] > 0 == history[0]["margin"]
    assert step.traces - traces <= 1


def test_adapters_share_the_base_with_their_reference():
    """A model with new adapters equals its base, so the first loss is log 2; the state contains only adapters."""
    join = functools.partial(lora.attach, scale=2.0)
    adapters = jax.jit(lambda key: lora.init(key, CFG, rank=2, pattern="layers/.*"))(KEY)
    step = parallel.jit_step(dpo.make_train_step(response, objectives.dpo, join=join, micro_batches=2))
    state, logs = step(fresh(adapters), params(), hyper(label_smoothing=0.0), pairs(), KEY)
    np.testing.assert_allclose(logs["loss"].value(), np.log(2), rtol=1e-5)
    assert jax.tree.structure(state.params) == jax.tree.structure(adapters)
    state, logs = step(state, params(), hyper(label_smoothing=0.0), pairs(), KEY)
    assert float(logs["loss"].value()) < np.log(2)
    merged = lora.merge(params(), state.params, scale=2.0)
    _, again = step(state, params(), hyper(label_smoothing=0.0), pairs(), KEY)
    whole, frozen_sums = sums(merged, pairs()), sums(params(), pairs())
    h = 0.5 * ((whole - frozen_sums)[:, 0] - (whole - frozen_sums)[:, 1])
    np.testing.assert_allclose(again["loss"].value(), np.logaddexp(0, -h).mean(), rtol=1e-4)


def test_labels_that_the_objective_ignores_are_refused():
    scored = objectives.Scored(jnp.zeros((2, 2)), jnp.zeros((2, 2)), jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="soft"):
        objectives.dpo(scored._replace(targets_B=jnp.ones(2)), hyper())
    with pytest.raises(ValueError, match="good_BK"):
        objectives.dpo(scored._replace(good_BK=jnp.ones((2, 2), bool)), hyper())
    losses_B, _ = objectives.soft(objectives.dpo)(scored._replace(targets_B=jnp.ones(2)), hyper(label_smoothing=0.0))
    np.testing.assert_allclose(losses_B, np.log(2), rtol=1e-6)


def test_accuracy_on_soft_labels_is_the_expected_share():
    batch, p = pairs(), np.array([0.9, 0.2, 0.8, 0.3, 0.4, 0.7, 0.1, 0.6])
    ratios = sums(params(), batch) - sums(params(1), batch)
    right = ratios[:, 0] > ratios[:, 1]
    step = jax.jit(dpo.make_train_step(response, objectives.soft(objectives.dpo)))
    _, logs = step(fresh(), params(1), hyper(), batch.replace(targets_B=jnp.asarray(p)), KEY)
    np.testing.assert_allclose(logs["accuracy"].value(), np.where(right, p, 1 - p).mean(), rtol=1e-5)
    assert abs(right.mean() - np.where(right, p, 1 - p).mean()) > 0.05


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_batch_sharded_over_a_named_axis_leads_to_the_same_update(name):
    batch = batch_of(name)
    expected, logs = run(batch, name)
    step = dpo.make_train_step(response, FAMILY[name], axis_name="d")
    halves = jax.tree.map(lambda x: x.reshape(2, B // 2, *x.shape[1:]), batch)
    states, got = jax.jit(jax.vmap(step, in_axes=(None, None, None, 0, None), axis_name="d"))(
        fresh(), params(1), hyper(), halves, KEY
    )
    close(jax.tree.map(lambda x: x[0], states.params), expected.params, atol=1e-6)
    for metric in ("loss", "accuracy", "chosen_logprob"):
        np.testing.assert_allclose(got[metric].value()[0], logs[metric].value(), rtol=1e-4, err_msg=metric)


def test_sweep_is_one_program():
    step = dpo.make_train_step(response, FAMILY["dpo"])
    betas = np.array([0.1, 1.0], np.float32)
    hypers = jax.tree.map(lambda *x: np.stack(x), *[hyper(beta=b) for b in betas])
    states = jax.tree.map(lambda x: jnp.stack([x, x]), fresh())
    swept, _ = jax.jit(jax.vmap(step, in_axes=(0, None, 0, None, None)))(states, params(1), hypers, pairs(), KEY)
    for i, beta in enumerate(betas):
        alone, _ = run(pairs(), beta=beta)
        close(jax.tree.map(lambda x, i=i: x[i], swept.params), alone.params, atol=1e-6)


# --------------------------------------------------------------------------------- cached reference log-probabilities


def test_cached_reference_logprobs_are_used_only_for_the_same_inputs(tmp_path):
    calls, warnings = [], []

    compiled = jax.jit(functools.partial(dpo.answer_logprobs, response))

    def score(weights, batch):
        calls.append(len(batch.tokens_BKL))
        return compiled(weights, batch)

    def with_reference(weights=None, data: Any = None, settings: Any = "float32"):
        return reference.attach_logprobs(
            score,
            params(1) if weights is None else weights,
            pairs() if data is None else data,
            path=tmp_path / "deep" / "reference.npz",
            settings=settings,
            rows=3,
            warn=warnings.append,
        )

    first = with_reference()
    assert calls == [3, 3, 3], "one shape; the last batch is padded"
    np.testing.assert_allclose(first.reference_BK, sums(params(1), pairs()), rtol=1e-4)
    np.testing.assert_array_equal(with_reference().reference_BK, first.reference_BK)
    assert len(calls) == 3 and not warnings, "read, not computed"
    for change, word in (
        ({"weights": params(2)}, "reference"),
        ({"data": pairs(1)}, "data"),
        ({"settings": "bfloat16"}, "settings"),
    ):
        with_reference()  # rewrites the cache for the original inputs
        calls.clear()
        warnings.clear()
        with_reference(**change)
        assert (
            len(calls) == 3
            and len(warnings) == 1
            and f"do not match this run's {word}" in warnings[0]
            and "recomputing" in warnings[0]
        ), word
        warnings.clear()
        calls.clear()
        with_reference(**change)
        assert not calls and not warnings, "the new log-probabilities are cached"
    (tmp_path / "deep" / "reference.npz").write_bytes(b"PK\x03\x04 torn")
    calls.clear()
    again = with_reference()
    np.testing.assert_array_equal(again.reference_BK, first.reference_BK)
    assert calls and "cannot read" in warnings[-1]
    crossed = with_reference(data=marked())
    np.testing.assert_array_equal(
        with_reference(data=marked()).mismatched.reference_BK, crossed.mismatched.reference_BK
    )
    np.testing.assert_allclose(crossed.mismatched.reference_BK, sums(params(1), marked().mismatched), rtol=1e-4)
