"""DPO and PPO on a bandit whose rewards and KL are known exactly, from the same few labels.

Prompts and answers are rows and columns of a table; so is everything that is learnt. Labels are Bradley-Terry's on
pairs of answers of the reference or, shifted, of another policy. PPO learns a reward model from them first. All seeds
and coefficients are one program.
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
RATE = 0.1


class Member(NamedTuple):
    """The world, with the key of one run's labels and samples."""

    rewards_SA: jax.Array
    reference_SA: jax.Array
    """Logits."""
    other_SA: jax.Array
    """Logits of the policy that shifted pairs are drawn from."""
    key: jax.Array


def member(seed: Any) -> Member:
    """One and the same world, all of it normal, with the labels and samples of a seed."""
    world, labels = jax.random.split(jax.random.key(0))
    rewards_SA, reference_SA, other_SA = jax.random.normal(world, (3, S, A))
    return Member(rewards_SA, reference_SA, other_SA, jax.random.fold_in(labels, seed))


def drawn(key: jax.Array, logits_SA: jax.Array, rewards_SA: jax.Array, *, n: int) -> types.Preferences:
    """``n`` pairs of answers drawn from a policy, with one Bradley-Terry label each, the better answer first."""
    prompts, first, second, label = jax.random.split(key, 4)
    prompts_B = jax.random.randint(prompts, (n,), 0, S)
    a_B, b_B = (jax.random.categorical(k, logits_SA[prompts_B]) for k in (first, second))
    gap_B = rewards_SA[prompts_B, a_B] - rewards_SA[prompts_B, b_B]
    wins_B = jax.random.bernoulli(label, jax.nn.sigmoid(gap_B))
    answers_B2 = jnp.where(wins_B[:, None], jnp.stack([a_B, b_B], 1), jnp.stack([b_B, a_B], 1))
    tokens_B22 = jnp.stack([jnp.repeat(prompts_B[:, None], 2, axis=1), answers_B2], axis=-1).astype(jnp.int32)
    return types.Preferences(tokens_B22, None, jnp.ones((n, 2, 1), bool))


def reward_model(pairs: types.Preferences, *, ridge: float = 0.01) -> jax.Array:
    """Rewards ``[S, A]`` by Bradley-Terry from pairs; a little ridge holds those of answers that nobody saw at 0."""
    prompts_B, better_B, worse_B = (pairs.tokens_BKL[:, i, j] for i, j in ((0, 0), (0, 1), (1, 1)))

    def loss(table_SA: jax.Array) -> jax.Array:
        pair = losses.pairwise(table_SA[prompts_B, better_B], table_SA[prompts_B, worse_B])
        return jnp.mean(pair) + ridge * jnp.mean(jnp.square(table_SA))

    def one(carry: Any, i: jax.Array) -> tuple[Any, None]:
        table_SA, state = carry
        updates: Any
        updates, state = ADAM.update(jax.grad(loss)(table_SA), state)
        return (table_SA + RATE * (1 - i / STEPS) * updates, state), None

    start = jnp.zeros((S, A))
    (table_SA, _), _ = jax.lax.scan(one, (start, ADAM.init(start)), jnp.arange(STEPS))
    return table_SA - table_SA.mean(axis=1, keepdims=True)


_logprobs = partial(lm.token_logprobs, cfg=APPLY, prompt_width=1)
_dpo_step = dpo.make_train_step(_logprobs, objectives.dpo)


def by_dpo(start_SA: jax.Array, pairs: types.Preferences, beta: jax.Array) -> jax.Array:
    """Logits that DPO ends at, from and against ``start_SA``."""
    params = {"logits_SA": start_SA}

    def one(state: Any, i: jax.Array) -> tuple[Any, None]:
        hyper = dpo.Hyper(learning_rate=RATE * schedules.linear(i, STEPS), beta=beta)
        return _dpo_step(state, params, hyper, pairs, None)[0], None

    state, _ = jax.lax.scan(one, state_lib.create(params, ADAM), jnp.arange(STEPS))
    return state.params["logits_SA"]


def by_rounds(world: Member, reward_SA: jax.Array, beta: jax.Array, *, n: int, rounds: int) -> jax.Array:
    """Iterated DPO: pairs of the latest policy, labelled by the reward model, that policy for a reference.

    The rounds share ``n`` pairs, the remainder left out. Each has ``rounds`` times the coefficient, which makes the
    whole as strong as one pass with ``beta``.
    """
    policy_SA = world.reference_SA
    for r in range(rounds):
        pairs = drawn(jax.random.fold_in(world.key, 10 + r), policy_SA, reward_SA, n=n // rounds)
        policy_SA = by_dpo(policy_SA, pairs, rounds * beta)
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


def by_ppo(world: Member, reward_SA: jax.Array, kl_coef: jax.Array) -> jax.Array:
    """Logits that PPO ends at, on a reward model."""
    step = ppo.make_train_step(_ppo_models(), epochs=2, minibatches=2)
    frozen = ppo.Frozen({"logits_SA": world.reference_SA}, reward_SA)
    # Not the world's own: the step folds its count into the key, as `one_run` folds 0 and 1 for the labels.
    key = jax.random.fold_in(world.key, 1000)
    prompts = ppo.Batch(jnp.arange(ANSWERS, dtype=jnp.int32)[:, None] % S, jnp.ones((ANSWERS, 1), bool))

    def one(state: Any, i: jax.Array) -> tuple[Any, None]:
        rate = RATE * schedules.linear(i, ITERATIONS)
        hyper = ppo.Hyper(learning_rate=rate, critic_learning_rate=rate, kl_coef=kl_coef, value_clip=10.0)
        return step(state, frozen, hyper, prompts, key)[0], None

    state = ppo.create(frozen.reference, {"value_S": jnp.zeros(S)}, ADAM)
    state, _ = jax.lax.scan(one, state, jnp.arange(ITERATIONS))
    return state.params["policy"]["logits_SA"]


def measured(world: Member, logits_SA: jax.Array) -> dict[str, jax.Array]:
    """Exact KL to the reference and exact expected reward, means over the prompts."""
    logp_SA, reference_SA = jax.nn.log_softmax(logits_SA), jax.nn.log_softmax(world.reference_SA)
    probs_SA = jnp.exp(logp_SA)
    return {
        "kl": jnp.mean(jnp.sum(probs_SA * (logp_SA - reference_SA), axis=-1)),
        "gold": jnp.mean(jnp.sum(probs_SA * world.rewards_SA, axis=-1)),
    }


METHODS = ("optimum", "PPO", "DPO", "iterated DPO", "PPO, shifted pairs", "DPO, shifted pairs")


def one_run(world: Member, coef: jax.Array, *, pairs: int, rounds: int) -> dict[str, dict[str, jax.Array]]:
    """KL and gold of every method at one coefficient, on one seed's labels of the world that all seeds share."""
    own = drawn(jax.random.fold_in(world.key, 0), world.reference_SA, world.rewards_SA, n=pairs)
    shifted = drawn(jax.random.fold_in(world.key, 1), world.other_SA, world.rewards_SA, n=pairs)
    learnt, learnt_shifted = reward_model(own), reward_model(shifted)
    best = jnp.log(bandit.optimum(world.reference_SA, world.rewards_SA, kl_coef=coef) + 1e-30)
    ends = (
        best,
        by_ppo(world, learnt, coef),
        by_dpo(world.reference_SA, own, coef),
        by_rounds(world, learnt, coef, n=pairs, rounds=rounds),
        by_ppo(world, learnt_shifted, coef),
        by_dpo(world.reference_SA, shifted, coef),
    )
    return {name: measured(world, logits_SA) for name, logits_SA in zip(METHODS, ends)}


def run(*, coefs: tuple[float, ...], seeds: int, pairs: int, rounds: int) -> dict[str, list[list[dict[str, float]]]]:
    """``method -> [coefficient][seed] -> {kl, gold}``; the labels of a seed are those of every method."""
    worlds = jax.vmap(member)(jnp.arange(seeds))
    each = jax.vmap(partial(one_run, pairs=pairs, rounds=rounds), in_axes=(0, None))
    found = jax.device_get(jax.jit(jax.vmap(each, in_axes=(None, 0)))(worlds, jnp.asarray(coefs)))
    return {
        name: [
            [{key: float(np.asarray(x)[c, s]) for key, x in numbers.items()} for s in range(seeds)]
            for c in range(len(coefs))
        ]
        for name, numbers in ((name, found[name]) for name in METHODS)
    }
