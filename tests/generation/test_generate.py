import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rlhf_jax import generation, lm

SMALL: dict[str, Any] = dict(vocab_size=23, n_layers=2, d_model=16, n_heads=4, d_mlp=24, max_length=32)
ROPE = lm.LMConfig(**SMALL, n_kv_heads=2)
LEARNED = lm.LMConfig(**SMALL, norm="layernorm", positions="learned", gated_mlp=False, tie_embeddings=True)
B, P, T = 48, 5, 9


STOPS = (3, 11, 7, 9)
SAMPLING = generation.Sampling(temperature=1.3, max_new_tokens=T, stop_ids=STOPS, pad_id=5)


@functools.cache
def model(cfg):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), jnp.float32), lm.abstract(cfg))


@functools.cache
def compiled(cfg):
    return jax.jit(functools.partial(generation.generate, cfg=cfg))


def prompts(batch=B, seed=0):
    tokens = jax.random.randint(jax.random.key(seed), (batch, P), 1, 23)
    mask = jnp.arange(P)[None, :] >= jnp.arange(batch)[:, None] % P
    return tokens, mask


def keys(batch=B, seed=1):
    return jax.random.split(jax.random.key(seed), batch)


def run(cfg=ROPE, sampling=SAMPLING, seed=1):
    return compiled(cfg)(model(cfg), keys(seed=seed), *prompts(), sampling=sampling)


def responses(rollout):
    return np.asarray(rollout.tokens_BL[:, -rollout.response_mask_BT.shape[1] :])


@pytest.mark.parametrize("cfg", [ROPE, LEARNED], ids=["rope", "learned"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_match_the_scoring_pass(cfg, temperature):
    rollout = run(cfg, dataclasses.replace(SAMPLING, temperature=temperature))

    @jax.jit
    def score(params, rollout, temperature):
        arguments: dict[str, Any] = dict(cfg=cfg, mask_BL=rollout.mask_BL, temperature=temperature)
        return (
            lm.token_logprobs(params, rollout.tokens_BL, **arguments)[:, P:],
            lm.token_logprobs(params, rollout.tokens_BL, prompt_width=P, **arguments),
        )

    for scored in score(model(cfg), rollout, temperature):
        np.testing.assert_allclose(rollout.logprobs_BT, scored, atol=1e-5)
    assert rollout.logprobs_BT.dtype == jnp.float32


def test_shapes_and_layout_of_a_rollout():
    rollout = run(seed=2)
    np.testing.assert_array_equal(rollout.tokens_BL[:, :P], prompts()[0])
    np.testing.assert_array_equal(rollout.mask_BL, jnp.concatenate([prompts()[1], rollout.response_mask_BT], axis=1))
    np.testing.assert_array_equal(rollout.response_mask_BT, np.arange(T)[None, :] < rollout.lengths_B[:, None])
    endings = {(bool(f), int(n) == T) for n, f in zip(rollout.lengths_B, rollout.finish_B)}
    assert endings == {(False, True), (True, False), (True, True)}, "the test needs stops at the last position as well"
    for row, (length, finish) in enumerate(zip(rollout.lengths_B, rollout.finish_B)):
        drawn, after = responses(rollout)[row, :length], responses(rollout)[row, length:]
        assert not set(drawn[:-1]) & set(STOPS)
        assert (drawn[-1] in STOPS) == bool(finish)
        assert finish or length == T
        assert np.all(after == 5)
    np.testing.assert_array_equal(np.asarray(rollout.logprobs_BT)[~np.asarray(rollout.response_mask_BT)], 0)


def test_stop_ids_only_truncate():
    """With stop ids, the same keys sample the same tokens up to the stop token."""
    free, cut = run(sampling=dataclasses.replace(SAMPLING, stop_ids=())), run()
    assert np.all(free.finish_B == 0) and np.all(free.lengths_B == T)
    kept = np.asarray(cut.response_mask_BT)
    np.testing.assert_array_equal(responses(cut)[kept], responses(free)[kept])
    for row, length in zip(responses(free), np.asarray(cut.lengths_B)):
        stops = np.flatnonzero(np.isin(row, STOPS))
        assert length == (stops[0] + 1 if len(stops) else T)


def test_all_rows_stop_immediately():
    rollout = run(sampling=dataclasses.replace(SAMPLING, stop_ids=tuple(range(23))))
    assert np.all(rollout.lengths_B == 1) and np.all(rollout.finish_B == 1)


def test_a_row_depends_only_on_its_prompt_and_key():
    tokens, mask = prompts()
    whole, order = run(), jnp.array([4, 2, 2, 0])
    part = compiled(ROPE)(model(ROPE), keys()[order], tokens[order], mask[order], sampling=SAMPLING)
    np.testing.assert_array_equal(part.tokens_BL, whole.tokens_BL[order])
    np.testing.assert_array_equal(part.lengths_B, whole.lengths_B[order])


@pytest.mark.parametrize("cfg", [ROPE, LEARNED], ids=["rope", "learned"])
def test_prompt_padding_and_larger_limits_do_not_change_answers(cfg):
    tokens, mask = prompts()
    tokens = jnp.pad(tokens, ((0, 0), (3, 0)), constant_values=22)
    mask = jnp.pad(mask, ((0, 0), (3, 0)))
    narrow = run(cfg)
    wide = compiled(cfg)(model(cfg), keys(), tokens, mask, sampling=dataclasses.replace(SAMPLING, max_new_tokens=T + 4))
    kept = np.asarray(narrow.response_mask_BT)
    np.testing.assert_array_equal(responses(narrow)[kept], responses(wide)[:, :T][kept])
    np.testing.assert_allclose(narrow.logprobs_BT, wide.logprobs_BT[:, :T], atol=1e-5)


def test_greedy_decoding_selects_the_most_likely_token():
    rollout = run(sampling=dataclasses.replace(SAMPLING, greedy=True, stop_ids=()))
    np.testing.assert_array_equal(
        rollout.tokens_BL, run(sampling=dataclasses.replace(SAMPLING, greedy=True, stop_ids=()), seed=9).tokens_BL
    )
    matches = jax.jit(functools.partial(lm.greedy_matches, cfg=ROPE))
    assert np.all(matches(model(ROPE), rollout.tokens_BL, mask_BL=rollout.mask_BL)[:, P:])


def test_one_program_for_every_temperature():
    traces = []

    @jax.jit
    def traced(params, sampling):
        traces.append(1)
        return generation.generate(params, keys(), *prompts(), cfg=ROPE, sampling=sampling)

    means = {
        float(traced(model(ROPE), dataclasses.replace(SAMPLING, temperature=t)).logprobs_BT.mean())
        for t in (0.5, 1.0, 2.0)
    }
    assert len(traces) == 1 and len(means) == 3


@pytest.mark.slow
def test_vmap_over_seeds_matches_a_loop():
    params = jax.tree.map(lambda x: jnp.stack([x, 0.8 * x]), model(ROPE))
    rngs = jnp.stack([keys(seed=1), keys(seed=2)])
    temperatures = jnp.array([0.8, 1.3])

    def one(params, rng_B, temperature):
        sampling = dataclasses.replace(SAMPLING, temperature=temperature)
        return generation.generate(params, rng_B, *prompts(), cfg=ROPE, sampling=sampling, axis_name="seeds")

    mapped = jax.jit(jax.vmap(one, axis_name="seeds"))(params, rngs, temperatures)
    for i in range(2):
        rows = jax.tree.map(lambda x, i=i: x[i], (params, rngs))
        alone = compiled(ROPE)(*rows, *prompts(), sampling=dataclasses.replace(SAMPLING, temperature=temperatures[i]))
        np.testing.assert_array_equal(mapped.tokens_BL[i], alone.tokens_BL)
        np.testing.assert_array_equal(mapped.finish_B[i], alone.finish_B)
        np.testing.assert_allclose(mapped.logprobs_BT[i], alone.logprobs_BT, atol=1e-5)


# --- stop conditions and forbidden tokens --------------------------------------------------------------------------


def first_end(tokens_T, sequences):
    """Returns the number of tokens up to the end of the first stop sequence, or the length without one."""
    for t in range(1, len(tokens_T) + 1):
        if any(tuple(tokens_T[max(t - len(s), 0) : t]) == s for s in sequences):
            return t
    return len(tokens_T)


def test_stop_sequence_of_several_tokens_only_truncates():
    free = run(sampling=dataclasses.replace(SAMPLING, stop_ids=()))
    drawn = responses(free)
    sequences = (tuple(map(int, drawn[0, 2:5])), tuple(map(int, drawn[1, 0:2])), (7,))
    cut = run(sampling=dataclasses.replace(SAMPLING, stop_ids=(), stop_sequences=sequences))
    for row, tokens_T in enumerate(drawn):
        length = first_end(tokens_T, sequences)
        ended = length < T or tuple(tokens_T[-3:]) in sequences or tokens_T[-1] == 7
        assert cut.lengths_B[row] == length and cut.finish_B[row] == ended
        np.testing.assert_array_equal(responses(cut)[row, :length], tokens_T[:length])
    assert cut.lengths_B[0] <= 5 and cut.lengths_B[1] == 2


def test_no_stop_before_min_new_tokens():
    early, late = run(), run(sampling=dataclasses.replace(SAMPLING, min_new_tokens=4))
    assert early.lengths_B.min() < 4 and late.lengths_B.min() >= 4
    before = responses(late)[:, :3]
    assert not np.isin(before, STOPS).any()
    # Early tokens have the log-probabilities of the distribution without the stop ids.
    logits = jnp.arange(23.0)
    kept = np.asarray(generation.log_distribution(logits, dataclasses.replace(SAMPLING, min_new_tokens=4), step=2))
    assert np.isneginf(kept[list(STOPS)]).all() and abs(np.exp(kept).sum() - 1) < 1e-5
    sequence = dataclasses.replace(SAMPLING, stop_ids=(), stop_sequences=tuple((i,) for i in range(23)))
    assert np.all(run(sampling=sequence).lengths_B == 1)
    assert np.all(run(sampling=dataclasses.replace(sequence, min_new_tokens=3)).lengths_B == 3)


def test_forbidden_tokens_are_never_drawn():
    forbidden = tuple(range(0, 23, 2))
    rollout = run(sampling=dataclasses.replace(SAMPLING, forbidden_ids=forbidden, stop_ids=(), pad_id=0))
    assert not np.isin(responses(rollout), forbidden).any()
    with pytest.raises(ValueError, match="forbidden_ids has the id 23; the model has 23 ids, 0 to 22"):
        run(sampling=dataclasses.replace(SAMPLING, forbidden_ids=(4, 23)))


def test_several_responses_share_one_prefill():
    tokens, mask = prompts(6)
    several = jax.jit(functools.partial(generation.generate, cfg=ROPE, n=4))
    got = several(model(ROPE), keys(24), tokens, mask, sampling=SAMPLING)
    want = compiled(ROPE)(
        model(ROPE), keys(24), jnp.repeat(tokens, 4, axis=0), jnp.repeat(mask, 4, axis=0), sampling=SAMPLING
    )
    for name in ("tokens_BL", "mask_BL", "lengths_B", "finish_B"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    np.testing.assert_allclose(got.logprobs_BT, want.logprobs_BT, atol=1e-5)


def test_values_match_the_scoring_pass():
    params = lm.with_head(jax.random.key(3), model(ROPE), ROPE)
    rollout = jax.jit(functools.partial(generation.generate, cfg=ROPE, values=True))(
        params, keys(), *prompts(), sampling=SAMPLING
    )
    score = jax.jit(functools.partial(lm.values, cfg=ROPE, prompt_width=P))
    want = score(params, rollout.tokens_BL, mask_BL=rollout.mask_BL)
    np.testing.assert_allclose(rollout.values_BT, want, atol=1e-5)
    assert np.ptp(rollout.values_BT) > 0.1 and run().values_BT is None


def test_each_row_has_a_length_limit():
    free = run(sampling=dataclasses.replace(SAMPLING, stop_ids=()))
    limits = jnp.arange(B) % T + 1
    sampling = dataclasses.replace(SAMPLING, stop_ids=())
    got = compiled(ROPE)(model(ROPE), keys(), *prompts(), sampling=sampling, limits_B=limits)
    np.testing.assert_array_equal(got.lengths_B, limits)
    assert not got.finish_B.any()
    np.testing.assert_array_equal(
        responses(got)[np.asarray(got.response_mask_BT)], responses(free)[got.response_mask_BT]
    )


def test_truncated_sampling_is_refused_for_policy_gradients():
    generation.check_on_policy(SAMPLING)
    with pytest.raises(ValueError, match=r"Sampling.top_k and Sampling.top_p, samples do not follow the policy"):
        generation.check_on_policy(dataclasses.replace(SAMPLING, top_k=5, top_p=0.9))
    with pytest.raises(ValueError, match=r"Sampling.min_new_tokens, samples"):
        generation.check_on_policy(dataclasses.replace(SAMPLING, min_new_tokens=2))


# --- sampling ----------------------------------------------------------------------------------------------------


def exact(logits, sampling):
    return np.exp(np.asarray(generation.log_distribution(logits, sampling), np.float64))


@pytest.mark.parametrize(
    "sampling",
    [
        generation.Sampling(),
        generation.Sampling(temperature=0.6),
        generation.Sampling(top_k=4),
        generation.Sampling(top_p=0.7, temperature=1.4),
        generation.Sampling(min_p=0.2),
    ],
    ids=["plain", "temperature", "top-k", "top-p", "min-p"],
)
def test_draws_follow_the_distribution(sampling):
    logits, n = 1.5 * jax.random.normal(jax.random.key(5), (12,)), 20_000
    tokens, logprobs = generation.choose(keys(n), jnp.broadcast_to(logits, (n, 12)), sampling)
    want = exact(logits, sampling)
    counts = np.bincount(tokens, minlength=12)
    assert np.all(counts[want == 0] == 0)
    assert stats.chisquare(counts[want > 0], n * want[want > 0] / want.sum()).pvalue > 1e-3
    np.testing.assert_allclose(np.exp(logprobs), want[tokens], rtol=1e-5)


def test_responses_follow_the_joint_distribution():
    """Compares two tokens at T = 0.7 after one prompt with the exact joint distribution from the scoring pass."""
    small: dict[str, Any] = SMALL | {"vocab_size": 5}
    cfg = lm.LMConfig(**small)
    params, n = model(cfg), 8_000
    prompt = jnp.array([[0, 2, 4, 1]])
    sampling = generation.Sampling(temperature=0.7, max_new_tokens=2)
    many = jnp.broadcast_to(prompt, (n, 4))
    rollout = compiled(cfg)(params, keys(n, seed=4), many, jnp.ones(many.shape, bool), sampling=sampling)
    pairs = jnp.stack(jnp.meshgrid(jnp.arange(5), jnp.arange(5), indexing="ij"), axis=-1).reshape(25, 2)
    rows = jnp.concatenate([jnp.broadcast_to(prompt, (25, 4)), pairs], axis=1)
    score = jax.jit(functools.partial(lm.token_logprobs, cfg=cfg, temperature=0.7))
    joint = np.exp(np.asarray(score(params, rows)[:, 4:].sum(axis=1), np.float64))
    drawn = responses(rollout)
    counts = np.bincount(5 * drawn[:, 0] + drawn[:, 1], minlength=25)
    assert abs(joint.sum() - 1) < 1e-4
    assert stats.chisquare(counts, n * joint / joint.sum()).pvalue > 1e-3


@pytest.mark.parametrize("vocab", [1025, 5000])
def test_draws_from_a_large_vocabulary_follow_the_distribution(vocab):
    # Most of the mass is on tokens at the edges of blocks; long ranges have none.
    logits = np.full(vocab, -np.inf)
    likely = [0, 1, 127, 128, 129, 255, 700, 1023, 1024, vocab - 1]
    logits[likely] = np.linspace(0.0, 2.0, len(likely))
    logits, n = jnp.asarray(logits, jnp.float32), 20_000
    tokens = jax.jit(jax.vmap(generation.draw, in_axes=(0, None)))(keys(n), jax.nn.log_softmax(logits))
    counts, want = np.bincount(tokens, minlength=vocab), np.asarray(jax.nn.softmax(logits), np.float64)
    assert counts[want == 0].sum() == 0
    assert stats.chisquare(counts[want > 0], n * want[want > 0] / want.sum()).pvalue > 1e-3


def test_tokens_of_probability_zero_are_never_drawn():
    logprobs = jnp.log(jnp.array([0.0, 0.5, 0.0, 0.5, 0.0, 0.0]))
    tokens = jax.vmap(generation.draw, in_axes=(0, None))(keys(5_000), logprobs)
    assert set(np.asarray(tokens)) == {1, 3}
    certain = jnp.full(1000, -jnp.inf).at[17].set(0.0)
    assert np.all(jax.vmap(generation.draw, in_axes=(0, None))(keys(500), certain) == 17)


def test_truncations_keep_the_right_tokens():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.05, 0.3, 0.15], [0.2, 0.2, 0.2, 0.2, 0.2]]))

    def kept(x):
        return np.isfinite(np.asarray(x))[0].nonzero()[0].tolist()

    assert kept(generation.keep_top_k(logits, 2)) == [1, 3]
    assert kept(generation.keep_top_k(logits, 99)) == [0, 1, 2, 3, 4]
    assert kept(generation.keep_top_p(logits, 0.69)) == [1, 3]
    assert kept(generation.keep_top_p(logits, 0.71)) == [1, 3, 4]
    assert kept(generation.keep_top_p(logits, 0.01)) == [1]
    assert kept(generation.keep_top_p(logits, 1.0)) == [0, 1, 2, 3, 4]
    assert kept(generation.keep_min_p(logits, 0.3)) == [1, 3, 4]
    assert kept(generation.keep_min_p(logits, 1.0)) == [1]
    both = generation.Sampling(top_k=3, top_p=0.8)
    np.testing.assert_allclose(exact(logits[0], both), [0, 4 / 7, 0, 3 / 7, 0], atol=1e-6)
    assert both.truncated and not generation.Sampling(temperature=0.3).truncated


@pytest.mark.parametrize(
    "arguments",
    [
        dict(temperature=0.0),
        dict(temperature=-1),
        dict(top_k=0),
        dict(top_p=0.0),
        dict(top_p=1.1),
        dict(min_p=2.0),
        dict(max_new_tokens=0),
        dict(min_new_tokens=-1),
        dict(min_new_tokens=5, max_new_tokens=4),
    ],
)
def test_sampling_fields_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=f"Sampling.{next(iter(arguments))} is"):
        generation.Sampling(**arguments)


def test_temperature_is_the_only_leaf():
    sampling = generation.Sampling(temperature=0.5, top_k=3, stop_ids=(1, 2))
    assert jax.tree.leaves(sampling) == [0.5]
    assert jax.tree.structure(sampling) == jax.tree.structure(
        generation.Sampling(temperature=2.0, top_k=3, stop_ids=(1, 2))
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(mask=jnp.ones((B, P + 1), bool)), "must have the same shape"),
        (dict(mask=jnp.ones((B, P), int)), "it must be bool"),
        (dict(rng=jax.random.key(0)), "one per response"),
        (dict(rng=jax.random.split(jax.random.key(0), B - 1)), "one per response"),
        (dict(max_new_tokens=28), "more than cfg.max_length = 32"),
    ],
)
def test_errors_name_the_wrong_argument(change, message):
    tokens, mask = prompts()
    sampling = generation.Sampling(max_new_tokens=change.get("max_new_tokens", T))
    with pytest.raises(ValueError, match=message):
        generation.generate(
            model(ROPE), change.get("rng", keys()), tokens, change.get("mask", mask), cfg=ROPE, sampling=sampling
        )
