"""C40: DPO can move probability to answers that appear in no pair; PPO cannot (Xu et al. 2024, Theorem 4.1, Figure 1).

Policies are small networks on a bandit with 8 prompts and 8 answers. Each prompt has one pair of answers. The reference
gives almost no probability to the other six answers. DPO is trained on the pairs, and PPO on the scores of a reward
model, another network, that is trained on the same pairs. Policies share weights between prompts, so DPO changes the
probabilities of answers that it never saw. PPO rarely samples these answers, and its KL penalty holds it back.
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
from rlhf_jax import lm, losses, types
from rlhf_jax.report import plots
from rlhf_jax.simulation import bandit
from rlhf_jax.train import dpo, objectives, ppo
from rlhf_jax.train import state as state_lib
from rlhf_jax.train.optim import schedules

S, A, WIDTH = 8, 8, 16
SEEN = 2
"""Number of answers to a prompt that appear in pairs."""
RARE = 1e-4
"""Probability that the reference gives to each of the other answers."""
BETA = 0.1
RATE = 0.03
RUNS = 32
"""Number of bandits per seed, with different rewards, pairs and initial weights."""
Params = dict[str, jax.Array]


def measure(trial: Trial) -> Measured:
    """Trains DPO and PPO on several bandits; returns the probability of unseen answers and the DPO loss of each."""
    steps, runs = (20, 2) if trial.quick else (400, RUNS)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(trial.settings.seed), 40), runs)
    return jax.device_get(jax.jit(jax.vmap(partial(_run, steps=steps)))(keys))


def _run(key: jax.Array, *, steps: int) -> dict[str, dict[str, jax.Array]]:
    world, first, second, sample = jax.random.split(key, 4)
    rewards_SA, logits_SA = jax.random.normal(world, (2, S, A))
    unseen_SA = jnp.argsort(jax.random.normal(jax.random.fold_in(world, 1), (S, A)), axis=1).argsort(axis=1) >= SEEN
    seen_SA = jax.nn.softmax(jnp.where(unseen_SA, -jnp.inf, logits_SA)) * (1 - (A - SEEN) * RARE)
    reference = _minimise(
        lambda params: jnp.mean((table(params) - jnp.log(jnp.where(unseen_SA, RARE, seen_SA))) ** 2),
        new_network(first),
        steps=5 * steps,
        rate=0.01,
    )
    pairs = seen_pairs(rewards_SA, unseen_SA)
    reward = _fit_rewards(new_network(second), pairs, jax.nn.softmax(table(reference)), steps=steps)
    policies = {
        "reference": reference,
        "DPO": _train_dpo(reference, pairs, steps=steps),
        "PPO": _train_ppo(reference, reward, sample, steps=steps),
    }
    return {
        name: {
            "unseen": jnp.mean(jnp.sum(jax.nn.softmax(table(policy)), axis=1, where=unseen_SA)),
            "loss": _dpo_loss(policy, reference, pairs),
        }
        for name, policy in policies.items()
    }


def new_network(key: jax.Array) -> Params:
    """Returns the weights of a network with one hidden layer."""
    shapes = {"embed_SD": (S, WIDTH), "hidden_DD": (WIDTH, WIDTH), "out_DA": (WIDTH, A)}
    return {
        name: jax.random.normal(jax.random.fold_in(key, i), shape) / (1 if i == 0 else WIDTH**0.5)
        for i, (name, shape) in enumerate(shapes.items())
    }


def table(params: Params) -> jax.Array:
    """Returns the outputs of a network for all prompts and answers, ``[S, A]``."""
    return jnp.tanh(jnp.tanh(params["embed_SD"]) @ params["hidden_DD"]) @ params["out_DA"]


def seen_pairs(rewards_SA: jax.Array, unseen_SA: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns all pairs as prompts and answers, ``[N, 2, 2]``, the better one first, and which of them are seen."""
    tokens_N22 = bandit.all_pairs(rewards_SA).tokens_BKL
    score_N2, unseen_N2 = (x_SA[tokens_N22[..., 0], tokens_N22[..., 1]] for x_SA in (rewards_SA, unseen_SA))
    flipped = (score_N2[:, 0] < score_N2[:, 1])[:, None, None]
    return jnp.where(flipped, tokens_N22[:, ::-1], tokens_N22), ~unseen_N2.any(axis=1)


def _minimise(loss: Any, params: Any, *, steps: int, rate: float = RATE) -> Any:
    def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
        params, state = carry
        updates, state = bandit_study.ADAM.update(jax.grad(loss)(params), state)
        return (jax.tree.map(lambda p, u: p + rate * schedules.linear(i, steps) * u, params, updates), state), None

    return jax.lax.scan(step, (params, bandit_study.ADAM.init(params)), jnp.arange(steps))[0][0]


def _fit_rewards(params: Params, pairs: tuple[jax.Array, jax.Array], reference_SA: jax.Array, *, steps: int) -> Any:
    """Returns the rewards of all answers, with mean 0 and standard deviation 1 on samples of the reference."""
    tokens_N22, where_N = pairs

    def loss(params: Params) -> jax.Array:
        score_N2 = table(params)[tokens_N22[..., 0], tokens_N22[..., 1]]
        return jnp.mean(losses.pairwise(score_N2[:, 0], score_N2[:, 1]), where=where_N)

    rewards_SA = table(_minimise(loss, params, steps=steps))
    mean = jnp.sum(reference_SA * rewards_SA) / S
    return (rewards_SA - mean) / jnp.sqrt(jnp.sum(reference_SA * (rewards_SA - mean) ** 2) / S)


def _forward(params: Params, tokens_BL: jax.Array, *, mask_BL: Any = None) -> types.LMOutput:
    return bandit.forward({"logits_SA": table(params)}, tokens_BL, mask_BL=mask_BL)


APPLY = types.ApplyFn(_forward, bandit.logits)


def _dpo_loss(policy: Params, reference: Params, pairs: tuple[jax.Array, jax.Array]) -> jax.Array:
    tokens_N22, where_N = pairs
    policy_N2, reference_N2 = (
        jax.nn.log_softmax(table(params))[tokens_N22[..., 0], tokens_N22[..., 1]] for params in (policy, reference)
    )
    return jnp.mean(losses.dpo(*policy_N2.T, *reference_N2.T, beta=BETA), where=where_N)


def _train_dpo(reference: Params, pairs: tuple[jax.Array, jax.Array], *, steps: int) -> Params:
    tokens_N22, where_N = pairs
    rows = jnp.flatnonzero(where_N, size=S * SEEN * (SEEN - 1) // 2)
    batch = types.Preferences(tokens_N22[rows], None, jnp.ones((len(rows), 2, 1), bool))
    train_step = dpo.make_train_step(partial(lm.token_logprobs, cfg=APPLY, prompt_width=1), objectives.dpo)

    def step(state: Any, i: jax.Array) -> tuple[Any, None]:
        hyper = dpo.Hyper(learning_rate=RATE * schedules.linear(i, steps), beta=BETA)
        return train_step(state, reference, hyper, batch, None)[0], None

    return jax.lax.scan(step, state_lib.create(reference, bandit_study.ADAM), jnp.arange(steps))[0].params


def _train_ppo(reference: Params, rewards_SA: jax.Array, key: jax.Array, *, steps: int) -> Params:
    models = ppo.Models(
        generate=lambda params, rng_B, prompts_BP, mask_BP, temperature: bandit.generate(
            {"logits_SA": table(params)}, rng_B, prompts_BP, mask_BP
        ),
        logprobs=lambda params, tokens, mask, temperature: lm.token_stats(
            params, tokens, cfg=APPLY, prompt_width=1, mask_BL=mask, temperature=temperature
        ),
        values=lambda params, tokens, mask: params["value_S"][tokens[:, :1]],
        score=lambda params, rollout: params[rollout.tokens_BL[:, 0], rollout.tokens_BL[:, 1]],
    )
    train_step = ppo.make_train_step(models, epochs=2, minibatches=2)
    prompts = ppo.Batch(jnp.arange(256, dtype=jnp.int32)[:, None] % S, jnp.ones((256, 1), bool))

    def step(state: Any, i: jax.Array) -> tuple[Any, None]:
        rate = RATE * schedules.linear(i, steps // 2)
        hyper = ppo.Hyper(learning_rate=rate, critic_learning_rate=10 * rate, kl_coef=BETA, value_clip=10.0)
        return train_step(state, ppo.Frozen(reference, rewards_SA), hyper, prompts, key)[0], None

    state = ppo.create(reference, {"value_S": jnp.zeros(S)}, bandit_study.ADAM)
    return jax.lax.scan(step, state, jnp.arange(steps // 2))[0].params["policy"]


def decide(measured_S: Sequence[Measured]) -> list[verdicts.Part]:
    """Compares the probability of unseen answers with that under the reference, and the DPO loss with its start."""

    def mean(arm: str, name: str) -> np.ndarray:
        return np.array([np.mean(measured[arm][name]) for measured in measured_S])

    start = mean("reference", "unseen")
    return [
        verdicts.above("probability of unseen answers, DPO − reference", mean("DPO", "unseen") - start, 0.01),
        verdicts.below("probability of unseen answers, PPO − reference", mean("PPO", "unseen") - start, 0.01),
        verdicts.below("DPO loss of DPO − of the reference", mean("DPO", "loss") - mean("reference", "loss")),
        verdicts.below("DPO loss of PPO − of the reference", mean("PPO", "loss") - mean("reference", "loss")),
    ]


def plot(measured_S: Sequence[Measured]) -> str:
    """Draws the probability of unseen answers against the DPO loss."""
    with plots.axes(height=2.6) as (svg, (ax,)):
        for name, color in (("reference", "base"), ("DPO", "other"), ("PPO", "ppo")):
            x, y = (np.concatenate([measured[name][axis] for measured in measured_S]) for axis in ("loss", "unseen"))
            ax.plot(x, y, ".", color=plots.color(color), label=name)
        ax.set_xlabel("DPO loss")
        ax.set_ylabel("probability of unseen answers")
        ax.legend()
    return svg[0]


CLAIM = Claim(
    id="C40",
    paper="Xu et al. 2024, Theorem 4.1, Table 1 and Figure 1",
    claim="DPO can move probability to answers that appear in no pair; PPO with a KL penalty does not.",
    published="three answers: from (0.5, 0.5, 0) to (0.1, 0, 0.9); 8 x 8 bandit: 0.11 to 0.23 on an unseen answer",
    differs="The theorem is about minimisers of the DPO loss. Here, both methods are trained for a fixed number of "
    "steps, and the mean over 32 bandits per seed decides. dpo_vs_ppo.py shows the example with three answers.",
    measure=measure,
    decide=decide,
    plot=plot,
)
