"""The enumerable bandit, its optimum, and PPO training that reaches the optimum."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import lm, parallel
from rlhf_jax.simulation import bandit
from rlhf_jax.train import ppo
from rlhf_jax.train.optim import schedules
from rlhf_jax.types import ApplyFn

S, A, B = 6, 7, 1536
KL_COEF, ITERATIONS = 0.5, 150
APPLY = ApplyFn(bandit.forward, bandit.logits)
ADAM = optax.chain(optax.scale_by_adam(eps=1e-5), optax.scale(-1.0))

rng = np.random.default_rng(0)
REWARDS = jnp.asarray(rng.normal(size=(S, A)), jnp.float32)
REFERENCE = jnp.asarray(rng.normal(size=(S, A)), jnp.float32)


def values(params, tokens_BL, mask_BL):
    del mask_BL
    return params["value_S"][tokens_BL[:, :1]]


MODELS = ppo.Models(
    generate=lambda params, rng_B, prompts, mask, temperature: bandit.generate(params, rng_B, prompts, mask),
    logprobs=lambda params, tokens, mask, temperature: lm.token_stats(
        params, tokens, cfg=APPLY, prompt_width=1, mask_BL=mask, temperature=temperature
    ),
    values=values,
    score=lambda params, rollout: params["rewards_SA"][rollout.tokens_BL[:, 0], rollout.tokens_BL[:, 1]],
)


@functools.cache
def trained() -> Any:
    """Returns the parameters after PPO training, and the last logs."""
    step = parallel.jit_step(ppo.make_train_step(MODELS, epochs=2, minibatches=2))
    frozen = ppo.Frozen(reference={"logits_SA": REFERENCE}, reward={"rewards_SA": REWARDS})
    state = ppo.create({"logits_SA": REFERENCE}, {"value_S": jnp.zeros(S)}, ADAM)
    batch = ppo.Batch(jnp.arange(B, dtype=jnp.int32)[:, None] % S, jnp.ones((B, 1), bool))
    logs = {}
    for i in range(ITERATIONS):
        rate = 0.1 * schedules.linear(i, ITERATIONS)
        hyper = ppo.Hyper(
            learning_rate=rate, critic_learning_rate=rate, kl_coef=np.float32(KL_COEF), value_clip=np.float32(10.0)
        )
        state, logs = step(state, frozen, hyper, batch, jax.random.key(0))
    assert step.traces == 1
    return state.params, logs


def variation(kl_coef):
    """Returns the total variation distance between the trained policy and the optimum for a KL coefficient."""
    policy_SA = jax.nn.softmax(trained()[0]["policy"]["logits_SA"])
    return float(bandit.total_variation(policy_SA, bandit.optimum(REFERENCE, REWARDS, kl_coef=kl_coef)))


def test_the_optimum_is_the_reference_times_the_exponential_of_reward():
    got = bandit.optimum(REFERENCE, REWARDS, kl_coef=0.3)
    reference = np.exp(np.asarray(REFERENCE, np.float64))
    reference /= reference.sum(1, keepdims=True)
    weights = reference * np.exp(np.asarray(REWARDS, np.float64) / 0.3)
    np.testing.assert_allclose(got, weights / weights.sum(1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(bandit.optimum(REFERENCE, REWARDS, kl_coef=1e6), reference, atol=1e-5)
    greedy = bandit.optimum(REFERENCE, REWARDS, kl_coef=1e-3)
    np.testing.assert_array_equal(greedy.argmax(1), REWARDS.argmax(1))
    assert greedy.max(1).min() > 0.999


def test_no_other_policy_has_a_higher_objective():
    def objective(policy_SA):
        kl = jnp.sum(policy_SA * (jnp.log(policy_SA) - jax.nn.log_softmax(REFERENCE)), axis=1)
        return jnp.sum(policy_SA * REWARDS, axis=1) - KL_COEF * kl

    best = bandit.optimum(REFERENCE, REWARDS, kl_coef=KL_COEF)
    for size in (0.01, 0.1, 1.0):
        noise = jnp.asarray(np.random.default_rng(1).normal(size=(S, A)) * size, jnp.float32)
        assert (objective(jax.nn.softmax(jnp.log(best) + noise)) < objective(best)).all()


def test_total_variation_equals_hand_computed_values():
    p = jnp.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    q = jnp.array([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]])
    assert float(bandit.total_variation(p[:1], q[:1])) == 0.25
    assert float(bandit.total_variation(p, q)) == 1.0
    assert float(bandit.total_variation(p, p)) == 0.0


def test_the_hidden_state_is_the_row_of_the_prompt():
    tokens = jnp.array([[2, 6], [0, 1]])  # an answer's id need not be a prompt's id
    stats = lm.token_stats({"logits_SA": REFERENCE}, tokens, cfg=APPLY, prompt_width=1)
    expected = jax.nn.log_softmax(REFERENCE)
    np.testing.assert_allclose(stats.logprobs[:, 0], [expected[2, 6], expected[0, 1]], rtol=1e-6)


def test_answers_are_drawn_with_the_probabilities_of_the_policy():
    prompts = jnp.arange(60_000, dtype=jnp.int32)[:, None] % S
    keys = jax.random.split(jax.random.key(1), len(prompts))
    rollout = jax.jit(bandit.generate)({"logits_SA": REFERENCE}, keys, prompts, jnp.ones_like(prompts, bool))
    counts = np.zeros((S, A))
    np.add.at(counts, (rollout.tokens_BL[:, 0], rollout.tokens_BL[:, 1]), 1)
    np.testing.assert_allclose(counts / counts.sum(1, keepdims=True), jax.nn.softmax(REFERENCE), atol=0.02)
    chosen = jax.nn.log_softmax(REFERENCE)[rollout.tokens_BL[:, 0], rollout.tokens_BL[:, 1]]
    np.testing.assert_allclose(rollout.logprobs_BT[:, 0], chosen, atol=1e-5)


def test_ppo_reaches_only_the_optimum_of_its_kl_coefficient():
    assert variation(KL_COEF) < 0.02
    for wrong in (0.8 * KL_COEF, 1.25 * KL_COEF):
        assert variation(wrong) > 0.05
    start = bandit.total_variation(jax.nn.softmax(REFERENCE), bandit.optimum(REFERENCE, REWARDS, kl_coef=KL_COEF))
    assert float(start) > 0.3, "training starts far from the optimum"


def test_the_critic_learns_the_value_and_the_logs_agree_with_the_optimum():
    params, logs = trained()
    best = bandit.optimum(REFERENCE, REWARDS, kl_coef=KL_COEF)
    kl = jnp.sum(best * (jnp.log(best) - jax.nn.log_softmax(REFERENCE)), axis=1)
    reward = jnp.sum(best * REWARDS, axis=1)
    np.testing.assert_allclose(params["critic"]["value_S"], reward - KL_COEF * kl, atol=0.1)
    np.testing.assert_allclose(logs["kl"].value(), kl.mean(), atol=0.1)
    np.testing.assert_allclose(logs["reward"].value(), reward.mean(), atol=0.1)
    assert float(logs["skipped"]) == 0 and float(logs["sampler_gap"]) < 1e-5
