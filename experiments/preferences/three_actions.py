"""The counterexample of Xu et al. 2024 (theorem 4.1, table 1): DPO can favour an answer that appears in no pair.

The example has three answers and one label, which prefers the first answer to the second. In the reference policy, the
first two answers have probability one half each, and the third has almost none. A policy minimises the DPO loss if the
second answer has probability 0 and the first has a positive one, as in (1, 0, 0) and (0.1, 0, 0.9). Reward minus KL has
a single optimum, in which the third answer has almost no probability.

With independent logits, DPO would never change the third logit. Networks share weights between answers, and so does the
policy in this example. Its only weight is ``theta``: ``logits = log reference + theta * (1, -1, 2)``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import lm, losses, parallel, types
from rlhf_jax.simulation import bandit
from rlhf_jax.train import dpo, objectives, ppo
from rlhf_jax.train import state as state_lib

UNSEEN = 1e-6
REFERENCE = np.array([0.5, 0.5, UNSEEN])
DIRECTION = np.array([1.0, -1.0, 2.0], np.float32)
PAIR = types.Preferences(
    tokens_BKL=jnp.array([[[0, 0], [0, 1]]], jnp.int32), mask_BKL=None, answer_BKC=jnp.ones((1, 2, 1), bool)
)
_ADAM = optax.chain(optax.scale_by_adam(), optax.scale(-1.0))


def _forward(params: dict[str, jax.Array], tokens_BL: jax.Array, *, mask_BL: Any = None) -> types.LMOutput:
    del mask_BL
    logits_A = jnp.log(jnp.asarray(REFERENCE, jnp.float32)) + params["theta"] * DIRECTION
    return types.LMOutput(jnp.broadcast_to(logits_A, (*tokens_BL.shape, 3)))


APPLY = types.ApplyFn(_forward, bandit.logits)
_START = {"theta": jnp.zeros(())}


def probabilities(params: Any) -> np.ndarray:
    """Returns the probabilities of the three answers."""
    return np.asarray(jax.nn.softmax(_forward(params, jnp.zeros((1, 1), jnp.int32)).hidden_BLD[0, 0]))


def loss(probabilities_A: Any, *, beta: float) -> float:
    """Returns the DPO loss of the pair; the log of a probability of 0 is replaced with -10,000."""
    with np.errstate(divide="ignore"):
        logs = np.maximum(np.log(np.asarray(probabilities_A, np.float64)), -1e4)
    reference = np.log(REFERENCE)
    return float(losses.dpo(logs[0], logs[1], reference[0], reference[1], beta=beta))  # type: ignore[arg-type]


def train_dpo(*, beta: float = 0.1, steps: int = 400) -> tuple[np.ndarray, float]:
    """Returns the probabilities after ``steps`` steps of DPO, and the last loss."""
    step = parallel.jit_step(dpo.make_train_step(partial(lm.token_logprobs, cfg=APPLY, prompt_width=1), objectives.dpo))
    state, logs = state_lib.create(_START, _ADAM), {}
    hyper = dpo.Hyper(learning_rate=np.float32(0.1), beta=np.float32(beta))
    for _ in range(steps):
        state, logs = step(state, _START, hyper, PAIR, jax.random.key(0))
    return probabilities(state.params), float(logs["loss"].value())


def train_ppo(*, kl_coef: float = 0.1, unseen_reward: float = 0.5, iterations: int = 150) -> np.ndarray:
    """Returns the probabilities after PPO with the rewards (1, 0, ``unseen_reward``)."""
    rewards_A = jnp.array([1.0, 0.0, unseen_reward])

    def generate(params: Any, rng_B: jax.Array, prompts_BP: Any, mask_BP: Any, temperature: Any) -> types.Rollout:
        logits_A = _forward(params, jnp.zeros((1, 1), jnp.int32)).hidden_BLD[0]
        return bandit.generate({"logits_SA": logits_A}, rng_B, prompts_BP, mask_BP)

    models = ppo.Models(
        generate=generate,
        logprobs=lambda params, tokens, mask, temperature: lm.token_stats(
            params, tokens, cfg=APPLY, prompt_width=1, mask_BL=mask, temperature=temperature
        ),
        values=lambda params, tokens, mask: jnp.broadcast_to(params["value"], (tokens.shape[0], 1)),
        score=lambda params, rollout: rewards_A[rollout.tokens_BL[:, 1]],
    )
    step = parallel.jit_step(ppo.make_train_step(models, minibatches=2))
    state = ppo.create(_START, {"value": jnp.zeros(())}, _ADAM)
    prompts = ppo.Batch(jnp.zeros((256, 1), jnp.int32), jnp.ones((256, 1), bool))
    for i in range(iterations):
        rate = np.float32(0.1 * (1 - i / iterations))
        hyper = ppo.Hyper(learning_rate=rate, critic_learning_rate=rate, kl_coef=np.float32(kl_coef))
        state, _ = step(state, ppo.Frozen(_START, None), hyper, prompts, jax.random.key(0))
    return probabilities(state.params["policy"])


def optimum(*, kl_coef: float = 0.1, unseen_reward: float = 0.5) -> np.ndarray:
    """Returns the policy that maximises reward minus ``kl_coef`` times the KL to the reference."""
    rewards_SA = jnp.array([[1.0, 0.0, unseen_reward]])
    return np.asarray(bandit.optimum(jnp.log(jnp.asarray(REFERENCE))[None], rewards_SA, kl_coef=kl_coef))[0]
