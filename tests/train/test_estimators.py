"""Every method on a bandit with a known optimum, and the components that the methods share."""

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import advantages, aggregation, kl, lm, losses, metrics, parallel, rewards, types
from rlhf_jax.simulation import bandit
from rlhf_jax.train import estimators, ppo
from rlhf_jax.train.optim import schedules
from rlhf_jax.types import ApplyFn

S, A, B = 6, 7, 1536
APPLY = ApplyFn(bandit.forward, bandit.logits)
ADAM = optax.chain(optax.scale_by_adam(eps=1e-5), optax.scale(-1.0))
KEY = jax.random.key(0)
rng = np.random.default_rng(0)
REWARDS = jnp.asarray(rng.normal(size=(S, A)), jnp.float32)
REFERENCE = jnp.asarray(rng.normal(size=(S, A)), jnp.float32)


def models(samples):
    def generate(params, rng_B, prompts_BP, mask_BP, temperature):
        rows = [jnp.repeat(x, samples, axis=0) for x in (prompts_BP, mask_BP)]
        return bandit.generate(params, rng_B, *rows)

    return ppo.Models(
        generate=generate,
        logprobs=lambda params, tokens, mask, temperature: lm.token_stats(
            params, tokens, cfg=APPLY, prompt_width=1, mask_BL=mask, temperature=temperature
        ),
        values=None,
        score=lambda params, rollout: params["rewards_SA"][rollout.tokens_BL[:, 0], rollout.tokens_BL[:, 1]],
    )


def trained(
    *, samples: Any = 1, iterations: Any = 150, rate: Any = 0.1, state: Any = None, answers: Any = B, **options
):
    """Trains a method; returns the probabilities of the final policy and the last metrics."""
    hypers = {name: options.pop(name) for name in list(options) if name in vars(ppo.Hyper())}
    step = parallel.jit_step(ppo.make_train_step(models(samples), minibatches=1, samples=samples, **options))
    frozen = ppo.Frozen(reference={"logits_SA": REFERENCE}, reward={"rewards_SA": REWARDS})
    state = state or ppo.create({"logits_SA": REFERENCE}, None, ADAM)
    batch = ppo.Batch(
        jnp.arange(answers // samples, dtype=jnp.int32)[:, None] % S, jnp.ones((answers // samples, 1), bool)
    )
    logs = {}
    for i in range(iterations):
        numbers = {"learning_rate": rate * schedules.linear(i, iterations)} | hypers
        hyper: Any = ppo.Hyper(**{name: np.float32(value) for name, value in numbers.items()})
        state, logs = step(state, frozen, hyper, batch, jax.random.key(0))
    assert step.traces == 1
    policy: Any = state.params["policy"]
    return jax.nn.softmax(policy["logits_SA"]), logs


def optimum(kl_coef):
    return bandit.optimum(REFERENCE, REWARDS, kl_coef=kl_coef)


def distance(policy_SA, other_SA):
    return float(bandit.total_variation(policy_SA, other_SA))


def forward_kl_point(coef, *, divide):
    """Returns the policy at which the gradients of advantages and of ``coef * KL(reference || policy)`` cancel."""
    reference = np.exp(np.asarray(REFERENCE, np.float64))
    reference /= reference.sum(1, keepdims=True)
    scores, logits = np.asarray(REWARDS, np.float64), np.log(reference)
    for _ in range(20_000):
        policy = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        centred = scores - (policy * scores).sum(1, keepdims=True)
        deviation = np.sqrt((policy * centred**2).sum(1, keepdims=True)) if divide else 1.0
        slope = policy * centred / deviation - coef * (policy - reference)
        logits = logits + 0.5 * slope
    assert np.abs(slope).max() < 1e-9
    return jnp.asarray(policy, jnp.float32)


# ------------------------------------------------------------------------------------------------------ fixed points

KL_IN_THE_REWARD = {
    "reinforce": dict(estimate=estimators.reinforce, reduction=aggregation.sequence_sum),
    "rloo": dict(estimate=functools.partial(estimators.rloo, samples=4), reduction=aggregation.sequence_sum, samples=4),
    "reinforce_pp": dict(estimate=estimators.reinforce_pp),
}


@pytest.mark.parametrize("name", KL_IN_THE_REWARD)
def test_methods_with_kl_in_the_reward_reach_the_optimum_of_their_coefficient(name):
    policy_SA, logs = trained(kl_coef=0.5, **KL_IN_THE_REWARD[name])
    assert distance(policy_SA, optimum(0.5)) < 0.03
    for wrong in (0.8 * 0.5, 1.25 * 0.5):
        assert distance(policy_SA, optimum(wrong)) > 0.05
    assert "value_loss" not in logs and "explained_variance" not in logs


def test_k2_loss_reaches_the_optimum_of_the_reverse_kl():
    options = dict(estimate=functools.partial(estimators.dr_grpo, samples=64), samples=64, kl_loss=kl.k2)
    policy_SA, _ = trained(kl_loss_coef=0.5, kl_coef=0.0, answers=6 * 256, **options)
    # A group's mean includes the response itself, so its advantage is (K - 1) / K times the leave-one-out advantage.
    assert distance(policy_SA, optimum(0.5 * 64 / 63)) < 0.03
    assert distance(policy_SA, forward_kl_point(2.5, divide=False)) > 0.1


@pytest.mark.parametrize("divide", [True, False])
def test_k3_loss_reaches_the_fixed_point_of_the_forward_kl(divide):
    """Checks ``pi (A - coef) + coef ref = 0`` for GRPO and, with A not divided by the deviation, for Dr. GRPO."""
    estimate = estimators.grpo if divide else estimators.dr_grpo
    coef = 2.0 if divide else 1.5
    options = dict(estimate=functools.partial(estimate, samples=64), samples=64, kl_loss=kl.k3)
    policy_SA, _ = trained(kl_loss_coef=coef, kl_coef=0.0, answers=6 * 256, **options)
    expected_SA = forward_kl_point(coef, divide=divide)
    assert distance(jax.nn.softmax(REFERENCE), expected_SA) > 0.12, "the initial policy must be far from the optimum"
    assert distance(policy_SA, expected_SA) < 0.03


def test_entropy_bonus_pulls_towards_the_uniform_policy():
    even = jnp.zeros_like(REFERENCE)
    options = dict(estimate=functools.partial(estimators.rloo, samples=4), samples=4, entropy_bonus=True)
    policy_SA, _ = trained(kl_coef=0.0, entropy_coef=0.5, **options)
    assert distance(policy_SA, bandit.optimum(even, REWARDS, kl_coef=0.5)) < 0.03


def test_moving_reference_lets_the_policy_move_further():
    options: dict[str, Any] = dict(KL_IN_THE_REWARD["rloo"], kl_coef=0.5)
    start = ppo.create({"logits_SA": REFERENCE}, None, ADAM, reference={"logits_SA": REFERENCE})
    held, _ = trained(state=start, reference_decay=1.0, iterations=60, **options)
    follows, _ = trained(
        state=ppo.create({"logits_SA": REFERENCE}, None, ADAM, reference={"logits_SA": REFERENCE}),
        reference_decay=0.9,
        iterations=60,
        **options,
    )
    best = REWARDS.argmax(axis=1)
    assert (follows[jnp.arange(S), best] > held[jnp.arange(S), best]).all()
    plain, _ = trained(iterations=60, **options)
    np.testing.assert_array_equal(held, plain)


def test_collect_and_update_match_the_whole_step():
    """Compiles `collect` and `update` separately, as for models too large to sample and train in one program."""
    options: dict[str, Any] = dict(samples=4, estimate=functools.partial(estimators.rloo, samples=4))
    bandit_models = models(4)
    whole = jax.jit(ppo.make_train_step(bandit_models, minibatches=2, reduction=aggregation.sequence_sum, **options))
    collect = jax.jit(functools.partial(ppo.collect, bandit_models, **options))
    update = jax.jit(functools.partial(ppo.update, bandit_models, minibatches=2, reduction=aggregation.sequence_sum))
    frozen = ppo.Frozen(reference={"logits_SA": REFERENCE}, reward={"rewards_SA": REWARDS})
    batch = ppo.Batch(jnp.arange(48, dtype=jnp.int32)[:, None] % S, jnp.ones((48, 1), bool))
    hyper: Any = ppo.Hyper(learning_rate=np.float32(0.1), kl_coef=np.float32(0.5))
    state, key = ppo.create({"logits_SA": REFERENCE}, None, ADAM), jax.random.key(5)
    together, logs = whole(state, frozen, hyper, batch, key)
    sample_key, order_key = jax.random.split(jax.random.fold_in(key, state.step))
    experience, first = collect(
        state.params, frozen, hyper, batch, sample_key, kl_scale=state.kl_scale.kl_coef, past=state.past
    )
    apart, second = update(state, experience, hyper, None, order_key)
    np.testing.assert_allclose(apart.params["policy"]["logits_SA"], together.params["policy"]["logits_SA"], atol=1e-6)
    np.testing.assert_allclose(first["reward"].value(), logs["reward"].value(), rtol=1e-6)
    np.testing.assert_allclose(second["policy_loss"], logs["policy_loss"], rtol=1e-5, atol=1e-7)


# --------------------------------------------------------------------------------------------------------- the parts


def scored(seed, B=8, T=5, **changes):
    rng = np.random.default_rng(seed)
    mask = np.arange(T)[None, :] < rng.integers(0, T + 1, size=(B, 1))
    numbers = {
        "scores_B": rng.normal(size=B),
        "logprobs_BT": rng.normal(size=(B, T)),
        "reference_BT": rng.normal(size=(B, T)),
        "values_BT": rng.normal(size=(B, T)),
        "mask_BT": mask,
        "kl_coef": 0.3,
        "past_return": 0.7,
    }
    numbers |= changes
    arrays: dict[str, Any] = {k: None if v is None else jnp.asarray(v) for k, v in numbers.items()}
    return estimators.Scored(**arrays), numbers


@functools.cache
def compiled(name, **options):
    """Compiled once for all examples."""
    return jax.jit(functools.partial(getattr(estimators, name), **options))


def assert_gae_matches_a_loop(s, n):
    mask = n["mask_BT"]

    def white(x, shift):
        real = x[mask] if mask.any() else np.zeros(1)
        return ((x - real.mean()) / np.sqrt(real.var() + advantages.WHITEN_EPSILON) + (not shift) * real.mean()) * mask

    pay = -0.3 * (n["logprobs_BT"] - n["reference_BT"]) * mask
    for i, length in enumerate(mask.sum(axis=1)):
        if "scores_BT" in n:
            pay[i] += n["scores_BT"][i]
        elif length:
            pay[i, length - 1] += n["scores_B"][i]
    pay, values, expected = white(pay, shift=False), n["values_BT"] * mask, np.zeros(mask.shape)
    for i, length in enumerate(mask.sum(axis=1)):
        for t in reversed(range(length)):
            following = values[i, t + 1] if t + 1 < length else 0.0
            later = expected[i, t + 1] if t + 1 < length else 0.0
            expected[i, t] = pay[i, t] + 0.9 * following - values[i, t] + 0.9 * 0.6 * later
    if mask.sum() > 1:
        hyper: Any = ppo.Hyper(discount=0.9, lambda_=0.6)
        got, returns = compiled("gae", whiten_rewards=True)(s, hyper)
        np.testing.assert_allclose(got, white(expected, shift=True), atol=1e-4)
        np.testing.assert_allclose(returns, expected + values, atol=1e-4)


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(seed=st.integers(0, 10_000), samples=st.sampled_from([2, 4]))
def test_estimators_match_python_loops(seed, samples):
    s, n = scored(seed)
    hyper: Any = ppo.Hyper(discount=0.9)
    rows, width = n["mask_BT"].shape
    returns, to_go = np.zeros(rows), np.zeros((rows, width))
    for i in range(rows):
        length = int(n["mask_BT"][i].sum())
        pay = [-0.3 * (n["logprobs_BT"][i, t] - n["reference_BT"][i, t]) for t in range(length)]
        if length:
            pay[-1] += n["scores_B"][i]
        returns[i] = sum(pay)
        for t in range(length):
            to_go[i, t] = sum(0.9 ** (u - t) * pay[u] for u in range(t, length))
    groups = [range(g, g + samples) for g in range(0, rows, samples)]
    expected = {name: np.zeros(rows) for name in ("rloo", "grpo", "dr_grpo")}
    for group in groups:
        scores = n["scores_B"][list(group)]
        for i in group:
            expected["rloo"][i] = returns[i] - np.mean([returns[j] for j in group if j != i])
            expected["dr_grpo"][i] = n["scores_B"][i] - scores.mean()
            expected["grpo"][i] = expected["dr_grpo"][i] / np.sqrt(scores.var() + advantages.WHITEN_EPSILON)
    for name, numbers_B in expected.items():
        got, learnt = compiled(name, samples=samples)(s, hyper)
        np.testing.assert_allclose(got, numbers_B[:, None] * n["mask_BT"], atol=2e-5)
        assert learnt is None
    got, _ = compiled("reinforce")(s, hyper)
    np.testing.assert_allclose(got, (returns - 0.7)[:, None] * n["mask_BT"], atol=2e-5)
    got, _ = compiled("reinforce_pp")(s, hyper)
    real = to_go[n["mask_BT"]]
    assert_gae_matches_a_loop(s, n)
    if len(real) > 1:
        white = (to_go - real.mean()) / np.sqrt(real.var() + advantages.WHITEN_EPSILON) * n["mask_BT"]
        np.testing.assert_allclose(got, white, atol=1e-4)


EVERY = {
    "gae": compiled("gae", whiten_rewards=True),
    "reinforce": compiled("reinforce"),
    "reinforce_pp": compiled("reinforce_pp"),
    **{name: compiled(name, samples=4) for name in ("rloo", "grpo", "dr_grpo")},
}


def with_token_scores(s, scores_BT):
    scores_BT = jnp.where(s.mask_BT, jnp.asarray(scores_BT, jnp.float32), 0.0)
    return s._replace(scores_B=scores_BT.sum(axis=1), token_scores_BT=scores_BT)


@pytest.mark.parametrize("name", EVERY)
def test_a_score_at_the_last_token_equals_the_score_of_the_response(name):
    s, _ = scored(4)
    s = s._replace(scores_B=jnp.where(s.mask_BT.any(axis=1), s.scores_B, 0.0))
    hyper: Any = ppo.Hyper(discount=0.9, lambda_=0.6)
    last = with_token_scores(s, rewards.as_token_scores(s.scores_B, s.mask_BT))
    jax.tree.map(np.testing.assert_array_equal, EVERY[name](s, hyper), EVERY[name](last, hyper))


@hypothesis.settings(deadline=None, max_examples=15)
@hypothesis.given(seed=st.integers(0, 10_000))
def test_methods_that_compare_responses_use_the_sum_of_token_scores(seed):
    s, n = scored(seed)
    hyper: Any = ppo.Hyper(discount=0.9, lambda_=0.6)
    steps = with_token_scores(s, np.random.default_rng(seed + 1).normal(size=n["mask_BT"].shape))
    for name in ("reinforce", "rloo", "grpo", "dr_grpo"):
        whole = EVERY[name](steps._replace(token_scores_BT=None), hyper)[0]
        np.testing.assert_allclose(EVERY[name](steps, hyper)[0], whole, atol=2e-5)


@hypothesis.settings(deadline=None, max_examples=15)
@hypothesis.given(seed=st.integers(0, 10_000))
def test_gae_and_reinforce_pp_use_each_score_at_its_token(seed):
    s, n = scored(seed)
    mask, hyper = n["mask_BT"], ppo.Hyper(discount=0.9, lambda_=0.6)
    scores = np.random.default_rng(seed + 1).normal(size=mask.shape) * mask
    steps = with_token_scores(s, scores)
    assert_gae_matches_a_loop(steps, n | {"scores_BT": scores})
    to_go = np.zeros(mask.shape)
    for i, length in enumerate(mask.sum(axis=1)):
        for t in reversed(range(length)):
            pay = scores[i, t] - 0.3 * (n["logprobs_BT"][i, t] - n["reference_BT"][i, t])
            to_go[i, t] = pay + 0.9 * (to_go[i, t + 1] if t + 1 < length else 0.0)
    if mask.sum() > 1:
        real = to_go[mask]
        white = (to_go - real.mean()) / np.sqrt(real.var() + advantages.WHITEN_EPSILON) * mask
        np.testing.assert_allclose(compiled("reinforce_pp")(steps, hyper)[0], white, atol=1e-4)


@pytest.mark.parametrize("samples", [1, 3])
def test_invalid_group_sizes_are_refused(samples):
    s, _ = scored(0)
    with pytest.raises(ValueError, match=f"samples is {samples}"):
        estimators.rloo(s, ppo.Hyper(), samples=samples)
    with pytest.raises(ValueError, match="critic"):
        estimators.gae(scored(0, values_BT=None)[0], ppo.Hyper())


def test_reductions_match_hand_computed_values():
    mask = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    x = jnp.array([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, jnp.nan, 0.0], [jnp.nan] * 4])

    def of(reduction):
        weights_B, total = reduction(mask)
        return float(aggregation.weighted_sum(x, weights_B, where=mask) / total)

    assert of(aggregation.token_mean) == pytest.approx(40 / 6)
    assert of(aggregation.sequence_mean) == pytest.approx((2.5 + 15) / 2)
    assert of(aggregation.sequence_sum) == pytest.approx((10 + 30) / 2)
    assert of(aggregation.constant_mean) == pytest.approx((10 + 30) / (2 * 4))
    for reduction in (aggregation.token_mean, aggregation.sequence_mean, aggregation.constant_mean):
        weights_B, total = reduction(mask)
        gradient = jax.grad(lambda x, w=weights_B: aggregation.weighted_sum(x, w, where=mask))(x) / total
        np.testing.assert_array_equal(np.asarray(gradient) != 0, mask)
        weights_B, total = reduction(mask[2:])  # A batch without tokens has loss 0.
        assert aggregation.weighted_sum(x[2:], weights_B, where=mask[2:]) / total == 0.0


# -------------------------------------------------------------------------------------------------- the update's parts

ROWS, WIDTH, V = 16, 4, 9
TABLE = ppo.Models(
    generate=lambda *_: None,  # type: ignore[arg-type]
    logprobs=lambda params, tokens, mask, temperature: lm.token_stats(
        params,
        tokens,
        cfg=ApplyFn(lambda p, tokens_BL, mask_BL=None: types.LMOutput(p["table"][tokens_BL]), lambda p, hidden: hidden),
        prompt_width=1,
        mask_BL=mask,
    ),
    values=lambda params, tokens, mask: params["values"][tokens[:, :-1]],
    score=lambda *_: jnp.zeros(()),
)


def experience(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, size=(ROWS, 1 + WIDTH))
    mask = np.arange(WIDTH)[None, :] < rng.integers(1, WIDTH + 1, size=(ROWS, 1))
    numbers = [rng.normal(size=(ROWS, WIDTH)) for _ in range(4)]
    logprobs = -np.abs(numbers[0]) - 1.5
    whole = np.concatenate([np.ones((ROWS, 1), bool), mask], axis=1)
    arrays = [tokens, whole, mask, logprobs, numbers[1], numbers[2], numbers[3]]
    return types.Experience(*map(jnp.asarray, arrays), reference_BT=jnp.asarray(logprobs - 0.3))


def table_state(tx=None):
    table = jnp.asarray(np.random.default_rng(3).normal(size=(V, V)), jnp.float32)
    return ppo.create({"table": table}, {"values": jnp.zeros(V)}, tx or optax.scale(-1.0))


LONG = [pytest.param(x, marks=pytest.mark.slow) for x in (aggregation.token_mean, aggregation.constant_mean)]


@pytest.mark.parametrize("reduction", [aggregation.sequence_mean, *LONG])
def test_micro_batches_match_the_whole_minibatch(reduction):
    options: Any = dict(epochs=1, minibatches=2, reduction=reduction, kl_loss=kl.k3, entropy_bonus=True)
    hyper: Any = ppo.Hyper(learning_rate=1.0, critic_learning_rate=1.0, kl_loss_coef=0.1, entropy_coef=0.01)
    outcomes = []
    for micro in (1, 4):
        update = jax.jit(functools.partial(ppo.update, TABLE, micro_batches=micro, **options))
        outcomes.append(update(table_state(), experience(), hyper, None, jax.random.key(0)))
    for state, logs in outcomes[1:]:
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), state.params, outcomes[0][0].params)
        for name, value in outcomes[0][1].items():
            np.testing.assert_allclose(logs[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def shifted_ratio(experience, logprobs_BT, entropy_BT, hyper):
    return {"shifted": jnp.exp(logprobs_BT - experience.logprobs_BT) + hyper.clip, "seen_entropy": entropy_BT}


@pytest.mark.parametrize("micro", [1, 4])
def test_extra_metrics_are_means_over_tokens_and_change_nothing(micro):
    options: Any = dict(epochs=1, minibatches=1, micro_batches=micro)
    hyper: Any = ppo.Hyper(learning_rate=0.5, clip=0.25)
    plain, more = (
        jax.jit(functools.partial(ppo.update, TABLE, **options, **extra))(
            table_state(), experience(), hyper, None, jax.random.key(0)
        )
        for extra in ({}, {"extra_metrics": shifted_ratio})
    )
    jax.tree.map(np.testing.assert_array_equal, plain[0].params, more[0].params)
    assert set(more[1]) == set(plain[1]) | {"shifted", "seen_entropy"}
    np.testing.assert_allclose(more[1]["shifted"], plain[1]["ratio_mean"] + 0.25, rtol=1e-5)
    _, entropy_BT = TABLE.logprobs(table_state().params["policy"], experience().tokens_BL, experience().mask_BL, 1.0)
    real = np.asarray(experience().response_mask_BT)
    np.testing.assert_allclose(more[1]["seen_entropy"], np.asarray(entropy_BT)[real].mean(), rtol=1e-5)


def test_a_policy_loss_replaces_the_clipped_one():
    def sequence_free(logprobs, old_logprobs, advantages, *, clip):
        return -advantages * logprobs + clip * jnp.square(logprobs - old_logprobs)

    e, hyper = experience(), ppo.Hyper(clip=0.25)
    params = table_state().params
    default, logs = ppo.loss(TABLE, params, e, hyper)
    named, _ = ppo.loss(TABLE, params, e, hyper, policy_loss=losses.clipped_policy)
    assert default == named
    _, other = ppo.loss(TABLE, params, e, hyper, policy_loss=sequence_free)
    table = np.asarray(params["policy"]["table"], np.float64)
    logp = table - np.log(np.exp(table).sum(1, keepdims=True))
    new = np.take_along_axis(logp[np.asarray(e.tokens_BL[:, :-1])], np.asarray(e.tokens_BL)[:, 1:, None], 2)[..., 0]
    each = -np.asarray(e.advantages_BT) * new + 0.25 * (new - np.asarray(e.logprobs_BT)) ** 2
    np.testing.assert_allclose(other["policy_loss"], each[np.asarray(e.response_mask_BT)].mean(), rtol=1e-5)
    assert other["clip_fraction"] == logs["clip_fraction"] and other["value_loss"] == logs["value_loss"]


def test_loss_matches_a_python_loop():
    e, hyper = experience(), ppo.Hyper(kl_loss_coef=0.2, entropy_coef=0.05, clip=0.3, value_clip=0.4, value_coef=0.5)
    state, ratios, clipped = table_state(), [], []
    weights_B, total = aggregation.sequence_mean(e.response_mask_BT)
    denominators = ppo.Denominators(total, aggregation.token_mean(e.response_mask_BT)[1])
    value, logs = ppo.loss(
        TABLE, state.params, e, hyper, weights_B=weights_B, denominators=denominators, kl_loss=kl.k3, entropy_bonus=True
    )
    table = np.asarray(state.params["policy"]["table"], np.float64)
    logp = table - np.log(np.exp(table).sum(1, keepdims=True))
    policy, critic, entropy, tokens = 0.0, 0.0, 0.0, 0
    for i in range(ROWS):
        length, response_loss = int(e.response_mask_BT[i].sum()), 0.0
        for t in range(length):
            before, word = int(e.tokens_BL[i, t]), int(e.tokens_BL[i, t + 1])
            new, old, ref = logp[before, word], float(e.logprobs_BT[i, t]), float(e.reference_BT[i, t])
            ratio, advantage = np.exp(new - old), float(e.advantages_BT[i, t])
            response_loss += max(-advantage * ratio, -advantage * np.clip(ratio, 0.7, 1.3))
            ratios.append(new - old)
            clipped.append(-advantage * np.clip(ratio, 0.7, 1.3) > -advantage * ratio)
            response_loss += 0.2 * (np.exp(ref - new) - 1 + new - ref)
            old_value, target = float(e.values_BT[i, t]), float(e.returns_BT[i, t])
            kept = np.clip(0.0, old_value - 0.4, old_value + 0.4)
            critic += 0.5 * max((0.0 - target) ** 2, (kept - target) ** 2)
            entropy -= (np.exp(logp[before]) * logp[before]).sum()
            tokens += 1
        policy += response_loss / length / ROWS
    np.testing.assert_allclose(logs["value_loss"], critic / tokens, rtol=1e-5)
    seen = np.exp(ratios)
    np.testing.assert_allclose(logs["approx_kl"], np.square(ratios).mean() / 2, rtol=1e-5)
    np.testing.assert_allclose(logs["clip_fraction"], np.mean(clipped), rtol=1e-5)
    np.testing.assert_allclose(logs["ratio_mean"], seen.mean(), rtol=1e-5)
    np.testing.assert_allclose(logs["ratio_max"], seen.max(), rtol=1e-5)
    np.testing.assert_allclose(logs["ratio_error"], np.abs(seen - 1).max(), rtol=1e-5)
    np.testing.assert_allclose(value, policy + 0.5 * critic / tokens - 0.05 * entropy / tokens, rtol=1e-5)


def collect(scores, *, stopped=(1, 1, 0, 1), past=None, **options):
    """Returns the experience and the metrics of four one-token responses with ``scores``."""
    zeros = jnp.zeros((4, 1))
    rollout = types.Rollout(
        jnp.zeros((4, 2), jnp.int32),
        jnp.ones((4, 2), bool),
        jnp.ones((4, 1), bool),
        zeros,
        jnp.ones(4),
        jnp.array(stopped),
    )
    hypers = {name: options.pop(name) for name in list(options) if name in vars(ppo.Hyper())}
    scorer: Any = scores if callable(scores) else lambda params, rollout: jnp.asarray(scores)
    four = ppo.Models(lambda *_: rollout, lambda *_: (zeros, zeros), lambda *_: zeros + 0.5, scorer)
    batch = ppo.Batch(jnp.zeros((4, 1), jnp.int32), jnp.ones((4, 1), bool))
    nothing: Any = {"policy": {}, "critic": {}}
    return ppo.collect(
        four, nothing, ppo.Frozen({}, {}), ppo.Hyper(**hypers), batch, jax.random.key(0), past=past, **options
    )


def test_scores_are_clipped_and_both_missing_stop_rules_apply():
    plain = functools.partial(estimators.gae, whiten=False)
    kept, logs = collect([5.0, -7.0, 1.0, 0.25], estimate=plain, reward_clip=2.0, missing_stop_score=-1.5)
    np.testing.assert_allclose(kept.returns_BT[:, 0], [2.0, -2.0, -1.5, 0.25])
    assert float(logs["reward"].value()) == pytest.approx(-0.1875), "the logged reward is the score before clipping"
    below, _ = collect([5.0, -7.0, 1.0, 0.25], estimate=plain, reward_clip=2.0, missing_stop_score=-3.0)
    # Clipping comes before the rule for a missing stop token.
    np.testing.assert_allclose(below.returns_BT[:, 0], [2.0, -2.0, -3.0, 0.25])
    assert float(logs["training_reward"].value()) == pytest.approx((2.0 - 2.0 - 1.5 + 0.25) / 4)
    assert float(logs["training_reward_std"]) == pytest.approx(np.std([2.0, -2.0, -1.5, 0.25]), rel=1e-5)
    lower, _ = collect([5, -7, 1, 0], estimate=plain, unfinished=ppo.subtract_penalty, missing_stop_score=-1.5)
    np.testing.assert_allclose(lower.returns_BT[:, 0], [5.0, -7.0, -0.5, 0.0])


def test_whitened_rewards_keep_their_mean():
    """Ziegler 2019 divides rewards by their deviation and does not shift them."""
    scores = np.array([5.0, -7.0, 1.0, 2.0])
    estimate = functools.partial(estimators.gae, whiten_rewards=True, whiten=False)
    whitened, _ = collect(scores.tolist(), stopped=(1, 1, 1, 1), estimate=estimate)
    expected = (scores - scores.mean()) / scores.std() + scores.mean()
    np.testing.assert_allclose(whitened.returns_BT[:, 0], expected, rtol=1e-5)


def test_normalised_critic_is_rescaled_to_units_of_reward():
    targets = ppo.RunningMoments(weight=jnp.float32(10), mean=jnp.float32(3), squares=jnp.float32(40))
    past = ppo.RunningMeans(metrics.Metric(jnp.float32(0), jnp.float32(10)), targets)
    estimate = functools.partial(estimators.gae, whiten=False)
    normalised, logs = collect(
        [5.0, -7.0, 1.0, 2.0], stopped=(1, 1, 1, 1), past=past, normalise_values=True, estimate=estimate
    )
    # The explained variance compares values and returns in the same units.
    returns = np.array([5.0, -7.0, 1.0, 2.0])
    explained = 1 - np.mean((4.0 - returns) ** 2) / returns.var()
    np.testing.assert_allclose(logs["explained_variance"], explained, rtol=1e-5)
    # With mean 3 and deviation 2, an output of 0.5 is a value of 4.
    np.testing.assert_allclose(normalised.values_BT[:, 0], 0.5)
    np.testing.assert_allclose(normalised.advantages_BT[:, 0], np.array([5.0, -7.0, 1.0, 2.0]) - 4.0)
    np.testing.assert_allclose(normalised.returns_BT[:, 0], (np.array([5.0, -7.0, 1.0, 2.0]) - 3.0) / 2.0)


def test_importance_weights_are_capped_at_the_given_value():
    experience, _ = collect([1.0, 2.0, 3.0, 4.0], correct_sampler=True, sampler_cap=0.5)
    np.testing.assert_array_equal(experience.weights_BT, 0.5)


def test_value_loss_is_a_mean_over_tokens_for_every_reduction():
    hyper: Any = ppo.Hyper(learning_rate=0.0, critic_learning_rate=1.0)
    update = functools.partial(ppo.update, TABLE, minibatches=1)
    (one, logs), (two, other) = (
        jax.jit(functools.partial(update, reduction=reduction))(table_state(), experience(), hyper, None, KEY)
        for reduction in (aggregation.token_mean, aggregation.sequence_sum)
    )
    np.testing.assert_allclose(other["value_loss"], logs["value_loss"], rtol=1e-5)
    np.testing.assert_allclose(two.params["critic"]["values"], one.params["critic"]["values"], atol=1e-6)
    assert abs(float(other["policy_loss"] - logs["policy_loss"])) > 0.1


def test_reinforce_subtracts_the_mean_return_of_earlier_iterations():
    """With an advantage equal to the baseline and ratios of 1, the policy loss is minus the baseline."""

    def estimate(scored, hyper):
        return jnp.full(scored.mask_BT.shape, scored.past_return), None

    step = jax.jit(ppo.make_train_step(models(1), minibatches=1, estimate=estimate))
    frozen = ppo.Frozen(reference={"logits_SA": 0.5 * REFERENCE}, reward={"rewards_SA": REWARDS})
    batch = ppo.Batch(jnp.arange(12, dtype=jnp.int32)[:, None] % S, jnp.ones((12, 1), bool))
    hyper: Any = ppo.Hyper(learning_rate=np.float32(0.0), kl_coef=np.float32(0.5))
    state, baselines, returns = ppo.create({"logits_SA": REFERENCE}, None, ADAM), [], []
    for _ in range(3):
        state, logs = step(state, frozen, hyper, batch, KEY)
        baselines.append(-float(logs["policy_loss"]))
        returns.append(float(logs["return"].value()))
    np.testing.assert_allclose(baselines, [0.0, returns[0], np.mean(returns[:2])], rtol=1e-5, atol=1e-6)  # type: ignore
    assert len(set(returns)) == 3


def test_scores_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"Models.score returned shape \(4, 2\)"):
        collect(np.zeros((4, 2)))
    with pytest.raises(ValueError, match=r"Models.score returned shape \(\)"):
        collect(0.0)


def test_a_python_function_can_be_the_reward_of_a_compiled_step():
    seen = []

    def length(tokens_BL, mask_BL, response_mask_BT):
        seen.append(type(tokens_BL))
        return response_mask_BT.sum(axis=1).astype(int)

    both, three = jnp.ones((3, 2), bool), jnp.ones(3)
    rollout = types.Rollout(both, both, both, both, three, three)
    score = jax.jit(lambda r: rewards.from_python(length)(None, r))
    np.testing.assert_array_equal(score(rollout), [2.0, 2.0, 2.0])
    assert score(rollout).dtype == jnp.float32 and seen[0] is np.ndarray
    for wrong, text in (
        (lambda *_: np.zeros((3, 1)), "returned shape"),
        (lambda *_: np.array([0.0, np.nan, 1.0]), "nan for response 1 of 3"),
        (lambda *_: np.array([0.0, 1.0, -np.inf]), "-inf for response 2 of 3"),
    ):
        with pytest.raises(Exception, match=text):
            jax.block_until_ready(jax.jit(lambda r, fn=wrong: rewards.from_python(fn)(None, r))(rollout))


def test_weighted_sum_of_several_rewards():
    parts: dict[str, Any] = {"helpful": lambda p, r: p * r, "harmless": lambda p, r: jnp.array([1, 2])}
    score = rewards.weighted(parts, {"helpful": 1.0, "harmless": 0.5})
    np.testing.assert_allclose(score({"helpful": 3.0, "harmless": None}, jnp.ones(2)), [3.5, 4.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="same names"):
        rewards.weighted(parts, {"helpful": 1.0})
