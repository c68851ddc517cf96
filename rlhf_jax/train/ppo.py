"""PPO and PPO-ptx for language models (InstructGPT 3.5 and C.4; Stiennon 2020; Ziegler 2019; PAPERS 1.4 to 1.7).

Two pure functions, in the order of the paper::

    collect:  prompts -> answers -> scores -> per-token KL rewards -> GAE -> Experience
    update:   Experience -> epochs x minibatches of (clipped losses [+ ptx] -> gradient -> apply) -> new state

and `make_train_step`, which is one after the other in a single program.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax import advantages, kl, metrics, reduce, rewards
from rlhf_jax.losses import policy as policy_losses
from rlhf_jax.losses import value as value_losses
from rlhf_jax.train import sft, step
from rlhf_jax.train import state as state_lib
from rlhf_jax.train.sft import TokenBatch
from rlhf_jax.types import Experience, Params, Rollout


class Models(NamedTuple):
    """What PPO calls. P is the prompt width; every ``params`` is the pytree that belongs to the function."""

    generate: Callable[..., Rollout]
    """``(params, rng_B, prompts_BP, mask_BP, temperature) -> Rollout``"""
    logprobs: Callable[..., Any]
    """``(params, tokens_BL, mask_BL, temperature) -> (logprobs_BT, entropy_BT)`` of the response tokens."""
    values: Callable[..., jax.Array]
    """``(params, tokens_BL, mask_BL) -> values_BT`` before each response token."""
    score: Callable[..., jax.Array]
    """``(params, rollout) -> scores_B``; any function, a reward model or a program."""
    token_logprobs: Callable[..., jax.Array] | None = None
    """``(params, tokens_BL, mask_BL=...) -> [B, L]``, for the pretraining rows of PPO-ptx."""
    watch: Callable[[Rollout], dict[str, jax.Array]] | None = None
    """``rollout -> {name: [B]}``: numbers to log and not to train on, such as a gold score (over-optimisation)."""
    join: Callable[[Any, Params], Params] = step.all_trained
    """``(frozen, params) -> {"policy", "critic"}`` as the functions above want them. A policy of adapters on its own
    reference, which is then there once: ``lambda frozen, params: {**params, "policy":
    lora.attach(frozen.reference, params["policy"], scale=...)}``."""


class Frozen(NamedTuple):
    """What the step reads and never changes."""

    reference: Params
    reward: Params


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
    """Replaces the score of an answer that never stopped."""
    ptx_coef: Any = 0.0
    """Weight of the mean pretraining loss per token; 0 is plain PPO, and then costs nothing."""
    sampler_cap: Any = 2.0
    """Largest weight of a token where the sampler's distribution is corrected for."""
    max_grad_norm: Any = jnp.inf
    ema_decay: Any = 0.0
    """Of the averaged policy weights (0.992 per step in InstructGPT); 0 follows the policy."""


class PPOState(state_lib.TrainState):
    """``params = {"policy", "critic"}``, and beside the optimiser what else a resumed run needs."""

    kl_scale: kl.ControllerState
    """What the adaptive controller has come to multiply ``Hyper.kl_coef`` by, 1 at the start."""
    ema: Params
    """Averaged policy weights."""


class Batch(NamedTuple):
    """One iteration's input."""

    prompts_BP: jax.Array
    mask_BP: jax.Array
    ptx: TokenBatch | None = None
    """Pretraining rows ``[epochs * minibatches * rows, L]``, dealt out to the updates in turn."""


def create(policy: Params, critic: Params, tx: Any) -> PPOState:
    """A fresh state; parameters are copied, since a step donates its state. ``tx`` has unit learning rate."""
    base = state_lib.create({"policy": policy, "critic": critic}, tx)
    ema = jax.tree.map(lambda x: jnp.array(x, copy=True), policy)
    return PPOState(
        step=base.step,
        apply_fn=base.apply_fn,
        params=base.params,
        tx=base.tx,
        opt_state=base.opt_state,
        kl_scale=kl.controller(1.0),
        ema=ema,
    )


def collect(
    models: Models,
    params: Params,
    frozen: Frozen,
    hyper: Hyper,
    batch: Batch,
    rng: jax.Array,
    *,
    kl_scale: jax.Array | float = 1.0,
    whiten_rewards: bool = False,
    correct_sampler: bool = False,
) -> tuple[Experience, dict[str, Any]]:
    """Answer the prompts and turn scores into advantages and returns. ``rng`` is consumed; ``params`` as in the state.

    The old log-probabilities come from the same scoring function as the reference's and the update's, so that the
    first ratio is 1 and the KL of equal models 0; the sampler's own are compared with them in ``sampler_gap``. Where
    the sampler drew from another distribution (top-p, a faster kernel), ``correct_sampler`` weighs each token's policy
    loss by how much likelier the policy makes it than the sampler did, up to ``Hyper.sampler_cap``.
    """
    params = models.join(frozen, params)
    rng_B = jax.random.split(rng, batch.prompts_BP.shape[0])
    rollout = models.generate(params["policy"], rng_B, batch.prompts_BP, batch.mask_BP, hyper.temperature)
    tokens_BL, mask_BL, response_BT = rollout.tokens_BL, rollout.mask_BL, rollout.response_mask_BT
    scores_B = reduce.as_float32(models.score(frozen.reward, rollout))
    stopped_B = rollout.finish_B == 1
    paid_B = rewards.missing_stop(scores_B, stopped_B, score=hyper.missing_stop_score)

    logprobs_BT, entropy_BT = models.logprobs(params["policy"], tokens_BL, mask_BL, hyper.temperature)
    reference_BT, _ = models.logprobs(frozen.reference, tokens_BL, mask_BL, hyper.temperature)
    values_BT = models.values(params["critic"], tokens_BL, mask_BL)

    kl_coef = hyper.kl_coef * kl_scale
    rewards_BT = rewards.token_rewards(paid_B, logprobs_BT, reference_BT, response_BT, kl_coef=kl_coef)
    if whiten_rewards:
        rewards_BT = advantages.whiten(rewards_BT, where=response_BT, shift_mean=False)
    gae = partial(advantages.gae, discount=hyper.discount, lambda_=hyper.lambda_)
    advantages_BT, returns_BT = jax.vmap(gae)(rewards_BT, values_BT, response_BT)
    experience = Experience(
        tokens_BL=tokens_BL,
        mask_BL=mask_BL,
        response_mask_BT=response_BT,
        logprobs_BT=logprobs_BT,
        values_BT=values_BT,
        advantages_BT=advantages.whiten(advantages_BT, where=response_BT),
        returns_BT=returns_BT,
        weights_BT=policy_losses.importance_weights(logprobs_BT, rollout.logprobs_BT, cap=hyper.sampler_cap)
        if correct_sampler
        else None,
    )
    kl_B = reduce.masked_sum(kl.k1(logprobs_BT, reference_BT), where=response_BT, axis=-1)
    spread = reduce.masked_var(returns_BT, where=response_BT)
    missed = reduce.masked_mean(jnp.square(values_BT - returns_BT), where=response_BT)
    logs = {
        "reward": metrics.mean_metric(scores_B),
        "kl": metrics.mean_metric(kl_B),
        "kl_coef": kl_coef,
        "length": metrics.mean_metric(rollout.lengths_B),
        "stopped": metrics.mean_metric(stopped_B),
        "entropy": metrics.mean_metric(entropy_BT, response_BT),
        "explained_variance": 1.0 - missed / jnp.maximum(spread, 1e-8),
        "sampler_gap": jnp.max(jnp.abs(jnp.where(response_BT, rollout.logprobs_BT - logprobs_BT, 0.0))),
    }
    if models.watch is not None:
        logs |= {name: metrics.mean_metric(numbers_B) for name, numbers_B in models.watch(rollout).items()}
    return experience, logs


def loss(
    models: Models, params: Params, experience: Experience, hyper: Hyper
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Clipped policy loss plus clipped value loss of one minibatch (PAPERS 1.6); the critic has its own rate instead
    of a value coefficient, and no weight is shared. No entropy bonus: no paper of the three has one. ``params`` are
    those that ``models.join`` gives.
    """
    where_BT = experience.response_mask_BT
    logprobs_BT, _ = models.logprobs(params["policy"], experience.tokens_BL, experience.mask_BL, hyper.temperature)
    values_BT = models.values(params["critic"], experience.tokens_BL, experience.mask_BL)
    policy_BT = policy_losses.clipped_policy(
        logprobs_BT, experience.logprobs_BT, experience.advantages_BT, clip=hyper.clip
    )
    if experience.weights_BT is not None:
        policy_BT = experience.weights_BT * policy_BT
    value_BT = value_losses.clipped_value(values_BT, experience.values_BT, experience.returns_BT, clip=hyper.value_clip)
    policy_loss = reduce.masked_mean(policy_BT, where=where_BT)
    value_loss = reduce.masked_mean(value_BT, where=where_BT)
    log_ratio_BT = jnp.where(where_BT, logprobs_BT - experience.logprobs_BT, 0.0)
    ratio_BT = jnp.exp(log_ratio_BT)
    logs = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "approx_kl": reduce.masked_mean(0.5 * jnp.square(log_ratio_BT), where=where_BT),
        "clip_fraction": reduce.masked_mean(jnp.abs(ratio_BT - 1.0) > hyper.clip, where=where_BT),
        "ratio_max": jnp.max(ratio_BT),
        "ratio_error": jnp.max(jnp.abs(ratio_BT - 1.0)),
    }
    return policy_loss + value_loss, logs


def ptx_loss(models: Models, policy: Params, rows: TokenBatch) -> jax.Array:
    """Mean negative log-probability of the pretraining tokens (InstructGPT Eq 2, second part); per token."""
    if models.token_logprobs is None:
        raise ValueError("Batch.ptx was given, but Models.token_logprobs was not")
    logprobs_BL = sft.batch_logprobs(models.token_logprobs, policy, rows)
    return -reduce.masked_mean(logprobs_BL, where=rows.loss_mask_BL)


def update(
    models: Models,
    state: PPOState,
    experience: Experience,
    hyper: Hyper,
    ptx: TokenBatch | None,
    rng: jax.Array,
    *,
    frozen: Frozen | None = None,
    epochs: int = 1,
    minibatches: int = 8,
) -> tuple[PPOState, dict[str, jax.Array]]:
    """Improve policy and critic on one batch of experience: ``epochs * minibatches`` optimiser steps in one scan.

    Minibatches are drawn anew every epoch. In PPO-ptx the gradients of the two parts are taken one after the other and
    added before one optimiser step (InstructGPT C.4). ``rng`` is consumed; ``frozen`` is for ``models.join``. Logs are
    means over the steps, but ``ratio_max`` (their maximum) and ``first_ratio_error``, how far any ratio was from 1
    before the first step.
    """
    B = experience.tokens_BL.shape[0]
    if B % minibatches:
        raise ValueError(f"a batch of {B} answers does not divide into {minibatches} minibatches")
    orders_EB = jnp.stack([jax.random.permutation(key, B) for key in jax.random.split(rng, epochs)])
    rows_UM = orders_EB.reshape(epochs * minibatches, B // minibatches)
    joined = partial(models.join, frozen)
    ptx_U = None if ptx is None else jax.tree.map(lambda x: x.reshape(rows_UM.shape[0], -1, *x.shape[1:]), ptx)

    def one_step(state: PPOState, now: tuple[jax.Array, TokenBatch | None]) -> tuple[PPOState, dict[str, jax.Array]]:
        rows_M, pretraining = now
        minibatch = jax.tree.map(lambda x: x[rows_M], experience)
        (value, logs), grads = jax.value_and_grad(lambda p: loss(models, joined(p), minibatch, hyper), has_aux=True)(
            state.params
        )
        if pretraining is not None:
            # The branch is taken at run time: plain PPO and PPO-ptx are one program, and PPO does not pay for ptx.
            nll, ptx_grads = jax.lax.cond(
                hyper.ptx_coef > 0,
                jax.value_and_grad(
                    lambda p: ptx_loss(models, joined({**state.params, "policy": p})["policy"], pretraining)
                ),
                lambda p: (jnp.zeros(()), jax.tree.map(jnp.zeros_like, p)),
                state.params["policy"],
            )
            grads["policy"] = jax.tree.map(lambda g, h: g + hyper.ptx_coef * h, grads["policy"], ptx_grads)
            logs["ptx_loss"] = nll
        state, update_logs = step.apply_gradients(
            state,
            grads,
            learning_rate={"policy": hyper.learning_rate, "critic": hyper.critic_learning_rate},
            max_grad_norm=hyper.max_grad_norm,
            loss=value,
        )
        # A skipped step leaves the average as it was, too.
        decay = jnp.where(update_logs["skipped"] > 0, 1.0, hyper.ema_decay)
        ema = jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, state.ema, state.params["policy"])
        return state.replace(ema=ema), logs | update_logs

    state, logs_U = jax.lax.scan(one_step, state, (rows_UM, ptx_U))
    logs = {name: jnp.mean(values_U) for name, values_U in logs_U.items()}
    first_ratio_error = logs_U["ratio_error"][0]
    logs |= {"ratio_max": jnp.max(logs_U["ratio_max"]), "first_ratio_error": first_ratio_error}
    logs["skipped"] = jnp.sum(logs_U["skipped"])
    return state, {name: value for name, value in logs.items() if name != "ratio_error"}


def make_train_step(
    models: Models,
    *,
    epochs: int = 1,
    minibatches: int = 8,
    whiten_rewards: bool = False,
    correct_sampler: bool = False,
) -> Callable[..., tuple[PPOState, dict[str, Any]]]:
    """Build ``train_step(state, frozen, hyper, batch, rng) -> (state, metrics)``: rollout to update in one program."""

    def train_step(
        state: PPOState, frozen: Frozen, hyper: Hyper, batch: Batch, rng: jax.Array
    ) -> tuple[PPOState, dict[str, Any]]:
        sample_rng, order_rng = jax.random.split(jax.random.fold_in(rng, state.step))
        experience, logs = collect(
            models,
            state.params,
            frozen,
            hyper,
            batch,
            sample_rng,
            kl_scale=state.kl_scale.kl_coef,
            whiten_rewards=whiten_rewards,
            correct_sampler=correct_sampler,
        )
        state, update_logs = update(
            models,
            state,
            experience,
            hyper,
            batch.ptx,
            order_rng,
            frozen=frozen,
            epochs=epochs,
            minibatches=minibatches,
        )
        observed = logs["kl"].value()
        scale = kl.update_controller(state.kl_scale, observed, target=hyper.kl_target, gain=hyper.kl_gain)
        # Held back with the weights: a KL that is not a number would stay in the controller for good.
        held = update_logs["skipped"] > 0
        scale = jax.tree.map(lambda new, old: jnp.where(held, old, new), scale, state.kl_scale)
        return state.replace(kl_scale=scale), logs | update_logs | {"learning_rate": hyper.learning_rate}

    return train_step
