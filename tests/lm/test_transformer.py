import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import lm, types
from rlhf_jax.lm import attention, weights
from rlhf_jax.lm import params as lm_params

SMALL: dict[str, Any] = dict(vocab_size=23, n_layers=2, d_model=16, n_heads=4, d_mlp=24, max_length=32)
GPT2: dict[str, Any] = dict(
    norm="layernorm",
    activation="gelu_tanh",
    gated_mlp=False,
    positions="learned",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    tie_embeddings=True,
)
CONFIGS = {
    "llama": lm.LMConfig(**SMALL, n_kv_heads=2),
    "gpt2": lm.LMConfig(**SMALL, **GPT2),
    "neox": lm.LMConfig(**SMALL, **GPT2 | {"positions": "rope", "rope_fraction": 0.5, "parallel_residual": True}),
}
each_config = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())


@functools.partial(jax.jit, static_argnames="cfg")
def read(params, tokens, mask=None, *, cfg, temperature=1.0):
    """Returns (hidden, logprobs, values, score) of tokens, in one compiled program."""
    return (
        lm.forward(params, tokens, cfg=cfg, mask_BL=mask).hidden_BLD,
        lm.token_logprobs(params, tokens, cfg=cfg, mask_BL=mask, temperature=temperature),
        lm.values(params, tokens, cfg=cfg, mask_BL=mask),
        lm.score(params, tokens, cfg=cfg, mask_BL=mask),
    )


L = 12
# Columns at which the same five real tokens are placed in a row.
LAYOUTS = {
    "right": [0, 1, 2, 3, 4],
    "left": [7, 8, 9, 10, 11],
    "both": [3, 4, 5, 6, 7],
    "gapped": [1, 4, 5, 8, 10],
    "gapped-edges": [0, 2, 3, 7, 11],
}


@functools.cache
def model(cfg):
    """Returns random parameters with a head, so that a test fails if a bias, scale or gain is ignored."""
    rng = np.random.default_rng(0)

    def leaf(x):
        return jnp.asarray(
            1.0 + 0.2 * rng.normal(size=x.shape) if x.ndim < 3 else 0.3 * rng.normal(size=x.shape), jnp.float32
        )

    params = jax.tree.map(leaf, lm.abstract(cfg, head=True))
    return params | {"embed": jax.tree.map(lambda x: x - 1, params["embed"])}


def some_tokens(cfg, batch=3, length=L, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, cfg.vocab_size)


def laid_out(real_tokens, columns, junk=-7):
    """Returns a row of width L with ``real_tokens`` at ``columns`` and an invalid id elsewhere."""
    tokens = np.full((1, L), junk)
    tokens[0, columns] = real_tokens
    mask = np.zeros((1, L), bool)
    mask[0, columns] = True
    return jnp.asarray(tokens), jnp.asarray(mask)


# --- config and params -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, count",
    [
        ("gpt2", 124_439_808),
        ("pythia-1b", 1_011_781_632),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
    ],
)
def test_presets_have_the_published_parameter_counts(preset, count):
    cfg = lm.LMConfig.preset(preset)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(lm.abstract(cfg))) == count
    assert lm.count(cfg) == count


def test_config_is_hashable_and_compares_by_value():
    cfg = lm.LMConfig.preset("tiny", vocab_size=300)
    assert cfg.vocab_size == 300 and hash(cfg) == hash(dataclasses.replace(cfg)) and cfg == dataclasses.replace(cfg)
    assert (cfg.n_kv_heads, cfg.d_head, cfg.d_mlp) == (4, 16, 256)
    assert lm.apply_fn(cfg) is lm.apply_fn(dataclasses.replace(cfg))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(cfg, "d_model", 3)  # noqa: B010


@pytest.mark.parametrize(
    "change, field",
    [
        (dict(vocab_size=0), "vocab_size"),
        (dict(n_heads=3), "n_heads"),
        (dict(n_kv_heads=3), "n_kv_heads"),
        (dict(d_mlp=-1), "d_mlp"),
        (dict(norm="batchnorm"), "norm"),
        (dict(activation="tanh"), "activation"),
        (dict(positions="alibi"), "positions"),
        (dict(dtype="int8"), "dtype"),
        (dict(remat="some"), "remat"),
        (dict(attention="flash"), "attention"),
        (dict(rope_fraction=1.5), "rope_fraction"),
        (dict(rope_fraction=0.1), "rope_fraction"),
        (dict(rope_theta=0.0), "rope_theta"),
        (dict(norm_eps=0.0), "norm_eps"),
    ],
)
def test_errors_name_the_invalid_field_of_a_config(change, field):
    with pytest.raises(ValueError, match=rf"LMConfig\.{field} is"):
        lm.LMConfig(**(SMALL | change))
    with pytest.raises(ValueError, match="unknown preset 'gpt5'; known presets: gpt2"):
        lm.LMConfig.preset("gpt5")


@each_config
def test_table_contains_abstract_shapes_and_axes(cfg):
    made = jax.eval_shape(lambda rng: lm.with_head(rng, lm.init(rng, cfg), cfg), jax.random.key(0))
    assert made == lm.abstract(cfg, head=True)
    assert "head" not in lm.abstract(cfg)
    axes = lm_params.flatten(lm.logical_axes(cfg, head=True))
    for name, leaf in lm_params.flatten(made).items():
        assert len(axes[name]) == len(leaf.shape)
        assert (axes[name][:1] == ("layers",)) == name.startswith("layers/")


def test_new_models_are_random_and_predict_nearly_uniformly():
    cfg = lm.LMConfig(**SMALL)
    params = lm.init(jax.random.key(0), cfg)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    # Layers have different random numbers, and a leaf's numbers do not depend on the model's other leaves.
    assert not np.array_equal(params["layers"]["q"]["kernel"][0], params["layers"]["q"]["kernel"][1])
    tied = lm.init(jax.random.key(0), dataclasses.replace(cfg, tie_embeddings=True))
    jax.tree.map(np.testing.assert_array_equal, tied, {k: v for k, v in params.items() if k != "unembed"})
    # Predictions are nearly uniform.
    logprobs = read(lm.with_head(jax.random.key(1), params, cfg), some_tokens(cfg, 16), cfg=cfg)[1]
    assert abs(-float(logprobs[:, 1:].mean()) - math.log(cfg.vocab_size)) < 0.3


# --- the transformer ---------------------------------------------------------------------------------------------


@each_config
def test_no_output_depends_on_a_later_token(cfg):
    """The gradient of an output is exactly 0 for embeddings of later columns and nonzero for its own column."""
    params, tokens = model(cfg), jnp.arange(8)[None, :]

    def outputs(table):
        hidden = lm.forward(params | {"embed": params["embed"] | {"tokens": table}}, tokens, cfg=cfg).hidden_BLD
        return hidden[0].sum(axis=-1)

    jacobian = np.abs(jax.jit(jax.jacrev(outputs))(params["embed"]["tokens"])).sum(axis=-1)[:, :8]
    assert np.all(np.triu(jacobian, 1) == 0)
    assert np.all(jacobian[np.tril_indices(8)] > 0)


@each_config
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_does_not_change_real_tokens(cfg, layout):
    real = some_tokens(cfg, 1, 5)[0]
    tokens, mask = laid_out(real, LAYOUTS[layout])
    hidden, logprobs, values, score = read(model(cfg), tokens, mask, cfg=cfg)
    alone = read(model(cfg), real[None, :], cfg=cfg)
    np.testing.assert_allclose(hidden[0, LAYOUTS[layout]], alone[0][0], atol=1e-5)
    for padded, want in ((logprobs, alone[1]), (values, alone[2])):
        np.testing.assert_allclose(padded[mask], want[0], atol=1e-5)
        assert np.all(padded[~mask] == 0)
    np.testing.assert_allclose(score, alone[3], atol=1e-5)


@each_config
def test_cached_passes_equal_one_pass(cfg):
    tokens = some_tokens(cfg)
    mask = jnp.stack([jnp.ones(L, bool), jnp.arange(L) >= 5, jnp.arange(L) % 3 != 1])
    whole = read(model(cfg), tokens, mask, cfg=cfg)[0]
    step = jax.jit(functools.partial(lm.forward, cfg=cfg))
    cache, pieces, start = lm.create_cache(cfg, batch=3, slots=L + 2), [], 0
    for width in (5, 1, 1, 5):
        columns = slice(start, start + width)
        out = step(model(cfg), tokens[:, columns], mask_BL=mask[:, columns], cache=cache)
        cache, start = out.cache, start + width
        pieces.append(out.hidden_BLD)
    assert int(cache.length) == L
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1)[mask], whole[mask], atol=1e-5)


def test_cache_is_immutable():
    cfg = CONFIGS["llama"]
    params, tokens = model(cfg), some_tokens(cfg)
    step = jax.jit(functools.partial(lm.forward, cfg=cfg))
    start = step(params, tokens[:, :4], cache=lm.create_cache(cfg, batch=3, slots=L)).cache
    one = step(params, tokens[:, 4:8], cache=start).hidden_BLD
    step(params, tokens[:, 8:], cache=start)
    np.testing.assert_array_equal(one, step(params, tokens[:, 4:8], cache=start).hidden_BLD)


@each_config
def test_rows_of_padding_are_finite_with_finite_gradients(cfg):
    tokens, mask = some_tokens(cfg), jnp.zeros((3, L), bool).at[1, 3].set(True)

    @jax.jit
    def gradient(params):
        def total(params):
            logprobs = lm.token_logprobs(params, tokens, cfg=cfg, mask_BL=mask, temperature=0.7)
            return logprobs.sum() + lm.score(params, tokens, cfg=cfg, mask_BL=mask).sum()

        return jax.grad(total)(params)

    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient(model(cfg))))
    hidden, logprobs, values, score = read(model(cfg), tokens, mask, cfg=cfg)
    assert np.isfinite(hidden).all() and np.all(logprobs == 0) and np.all(values == 0)
    assert np.array_equal(score != 0, [False, True, False])


@pytest.mark.parametrize("change", [dict(remat="dots"), dict(attention="xla", remat="full")])
def test_attention_and_remat_options_agree_and_padding_has_no_gradient(change):
    params, tokens = model(CONFIGS["llama"]), some_tokens(CONFIGS["llama"]).at[:, 0].set(22)
    tokens = jnp.where(tokens == 5, 6, tokens).at[0, 2].set(5)
    mask = (jnp.arange(L)[None, :] >= jnp.array([0, 3, 6])[:, None]).at[0, 2].set(False)

    @functools.partial(jax.jit, static_argnums=1)
    def run(params, cfg):
        return jax.value_and_grad(lambda p: lm.token_logprobs(p, tokens, cfg=cfg, mask_BL=mask).mean())(params)

    want, want_gradient = run(params, CONFIGS["llama"])
    got, got_gradient = run(params, dataclasses.replace(CONFIGS["llama"], **change))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got_gradient, want_gradient)
    # Token 5 occurs only at padding.
    assert np.all(want_gradient["embed"]["tokens"][5] == 0) and np.any(want_gradient["embed"]["tokens"][22] != 0)


def test_grouped_attention_equals_attention_with_repeated_heads():
    cfg = CONFIGS["llama"]
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (2, 4, 5, 4))
    key, value = (jax.random.normal(k, (2, 2, 5, 4)) for k in keys[1:])
    seen = attention.causal(jnp.ones((2, 5), bool))
    more_keys, more_values = (jnp.repeat(x, 2, axis=1) for x in (key, value))
    np.testing.assert_allclose(
        attention.attend(query, key, value, seen, cfg=cfg),
        attention.attend(query, more_keys, more_values, seen, cfg=cfg),
        atol=1e-6,
    )


def test_fully_masked_query_is_finite():
    cfg = CONFIGS["llama"]
    query = key = value = jax.random.normal(jax.random.key(0), (1, 2, 3, 4))
    seen = jnp.zeros((1, 3, 3), bool)
    out, gradient = jax.value_and_grad(lambda q: attention.attend(q, key, value, seen, cfg=cfg).sum())(query)
    assert np.isfinite(out) and np.isfinite(gradient).all()


def test_bfloat16_compute_and_float32_logprobs():
    cfg = dataclasses.replace(CONFIGS["llama"], dtype="bfloat16")
    params, tokens = model(CONFIGS["llama"]), some_tokens(cfg)
    hidden, *rest = read(params, tokens, cfg=cfg)
    assert hidden.dtype == jnp.bfloat16 and all(x.dtype == jnp.float32 for x in rest)
    np.testing.assert_allclose(rest[0], read(params, tokens, cfg=CONFIGS["llama"])[1], atol=0.3)


def test_unstacked_params():
    cfg = CONFIGS["llama"]
    unstacked = weights.unstack(model(cfg), cfg)
    np.testing.assert_array_equal(unstacked["layers"][1]["q"]["kernel"], model(cfg)["layers"]["q"]["kernel"][1])
    assert weights.unstack(unstacked, cfg) is unstacked


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_unstacked_params_are_cast_once_and_give_the_same_bits(name):
    """A decoding loop must not read float32 kernels at every token."""
    cfg = dataclasses.replace(CONFIGS[name], dtype="bfloat16")
    params = model(cfg)
    unstacked = weights.unstack(params, cfg)
    for path, x in jax.tree_util.tree_leaves_with_path(unstacked["layers"]):
        assert x.dtype == (jnp.float32 if "norm" in str(path) else jnp.bfloat16), path
    assert unstacked["final_norm"]["scale"].dtype == jnp.float32
    tokens_BL = jnp.arange(8).reshape(2, 4)

    def hidden(params):
        cache = lm.create_cache(cfg, batch=2, slots=4)
        return lm.forward(params, tokens_BL, cfg=cfg, mask_BL=jnp.ones((2, 4), bool), cache=cache).hidden_BLD

    stacked = params | {
        "layers": tuple(jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(cfg.n_layers))
    }
    np.testing.assert_array_equal(hidden(unstacked), hidden(stacked))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(tokens_BL=jnp.zeros(3, int)), "rank 2"),
        (dict(mask_BL=jnp.ones((2, 3), bool)), "mask_BL has shape"),
        (dict(mask_BL=jnp.ones((2, 4))), "must be bool"),
        (dict(positions_BL=jnp.ones((1, 4), int)), "positions_BL has shape"),
        (dict(tokens_BL=jnp.zeros((1, 33), int)), "longer than cfg.max_length = 32"),
        (dict(cache=lm.create_cache(CONFIGS["llama"], batch=2, slots=3)), "do not fit in a cache of 3 slots"),
    ],
)
def test_errors_name_wrong_shapes(arguments, message):
    cfg = CONFIGS["llama"]
    arguments = {"tokens_BL": jnp.zeros((2, 4), int)} | arguments
    with pytest.raises(ValueError, match=message):
        lm.forward(model(cfg), arguments.pop("tokens_BL"), cfg=cfg, **arguments)


# --- log-probabilities, values, scores ---------------------------------------------------------------------------


@each_config
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_agree_with_a_loop(cfg, temperature):
    """Predicts each real token from the previous one, in NumPy and float64."""
    tokens = some_tokens(cfg)
    mask = jnp.stack([jnp.ones(L, bool), jnp.arange(L) >= 5, jnp.arange(L) % 3 != 1])
    hidden, got, *_ = read(model(cfg), tokens, mask, cfg=cfg, temperature=temperature)
    logits = np.asarray(lm.logits(model(cfg), hidden, cfg=cfg), np.float64) / temperature
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    want = np.zeros((3, L))
    for row in range(3):
        real = np.flatnonzero(mask[row])
        for before, column in itertools.pairwise(real):
            want[row, column] = logp[row, before, tokens[row, column]]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_probabilities_of_all_last_tokens_sum_to_one():
    cfg = CONFIGS["llama"]
    prefix = some_tokens(cfg, 1, 6)
    every = jnp.concatenate([jnp.repeat(prefix, 23, axis=0), jnp.arange(23)[:, None]], axis=1)
    for temperature in (0.5, 1.0, 2.0):
        logprobs = read(model(cfg), every, cfg=cfg, temperature=temperature)[1]
        assert abs(float(jnp.exp(logprobs[:, -1]).sum()) - 1) < 1e-5


@each_config
def test_values_are_before_each_token_and_the_score_is_at_the_last(cfg):
    params, tokens = model(cfg), some_tokens(cfg)
    mask = jnp.stack([jnp.ones(L, bool), jnp.arange(L) >= 5, (jnp.arange(L) % 3 != 1) & (jnp.arange(L) < 9)])
    hidden, _, values, score = read(params, tokens, mask, cfg=cfg)
    # Values before token 8 do not depend on that token; later values do.
    changed = read(params, (tokens.at[:, 8].add(1)) % cfg.vocab_size, mask, cfg=cfg)[2]
    np.testing.assert_allclose(values[:, :9], changed[:, :9], atol=1e-6)
    assert np.all(np.asarray(values[:2, 9]) != np.asarray(changed[:2, 9]))
    # A value is the score of the preceding tokens.
    shorter = mask & (jnp.arange(L)[None, :] < jnp.array([L - 1, L - 1, 8])[:, None])
    want = read(params, tokens, shorter, cfg=cfg)[3]
    np.testing.assert_allclose([values[0, L - 1], values[1, L - 1], values[2, 8]], want, atol=1e-5)
    # The score is linear in the hidden state at the last real token.
    head = params["head"]
    last = hidden[jnp.arange(3), jnp.array([L - 1, L - 1, 8])]
    np.testing.assert_allclose(score, head["gain"] * (last @ head["kernel_D"]) + head["bias"], rtol=1e-4)


@each_config
def test_missing_mask_equals_a_mask_of_ones(cfg):
    tokens = some_tokens(cfg)
    bare, masked = read(model(cfg), tokens, cfg=cfg), read(model(cfg), tokens, jnp.ones((3, L), bool), cfg=cfg)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), bare, masked)
    assert np.all(bare[1][:, 0] == 0) and np.all(bare[2][:, 0] == 0)


@each_config
def test_prompt_width_selects_the_response_columns(cfg):
    params, tokens, P = model(cfg), some_tokens(cfg), 5
    columns, lengths = jnp.arange(L)[None, :], jnp.array([7, 3, 0])[:, None]
    mask = (columns >= jnp.array([0, 2, 4])[:, None]) & (columns < P + lengths)
    _, logprobs, values, _ = read(params, tokens, mask, cfg=cfg, temperature=0.7)

    @jax.jit
    def responses(params):
        arguments: dict[str, Any] = dict(cfg=cfg, mask_BL=mask, prompt_width=P)
        return (
            lm.token_logprobs(params, tokens, temperature=0.7, **arguments),
            lm.values(params, tokens, **arguments),
            lm.token_stats(params, tokens, temperature=0.7, **arguments),
        )

    got_logprobs, got_values, stats = responses(params)
    np.testing.assert_allclose(got_logprobs, logprobs[:, P:], atol=1e-5)
    np.testing.assert_allclose(got_values, values[:, P:], atol=1e-5)
    np.testing.assert_allclose(stats.logprobs, logprobs[:, P:], atol=1e-5)
    assert np.all((stats.entropy > 0) == mask[:, P:]) and float(stats.entropy.max()) <= math.log(cfg.vocab_size) + 1e-5
    for width in (0, L):
        with pytest.raises(ValueError, match="prompt_width"):
            lm.token_logprobs(params, tokens, cfg=cfg, prompt_width=width)


@pytest.mark.parametrize(
    "change", [{}, *(pytest.param(each, marks=pytest.mark.slow) for each in (dict(remat="full"), dict(n_layers=1)))]
)
def test_restricting_columns_does_not_change_gradients(change):
    cfg = dataclasses.replace(next(iter(CONFIGS.values())), **change)
    tokens, P = some_tokens(cfg), 5
    columns = jnp.arange(L)[None, :]
    mask = (columns >= jnp.array([0, 2, 4])[:, None]) & (columns < jnp.array([L, 9, 6])[:, None])
    last = jnp.array([L - 1, 8, 5])

    def few(params):
        how: dict[str, Any] = dict(cfg=cfg, mask_BL=mask)
        return jnp.sum(jnp.sin(lm.token_logprobs(params, tokens, prompt_width=P, **how))), jnp.sum(
            jnp.sin(lm.score(params, tokens, **how))
        )

    def all_of_them(params):
        hidden = lm.forward(params, tokens, cfg=cfg, mask_BL=mask).hidden_BLD
        scores = lm.heads.scalar(params, hidden)[jnp.arange(3), last]
        logprobs = lm.token_logprobs(params, tokens, cfg=cfg, mask_BL=mask)[:, P:]
        return jnp.sum(jnp.sin(logprobs)), jnp.sum(jnp.sin(scores))

    got, want = (jax.jit(jax.jacrev(fn))(model(cfg)) for fn in (few, all_of_them))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(b).max())), got, want)


@pytest.mark.slow
def test_chunk_size_does_not_change_results():
    cfg, tokens = CONFIGS["llama"], some_tokens(CONFIGS["llama"])
    mask = jnp.stack([jnp.ones(L, bool), jnp.arange(L) >= 3, (jnp.arange(L) >= 2) & (jnp.arange(L) < 9)])

    @functools.partial(jax.jit, static_argnums=1)
    def run(params, chunk):
        def total(params):
            arguments: dict[str, Any] = dict(cfg=cfg, temperature=0.7, chunk=chunk)
            made = (
                lm.token_logprobs(params, tokens, mask_BL=mask, **arguments),
                lm.token_logprobs(params, tokens, **arguments),
                *lm.token_stats(params, tokens, mask_BL=mask, prompt_width=5, **arguments),
            )
            return sum(x.mean() for x in made), made

        return jax.grad(total, has_aux=True)(params)

    want = run(model(cfg), None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), run(model(cfg), 5), want)
    with pytest.raises(ValueError, match="chunk is 0"):
        lm.token_logprobs(model(cfg), tokens, cfg=cfg, chunk=0)


def test_entropy_of_known_distributions():
    uniform, certain = jnp.zeros((2, 8)), jnp.array([[0.0, 60.0], [0.0, 1000.0]])
    np.testing.assert_allclose(lm.entropy(uniform), math.log(8), rtol=1e-6)
    np.testing.assert_allclose(lm.entropy(certain), 0, atol=1e-6)
    some = jax.random.normal(jax.random.key(0), (5, 8))
    np.testing.assert_allclose(lm.entropy(some, temperature=0.5), lm.entropy(2 * some), rtol=1e-5)


def test_selected_logprobs_stay_exact_far_from_zero():
    far = jnp.array([[1e4, 1e4 - 1, -1e4]])
    got = [float(lm.selected_logprobs(far, jnp.array([i]))[0]) for i in range(3)]
    np.testing.assert_allclose(got[:2], [-math.log1p(math.exp(-1)), -1 - math.log1p(math.exp(-1))], atol=2e-3)
    assert np.isfinite(got[2])
    with pytest.raises(ValueError, match=r"targets have shape \(1, 1\); logits \(1, 3\) require \(1,\)"):
        lm.selected_logprobs(far, jnp.zeros((1, 1), int))


def test_functions_accept_the_apply_fn_of_any_model():
    """Uses a bigram table of log p(b | a) in place of a transformer."""
    table = jax.random.normal(jax.random.key(0), (6, 6))
    apply = types.ApplyFn(
        forward=lambda params, tokens, *, mask_BL=None: types.LMOutput(jax.nn.one_hot(tokens, 6)),
        logits=lambda params, hidden: hidden @ params["table"],
    )
    params = {"table": table, "head": {"kernel_D": jnp.arange(6.0), "bias": jnp.zeros(()), "gain": jnp.ones(())}}
    tokens = jnp.array([[2, 4, 1, 5]])
    logp = jax.nn.log_softmax(table)
    want = [0, logp[2, 4], logp[4, 1], logp[1, 5]]
    np.testing.assert_allclose(lm.token_logprobs(params, tokens, cfg=apply)[0], jnp.array(want), rtol=1e-6)
    np.testing.assert_allclose(lm.values(params, tokens, cfg=apply)[0], [0, 2, 4, 1])
    np.testing.assert_allclose(lm.score(params, tokens, cfg=apply), [5])
    gapped = lm.token_logprobs(params, tokens, cfg=apply, mask_BL=jnp.array([[True, False, True, True]]))
    np.testing.assert_allclose(gapped[0], jnp.array([0, 0, logp[2, 1], logp[1, 5]]), rtol=1e-6)


def test_vmap_over_models_equals_a_loop():
    cfg, tokens = CONFIGS["llama"], some_tokens(CONFIGS["llama"])
    models = [model(cfg), jax.tree.map(lambda x: 0.9 * x, model(cfg))]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *models)
    mapped = jax.jit(jax.vmap(functools.partial(lm.token_logprobs, cfg=cfg), in_axes=(0, None)))(stacked, tokens)
    for got, one in zip(mapped, models):
        np.testing.assert_allclose(got, read(one, tokens, cfg=cfg)[1], atol=1e-5)


# --- heads -------------------------------------------------------------------------------------------------------


def test_new_heads_have_the_documented_distribution():
    cfg = lm.LMConfig.preset("tiny", d_model=512, n_heads=8)
    trunk = {"embed": jnp.zeros(1)}
    head = lm.with_head(jax.random.key(0), trunk, cfg)["head"]
    assert abs(float(head["kernel_D"].std()) * math.sqrt(513) - 1) < 0.1
    assert (float(head["bias"]), float(head["gain"])) == (0, 1)
    zero = lm.with_head(jax.random.key(0), trunk, cfg, zero=True)
    np.testing.assert_array_equal(zero["head"]["kernel_D"], 0)
    assert lm.without_head(zero) == trunk
    with pytest.raises(ValueError, match='no "head"'):
        lm.heads.scalar(trunk, jnp.zeros((1, 1, 512)))


def test_normalising_scores():
    cfg = CONFIGS["llama"]
    params, tokens, where = model(cfg), some_tokens(cfg, 16), jnp.arange(16) < 10

    def score(params):
        return read(params, tokens, cfg=cfg)[3]

    scores = score(params)
    np.testing.assert_allclose(score(lm.heads.shift_bias(params, 2.5)), scores + 2.5, atol=1e-4)
    centred = score(lm.heads.centre(params, scores, where=where))
    assert abs(float(centred[:10].mean())) < 1e-4
    np.testing.assert_allclose(centred - centred[0], scores - scores[0], atol=1e-4)
    standard = score(lm.heads.standardise(params, scores, where=where))
    assert abs(float(standard[:10].mean())) < 1e-4 and abs(float(standard[:10].std()) - 1) < 1e-4
    constant = lm.heads.standardise(params, jnp.full(4, 3.0))
    assert float(constant["head"]["gain"]) == float(params["head"]["gain"])
