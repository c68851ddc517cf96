"""C34: PPO approaches the analytic optimum, and labels can replace the true reward (Ziegler et al. 2019, section 3).

On bandits with 8 prompts and 8 answers, the policy that maximises reward minus KL is known: the reference times
``exp(reward / coefficient)``, normalised. PPO is trained with the true reward, with a reward model fitted to many
labels, and with one fitted to few labels. The few labels compare different answers of the reference (offline)
or, in rounds, of the latest policy (online). Online labels should help only if the policy moves far from the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from preferences import bandit_study

from claims import verdicts
from claims.claim import Claim, Measured
from claims.trial import Trial
from rlhf_jax import types
from rlhf_jax.report import plots
from rlhf_jax.simulation import bandit

WORLDS = 24
"""Number of bandits per seed."""
COEFS = (0.1, 1.0)
"""KL coefficients, with which the policy moves far and little."""
MANY, FEW = 5120, 512
"""Numbers of labels."""
ROUNDS = 4
SHARPNESS = 2.0
"""Factor of the reference's logits, which makes some answers rare."""
ARMS = ("true reward", "many labels", "offline labels", "online labels")
OPTIMUM_COEFS = np.geomspace(0.005, 50, 400)


@partial(jax.jit, static_argnames="n")
def _sample(keys_W: jax.Array, policy_WSA: jax.Array, rewards_WSA: jax.Array, *, n: int) -> types.Preferences:
    return jax.vmap(partial(sample_pairs, n=n))(keys_W, policy_WSA, rewards_WSA)


def sample_pairs(key: jax.Array, logits_SA: jax.Array, rewards_SA: jax.Array, *, n: int) -> types.Preferences:
    """Samples ``n`` pairs of different answers, labelled by the Bradley-Terry model, preferred answer first."""
    prompt, first, second, label = jax.random.split(key, 4)
    prompts_B = jax.random.randint(prompt, (n,), 0, len(logits_SA))
    a_B = jax.random.categorical(first, logits_SA[prompts_B])
    same_BA = jax.nn.one_hot(a_B, logits_SA.shape[1], dtype=bool)
    b_B = jax.random.categorical(second, jnp.where(same_BA, -jnp.inf, logits_SA[prompts_B]))
    wins_B = jax.random.bernoulli(label, jax.nn.sigmoid(rewards_SA[prompts_B, a_B] - rewards_SA[prompts_B, b_B]))
    answers_B2 = jnp.where(wins_B[:, None], jnp.stack([a_B, b_B], 1), jnp.stack([b_B, a_B], 1))
    tokens_B22 = jnp.stack([jnp.repeat(prompts_B[:, None], 2, axis=1), answers_B2], axis=-1).astype(jnp.int32)
    return types.Preferences(tokens_B22, None, jnp.ones((n, 2, 1), bool))


_fit_rewards = jax.jit(jax.vmap(bandit_study.fit_rewards))
_train_ppo = jax.jit(jax.vmap(bandit_study.train_ppo, in_axes=(0, 0, None)))


def measure(trial: Trial) -> Measured:
    """Trains PPO on several bandits; returns gain in reward, and that of the optimum at the same KL, ``[W, C]``."""
    keys_W = jax.random.split(jax.random.fold_in(jax.random.key(trial.settings.seed), 34), 2 if trial.quick else WORLDS)
    world = jax.vmap(make_world)(keys_W)
    found_C = [_train_all(world, coef, many=64 if trial.quick else MANY) for coef in COEFS]
    return {
        arm: jax.tree.map(lambda *x_W: np.stack(x_W, axis=1), *(jax.device_get(each[arm]) for each in found_C))
        for arm in ARMS
    }


def make_world(key: jax.Array) -> bandit_study.Bandit:
    """Returns a bandit with standard normal rewards and a reference with sharper logits."""
    rewards_SA, logits_SA = jax.random.normal(key, (2, bandit_study.S, bandit_study.A))
    reference_SA = SHARPNESS * logits_SA
    return bandit_study.Bandit(rewards_SA, reference_SA, reference_SA, jax.random.fold_in(key, 1))


def _train_all(world: bandit_study.Bandit, coef: float, *, many: int) -> dict[str, dict[str, jax.Array]]:
    def labels(number: int, policy_WSA: jax.Array, n: int) -> types.Preferences:
        keys_W = jax.vmap(lambda key: jax.random.fold_in(key, number))(world.key)
        return _sample(keys_W, policy_WSA, world.rewards_SA, n=n)

    def train(pairs: types.Preferences) -> jax.Array:
        return _train_ppo(world, _fit_rewards(pairs), coef)

    policies = {
        "true reward": _train_ppo(world, world.rewards_SA, coef),
        "many labels": train(labels(2, world.reference_SA, many)),
        "offline labels": train(labels(3, world.reference_SA, FEW)),
    }
    online = [labels(4, world.reference_SA, FEW // ROUNDS)]
    for number in range(1, ROUNDS):
        policy_WSA = train(_joined(online))
        online.append(labels(4 + number, policy_WSA, FEW // ROUNDS))
    policies["online labels"] = train(_joined(online))
    return {name: jax.vmap(worth)(world, policies[name]) for name in ARMS}


def _joined(parts: list[types.Preferences]) -> types.Preferences:
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)


def worth(world: bandit_study.Bandit, logits_SA: jax.Array) -> dict[str, jax.Array]:
    """Returns how much more reward a policy and the optimum with the same KL have than the reference."""
    policy = _gain_and_kl(world, jax.nn.softmax(logits_SA))
    optima_CSA = jax.vmap(lambda coef: bandit.optimum(world.reference_SA, world.rewards_SA, kl_coef=coef))(
        jnp.asarray(OPTIMUM_COEFS[::-1], jnp.float32)
    )
    gain_C, kl_C = jax.vmap(partial(_gain_and_kl, world))(optima_CSA)
    return {"gain": policy[0], "kl": policy[1], "optimum": jnp.interp(policy[1], kl_C, gain_C)}


def _gain_and_kl(world: bandit_study.Bandit, probs_SA: jax.Array) -> tuple[jax.Array, jax.Array]:
    reference_SA = jax.nn.log_softmax(world.reference_SA)
    gain = jnp.sum((probs_SA - jnp.exp(reference_SA)) * world.rewards_SA, axis=1)
    log_ratio_SA = jnp.where(probs_SA > 0, jnp.log(jnp.maximum(probs_SA, 1e-30)) - reference_SA, 0.0)
    return gain.mean(), jnp.sum(probs_SA * log_ratio_SA, axis=1).mean()


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares PPO with the optimum, labels with the true reward, and online with offline labels."""

    def mean(arm: str, name: str) -> np.ndarray:
        """Returns the mean over bandits for each seed and coefficient."""
        return np.array([np.mean(measured[arm][name], axis=0) for measured in measured_S])

    gap_S = 1 - (mean("true reward", "gain") / mean("true reward", "optimum"))[:, 0]
    share_S = (mean("many labels", "gain") / mean("many labels", "optimum"))[:, 0]
    online_SC = mean("online labels", "gain") - mean("offline labels", "gain")
    return [
        verdicts.below("gap of PPO to the optimum at equal KL, as a share of the gain of the optimum", gap_S, 0.1),
        verdicts.below("the same gap with many labels instead of the true reward", 1 - share_S, 0.1),
        verdicts.above("gain with online − offline labels, far from the reference", online_SC[:, 0]),
        verdicts.above("the same, far from − near the reference", online_SC[:, 0] - online_SC[:, 1]),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the gain in reward against KL, and that of the optimum."""
    colors = dict(zip(ARMS, ("ppo", "ppo_ptx", "other", "reward_model")))
    with plots.axes(height=2.8) as (svg, (ax,)):
        for arm in ARMS:
            x_SC, y_SC = (
                np.array([np.mean(measured[arm][name], axis=0) for measured in measured_S]) for name in ("kl", "gain")
            )
            ax.plot(x_SC.ravel(), y_SC.ravel(), ".", color=plots.color(colors[arm]), label=arm)
        x_N, y_N = (
            np.concatenate([np.mean(measured["true reward"][name], axis=0) for measured in measured_S])
            for name in ("kl", "optimum")
        )
        ax.plot(x_N, y_N, "_", color=plots.color("base"), markersize=12, label="optimum")
        ax.set_xlabel("KL in nats")
        ax.set_ylabel("gain in reward")
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C34",
    paper="Ziegler et al. 2019, section 3",
    claim="PPO approaches the analytic optimum; 5,000 labels nearly match the true reward; online labels help only if "
    "the policy moves far.",
    published="style tasks: 86 % against zero-shot, 77 % against a policy trained with a classifier",
    differs="Bandits replace the language model and the mock sentiment reward, so 5,000 labels are "
    "many for 64 answers. Online labels are compared with offline ones at 512 labels.",
    measure=measure,
    decide=decide,
    plot=plot,
)
