"""Trains with DPO and PPO on the same few labels of a bandit for which reward and KL are computed exactly.

Rewards and policies are tables ``[S, A]`` with a row for each prompt and a column for each answer. Pairs of answers are
sampled from the reference policy or, for shifted pairs, from another policy, and labelled by the Bradley-Terry model.
PPO uses a reward model that is first fitted to the labels. All seeds and KL coefficients run in one compiled program.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import lm, losses, types
from rlhf_jax.simulation import bandit
from rlhf_jax.train import dpo, objectives, ppo
from rlhf_jax.train import state as state_lib
from rlhf_jax.train.optim import schedules

S, A = 8, 8
APPLY = types.ApplyFn(bandit.forward, bandit.logits)
ADAM = optax.chain(optax.scale_by_adam(eps=1e-5), optax.scale(-1.0))
STEPS, ITERATIONS, ANSWERS = 300, 120, 1024
EPOCHS, PARTS = 2, 2  # of a rollout in PPO
RATE = 0.1


class Bandit(NamedTuple):
    """The bandit, and the key of one run's labels and samples."""

    rewards_SA: jax.Array
    reference_SA: jax.Array
    """Logits of the reference policy."""
    other_SA: jax.Array
    """Logits of the policy that shifted pairs are sampled from."""
    key: jax.Array


def make_bandit(seed: Any) -> Bandit:
    """Returns the bandit and the key of a seed. The tables are standard normal and the same for every seed."""
    world, labels = jax.random.split(jax.random.key(0))
    rewards_SA, reference_SA, other_SA = jax.random.normal(world, (3, S, A))
    return Bandit(rewards_SA, reference_SA, other_SA, jax.random.fold_in(labels, seed))


def sample_pairs(key: jax.Array, logits_SA: jax.Array, rewards_SA: jax.Array, *, n: int) -> types.Preferences:
    """Samples ``n`` pairs of answers from a policy, labelled by the Bradley-Terry model, preferred answer first."""
    prompts, first, second, label = jax.random.split(key, 4)
    prompts_B = jax.random.randint(prompts, (n,), 0, S)
    a_B, b_B = (jax.random.categorical(k, logits_SA[prompts_B]) for k in (first, second))
    gap_B = rewards_SA[prompts_B, a_B] - rewards_SA[prompts_B, b_B]
    wins_B = jax.random.bernoulli(label, jax.nn.sigmoid(gap_B))
    answers_B2 = jnp.where(wins_B[:, None], jnp.stack([a_B, b_B], 1), jnp.stack([b_B, a_B], 1))
    tokens_B22 = jnp.stack([jnp.repeat(prompts_B[:, None], 2, axis=1), answers_B2], axis=-1).astype(jnp.int32)
    return types.Preferences(tokens_B22, None, jnp.ones((n, 2, 1), bool))


def fit_rewards(pairs: types.Preferences, features_SAF: jax.Array | None = None, *, ridge: float = 0.01) -> jax.Array:
    """Fits Bradley-Terry rewards ``[S, A]`` to pairs, with a ridge penalty, and centres them for each prompt.

    The rewards are linear in ``features_SAF`` if they are given. Otherwise, each answer has its own reward.
    """
    prompts_B, better_B, worse_B = (pairs.tokens_BKL[:, i, j] for i, j in ((0, 0), (0, 1), (1, 1)))

    def table(weights: jax.Array) -> jax.Array:
        return weights if features_SAF is None else features_SAF @ weights

    def loss(weights: jax.Array) -> jax.Array:
        table_SA = table(weights)
        pair = losses.pairwise(table_SA[prompts_B, better_B], table_SA[prompts_B, worse_B])
        return jnp.mean(pair) + ridge * jnp.mean(jnp.square(table_SA))

    def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
        weights, state = carry
        updates: Any
        updates, state = ADAM.update(jax.grad(loss)(weights), state)
        return (weights + RATE * (1 - i / STEPS) * updates, state), None

    start = jnp.zeros((S, A) if features_SAF is None else features_SAF.shape[-1])
    (weights, _), _ = jax.lax.scan(step, (start, ADAM.init(start)), jnp.arange(STEPS))
    table_SA = table(weights)
    return table_SA - table_SA.mean(axis=1, keepdims=True)


_logprobs = partial(lm.token_logprobs, cfg=APPLY, prompt_width=1)
_dpo_step = dpo.make_train_step(_logprobs, objectives.dpo)


def train_dpo(start_SA: jax.Array, pairs: types.Preferences, beta: jax.Array) -> jax.Array:
    """Returns the logits after DPO; ``start_SA`` is both the initial policy and the reference."""
    params = {"logits_SA": start_SA}

    def step(state: Any, i: jax.Array) -> tuple[Any, None]:
        hyper = dpo.Hyper(learning_rate=RATE * schedules.linear(i, STEPS), beta=beta)
        return _dpo_step(state, params, hyper, pairs, None)[0], None

    state, _ = jax.lax.scan(step, state_lib.create(params, ADAM), jnp.arange(STEPS))
    return state.params["logits_SA"]


def train_iterated_dpo(world: Bandit, reward_SA: jax.Array, beta: jax.Array, *, n: int, rounds: int) -> jax.Array:
    """Returns the logits of iterated DPO, in which the latest policy is the reference and samples the pairs.

    The reward model labels the pairs. Each round trains on ``n // rounds`` pairs with the coefficient
    ``rounds * beta``, so that all rounds together move the policy as far as a single round with ``beta``.
    """
    policy_SA = world.reference_SA
    for r in range(rounds):
        pairs = sample_pairs(jax.random.fold_in(world.key, 10 + r), policy_SA, reward_SA, n=n // rounds)
        policy_SA = train_dpo(policy_SA, pairs, rounds * beta)
    return policy_SA


def _ppo_models() -> ppo.Models:
    return ppo.Models(
        generate=lambda params, rng_B, prompts, mask, temperature: bandit.generate(params, rng_B, prompts, mask),
        logprobs=lambda params, tokens, mask, temperature: lm.token_stats(
            params, tokens, cfg=APPLY, prompt_width=1, mask_BL=mask, temperature=temperature
        ),
        values=lambda params, tokens, mask: params["value_S"][tokens[:, :1]],
        score=lambda params, rollout: params[rollout.tokens_BL[:, 0], rollout.tokens_BL[:, 1]],
    )


def train_ppo(world: Bandit, reward_SA: jax.Array, kl_coef: jax.Array) -> jax.Array:
    """Returns the logits after PPO with the reward model ``reward_SA``."""
    step = ppo.make_train_step(_ppo_models(), epochs=EPOCHS, minibatches=PARTS)
    frozen = ppo.Frozen({"logits_SA": world.reference_SA}, reward_SA)
    # The step folds its counter into this key. It must differ from `world.key`, into which `_run_once` folds 0 and 1.
    key = jax.random.fold_in(world.key, 1000)
    prompts = ppo.Batch(jnp.arange(ANSWERS, dtype=jnp.int32)[:, None] % S, jnp.ones((ANSWERS, 1), bool))

    def iteration(state: Any, i: jax.Array) -> tuple[Any, None]:
        rate = RATE * schedules.linear(i, ITERATIONS)
        hyper = ppo.Hyper(learning_rate=rate, critic_learning_rate=rate, kl_coef=kl_coef, value_clip=10.0)
        return step(state, frozen, hyper, prompts, key)[0], None

    state = ppo.create(frozen.reference, {"value_S": jnp.zeros(S)}, ADAM)
    state, _ = jax.lax.scan(iteration, state, jnp.arange(ITERATIONS))
    return state.params["policy"]["logits_SA"]


def _measure(world: Bandit, logits_SA: jax.Array) -> dict[str, jax.Array]:
    """Returns the exact KL to the reference and the exact expected reward, averaged over prompts."""
    logp_SA, reference_SA = jax.nn.log_softmax(logits_SA), jax.nn.log_softmax(world.reference_SA)
    probs_SA = jnp.exp(logp_SA)
    return {
        "kl": jnp.mean(jnp.sum(probs_SA * (logp_SA - reference_SA), axis=-1)),
        "gold": jnp.mean(jnp.sum(probs_SA * world.rewards_SA, axis=-1)),
    }


METHODS = ("optimum", "PPO", "DPO", "iterated DPO", "PPO, shifted pairs", "DPO, shifted pairs")


def data(*, pairs: int, rounds: int) -> dict[str, dict[str, int]]:
    """Returns the numbers of labels, sampled answers and steps of every method except the optimum, per run."""
    dpo_data = {"labelled pairs": pairs, "sampled answers": 0, "steps": STEPS}
    ppo_data = {"labelled pairs": pairs, "sampled answers": ITERATIONS * ANSWERS, "steps": ITERATIONS * EPOCHS * PARTS}
    iterated = {"labelled pairs": pairs, "sampled answers": 2 * (pairs // rounds) * rounds, "steps": rounds * STEPS}
    by_method = {"PPO": ppo_data, "DPO": dpo_data, "iterated DPO": iterated}
    return {name: by_method[name.partition(",")[0]] for name in METHODS if name != "optimum"}


def _run_once(world: Bandit, coef: jax.Array, *, pairs: int, rounds: int) -> dict[str, dict[str, jax.Array]]:
    """Returns the KL and the expected reward of every method at one coefficient, for the labels of one seed."""
    own = sample_pairs(jax.random.fold_in(world.key, 0), world.reference_SA, world.rewards_SA, n=pairs)
    shifted = sample_pairs(jax.random.fold_in(world.key, 1), world.other_SA, world.rewards_SA, n=pairs)
    rewards_SA, shifted_rewards_SA = fit_rewards(own), fit_rewards(shifted)
    policies = (
        jnp.log(bandit.optimum(world.reference_SA, world.rewards_SA, kl_coef=coef) + 1e-30),
        train_ppo(world, rewards_SA, coef),
        train_dpo(world.reference_SA, own, coef),
        train_iterated_dpo(world, rewards_SA, coef, n=pairs, rounds=rounds),
        train_ppo(world, shifted_rewards_SA, coef),
        train_dpo(world.reference_SA, shifted, coef),
    )
    return {name: _measure(world, logits_SA) for name, logits_SA in zip(METHODS, policies)}


def run(*, coefs: tuple[float, ...], seeds: int, pairs: int, rounds: int) -> dict[str, list[list[dict[str, float]]]]:
    """Returns ``method -> [coefficient][seed] -> {kl, gold}``. For each seed, PPO and DPO use the same labels."""
    worlds = jax.vmap(make_bandit)(jnp.arange(seeds))
    over_seeds = jax.vmap(partial(_run_once, pairs=pairs, rounds=rounds), in_axes=(0, None))
    results = jax.device_get(jax.jit(jax.vmap(over_seeds, in_axes=(None, 0)))(worlds, jnp.asarray(coefs)))
    return {
        name: [
            [{key: float(np.asarray(x)[c, s]) for key, x in numbers.items()} for s in range(seeds)]
            for c in range(len(coefs))
        ]
        for name, numbers in ((name, results[name]) for name in METHODS)
    }
