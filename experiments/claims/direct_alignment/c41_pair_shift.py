"""C41: DPO suffers if the pairs come from another policy, PPO does not; iteration repairs it (Xu et al. 2024, Table 2).

On bandits with 8 prompts and 8 answers, pairs of answers are sampled from the reference policy or, with a shift, from
another policy, and labelled by the Bradley-Terry model. DPO is trained on the pairs, and PPO on the scores of a reward
model fitted to them. Rewards are linear in features of the answers, which the reward model sees, so its scores hold for
answers in no pair. A policy is a table of logits. Two repairs start from the shifted pairs: SFT on their better answers
before DPO, and iterated DPO, in which the reward model labels answers of the latest policy. The expected reward of each
policy is exact.

With a table of rewards as reward model, which is still an arm, the claim was not shown with the seeds 0 to 4: the shift
then costs PPO as much as DPO.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from preferences import bandit_study

from claims import verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax import types
from rlhf_jax.report import plots
from rlhf_jax.train.optim import schedules

WORLDS = 40
"""Number of bandits per seed."""
PAIRS = 256
COEF = 0.3
"""KL coefficient of PPO, and beta of DPO."""
ROUNDS = 4
PAIRS_OF_ROUND = 1024
"""Number of pairs in a round of iterated DPO, which the reward model labels."""
SHARPNESS = 2.0
"""Factor of the other policy's logits, so that its pairs leave out more answers."""
FEATURES = 4
"""Number of features of an answer, in which its reward is linear."""
ARMS = (
    *(f"{name}{shift}" for name in ("PPO", "PPO with a table") for shift in ("", ", shifted")),
    "DPO",
    "DPO, shifted",
    "DPO after SFT, shifted",
    "iterated DPO, shifted",
)


_sample = jax.jit(jax.vmap(partial(bandit_study.sample_pairs, n=PAIRS)))
_sample_round = jax.jit(jax.vmap(partial(bandit_study.sample_pairs, n=PAIRS_OF_ROUND)))
_fit_rewards = jax.jit(jax.vmap(bandit_study.fit_rewards))
_train_dpo = jax.jit(jax.vmap(bandit_study.train_dpo, in_axes=(0, 0, None)))
_train_ppo = jax.jit(jax.vmap(bandit_study.train_ppo, in_axes=(0, 0, None)))


def measure(trial: Trial) -> Measured:
    """Trains all methods on several bandits; returns the expected reward and the KL of each."""
    keys_W = jax.random.split(jax.random.fold_in(jax.random.key(trial.settings.seed), 41), 2 if trial.quick else WORLDS)
    world, features_WSAF = jax.vmap(make_world)(keys_W)
    policies = {}
    for number, (shift, logits_WSA) in enumerate({"": world.reference_SA, ", shifted": world.other_SA}.items()):
        pairs = _sample(_folded(world.key, 2 + number), logits_WSA, world.rewards_SA)
        rewards_WSA = _fit_rewards(pairs, features_WSAF)
        policies[f"PPO{shift}"] = _train_ppo(world, rewards_WSA, COEF)
        policies[f"PPO with a table{shift}"] = _train_ppo(world, _fit_rewards(pairs), COEF)
        policies[f"DPO{shift}"] = _train_dpo(world.reference_SA, pairs, COEF)
    tuned_WSA = jax.jit(jax.vmap(fine_tune))(world.reference_SA, pairs)
    policies["DPO after SFT, shifted"] = _train_dpo(tuned_WSA, pairs, COEF)
    policies["iterated DPO, shifted"] = train_iterated_dpo(world, rewards_WSA)
    return jax.device_get({name: jax.vmap(worth)(world, policies[name]) for name in ARMS})


def make_world(key: jax.Array) -> tuple[bandit_study.Bandit, jax.Array]:
    """Returns a bandit, and the features of its answers.

    Features, and the logits of the reference and of the other policy, are normal. Rewards have standard deviation 1.
    """
    reference_SA, other_SA = jax.random.normal(key, (2, bandit_study.S, bandit_study.A))
    features_SAF = jax.random.normal(jax.random.fold_in(key, 1), (bandit_study.S, bandit_study.A, FEATURES))
    weights_F = jax.random.normal(jax.random.fold_in(key, 2), (FEATURES,))
    rewards_SA = features_SAF @ (weights_F / jnp.linalg.norm(weights_F))
    own = jax.random.fold_in(key, 3)
    return bandit_study.Bandit(rewards_SA, reference_SA, SHARPNESS * other_SA, own), features_SAF


def _folded(key_W: jax.Array, number: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(key_W)


def train_iterated_dpo(world: bandit_study.Bandit, rewards_WSA: jax.Array) -> jax.Array:
    """Returns the logits of iterated DPO on answers of the latest policy, which is also the reference of its round.

    The coefficient of a round is ``ROUNDS * COEF``, so that all rounds together have the coefficient ``COEF``.
    """
    policy_WSA = world.reference_SA
    for r in range(ROUNDS):
        pairs = _sample_round(_folded(world.key, 10 + r), policy_WSA, rewards_WSA)
        policy_WSA = _train_dpo(policy_WSA, pairs, ROUNDS * COEF)
    return policy_WSA


def fine_tune(start_SA: jax.Array, pairs: types.Preferences, *, steps: int = 100) -> jax.Array:
    """Returns the logits after SFT on the better answers."""
    prompts_B, better_B = pairs.tokens_BKL[:, 0, 0], pairs.tokens_BKL[:, 0, 1]

    def loss(logits_SA: jax.Array) -> jax.Array:
        return -jnp.mean(jax.nn.log_softmax(logits_SA)[prompts_B, better_B])

    def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
        logits_SA, state = carry
        updates, state = bandit_study.ADAM.update(jax.grad(loss)(logits_SA), state)
        return (logits_SA + bandit_study.RATE * schedules.linear(i, steps) * updates, state), None

    return jax.lax.scan(step, (start_SA, bandit_study.ADAM.init(start_SA)), jnp.arange(steps))[0][0]


def worth(world: bandit_study.Bandit, logits_SA: jax.Array) -> dict[str, jax.Array]:
    """Returns the expected reward of a policy and its KL to the reference, averaged over prompts."""
    logp_SA, reference_SA = jax.nn.log_softmax(logits_SA), jax.nn.log_softmax(world.reference_SA)
    return {
        "reward": jnp.mean(jnp.sum(jnp.exp(logp_SA) * world.rewards_SA, axis=1)),
        "kl": jnp.mean(jnp.sum(jnp.exp(logp_SA) * (logp_SA - reference_SA), axis=1)),
    }


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the effect of the shift on both methods, and the repairs with DPO on shifted pairs."""
    reward = {name: np.array([np.mean(measured[name]["reward"]) for measured in measured_S]) for name in ARMS}
    shift = {name: reward[name] - reward[f"{name}, shifted"] for name in ("DPO", "PPO")}
    shifted = reward["DPO, shifted"]
    return [
        verdicts.above("loss of reward by the shift, DPO − PPO", shift["DPO"] - shift["PPO"]),
        verdicts.above("reward of iterated DPO − DPO, shifted pairs", reward["iterated DPO, shifted"] - shifted),
        verdicts.above("reward of DPO after SFT − DPO, shifted pairs", reward["DPO after SFT, shifted"] - shifted),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the expected rewards."""
    reward_SA = np.array([[np.mean(measured[name]["reward"]) for name in ARMS] for measured in measured_S])
    with plots.axes(height=2.9) as (svg, (ax,)):
        for place, name in enumerate(ARMS):
            color = plots.color("ppo" if name.startswith("PPO") else "other")
            ax.plot(reward_SA[:, place], [place] * len(reward_SA), ".", color=color)
        ax.set_yticks(range(len(ARMS)), ARMS)
        ax.invert_yaxis()
        ax.set_xlabel("expected reward")
    return svg[0]


CLAIM = Claim(
    id="C41",
    paper="Xu et al. 2024, Tables 2, 9 and 10",
    claim="A shift between the policy and the pairs hurts DPO more than PPO; SFT on the pairs or iteration repairs it.",
    published="safety: DPO 55.4 %, after SFT on the pairs 71.8 %, after four iterations 99.9 %; PPO 99.5 %",
    differs="Bandits with tables of logits replace language models, so DPO learns nothing about answers in no pair. "
    "The reward model is linear in features of the answers. With a table of rewards instead, the shift costs PPO as "
    "much as DPO. The pairs of another policy cover all answers, with other frequencies.",
    measure=measure,
    decide=decide,
    plot=plot,
)
