"""The types that PPO uses: the functions that it calls, its hyperparameters, its state and its batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax import kl, metrics, rewards
from rlhf_jax.train import state as state_lib
from rlhf_jax.train.optim import update
from rlhf_jax.types import Params, Rollout, TokenBatch


class Models(NamedTuple):
    """The functions that PPO calls. P is the prompt width; ``params`` are the parameters of the model concerned."""

    generate: Callable[..., Rollout]
    """``(params, rng_B, prompts_BP, mask_BP, temperature) -> Rollout`` samples responses from the policy."""
    logprobs: Callable[..., Any]
    """``(params, tokens_BL, mask_BL, temperature) -> (logprobs_BT, entropy_BT)`` of the response tokens, in nats."""
    values: Callable[..., jax.Array] | None
    """``(params, tokens_BL, mask_BL) -> values_BT``, the critic's value before each response token; None without a
    critic."""
    score: Callable[..., Any]
    """``(params, rollout) -> scores_B``: a reward model or any other function of the responses. It may instead return
    ``[B, T]``, one score per response token (process rewards), and a pair of the scores and a dict ``{name: [B]}`` of
    numbers whose means are logged. A response without a stop token is trained with `Hyper.missing_stop_score` in place
    of its score (see ``unfinished`` in `ppo.make_train_step`)."""
    token_logprobs: Callable[..., jax.Array] | None = None
    """``(params, tokens_BL, mask_BL=...) -> [B, L]``, called on the pretraining rows of PPO-ptx."""
    watch: Callable[[Rollout], dict[str, jax.Array]] | None = None
    """``rollout -> {name: [B]}``: numbers that are logged and not trained on, such as a gold score."""
    join: Callable[[Any, Params], Params] = update.all_trained
    """``(frozen, params) -> {"policy", "critic"}`` builds the parameters that the functions above receive. For a critic
    on the policy's trunk, use `shared_trunk`. For a policy that consists of adapters on the reference, use ``lambda
    frozen, params: {**params, "policy": lora.attach(frozen.reference, params["policy"], scale=...)}``; the base model
    is then in memory only once."""


def shared_trunk(frozen: Any, params: Params) -> Params:
    """Joins policy and critic if the critic is a head on the policy's trunk (Ziegler 2019); pass it as `Models.join`.

    ``params["critic"]`` holds only the head, ``{"head": ...}``. If `lm.with_head` creates the head with ``zero=True``,
    all values are 0 at the start. Both losses train the trunk; `Hyper.value_coef` is the weight of the value loss.
    """
    del frozen
    return {"policy": params["policy"], "critic": {**params["policy"], **params["critic"]}}


class Frozen(NamedTuple):
    """Parameters that a step uses but never changes."""

    reference: Params
    """Parameters of the reference policy, from which the KL penalty is measured (the SFT model in InstructGPT)."""
    reward: Params
    """Parameters of the reward model; the first argument of `Models.score`."""
    heldout: Params | None = None
    """Parameters of a second reward model. Its mean score is logged as ``heldout_reward``; nothing is trained on it."""


@struct.dataclass
class Hyper:
    """Hyperparameters as traced scalars, which can change without recompilation and be swept with `jax.vmap`."""

    learning_rate: Any = 1e-5
    """Learning rate of the policy (InstructGPT swept 2.55e-6 to 2.55e-5 for 1.3B and 6B)."""
    critic_learning_rate: Any = 1e-5
    """Learning rate of the critic (InstructGPT: 9e-6; 5e-6 for 175B)."""
    kl_coef: Any = 0.02
    """KL coefficient beta, in reward per nat (InstructGPT: 0.02; Stiennon: 0.05); initial value if ``kl_gain`` > 0."""
    kl_target: Any = 6.0
    """Target KL of the adaptive controller, in nats per response (Ziegler 2019: 6 or 10)."""
    kl_gain: Any = 0.0
    """Gain of the adaptive controller per iteration (Ziegler 2019: 0.1); 0 keeps ``kl_coef`` fixed (InstructGPT)."""
    clip: Any = 0.2
    """Clip range epsilon of the probability ratio (0.2 in InstructGPT and in the code of Ziegler 2019)."""
    value_clip: Any = 0.2
    """Clip range of the value around the old value (0.2 in the code of Ziegler 2019), in units of reward or, with
    ``normalise_values``, in standard deviations of the returns."""
    discount: Any = 1.0
    """Discount factor gamma per token (1 in InstructGPT, Stiennon and Ziegler)."""
    lambda_: Any = 0.95
    """Lambda of GAE (Ziegler and Stiennon: 0.95; Xu: 1; InstructGPT does not report it)."""
    temperature: Any = 1.0
    """Temperature of the policy, used for sampling and for every log-probability of a response (InstructGPT: 1)."""
    missing_stop_score: Any = -1.0
    """Score of a response without a stop token (Ziegler 2019: -1); with ``unfinished=subtract_penalty``, this negative
    number is added to the response's score instead."""
    reward_clip: Any = jnp.inf
    """Scores are clipped to [-reward_clip, reward_clip] (Xu 2024: 20), token by token if each token has one; infinity
    disables clipping."""
    value_coef: Any = 1.0
    """Weight of the value loss. It matters mainly if critic and policy share a trunk (Ziegler 2019: 0.1)."""
    entropy_coef: Any = 0.0
    """Weight of the entropy bonus, used if the step has ``entropy_bonus`` (none in InstructGPT, Stiennon, Ziegler)."""
    kl_loss_coef: Any = 0.0
    """Weight of the KL loss, used if the step has a ``kl_loss`` (GRPO: 0.04). If it is above 0, set ``kl_coef`` to 0;
    otherwise the KL is penalised twice."""
    ptx_coef: Any = 0.0
    """Weight gamma of the pretraining loss, which is a mean over tokens (InstructGPT: 27.8); 0 selects plain PPO and
    skips the computation of this loss."""
    sampler_cap: Any = 2.0
    """Largest importance weight of a token, used if the step has ``correct_sampler``."""
    max_grad_norm: Any = jnp.inf
    """Gradients with a larger l2 norm are scaled down to this norm; infinity disables clipping (InstructGPT does not
    report it). Policy and critic are clipped separately, unless they share a trunk."""
    ema_decay: Any = 0.0
    """Decay per update of the averaged policy weights (InstructGPT: 0.992); at 0 they equal the policy."""
    reference_decay: Any = 1.0
    """Decay per iteration of a reference that follows the policy (Xu 2024); 1 keeps it fixed. Used if the state has a
    reference."""


def replace_score(scores_B: jax.Array, stopped_B: jax.Array, hyper: Hyper) -> jax.Array:
    """Replaces the score of each response without a stop token by ``missing_stop_score`` (Ziegler 2019)."""
    return rewards.replace_unfinished(scores_B, stopped_B, score=hyper.missing_stop_score)


def subtract_penalty(scores_B: jax.Array, stopped_B: jax.Array, hyper: Hyper) -> jax.Array:
    """Adds ``missing_stop_score``, which should be negative, to the score of each response without a stop token.

    Some later implementations do this; the papers replace the score (`replace_score`).
    """
    return rewards.penalise_unfinished(scores_B, stopped_B, penalty=-hyper.missing_stop_score)


@struct.dataclass
class RunningMoments:
    """Running mean and variance of weighted observations, merged without cancellation (Chan et al. 1979)."""

    weight: jax.Array
    mean: jax.Array
    squares: jax.Array
    """Sum of the squared deviations from the mean."""

    def merge(self, observed: metrics.Metric, variance: jax.Array) -> RunningMoments:
        """Returns the moments of these and further observations, given by their mean and their variance."""
        total, gap = self.weight + observed.weight, observed.sum / jnp.maximum(observed.weight, 1e-8) - self.mean
        share = observed.weight / jnp.maximum(total, 1e-8)
        squares = self.squares + observed.weight * variance + jnp.square(gap) * self.weight * share
        return RunningMoments(total, self.mean + gap * share, squares)

    def scale(self) -> tuple[jax.Array, jax.Array]:
        """Returns mean and standard deviation; 0 and 1 if there are no observations."""
        some = self.weight > 0
        variance = self.squares / jnp.where(some, self.weight, 1.0)
        return jnp.where(some, self.mean, 0.0), jnp.where(some, jnp.sqrt(jnp.maximum(variance, 1e-8)), 1.0)


@struct.dataclass
class RunningMeans:
    """Running means over the responses of all iterations so far."""

    returns: metrics.Metric
    """Score of a response minus its KL penalty; the mean is REINFORCE's baseline."""
    targets: RunningMoments
    """Targets of the critic, per token."""


class PPOState(state_lib.TrainState):
    """A ``TrainState`` with ``params = {"policy", "critic"}`` and all other values that a resumed run needs."""

    kl_scale: kl.ControllerState
    """The factor by which the adaptive controller multiplies `Hyper.kl_coef`; 1 at the start."""
    ema: Params
    """Exponential moving average of the policy weights (InstructGPT C.4)."""
    past: RunningMeans
    """Running means over all earlier iterations."""
    reference: Params | None = None
    """A reference that follows the policy and replaces `Frozen.reference`; None for a frozen reference."""


class Batch(NamedTuple):
    """The input of one iteration."""

    prompts_BP: jax.Array
    """int32 prompts, left-padded."""
    mask_BP: jax.Array
    """bool, True at the tokens of the prompts; the last column must be True."""
    ptx: TokenBatch | None = None
    """Pretraining rows ``[epochs * minibatches * rows, L]``; each update takes ``rows`` of them."""


class Denominators(NamedTuple):
    """Denominators of the sums of a minibatch, shared by its micro-batches."""

    policy: jax.Array
    """Denominator of the policy loss, from the `aggregation.Reduction`."""
    tokens: jax.Array
    """Number of response tokens."""


ExtraMetrics = Callable[..., dict[str, jax.Array]]
"""See ``extra_metrics`` in `ppo.make_train_step`."""


def create(
    policy: Params,
    critic: Params | None,
    tx: Any,
    *,
    reference: Params | None = None,
    check_learning_rate: bool = True,
) -> PPOState:
    """Returns a new state at step 0.

    Args:
        policy: Parameters of the policy. They are copied, as are the other parameters, because a step donates its
            state.
        critic: Parameters of the critic; None for methods without one.
        tx: An optax transformation with unit learning rate, see `optim.update.apply_gradients`.
        reference: Initial parameters of a reference that follows the policy with decay `Hyper.reference_decay` and
            replaces `Frozen.reference`; None for a frozen reference.
        check_learning_rate: Whether to check ``tx``, see `state.create`.

    Returns:
        A `PPOState`.
    """
    base = state_lib.create(
        {"policy": policy} | ({} if critic is None else {"critic": critic}), tx, check_learning_rate=check_learning_rate
    )
    ema, reference = (jax.tree.map(lambda x: jnp.array(x, copy=True), tree) for tree in (policy, reference))
    returns = metrics.Metric(jnp.zeros(()), jnp.zeros(()))
    past = RunningMeans(returns, RunningMoments(jnp.zeros(()), jnp.zeros(()), jnp.zeros(())))
    return PPOState(
        step=base.step,
        apply_fn=base.apply_fn,
        params=base.params,
        tx=base.tx,
        opt_state=base.opt_state,
        kl_scale=kl.init_controller(1.0),
        ema=ema,
        past=past,
        reference=reference,
    )


def moving_average(old: Params, new: Params, decay: Any) -> Params:
    """Returns ``decay * old + (1 - decay) * new``, leaf by leaf."""
    return jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, old, new)


def finish_iteration(state: PPOState, hyper: Hyper, logs: dict[str, Any], *, skipped: jax.Array) -> PPOState:
    """Returns the state with its KL controller, running means and moving reference updated after an iteration.

    Args:
        state: The state after the updates of the iteration.
        hyper: The hyperparameters of the iteration.
        logs: The metrics of `ppo.collect`, which include ``target`` and ``target_variance`` if there is a critic.
        skipped: Whether an update was skipped. If so, the state is returned unchanged, because a NaN would stay in the
            controller forever.

    Returns:
        A `PPOState`.
    """
    past = state.past.replace(returns=state.past.returns.merge(logs["return"]))  # type: ignore[attr-defined]
    if "target" in logs:
        past = past.replace(targets=past.targets.merge(logs["target"], logs["target_variance"]))
    kl_scale = kl.update_controller(state.kl_scale, logs["kl"].value(), target=hyper.kl_target, gain=hyper.kl_gain)
    new = {"kl_scale": kl_scale, "past": past}
    if state.reference is not None:
        new["reference"] = moving_average(state.reference, state.params["policy"], hyper.reference_decay)
    old = {name: getattr(state, name) for name in new}
    return state.replace(**jax.tree.map(lambda a, b: jnp.where(skipped, a, b), old, new))
