"""PPO and PPO-ptx for language models (InstructGPT 3.5 and C.4; Stiennon 2020; Ziegler 2019).

Two pure functions, in the order of the paper::

    collect:  prompts -> answers -> scores -> per-token KL rewards -> GAE -> Experience
    update:   Experience -> epochs x minibatches of (clipped losses [+ ptx] -> gradient -> apply) -> new state

and `make_train_step`, which is one after the other in a single program. Without a critic, and with another estimator of
advantages and another reduction, the same two are REINFORCE, RLOO, GRPO and their kin: see `train.estimators`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import aggregation, kl, masking, metrics
from rlhf_jax.losses import policy as policy_losses
from rlhf_jax.losses import value as value_losses
from rlhf_jax.train import estimators, ppo_state
from rlhf_jax.train import minibatches as dealing
from rlhf_jax.train import ptx as ptx_lib
from rlhf_jax.train.minibatches import AxisName
from rlhf_jax.train.optim import nonfinite
from rlhf_jax.train.optim import update as step
from rlhf_jax.train.ppo_state import (
    Batch,
    Frozen,
    Hyper,
    Models,
    Past,
    PPOState,
    create,
    lowered,
    replaced,
    shared_trunk,
)
from rlhf_jax.train.ptx import ptx_loss
from rlhf_jax.train.sft import TokenBatch
from rlhf_jax.types import Experience, Params

__all__ = [
    "Batch",
    "Frozen",
    "Hyper",
    "Models",
    "PPOState",
    "Past",
    "Totals",
    "collect",
    "create",
    "loss",
    "lowered",
    "make_train_step",
    "ptx_loss",
    "replaced",
    "shared_trunk",
    "update",
]


def collect(
    models: Models,
    params: Params,
    frozen: Frozen,
    hyper: Hyper,
    batch: Batch,
    rng: jax.Array,
    *,
    kl_scale: jax.Array | float = 1.0,
    past: Past | None = None,
    samples: int = 1,
    estimate: estimators.Estimator = estimators.gae,
    unfinished: Callable[..., jax.Array] = replaced,
    normalise_values: bool = False,
    correct_sampler: bool = False,
    axis_name: AxisName = None,
) -> tuple[Experience, dict[str, Any]]:
    """Answer the prompts and turn scores into advantages and returns. ``rng`` is consumed; ``params`` as in the state.

    The old log-probabilities come from the same scoring function as the reference's and the update's, so that the
    first ratio is 1 and the KL of equal models 0; the sampler's own are compared with them in ``sampler_gap``. The
    other arguments are those of `make_train_step`.
    """
    params = models.join(frozen, params)
    B = batch.prompts_BP.shape[0] * samples
    rng_B = dealing.row_keys(rng, B, axis_name=axis_name)
    rollout = models.generate(params["policy"], rng_B, batch.prompts_BP, batch.mask_BP, hyper.temperature)
    tokens_BL, mask_BL, response_BT = rollout.tokens_BL, rollout.mask_BL, rollout.response_mask_BT
    scores_B = masking.as_float32(models.score(frozen.reward, rollout))
    if scores_B.shape != (B,) or response_BT.shape[0] != B:
        raise ValueError(
            f"Models.score gave shape {scores_B.shape} for {response_BT.shape[0]} answers, and {samples} to each of "
            f"{batch.prompts_BP.shape[0]} prompts are {B}; it must give one score an answer"
        )
    stopped_B = rollout.finish_B == 1
    paid_B = unfinished(jnp.clip(scores_B, -hyper.reward_clip, hyper.reward_clip), stopped_B, hyper)

    logprobs_BT, entropy_BT = models.logprobs(params["policy"], tokens_BL, mask_BL, hyper.temperature)
    reference_BT, _ = models.logprobs(frozen.reference, tokens_BL, mask_BL, hyper.temperature)
    own_BT = None if models.values is None else models.values(params["critic"], tokens_BL, mask_BL)
    scale = past.scale() if past is not None and normalise_values else None
    values_BT = own_BT if scale is None or own_BT is None else own_BT * scale[1] + scale[0]

    kl_coef = hyper.kl_coef * kl_scale
    before = jnp.zeros(()) if past is None else jnp.where(past.returns.weight > 0, past.returns.value(), 0.0)
    scored = estimators.Scored(paid_B, logprobs_BT, reference_BT, values_BT, response_BT, kl_coef, before)
    shared: Any = {} if axis_name is None else {"axis_name": axis_name}
    advantages_BT, returns_BT = estimate(scored, hyper, **shared)
    experience = Experience(
        tokens_BL=tokens_BL,
        mask_BL=mask_BL,
        response_mask_BT=response_BT,
        logprobs_BT=logprobs_BT,
        values_BT=own_BT,
        advantages_BT=advantages_BT,
        returns_BT=returns_BT if scale is None or returns_BT is None else (returns_BT - scale[0]) / scale[1],
        weights_BT=policy_losses.importance_weights(logprobs_BT, rollout.logprobs_BT, cap=hyper.sampler_cap)
        if correct_sampler
        else None,
        reference_BT=reference_BT,
    )
    kl_B = masking.masked_sum(kl.k1(logprobs_BT, reference_BT), where=response_BT, axis=-1)
    gap_BT = jnp.where(response_BT, rollout.logprobs_BT - logprobs_BT, 0.0)
    odds_BT = masking.masked_fill(kl.ratio(logprobs_BT, rollout.logprobs_BT), where=response_BT)
    total, mean = partial(masking.masked_sum, axis_name=axis_name), partial(metrics.mean_metric, axis_name=axis_name)
    tokens = total(response_BT, where=True)
    logs = {
        "reward": mean(scores_B),
        "reward_std": jnp.sqrt(masking.masked_var(scores_B, where=True, axis_name=axis_name)),
        "kl": mean(kl_B),
        "kl_coef": kl_coef,
        "return": mean(paid_B - kl_coef * kl_B),
        "length": mean(rollout.lengths_B),
        "stopped": mean(stopped_B),
        "entropy": mean(entropy_BT, response_BT),
        "sampler_gap": masking.global_max(jnp.abs(gap_BT), axis_name=axis_name),
        "sampler_gap_mean": mean(jnp.abs(gap_BT), response_BT),
        "sampler_ess": jnp.square(total(odds_BT, where=True))
        / jnp.maximum(total(jnp.square(odds_BT), where=True) * tokens, 1e-8),
    }
    bad = nonfinite.of_tokens(logprobs_BT, reference_BT, values_BT, where_BT=response_BT)
    logs |= nonfinite.numbers(bad.either(nonfinite.of_losses(scores_B)), axis_name=axis_name)
    if values_BT is not None and returns_BT is not None:
        spread = masking.masked_var(returns_BT, where=response_BT, axis_name=axis_name)
        missed = masking.masked_mean(jnp.square(values_BT - returns_BT), where=response_BT, axis_name=axis_name)
        logs["explained_variance"] = 1.0 - missed / jnp.maximum(spread, 1e-8)
        logs |= {"target": mean(returns_BT, response_BT)}
        logs |= {"target_square": mean(jnp.square(returns_BT), response_BT)}
    if frozen.heldout is not None:
        logs["heldout_reward"] = mean(masking.as_float32(models.score(frozen.heldout, rollout)))
    if models.watch is not None:
        logs |= {name: mean(numbers_B) for name, numbers_B in models.watch(rollout).items()}
    return experience, logs


class Totals(NamedTuple):
    """What a minibatch's sums are divided by, which its micro-batches share."""

    policy: jax.Array
    tokens: jax.Array


def loss(
    models: Models,
    params: Params,
    experience: Experience,
    hyper: Hyper,
    *,
    weights_B: jax.Array | None = None,
    totals: Totals | None = None,
    kl_loss: Callable[..., jax.Array] | None = None,
    entropy_bonus: bool = False,
    axis_name: AxisName = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Clipped policy loss plus clipped value loss of one minibatch (Schulman 2017; Ziegler 2019, code).

    ``params`` are those that ``models.join`` gives. ``weights_B`` and ``totals`` say how tokens become a mean; by
    default every token weighs the same.
    """
    where_BT = experience.response_mask_BT
    if weights_B is None or totals is None:
        weights_B, count = aggregation.token_mean(where_BT, axis_name=axis_name)
        totals = Totals(count, count)
    logprobs_BT, entropy_BT = models.logprobs(
        params["policy"], experience.tokens_BL, experience.mask_BL, hyper.temperature
    )
    policy_BT = policy_losses.clipped_policy(
        logprobs_BT, experience.logprobs_BT, experience.advantages_BT, clip=hyper.clip
    )
    if experience.weights_BT is not None:
        policy_BT = experience.weights_BT * policy_BT
    if kl_loss is not None:
        assert experience.reference_BT is not None
        policy_BT = policy_BT + hyper.kl_loss_coef * kl_loss(logprobs_BT, experience.reference_BT)

    def token_mean(x_BT: jax.Array) -> jax.Array:
        return masking.masked_sum(x_BT, where=where_BT, axis_name=axis_name) / totals.tokens

    policy_sum = aggregation.weighted_sum(policy_BT, weights_B, where=where_BT, axis_name=axis_name)
    objective = policy_loss = policy_sum / totals.policy
    log_ratio_BT = jnp.where(where_BT, logprobs_BT - experience.logprobs_BT, 0.0)
    ratio_BT = jnp.exp(log_ratio_BT)
    logs = {
        "policy_loss": policy_loss,
        "approx_kl": token_mean(0.5 * jnp.square(log_ratio_BT)),
        "clip_fraction": token_mean(jnp.abs(ratio_BT - 1.0) > hyper.clip),
        "ratio_mean": token_mean(ratio_BT),
        "ratio_max": masking.global_max(ratio_BT, axis_name=axis_name),
        "ratio_error": masking.global_max(jnp.abs(ratio_BT - 1.0), axis_name=axis_name),
    }
    if models.values is not None and experience.values_BT is not None and experience.returns_BT is not None:
        values_BT = models.values(params["critic"], experience.tokens_BL, experience.mask_BL)
        value_loss = token_mean(
            value_losses.clipped_value(values_BT, experience.values_BT, experience.returns_BT, clip=hyper.value_clip)
        )
        objective += hyper.value_coef * value_loss
        logs["value_loss"] = value_loss
    if entropy_bonus:
        objective -= hyper.entropy_coef * token_mean(entropy_BT)
    return objective, logs


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
    micro_batches: int = 1,
    reduction: aggregation.Reduction = aggregation.token_mean,
    kl_loss: Callable[..., jax.Array] | None = None,
    entropy_bonus: bool = False,
    shards: int = 1,
    axis_name: AxisName = None,
) -> tuple[PPOState, dict[str, jax.Array]]:
    """Improve policy and critic on one batch of experience: ``epochs * minibatches`` optimiser steps in one scan.

    Minibatches are drawn anew every epoch. In PPO-ptx the gradients of the two parts are taken one after the other and
    added before one optimiser step (InstructGPT C.4). ``rng`` is consumed; ``frozen`` is for ``models.join``. Logs are
    means over the steps, but ``ratio_max`` (their maximum) and ``first_ratio_error``, how far any ratio was from 1
    before the first step. The other arguments are those of `make_train_step`.
    """
    B = experience.tokens_BL.shape[0]
    rows_USR = dealing.minibatches(rng, B, epochs=epochs, count=minibatches, shards=shards, axis_name=axis_name)
    joined = partial(models.join, frozen)
    ptx_U = dealing.in_turn(ptx, rows_USR.shape[0], shards=rows_USR.shape[1])

    def loss_fn(params: Params, part: tuple[Experience, jax.Array], totals: Totals) -> tuple[jax.Array, Any]:
        rows, weights_B = part
        how: Any = {"weights_B": weights_B, "totals": totals, "kl_loss": kl_loss, "entropy_bonus": entropy_bonus}
        return loss(models, joined(params), rows, hyper, **how, axis_name=axis_name)

    def one_step(state: PPOState, now: tuple[jax.Array, TokenBatch | None]) -> tuple[PPOState, dict[str, jax.Array]]:
        rows_SR, pretraining = now
        minibatch = dealing.take(experience, rows_SR)
        weights_M, total = reduction(minibatch.response_mask_BT, axis_name=axis_name)
        totals = Totals(total, aggregation.token_mean(minibatch.response_mask_BT, axis_name=axis_name)[1])
        (value, logs), grads = step.loss_and_grads(
            loss_fn, state.params, (minibatch, weights_M), totals, micro_batches=micro_batches, merge=_merged
        )
        if pretraining is not None:
            # The branch is taken at run time: plain PPO and PPO-ptx are one program, and PPO does not pay for ptx.
            def of_text(policy: Params) -> jax.Array:
                policy = joined({**state.params, "policy": policy})["policy"]
                return ptx_loss(models, policy, pretraining, axis_name=axis_name)

            nll, ptx_grads = jax.lax.cond(
                hyper.ptx_coef > 0,
                jax.value_and_grad(of_text),
                lambda p: (jnp.zeros(()), jax.tree.map(jnp.zeros_like, p)),
                state.params["policy"],
            )
            grads["policy"] = jax.tree.map(lambda g, h: g + hyper.ptx_coef * h, grads["policy"], ptx_grads)
            logs["ptx_loss"] = nll
            how: Any = {"weights_B": weights_M, "total": total, "axis_name": axis_name}
            logs |= ptx_lib.coefficients(hyper.ptx_coef, pretraining, minibatch.response_mask_BT, **how)
        if axis_name is not None:
            grads = jax.lax.pmean(grads, axis_name)
        logs |= {f"grad_norm_{part}": step.global_norm(grads[part]) for part in grads}
        rates = {"policy": hyper.learning_rate, "critic": hyper.critic_learning_rate}
        state, update_logs = step.apply_gradients(
            state,
            grads,
            learning_rate={part: rates[part] for part in grads},
            max_grad_norm=hyper.max_grad_norm,
            loss=value,
        )
        # A skipped step leaves the average as it was, too.
        decay = jnp.where(update_logs["skipped"] > 0, 1.0, hyper.ema_decay)
        return state.replace(ema=ppo_state.towards(state.ema, state.params["policy"], decay)), logs | update_logs

    state, logs_U = jax.lax.scan(one_step, state, (rows_USR, ptx_U))
    logs = {name: jnp.mean(values_U) for name, values_U in logs_U.items()}
    first_ratio_error = logs_U["ratio_error"][0]
    logs |= {"ratio_max": jnp.max(logs_U["ratio_max"]), "first_ratio_error": first_ratio_error}
    skipped_U = logs_U["skipped"]
    logs["skipped"] = jnp.sum(skipped_U)
    logs["bad_update"] = jnp.where(jnp.any(skipped_U > 0), jnp.argmax(skipped_U), -1).astype(jnp.float32)
    return state, {name: value for name, value in logs.items() if name != "ratio_error"}


def _merged(logs_M: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The logs of a minibatch from those of its micro-batches."""
    largest = ("ratio_max", "ratio_error")
    return {name: jnp.max(x_M) if name in largest else jnp.sum(x_M) for name, x_M in logs_M.items()}


def make_train_step(
    models: Models,
    *,
    epochs: int = 1,
    minibatches: int = 8,
    micro_batches: int = 1,
    samples: int = 1,
    estimate: estimators.Estimator = estimators.gae,
    reduction: aggregation.Reduction = aggregation.token_mean,
    kl_loss: Callable[..., jax.Array] | None = None,
    entropy_bonus: bool = False,
    unfinished: Callable[..., jax.Array] = replaced,
    normalise_values: bool = False,
    correct_sampler: bool = False,
    shards: int = 1,
    axis_name: AxisName = None,
) -> Callable[..., tuple[PPOState, dict[str, Any]]]:
    """Build ``train_step(state, frozen, hyper, batch, rng) -> (state, metrics)``: rollout to update in one program.

    Args:
        models: What is called.
        epochs: Passes over each rollout (1 in InstructGPT, 4 in Ziegler and Stiennon).
        minibatches: Optimiser steps an epoch; divides the number of answers.
        micro_batches: Parts of a minibatch that are held in memory one at a time and give the same gradient.
        samples: Answers to each prompt; ``models.generate`` gets as many keys and gives as many rows, those of one
            prompt next to each other.
        estimate: Advantages and returns of a scored batch; see `train.estimators`.
        reduction: How token losses become one number; see `reductions`. The value loss is always a mean over tokens.
        kl_loss: ``kl.k2`` or ``kl.k3`` of policy and reference as a loss of its own, times ``Hyper.kl_loss_coef``.
        entropy_bonus: Whether the policy loss has one, times ``Hyper.entropy_coef``.
        unfinished: ``(scores_B, stopped_B, hyper) -> scores_B``: `replaced` or `lowered`.
        normalise_values: Let the critic learn returns less their running mean over their deviation (Xu 2024).
        correct_sampler: Weigh each token's policy loss by how much likelier the policy makes it than the sampler did,
            up to ``Hyper.sampler_cap``, where the sampler drew from another distribution (top-p, a faster kernel).
        shards: Blocks of neighbours that the answers, and the pretraining rows, are dealt in; each minibatch takes as
            many of every block (`train.dealing`). A multiple of the number of devices keeps rows where they are.
        axis_name: Of devices that share the batch, each with its own prompts and pretraining rows (`shard_map`,
            `pmap`); they divide ``shards``. Samples and minibatches are those of one device with all of the rows.
    """

    def train_step(
        state: PPOState, frozen: Frozen, hyper: Hyper, batch: Batch, rng: jax.Array
    ) -> tuple[PPOState, dict[str, Any]]:
        sample_rng, order_rng = jax.random.split(jax.random.fold_in(rng, state.step))
        compared = frozen if state.reference is None else frozen._replace(reference=state.reference)
        experience, logs = collect(
            models,
            state.params,
            compared,
            hyper,
            batch,
            sample_rng,
            kl_scale=state.kl_scale.kl_coef,
            past=state.past,
            samples=samples,
            estimate=estimate,
            unfinished=unfinished,
            normalise_values=normalise_values,
            correct_sampler=correct_sampler,
            axis_name=axis_name,
        )
        state, update_logs = update(
            models,
            state,
            experience,
            hyper,
            batch.ptx,
            order_rng,
            frozen=compared,
            epochs=epochs,
            minibatches=minibatches,
            micro_batches=micro_batches,
            reduction=reduction,
            kl_loss=kl_loss,
            entropy_bonus=entropy_bonus,
            shards=shards,
            axis_name=axis_name,
        )
        carried = ppo_state.carried(state, hyper, logs)
        # Held back with the weights: a KL that is not a number would stay in the controller for good.
        held = update_logs["skipped"] > 0
        carried = {
            name: jax.tree.map(lambda new, old: jnp.where(held, old, new), new, getattr(state, name))
            for name, new in carried.items()
        }
        logs = {name: value for name, value in logs.items() if name not in ("target", "target_square")}
        return state.replace(**carried), logs | update_logs | {"learning_rate": hyper.learning_rate}

    return train_step
