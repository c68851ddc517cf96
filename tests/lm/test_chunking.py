import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import kl, lm, losses, types
from rlhf_jax.lm import chunking

LARGE_V = 151_936
V, K = 23, 4
CFG = lm.LMConfig(vocab_size=V, n_layers=1, d_model=16, n_heads=2, d_mlp=24, max_length=32)
B, L, P = 6, 11, 4


@functools.cache
def model(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), jnp.float32), lm.abstract(CFG))


def rows():
    """Returns rows with prompts padded on the left and responses on the right; padding has an invalid id."""
    rng = np.random.default_rng(1)
    columns = np.arange(L)[None, :]
    mask = (columns >= np.arange(B)[:, None] % P) & (columns < L - np.arange(B)[:, None])
    tokens = np.where(mask, rng.integers(0, V, size=(B, L)), 99)
    return jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(rng.integers(0, V, size=(B, L, K)))


def everything(params, other, *, chunk=None, cfg=CFG, apply=None):
    """Returns the results of all functions of logits; the last two have no gradient."""
    tokens, mask, ids = rows()
    apply = apply or lm.apply_fn(cfg)
    how: dict[str, Any] = dict(chunk=chunk, temperature=0.7)
    made = (
        lm.token_logprobs(params, tokens, cfg=apply, mask_BL=mask, **how),
        lm.token_logprobs(params, tokens, cfg=apply, prompt_width=P, mask_BL=mask, **how),
        lm.token_stats(params, tokens, cfg=apply, prompt_width=P, mask_BL=mask, **how),
        lm.token_listed_logprobs(params, tokens, ids, cfg=apply, mask_BL=mask, **how),
        lm.token_listed_logprobs(params, tokens, ids[:, P:], cfg=apply, prompt_width=P, mask_BL=mask, **how),
        lm.token_top_k(params, tokens, cfg=apply, k=K, mask_BL=mask, **how).logprobs,
        lm.token_top_k(params, tokens, cfg=apply, k=K, prompt_width=P, mask_BL=mask, **how).logprobs,
        lm.token_kl(params, other, tokens, cfg=apply, other_cfg=apply, mask_BL=mask, **how),
        lm.token_kl(other, params, tokens, cfg=apply, other_cfg=apply, mask_BL=mask, **how),
        lm.token_logprobs(params, jnp.where(mask, tokens, 0), cfg=apply, **how),
    )
    bools = lm.greedy_matches(params, tokens, cfg=apply, mask_BL=mask, chunk=chunk)
    ids_made = lm.token_top_k(params, tokens, cfg=apply, k=K, mask_BL=mask, chunk=chunk).ids
    return made, (bools, ids_made)


def with_gradients(chunk=None):
    other = model(1)

    def total(params):
        made, exact = everything(params, other, chunk=chunk)
        weights = [jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) for x in jax.tree.leaves(made)]
        return sum(jnp.sum(w * x) / x.size for w, x in zip(weights, jax.tree.leaves(made))), (made, exact)

    gradient, (made, exact) = jax.jit(jax.grad(total, has_aux=True))(model())
    return made, exact, gradient


@functools.cache
def at_once():
    return with_gradients(chunk=L)


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize(
    "fit",
    [
        pytest.param(
            17, id="two columns", marks=pytest.mark.slow
        ),  # covered by test_gradient_memory_over_a_large_vocabulary_is_bounded
        pytest.param(4, id="four rows of one column", marks=pytest.mark.slow),
    ],
)
def test_chunking_does_not_change_results(fit, monkeypatch):
    want, want_exact, want_gradient = at_once()
    monkeypatch.setattr(chunking, "MAX_BYTES", 4 * V * fit)
    made, exact, gradient = with_gradients()
    close(made, want, atol=1e-6, rtol=1e-6)
    close(exact, want_exact, atol=0)
    close(gradient, want_gradient, atol=1e-5, rtol=1e-5)


def test_small_inputs_use_no_loop():
    """If all logits fit, the default is the program that computes them at once."""
    tokens, mask, _ = rows()

    def program(chunk):
        return str(jax.make_jaxpr(lambda p: lm.token_logprobs(p, tokens, cfg=CFG, mask_BL=mask, chunk=chunk))(model()))

    assert program(None) == program(L) != program(5)
    fit = chunking.MAX_BYTES // (4 * V)
    assert chunking.part_shape(1, fit, vocab=V) == (1, fit) and chunking.part_shape(1, fit + 1, vocab=V) != (1, fit + 1)


@hypothesis.given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 300_000))
def test_chunks_are_within_the_bound_and_as_few_as_possible(rows_n, columns_n, vocab):
    b, c = chunking.part_shape(rows_n, columns_n, vocab=vocab)
    fit = chunking.MAX_BYTES // (4 * vocab)
    assert 1 <= b <= rows_n and 1 <= c <= columns_n and b * c <= fit
    assert b == rows_n or c == 1
    parts = -(-rows_n // b) * -(-columns_n // c)
    # Chunks of whole columns use more than half of the bound, and the last one is about as full as the others.
    assert parts <= 2 * rows_n * columns_n / fit + max(rows_n, columns_n) / max(b, c) + 1


def oracle():
    """Computes the log-probabilities ``[B, L, V]`` from which each token was predicted, in NumPy and float64."""
    tokens, mask, _ = rows()

    def of(params):
        hidden = lm.forward(params, tokens, cfg=CFG, mask_BL=mask).hidden_BLD
        logits = np.asarray(lm.logits(params, hidden, cfg=CFG), np.float64) / 0.7
        logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        moved = np.full((B, L, V), np.nan)
        for b in range(B):
            real = np.flatnonzero(mask[b])
            moved[b, real[1:]] = logp[b, real[:-1]]
        return moved

    return of(model(0)), of(model(1))


def test_token_functions_match_their_definitions(monkeypatch):
    policy, other = oracle()
    tokens, mask, ids = (np.asarray(x) for x in rows())
    known = ~np.isnan(policy[..., 0])
    safe = np.where(mask, tokens, 0)
    probs = np.exp(policy)
    by_definition = {
        "logprobs": np.take_along_axis(policy, safe[..., None], -1)[..., 0],
        "entropy": -(probs * policy).sum(-1),
        "listed": np.take_along_axis(policy, ids, -1),
        "top k": -np.sort(-policy, axis=-1)[..., :K],
        "kl": (probs * (policy - other)).sum(-1),
        "reverse kl": (np.exp(other) * (other - policy)).sum(-1),
    }
    want = {
        name: np.where(known.reshape(*known.shape, *[1] * (x.ndim - 2)), x, 0.0) for name, x in by_definition.items()
    }
    monkeypatch.setattr(chunking, "MAX_BYTES", 4 * V * 13)
    made, (matches, top_ids) = jax.jit(everything)(model(0), model(1))
    logprobs, response, stats, listed, response_listed, top, response_top, divergence, reverse, _ = made
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(made))
    for got, name in [
        (logprobs, "logprobs"),
        (listed, "listed"),
        (top, "top k"),
        (divergence, "kl"),
        (reverse, "reverse kl"),
    ]:
        np.testing.assert_allclose(got, want[name], atol=2e-5, err_msg=name)
    for got, name in [
        (response, "logprobs"),
        (stats.logprobs, "logprobs"),
        (stats.entropy, "entropy"),
        (response_listed, "listed"),
        (response_top, "top k"),
    ]:
        np.testing.assert_allclose(got, want[name][:, P:], atol=2e-5, err_msg=name)
    np.testing.assert_array_equal(matches, known & (np.argmax(policy, axis=-1) == safe))
    np.testing.assert_array_equal(top_ids[known], np.argsort(-policy[known], axis=-1)[:, :K])


def test_distillation_gradient_is_zero_for_an_identical_student():
    tokens, mask, _ = rows()

    given = model()

    def loss(params):
        teacher = lm.token_top_k(given, tokens, cfg=CFG, k=K, mask_BL=mask, temperature=0.7, chunk=2)
        student = lm.token_listed_logprobs(params, tokens, teacher.ids, cfg=CFG, mask_BL=mask, temperature=0.7, chunk=3)
        return losses.masked_mean(losses.distill(student[:, 1:], teacher.logprobs[:, 1:]), where=mask[:, 1:])

    run = jax.jit(jax.value_and_grad(loss))
    value, gradient = run(model())
    assert abs(float(value)) < 1e-6 and max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient)) < 1e-5
    assert float(run(model(1))[0]) > 0.1


def test_bfloat16_models_produce_float32_results_with_and_without_chunks(monkeypatch):
    """If hidden states and logits are bfloat16, the rounding of the logits is the only error."""
    embed, kernel = (
        jax.random.normal(key, (V, 16)).astype(jnp.bfloat16) for key in jax.random.split(jax.random.key(0))
    )
    apply = types.ApplyFn(
        forward=lambda params, tokens, *, mask_BL=None: types.LMOutput(params["embed"][jnp.clip(tokens, 0, V - 1)]),
        logits=lambda params, hidden: hidden @ params["kernel"].T,
    )
    params, other = {"embed": embed, "kernel": kernel}, {"embed": embed, "kernel": kernel + 0.1}
    want, _ = jax.jit(lambda p, q: everything(p, q, apply=apply))(params, other)
    monkeypatch.setattr(chunking, "MAX_BYTES", 4 * V * 7)
    got, _ = jax.jit(lambda p, q: everything(p, q, apply=apply))(params, other)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(got))
    close(got, want, atol=1e-5)
    tokens, mask, _ = rows()
    logits = np.asarray((embed @ kernel.T), np.float32)
    first = logits[np.asarray(tokens[0, :-1])] / 0.7
    exact = np.take_along_axis(
        first - np.log(np.exp(first).sum(-1, keepdims=True)), np.asarray(tokens[0, 1:, None]), -1
    )
    np.testing.assert_allclose(got[0][0, 1:], exact[:, 0], atol=1e-5)
    assert bool(mask[0].all())


@pytest.mark.parametrize(
    "shape, tied",
    [
        ((1, 2048), True),
        pytest.param((8, 256), False, marks=pytest.mark.slow),
        pytest.param((1, 2048), False, marks=pytest.mark.slow),
        pytest.param((8, 256), True, marks=pytest.mark.slow),
        pytest.param((512, 4), True, marks=pytest.mark.slow),
    ],
)
def test_gradient_memory_over_a_large_vocabulary_is_bounded(shape, tied):
    """All logits of 2,048 tokens need 1.25 GB; with the default chunks, temporaries stay below 0.4 GB."""
    cfg = lm.LMConfig(
        vocab_size=LARGE_V, n_layers=1, d_model=64, n_heads=1, d_mlp=64, max_length=2048, tie_embeddings=tied
    )
    params, tokens = lm.abstract(cfg), jax.ShapeDtypeStruct(shape, jnp.int32)
    mask = jax.ShapeDtypeStruct(shape, bool)
    ids, logprobs = (jax.ShapeDtypeStruct((*shape, 50), dtype) for dtype in (jnp.int32, jnp.float32))

    def distill(p, t, i, teacher):
        return losses.distill(lm.token_listed_logprobs(p, t, i, cfg=cfg), teacher).sum()

    def entropy(p, t, m):
        return lm.token_stats(p, t, cfg=cfg, prompt_width=1, mask_BL=m).entropy.sum()

    cases: dict[str, tuple[Any, tuple]] = {
        "logprobs": (lambda p, t, m: lm.token_logprobs(p, t, cfg=cfg, mask_BL=m).sum(), (params, tokens, mask)),
        "entropy": (entropy, (params, tokens, mask)),
        "distillation": (distill, (params, tokens, ids, logprobs)),
        "kl": (lambda p, q, t: lm.token_kl(p, q, t, cfg=cfg).sum(), (params, params, tokens)),
        "kl to a teacher": (lambda p, q, t: lm.token_kl(q, p, t, cfg=cfg).sum(), (params, params, tokens)),
    }
    for name, (fn, arguments) in cases.items():
        analysis: Any = jax.jit(jax.grad(fn)).lower(*arguments).compile().memory_analysis()
        assert analysis.temp_size_in_bytes < 0.4e9, name


def test_kl_between_models_of_different_sizes():
    small = lm.LMConfig(vocab_size=V, n_layers=1, d_model=8, n_heads=1, d_mlp=8, max_length=32, positions="learned")
    other = lm.init(jax.random.key(3), small)
    tokens, mask, _ = rows()
    got = lm.token_kl(model(), other, tokens, cfg=CFG, other_cfg=small, mask_BL=mask, chunk=3)
    hidden = lm.forward(model(), tokens, cfg=CFG, mask_BL=mask).hidden_BLD
    other_hidden = lm.forward(other, tokens, cfg=small, mask_BL=mask).hidden_BLD
    whole = kl.full(lm.logits(model(), hidden, cfg=CFG), lm.logits(other, other_hidden, cfg=small))
    np.testing.assert_allclose(got[0, 1:], whole[0, :-1], atol=1e-5)
    assert bool(mask[0].all())


def test_kl_between_models_that_read_a_response_after_different_prompts():
    tokens = rows()[0] % V
    response, prompts = tokens[:, 3:], (tokens[:, :3], jnp.concatenate([tokens[:, 2:4], tokens[:, :3]], axis=1))
    other = lm.init(jax.random.key(4), CFG)
    first, second = (jnp.concatenate([each, response], axis=1) for each in prompts)
    real = jnp.ones(second.shape, bool).at[0, :2].set(False).at[1, -1].set(False)
    got = lm.token_kl(
        *(model(), other, first),
        cfg=CFG,
        mask_BL=real[:, 2:],
        prompt_width=3,
        other_tokens_BL=second,
        other_mask_BL=real,
        other_prompt_width=5,
        chunk=3,
    )
    assert got.shape == response.shape and float(got[1, -1]) == 0
    for row in range(len(tokens)):
        logits = []
        for params, ids, width in ((model(), first[row], 3), (other, second[row][real[row, :]], None)):
            ids = ids[real[row, 2:]] if width else ids
            hidden = lm.forward(params, ids[None], cfg=CFG).hidden_BLD
            T = int(real[row, 5:].sum())
            logits.append(lm.logits(params, hidden, cfg=CFG)[0, len(ids) - T - 1 : len(ids) - 1])
        np.testing.assert_allclose(got[row, : len(logits[0])], kl.full(*logits), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="requires prompt_width and other_prompt_width"):
        lm.token_kl(model(), other, first, cfg=CFG, other_tokens_BL=second)
    with pytest.raises(ValueError, match="they must be equal"):
        lm.token_kl(*(model(), other, first), cfg=CFG, prompt_width=3, other_tokens_BL=second, other_prompt_width=4)
