"""Models that are not part of the library: a Linen transformer and an NNX recurrent network as `types.ApplyFn`."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from rlhf_jax import generation, lm, parallel, types
from rlhf_jax.train import ppo, sft
from rlhf_jax.train import state as state_lib

V, D, P, T, B = 13, 8, 4, 5, 8
L = P + T
CFG = lm.LMConfig(vocab_size=V, n_layers=1, d_model=D, n_heads=2, d_mlp=16, max_length=L)
SAMPLING = generation.Sampling(max_new_tokens=T, stop_ids=(1, 2), pad_id=3)
PLAIN = optax.scale(-1.0)


class LinenTransformer(linen.Module):
    """One attention layer, with learned positions that count only real tokens."""

    def setup(self):
        self.embed, self.positions = linen.Embed(V, D), linen.Embed(L, D)
        self.attention = linen.MultiHeadDotProductAttention(num_heads=2)
        self.norm, self.up, self.down = linen.LayerNorm(), linen.Dense(2 * D), linen.Dense(D)
        self.unembed = linen.Dense(V)

    def __call__(self, tokens_BL, mask_BL=None):
        mask_BL = jnp.ones(tokens_BL.shape, bool) if mask_BL is None else mask_BL
        seen = linen.combine_masks(linen.make_causal_mask(tokens_BL), linen.make_attention_mask(mask_BL, mask_BL))
        # Padding may have any id; the embedding of an id outside the vocabulary would be NaN.
        tokens_BL = jnp.where(mask_BL, tokens_BL, 0)
        x_BLD = self.embed(tokens_BL) + self.positions(jnp.cumsum(mask_BL, axis=1) - mask_BL)
        x_BLD = x_BLD + self.attention(self.norm(x_BLD), mask=seen)
        return x_BLD + self.down(jax.nn.gelu(self.up(x_BLD)))

    def logits(self, hidden_BLD):
        return self.unembed(hidden_BLD)

    def both(self, tokens_BL):
        return self.logits(self(tokens_BL))


class NNXRecurrent(nnx.Module):
    """A gated recurrent network that ignores padding."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.gate, self.update = nnx.Linear(2 * D, D, rngs=rngs), nnx.Linear(2 * D, D, rngs=rngs)
        self.unembed = nnx.Linear(D, V, rngs=rngs)

    def __call__(self, tokens_BL, mask_BL=None):
        mask_BL = jnp.ones(tokens_BL.shape, bool) if mask_BL is None else mask_BL

        def step(state_BD, column):
            x_BD, real_B = column
            both = jnp.concatenate([state_BD, x_BD], axis=1)
            gate_BD = jax.nn.sigmoid(self.gate(both))
            new_BD = gate_BD * state_BD + (1 - gate_BD) * jnp.tanh(self.update(both))
            state_BD = jnp.where(real_B[:, None], new_BD, state_BD)
            return state_BD, state_BD

        x_BLD = self.embed(jnp.where(mask_BL, tokens_BL, 0))
        columns = (jnp.swapaxes(x_BLD, 0, 1), mask_BL.T)
        return jnp.swapaxes(jax.lax.scan(step, jnp.zeros((len(tokens_BL), D)), columns)[1], 0, 1)


def linen_model():
    module = LinenTransformer()
    params = module.init(jax.random.key(0), jnp.zeros((1, L), jnp.int32), method="both")["params"]

    def run(params, *args, **kwargs) -> Any:
        return module.apply({"params": params}, *args, **kwargs)

    apply = types.ApplyFn(
        forward=lambda params, tokens_BL, *, mask_BL=None: types.LMOutput(run(params, tokens_BL, mask_BL)),
        logits=lambda params, hidden_BLD: run(params, hidden_BLD, method="logits"),
    )
    return apply, params


def nnx_model():
    graph, state = nnx.split(NNXRecurrent(nnx.Rngs(0)))

    def model(params):
        # The scalar head of a critic or a reward model is stored next to the module's parameters.
        return nnx.merge(graph, lm.without_head(params))

    apply = types.ApplyFn(
        forward=lambda params, tokens_BL, *, mask_BL=None: types.LMOutput(model(params)(tokens_BL, mask_BL)),
        logits=lambda params, hidden_BLD: model(params).unembed(hidden_BLD),
    )
    return apply, nnx.to_pure_dict(state)


def own_model():
    return lm.apply_fn(CFG), jax.jit(functools.partial(lm.init, cfg=CFG))(jax.random.key(0))


MODELS = {"linen": functools.cache(linen_model), "nnx": functools.cache(nnx_model), "own": functools.cache(own_model)}
foreign = pytest.mark.parametrize("make", [MODELS["linen"], MODELS["nnx"]], ids=["linen", "nnx"])
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def louder(params):
    """Returns weights that make some tokens much more likely than others."""
    return jax.tree.map(lambda x: 2.0 * x, params)


def with_head(params, seed=5):
    return lm.with_head(jax.random.key(seed), params, CFG)


def prompts(batch=B):
    rng = np.random.default_rng(0)
    mask = np.arange(P)[None, :] >= np.arange(batch)[:, None] % P
    return jnp.asarray(np.where(mask, rng.integers(4, V, size=(batch, P)), -9)), jnp.asarray(mask)


def keys(batch=B):
    return jax.random.split(jax.random.key(1), batch)


def rows():
    tokens, mask = prompts()
    rng = np.random.default_rng(1)
    answers = np.arange(T)[None, :] < 1 + np.arange(B)[:, None] % T
    learnt = jnp.asarray(np.concatenate([np.zeros((B, P), bool), answers], axis=1))
    whole = jnp.concatenate([tokens, jnp.asarray(rng.integers(1, V, size=(B, T)))], axis=1)
    return sft.TokenBatch(whole.astype(jnp.int32), jnp.concatenate([mask, jnp.asarray(answers)], axis=1), learnt)


@foreign
def test_token_functions_accept_any_model(make):
    """Padded rows agree with single unpadded rows, and chunks of columns with all columns at once."""
    apply, params = make()
    params, batch = with_head(params), rows()

    @functools.partial(jax.jit, static_argnames="chunk")
    def read(params, tokens, mask, chunk=None):
        how: dict[str, Any] = dict(mask_BL=mask, temperature=0.7, chunk=chunk)
        return (
            lm.token_logprobs(params, tokens, cfg=apply, **how),
            lm.values(params, tokens, cfg=apply, mask_BL=mask),
            lm.score(params, tokens, cfg=apply, mask_BL=mask),
            lm.token_stats(params, tokens, cfg=apply, prompt_width=P, **how) if tokens.shape[1] == L else None,
            lm.values(params, tokens, cfg=apply, prompt_width=P, mask_BL=mask) if tokens.shape[1] == L else None,
        )

    logprobs, values, score, stats, response_values = got = read(params, batch.tokens_BL, batch.mask_BL)
    for row in (0, 2, 5):
        real = np.flatnonzero(batch.mask_BL[row])
        alone = read(params, batch.tokens_BL[row, real][None, :], None)
        np.testing.assert_allclose(logprobs[row, real], alone[0][0], atol=1e-5)
        np.testing.assert_allclose(values[row, real], alone[1][0], atol=1e-5)
        np.testing.assert_allclose(score[row], alone[2][0], atol=1e-5)
    np.testing.assert_allclose(stats.logprobs, logprobs[:, P:], atol=1e-5)
    np.testing.assert_allclose(response_values, values[:, P:], atol=1e-5)
    assert np.all((stats.entropy > 0) == batch.mask_BL[:, P:])
    in_parts = read(params, batch.tokens_BL, batch.mask_BL, chunk=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), in_parts, got)


@foreign
def test_supervised_step(make):
    apply, params = make()
    step = parallel.jit_step(sft.make_train_step(functools.partial(lm.token_logprobs, cfg=apply)))
    hyper = {"learning_rate": np.float32(0.3), "max_grad_norm": np.float32(1.0)}
    state, found = state_lib.create(params, PLAIN), []
    for _ in range(12):
        state, logs = step(state, None, hyper, rows(), jax.random.key(0))
        found.append(float(logs["loss"].value()))
    assert np.all(np.isfinite(found)) and found[-1] < 0.9 * found[0]
    assert step.traces == 1 and jax.tree.structure(state.params) == jax.tree.structure(params)


@foreign
def test_ppo_step(make):
    apply, params = make()

    def generate(params, rng_B, prompts_BP, mask_BP, temperature):
        sampling = dataclasses.replace(SAMPLING, temperature=temperature)
        return generation.generate(params, rng_B, prompts_BP, mask_BP, cfg=apply, sampling=sampling)

    models = ppo.Models(
        generate=generate,
        logprobs=lambda params, tokens, mask, temperature: lm.token_stats(
            params, tokens, cfg=apply, prompt_width=P, mask_BL=mask, temperature=temperature
        ),
        values=lambda params, tokens, mask: lm.values(params, tokens, cfg=apply, prompt_width=P, mask_BL=mask),
        score=lambda params, rollout: lm.score(params, rollout.tokens_BL, cfg=apply, mask_BL=rollout.mask_BL),
        token_logprobs=functools.partial(lm.token_logprobs, cfg=apply),
    )
    step = parallel.jit_step(ppo.make_train_step(models, epochs=1, minibatches=2))
    state = ppo.create(params, with_head(params), PLAIN)
    hyper: Any = jax.tree.map(np.float32, ppo.Hyper(learning_rate=0.1, critic_learning_rate=0.1, ptx_coef=0.1))
    frozen = ppo.Frozen(reference=params, reward=with_head(params, seed=9))
    state, logs = step(state, frozen, hyper, ppo.Batch(*prompts(), rows()), jax.random.key(0))
    assert float(logs["sampler_gap"]) < 1e-5 and float(logs["first_ratio_error"]) < 1e-5
    assert abs(float(logs["kl"].value())) < 1e-5 and float(logs["skipped"]) == 0
    for name, before in (("policy", params), ("critic", with_head(params))):
        change = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params[name], before)
        assert all(np.isfinite(x) for x in jax.tree.leaves(change)) and max(jax.tree.leaves(change)) > 1e-4
    assert float(logs["ptx_loss"]) > 0 and np.isfinite(float(logs["policy_loss"]))


# ----------------------------------------------------------------------------------------------------- generation


@functools.cache
def sampler(make):
    apply, _ = make()
    return jax.jit(functools.partial(generation.generate, cfg=apply))


@each_model
def test_scoring_reproduces_the_sampled_logprobs(make):
    apply, params = make()
    params = louder(params)
    rollout = sampler(make)(params, keys(64), *prompts(64), sampling=dataclasses.replace(SAMPLING, temperature=1.3))
    np.testing.assert_array_equal(rollout.mask_BL, jnp.concatenate([prompts(64)[1], rollout.response_mask_BT], axis=1))
    np.testing.assert_array_equal(rollout.tokens_BL[:, :P], prompts(64)[0])
    np.testing.assert_array_equal(rollout.response_mask_BT, np.arange(T)[None, :] < rollout.lengths_B[:, None])
    scored = jax.jit(functools.partial(lm.token_logprobs, cfg=apply, prompt_width=P))(
        params, rollout.tokens_BL, mask_BL=rollout.mask_BL, temperature=1.3
    )
    np.testing.assert_allclose(rollout.logprobs_BT, scored, atol=1e-5)
    for row, (length, finish) in enumerate(zip(rollout.lengths_B, rollout.finish_B)):
        answer = np.asarray(rollout.tokens_BL[row, P:])
        assert not set(answer[: length - 1]) & {1, 2} and np.all(answer[length:] == 3)
        assert (answer[length - 1] in (1, 2)) == bool(finish) and (finish or length == T)
    assert {int(f) for f in rollout.finish_B} == {0, 1}


@each_model
def test_a_sample_depends_only_on_its_prompt_and_key(make):
    params = louder(make()[1])
    tokens, mask = prompts()
    whole, order = sampler(make)(params, keys(), tokens, mask, sampling=SAMPLING), jnp.array([4, 2, 2, 0])
    part = sampler(make)(params, keys()[order], tokens[order], mask[order], sampling=SAMPLING)
    np.testing.assert_array_equal(part.tokens_BL, whole.tokens_BL[order])


@pytest.mark.parametrize(
    "change", [{}, dict(greedy=True), dict(stop_ids=(), temperature=2.0), dict(stop_sequences=((4, 5), (7,)), top_k=6)]
)
def test_generation_with_and_without_a_cache_is_equal(change):
    params, sampling = louder(own_model()[1]), dataclasses.replace(SAMPLING, **change)
    given = (keys(32), *prompts(32))
    want = jax.jit(functools.partial(generation.generate, cfg=CFG))(params, *given, sampling=sampling)
    got = sampler(MODELS["own"])(params, *given, sampling=sampling)
    for name in ("tokens_BL", "mask_BL", "response_mask_BT", "lengths_B", "finish_B"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    np.testing.assert_allclose(got.logprobs_BT, want.logprobs_BT, atol=1e-5)


def test_vmap_over_seeds_and_wrong_arguments():
    apply, params = MODELS["own"]()
    tokens, mask = prompts()
    rngs = jnp.stack([keys(), keys()[::-1]])

    def one(rng_B):
        return generation.generate(params, rng_B, tokens, mask, cfg=apply, sampling=SAMPLING, axis_name="seeds")

    mapped = jax.jit(jax.vmap(one, axis_name="seeds"))(rngs)
    for i in range(2):
        alone = sampler(MODELS["own"])(params, rngs[i], tokens, mask, sampling=SAMPLING)
        np.testing.assert_array_equal(mapped.tokens_BL[i], alone.tokens_BL)
    for given, message in (
        ((keys(), tokens, mask[:, 1:]), "the same shape"),
        ((keys(), tokens, mask.astype(int)), "must be bool"),
        ((keys(3), tokens, mask), "one per response"),
    ):
        with pytest.raises(ValueError, match=message):
            generation.generate(params, *given, cfg=apply, sampling=SAMPLING)
