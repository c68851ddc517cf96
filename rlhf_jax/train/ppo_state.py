"""What PPO is given and what it carries: the functions it calls, its numbers, its state and its input."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax import kl, metrics, rewards
from rlhf_jax.train import state as state_lib
from rlhf_jax.train.optim import update
from rlhf_jax.train.sft import TokenBatch
from rlhf_jax.types import Params, Rollout


class Models(NamedTuple):
    """What PPO calls. P is the prompt width; every ``params`` is the pytree that belongs to the function."""

    generate: Callable[..., Rollout]
    """``(params, rng_B, prompts_BP, mask_BP, temperature) -> Rollout``"""
    logprobs: Callable[..., Any]
    """``(params, tokens_BL, mask_BL, temperature) -> (logprobs_BT, entropy_BT)`` of the response tokens."""
    values: Callable[..., jax.Array] | None
    """``(params, tokens_BL, mask_BL) -> values_BT`` before each response token; None where there is no critic."""
    score: Callable[..., jax.Array]
    """``(params, rollout) -> scores_B``; any function, a reward model or a program."""
    token_logprobs: Callable[..., jax.Array] | None = None
    """``(params, tokens_BL, mask_BL=...) -> [B, L]``, for the pretraining rows of PPO-ptx."""
    watch: Callable[[Rollout], dict[str, jax.Array]] | None = None
    """``rollout -> {name: [B]}``: numbers to log and not to train on, such as a gold score (over-optimisation)."""
    join: Callable[[Any, Params], Params] = update.all_trained
    """``(frozen, params) -> {"policy", "critic"}`` as the functions above want them. A policy of adapters on its own
    reference, which is then there once: ``lambda frozen, params: {**params, "policy":
    lora.attach(frozen.reference, params["policy"], scale=...)}``. A critic on the policy's trunk: `shared_trunk`."""


def shared_trunk(frozen: Any, params: Params) -> Params:
    """The ``join`` of a critic that is a head on the policy's trunk, which both then train (Ziegler 2019).

    ``params["critic"]`` holds the head alone, ``{"head": ...}``; made by `lm.with_head` with ``zero``, its values
    begin at 0. ``Hyper.value_coef`` weighs what the value loss may do to the trunk.
    """
    del frozen
    return {"policy": params["policy"], "critic": {**params["policy"], **params["critic"]}}


class Frozen(NamedTuple):
    """What the step reads and never changes."""

    reference: Params
    reward: Params
    heldout: Params | None = None
    """Of a second reward model: its mean score is logged as ``heldout_reward``, and nothing is trained on it."""


@struct.dataclass
class Hyper:
    """Everything a sweep would vary, as traced scalars: changing one compiles nothing."""

    learning_rate: Any = 1e-5
    critic_learning_rate: Any = 1e-5
    kl_coef: Any = 0.02
    """Reward per nat. The start of the adaptive controller where ``kl_gain`` is not 0."""
    kl_target: Any = 6.0
    """Nats a sequence that the controller steers to."""
    kl_gain: Any = 0.0
    """Of the adaptive controller (0.1 in Ziegler 2019); 0 keeps the coefficient fixed."""
    clip: Any = 0.2
    value_clip: Any = 0.2
    discount: Any = 1.0
    lambda_: Any = 0.95
    temperature: Any = 1.0
    """Of sampling and of every scoring pass alike."""
    missing_stop_score: Any = -1.0
    """Replaces the score of an answer that never stopped; or what ``unfinished`` makes of it."""
    reward_clip: Any = jnp.inf
    """Scores are kept within this on both sides (20 in Xu 2024)."""
    value_coef: Any = 1.0
    """Of the value loss, where critic and policy share weights (0.1 in Ziegler 2019); else the critic has its rate."""
    entropy_coef: Any = 0.0
    """Of the entropy bonus, with ``entropy_bonus``. No paper of the three has one."""
    kl_loss_coef: Any = 0.0
    """Of the KL loss, with ``kl_loss`` (0.04 in GRPO); the KL in the reward is ``kl_coef``, and both count twice."""
    ptx_coef: Any = 0.0
    """Weight of the mean pretraining loss per token; 0 is plain PPO, and then costs nothing."""
    sampler_cap: Any = 2.0
    """Largest weight of a token where the sampler's distribution is corrected for."""
    max_grad_norm: Any = jnp.inf
    ema_decay: Any = 0.0
    """Of the averaged policy weights (0.992 per step in InstructGPT); 0 follows the policy."""
    reference_decay: Any = 1.0
    """Of a reference that follows the policy once an iteration (Xu 2024), in a state that has one; 1 holds it still."""


def replaced(scores_B: jax.Array, stopped_B: jax.Array, hyper: Hyper) -> jax.Array:
    """An answer that never stopped is paid ``missing_stop_score``, whatever it scored (Ziegler 2019)."""
    return rewards.replace_unfinished(scores_B, stopped_B, score=hyper.missing_stop_score)


def lowered(scores_B: jax.Array, stopped_B: jax.Array, hyper: Hyper) -> jax.Array:
    """It is paid its score plus ``missing_stop_score``, which is negative: a later variant, not the papers' rule."""
    return rewards.penalise_unfinished(scores_B, stopped_B, penalty=-hyper.missing_stop_score)


@struct.dataclass
class Past:
    """Running means over the answers of all iterations so far."""

    returns: metrics.Metric
    """Of whole answers, KL penalty included: the baseline of REINFORCE."""
    targets: metrics.Metric
    """Of the critic's targets, token by token."""
    squares: metrics.Metric
    """Of their squares."""

    def scale(self) -> tuple[jax.Array, jax.Array]:
        """Mean and standard deviation of the critic's targets; 0 and 1 while there are none."""
        some = self.targets.weight > 0
        mean = jnp.where(some, self.targets.value(), 0.0)
        variance = jnp.where(some, self.squares.value(), 1.0) - jnp.square(mean)
        return mean, jnp.sqrt(jnp.maximum(variance, 1e-8))


class PPOState(state_lib.TrainState):
    """``params = {"policy", "critic"}``, and beside the optimiser what else a resumed run needs."""

    kl_scale: kl.ControllerState
    """What the adaptive controller has come to multiply ``Hyper.kl_coef`` by, 1 at the start."""
    ema: Params
    """Averaged policy weights."""
    past: Past
    reference: Params | None = None
    """One that follows the policy, in place of the frozen one."""


class Batch(NamedTuple):
    """One iteration's input."""

    prompts_BP: jax.Array
    mask_BP: jax.Array
    ptx: TokenBatch | None = None
    """Pretraining rows ``[epochs * minibatches * rows, L]``, dealt out to the updates in turn."""


def create(policy: Params, critic: Params | None, tx: Any, *, reference: Params | None = None) -> PPOState:
    """A fresh state; parameters are copied, since a step donates its state. ``tx`` has unit learning rate.

    Without a ``critic`` the state holds a policy alone. A ``reference`` given here follows the policy by
    ``Hyper.reference_decay`` and is used in place of ``Frozen.reference``.
    """
    base = state_lib.create({"policy": policy} | ({} if critic is None else {"critic": critic}), tx)
    ema, reference = (jax.tree.map(lambda x: jnp.array(x, copy=True), tree) for tree in (policy, reference))
    nothing = [metrics.Metric(jnp.zeros(()), jnp.zeros(())) for _ in range(3)]
    return PPOState(
        step=base.step,
        apply_fn=base.apply_fn,
        params=base.params,
        tx=base.tx,
        opt_state=base.opt_state,
        kl_scale=kl.init_controller(1.0),
        ema=ema,
        past=Past(*nothing),
        reference=reference,
    )


def towards(old: Params, new: Params, decay: Any) -> Params:
    """``old`` and ``new`` weighed by ``decay`` and the rest."""
    return jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, old, new)


def carried(state: PPOState, hyper: Hyper, logs: dict[str, Any]) -> dict[str, Any]:
    """What the next iteration takes over from this one, beside the weights."""
    observed = logs["kl"].value()
    past = dataclasses.replace(state.past, returns=state.past.returns.merge(logs["return"]))
    if "target" in logs:
        past = dataclasses.replace(
            past, targets=past.targets.merge(logs["target"]), squares=past.squares.merge(logs["target_square"])
        )
    carried = {
        "kl_scale": kl.update_controller(state.kl_scale, observed, target=hyper.kl_target, gain=hyper.kl_gain),
        "past": past,
    }
    if state.reference is not None:
        carried["reference"] = towards(state.reference, state.params["policy"], hyper.reference_decay)
    return carried
