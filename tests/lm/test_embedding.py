"""Ids outside the vocabulary, which are refused on the host and give NaN on the device, and changes of its size."""
# pyright: reportArgumentType=false

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import generation, lm
from rlhf_jax.losses import supervised

V, L = 11, 6
KINDS = {
    "tied": dict(tie_embeddings=True),
    "untied": dict(),
    "gpt2": dict(norm="layernorm", positions="learned", tie_embeddings=True, gated_mlp=False, activation="gelu_tanh"),
    "gemma": dict(embed_scale=True, norm_plus_one=True, dtype="bfloat16"),
}


def config(kind="untied", **fields):
    return lm.LMConfig(vocab_size=V, n_layers=2, d_model=8, n_heads=2, d_mlp=16, max_length=16, **KINDS[kind], **fields)


@functools.cache
def initial(cfg):
    return jax.jit(partial(lm.init, cfg=cfg))(jax.random.key(0))


def rows(seed=0):
    return np.random.default_rng(seed).integers(0, V, (3, L)).astype(np.int32)


@partial(jax.jit, static_argnames="cfg")
def outputs(params, tokens, *, cfg):
    return lm.token_logprobs(params, tokens, cfg=cfg), lm.forward(params, tokens, cfg=cfg).hidden_BLD


@pytest.mark.parametrize("wrong", [V, 5000, -1, -V, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("kind", KINDS)
def test_an_id_outside_the_vocabulary_makes_its_row_nan_and_no_other(kind, wrong):
    cfg = config(kind)
    params, tokens = initial(cfg), rows()
    tokens[1, 2] = wrong
    for got in outputs(params, tokens, cfg=cfg):
        got = np.asarray(got, np.float32)
        assert np.isnan(got[1, 2:]).all() and np.isfinite(got[[0, 2]]).all()


def test_a_wrong_id_that_is_only_a_target_is_nan():
    cfg = config()
    params, tokens = initial(cfg), rows()
    tokens[:, -1] = (V, -1, 3)
    tokens_BL, mask_BL = jnp.asarray(tokens), jnp.broadcast_to(jnp.arange(L) > 0, tokens.shape)
    for masks in ({}, {"mask_BL": mask_BL}, {"prompt_width": 3}):
        stats = jax.jit(partial(lm.token_stats, cfg=cfg, **masks))(params, tokens_BL)
        assert np.isnan(np.asarray(stats.logprobs)[:, -1]).tolist() == [True, True, False]


@pytest.mark.parametrize("wrong", [V, -1])
def test_probabilities_of_listed_ids(wrong):
    logits = jax.random.normal(jax.random.key(0), (2, V))
    assert np.isnan(lm.selected_logprobs(logits, jnp.array([3, wrong]))).tolist() == [False, True]
    listed = supervised.gather_logprobs(logits, jnp.array([[3, wrong], [wrong, 0]]))
    assert np.isnan(listed).tolist() == [[False, True], [True, False]]
    np.testing.assert_allclose(listed[0, 0], jax.nn.log_softmax(logits)[0, 3], rtol=1e-6)


@partial(jax.jit, static_argnames="cfg")
def gradient(params, tokens, mask, *, cfg):
    return jax.grad(lambda p: lm.token_logprobs(p, tokens, cfg=cfg, mask_BL=mask).sum())(params)


@pytest.mark.parametrize("padding", [-1, -100, V, 0])
def test_padding_may_have_any_id_also_for_gradients(padding):
    cfg = config("tied")
    params, tokens = initial(cfg), rows()
    mask = np.arange(L) >= np.array([2, 0, 3])[:, None]
    got, wanted = (gradient(params, np.where(mask, tokens, pad), mask, cfg=cfg) for pad in (padding, 5))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_the_gradient_of_the_embedding_counts_each_id():
    cfg = config("untied", embed_scale=True)
    params, tokens = initial(cfg), rows()

    @jax.jit
    def total(table):
        return lm.forward({**params, "embed": {"tokens": table}}, tokens, cfg=cfg).hidden_BLD.sum()

    got, step = jax.jit(jax.grad(total))(params["embed"]["tokens"]), 1e-2
    for i in range(V):
        bump = np.zeros((V, 8), np.float32)
        bump[i, 3] = step
        numeric = (total(params["embed"]["tokens"] + bump) - total(params["embed"]["tokens"] - bump)) / (2 * step)
        np.testing.assert_allclose(got[i, 3], numeric, atol=2e-2)


def test_ids_on_the_host_are_refused_with_their_place():
    cfg = config()
    params, tokens = initial(cfg), rows()
    tokens[2, 4] = V
    with pytest.raises(ValueError, match=r"tokens_BL contain the id 11 at \[2, 4\], but the model has 11 ids, 0 to 10"):
        lm.forward(params, tokens, cfg=cfg)
    with pytest.raises(ValueError, match=r"-1 at \[0\]"):
        lm.check_ids([-1, 3], V)
    lm.check_ids([V, 3], V, mask=[False, True])
    lm.forward(params, tokens, cfg=cfg, mask_BL=np.arange(L) + 0 * tokens < 4)  # at padding


def test_samplers_refuse_ids_outside_the_vocabulary():
    cfg, spec = config(), generation.Sampling(max_new_tokens=3, stop_ids=(1,))
    params = initial(cfg)
    sampler = generation.RaggedSampler(cfg, spec, widths=(4,), slots=1)
    with pytest.raises(ValueError, match=r"the ids of prompt 1 contain the id 11 at \[0\]"):
        sampler(params, jax.random.key(0), [[3], [V, 2]])
    prompts, keys = np.array([[3, V]]), jax.random.split(jax.random.key(0), 1)
    with pytest.raises(ValueError, match="prompts_BP contain the id 11"):
        generation.generate(params, keys, prompts, prompts > 0, cfg=cfg, sampling=spec)
    for name, ids in {"stop_ids": (1, V), "forbidden_ids": (-1,), "stop_sequences": ((2, 30),), "pad_id": V}.items():
        wrong = generation.Sampling(**{"max_new_tokens": 3, "stop_ids": (1,), name: ids})
        with pytest.raises(ValueError, match=f"Sampling.{name} has the id"):
            generation.RaggedSampler(cfg, wrong, widths=(4,))
        with pytest.raises(ValueError, match=f"Sampling.{name} has the id"):
            generation.generate(params, keys, prompts % V, prompts > 0, cfg=cfg, sampling=wrong)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 7, V, 12, 40])
def test_resize_keeps_the_rows_and_fills_with_the_mean(kind, size, head):
    cfg = config(kind)
    params = initial(cfg)
    params = lm.with_head(jax.random.key(1), params, cfg) if head else params
    got, resized = lm.resize(params, cfg, size)
    assert resized == dataclasses.replace(cfg, vocab_size=size)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), lm.abstract(resized, head=head))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == shapes
    tables = {"embed": (params["embed"]["tokens"], got["embed"]["tokens"])}
    if "unembed" in params:
        tables["unembed"] = (params["unembed"]["kernel"].T, got["unembed"]["kernel"].T)
    for old, new in tables.values():
        n = min(size, V)
        np.testing.assert_array_equal(new[:n], old[:n])
        np.testing.assert_allclose(
            new[n:], np.tile(np.mean(np.asarray(old, np.float64), 0), (size - n, 1)), rtol=1e-5, atol=1e-7
        )
    for name in params.keys() - tables.keys():
        jax.tree.map(np.testing.assert_array_equal, got[name], params[name])


def test_a_resized_model_computes_the_same_logits_for_the_old_ids():
    cfg = config("gpt2")
    params, tokens = initial(cfg), rows()
    grown, larger = lm.resize(params, cfg, V + 4)

    def logits(params, cfg):
        return np.asarray(lm.logits(params, lm.forward(params, tokens, cfg=cfg).hidden_BLD, cfg=cfg))

    old, new = logits(params, cfg), logits(grown, larger)
    np.testing.assert_allclose(new[..., :V], old, atol=1e-5)
    # The logit of a new token is the mean of the old ones.
    np.testing.assert_allclose(new[..., V:], np.repeat(old.mean(-1, keepdims=True), 4, -1), atol=1e-5)
    back, _ = lm.resize(grown, larger, V)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_resize_keeps_leading_axes_and_dtype():
    cfg = config()
    stacked = jax.jit(jax.vmap(partial(lm.init, cfg=cfg)))(jax.random.split(jax.random.key(0), 3))
    many, _ = lm.resize(stacked, cfg, 13)
    for i in range(3):
        one, _ = lm.resize(jax.tree.map(lambda x, i=i: x[i], stacked), cfg, 13)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), jax.tree.map(lambda x, i=i: x[i], many), one)
    half, _ = lm.resize(jax.tree.map(lambda x: x.astype(jnp.bfloat16), stacked), cfg, 13)
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(ValueError, match="vocab_size"):
        lm.resize(stacked, cfg, 0)
