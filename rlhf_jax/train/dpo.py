"""DPO and its relatives: one step for the whole family, which takes its loss as a function.

No sampling, no reward model, no critic: log-probabilities of given answers under the policy and, where the method has
one, under a frozen reference. What sets the methods apart is in `train.objectives`::

    train_step = parallel.jit_step(dpo.make_train_step(logprobs, objectives.dpo))
    state, logs = train_step(state, reference_params, dpo.Hyper(learning_rate=1e-6, beta=0.1), batch, rng)

The reference's part costs a forward pass in each step. `train.reference` computes it once for all steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax import masking, metrics
from rlhf_jax.losses import preference
from rlhf_jax.train import objectives
from rlhf_jax.train.optim import nonfinite, update
from rlhf_jax.types import Params, Preferences


@struct.dataclass
class Hyper:
    """Everything a sweep would vary, as traced scalars: changing one compiles nothing."""

    learning_rate: Any = 1e-6
    max_grad_norm: Any = jnp.inf
    beta: Any = 0.1
    """The KL coefficient of the objective that DPO solves; in SimPO the scale of its reward (2 to 2.5 there)."""
    label_smoothing: Any = 0.0
    """Assumed share of flipped labels, below 1/2: of cDPO and robust DPO."""
    desirable_weight: Any = 1.0
    undesirable_weight: Any = 1.0
    """Of KTO, the paper's lambdas."""
    odds_weight: Any = 0.1
    """Of ORPO, the paper's lambda."""
    margin: Any = 0.5
    """Of SimPO, the paper's gamma."""
    sft_coef: Any = 1.0
    """Of the SFT term, where there is one."""


def answer_logprobs(logprobs: Callable[..., jax.Array], params: Params, batch: Preferences) -> jax.Array:
    """``[B, K]`` float32: log-probability of each answer, summed over its tokens; ``logprobs`` as in the step."""
    B, K, L = batch.tokens_BKL.shape
    masked = {} if batch.mask_BKL is None else {"mask_BL": batch.mask_BKL.reshape(B * K, L)}
    rows = logprobs(params, batch.tokens_BKL.reshape(B * K, L), **masked)
    if rows.shape != (B * K, batch.answer_BKC.shape[-1]):
        raise ValueError(
            f"logprobs gave shape {rows.shape} for {B * K} answers, and answer_BKC has {batch.answer_BKC.shape[-1]} "
            "columns; they must be the same columns"
        )
    return masking.masked_sum(rows.reshape(batch.answer_BKC.shape), where=batch.answer_BKC, axis=-1)


def mismatched(batch: Preferences, *, prompt_width: int, shift: int = 1) -> Preferences:
    """Every prompt with the answers of the one ``shift`` rows before, of which KTO takes its baseline.

    ``tokens_BKL`` has prompts in columns up to P, left-padded, and answers behind them; C is T. Rows ``shift`` apart,
    and the last ones and the first, must not be of the same prompt. Works on NumPy arrays and in a compiled function.
    """

    def crossed(x_BKL: Any) -> Any:
        answers = jnp.roll(x_BKL[..., prompt_width:], shift, axis=0)
        return jnp.concatenate([x_BKL[..., :prompt_width], answers], axis=-1)

    if batch.answer_BKC.shape[-1] + prompt_width != batch.tokens_BKL.shape[-1]:
        raise ValueError(f"answer_BKC must have the columns behind the {prompt_width} of the prompt")
    return Preferences(
        tokens_BKL=crossed(batch.tokens_BKL),
        mask_BKL=None if batch.mask_BKL is None else crossed(batch.mask_BKL),
        answer_BKC=jnp.roll(batch.answer_BKC, shift, axis=0),
    )


def frozen_itself(frozen: Any) -> Params:
    """What is frozen is the reference, and nothing else; with adapters it is their base."""
    return frozen


def make_train_step(
    logprobs: Callable[..., jax.Array],
    objective: objectives.Objective,
    *,
    reference: Callable[[Any], Params] | None = frozen_itself,
    join: Callable[[Any, Any], Any] = update.all_trained,
    micro_batches: int = 1,
    axis_name: str | tuple[str, ...] | None = None,
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Build ``train_step(state, frozen, hyper, batch, rng) -> (state, metrics)`` on a `types.Preferences` batch.

    ``rng`` is not used. The loss is the mean over the rows of the batch.

    Args:
        logprobs: ``(params, tokens_BL, mask_BL=...) -> [B, C]``, such as `lm.token_logprobs` of one prompt width (C
            is T) or `lm.token_logprobs` (C is L, padding anywhere); without ``mask_BL`` where the batch has none.
        objective: One of `train.objectives`, or another function like them.
        reference: Gives the reference's parameters of ``frozen``, for a batch without ``reference_BK``. None for
            methods without a reference: then none is held and none computed.
        join: ``(frozen, params) -> `` what ``logprobs`` takes; with ``partial(lm.lora.attach, scale=...)`` the state
            holds adapters, and ``frozen`` is their base and, by default, the reference.
        micro_batches: Parts of the batch that are held in memory one at a time; the update is the same.
        axis_name: Of devices that share the batch.

    Returns:
        A step that takes a `Hyper`. Its metrics: ``loss``; ``accuracy``, how often the better answer has the higher
        implicit reward (equal ones count a half) or, of marked answers, how often its sign is right; ``margin`` of
        the rewards in pairs; ``chosen_reward`` and ``rejected_reward``; ``chosen_logprob`` and ``rejected_logprob``,
        summed over tokens, both of which usually fall; ``baseline`` of KTO; and those of `step.apply_gradients`.
    """

    def reference_logprobs(frozen: Any, batch: Preferences) -> jax.Array | None:
        if batch.reference_BK is not None:
            return masking.as_float32(batch.reference_BK)
        if reference is None:
            return None
        if frozen is None:
            raise ValueError("there is no reference: give it as `frozen`, or its log-probabilities in the batch")
        return answer_logprobs(logprobs, reference(frozen), batch)

    def baseline(frozen: Any, params: Any, batch: Preferences) -> jax.Array | None:
        """Before the micro-batches, which share it; nothing is differentiated here."""
        if batch.mismatched is None:
            return None

        def one(part: Preferences) -> tuple[jax.Array, jax.Array]:
            theirs_BK = reference_logprobs(frozen, part)
            assert theirs_BK is not None
            return answer_logprobs(logprobs, join(frozen, params), part), theirs_BK

        if reference is None and batch.mismatched.reference_BK is None:
            raise ValueError("mismatched answers need a reference, and there is none")
        whole = micro_batches == 1
        parts = batch.mismatched if whole else update.split(batch.mismatched, micro_batches)
        policy, theirs = one(parts) if whole else jax.lax.map(one, parts)
        return preference.kto_baseline(policy, theirs, axis_name=axis_name)

    def loss_fn(
        frozen: Any, hyper: Hyper, params: Any, batch: Preferences, totals: tuple[jax.Array, jax.Array | None]
    ) -> tuple[jax.Array, dict[str, Any]]:
        total, shared = totals
        scored = objectives.Scored(
            policy_BK=answer_logprobs(logprobs, join(frozen, params), batch),
            reference_BK=reference_logprobs(frozen, batch),
            lengths_BK=jnp.maximum(jnp.sum(batch.answer_BKC, axis=-1), 1).astype(jnp.float32),
            good_BK=batch.good_BK,
            targets_B=batch.targets_B,
            baseline=shared,
        )
        losses_B, rewards_BK = objective(scored, hyper)
        masking.check_rank(1, losses_B=losses_B)
        loss_sum = masking.masked_sum(losses_B, where=True, axis_name=axis_name)
        logs = {"loss": metrics.Metric(loss_sum, total / micro_batches), "bad": nonfinite.of_losses(losses_B)}
        return loss_sum / total, logs | _told(scored, rewards_BK, axis_name)

    def train_step(state: Any, frozen: Any, hyper: Hyper, batch: Preferences, rng: Any) -> tuple[Any, dict[str, Any]]:
        del rng
        rows_B = batch.tokens_BKL[:, 0, 0]
        total = masking.masked_count(rows_B, where=True, axis_name=axis_name).astype(jnp.float32)
        shared = baseline(frozen, state.params, batch)
        (value, logs), grads = update.loss_and_grads(
            partial(loss_fn, frozen, hyper),
            state.params,
            batch.replace(mismatched=None),  # type: ignore[attr-defined]
            (total, shared),
            micro_batches=micro_batches,
        )
        state, update_logs = update.apply_gradients(
            state,
            grads,
            learning_rate=hyper.learning_rate,
            max_grad_norm=hyper.max_grad_norm,
            axis_name=axis_name,
            loss=value,
        )
        logs |= nonfinite.numbers(logs.pop("bad"), axis_name=axis_name)
        logs = logs | ({} if shared is None else {"baseline": shared})
        return state, logs | update_logs | {"learning_rate": hyper.learning_rate}

    return train_step


def _told(
    scored: objectives.Scored, rewards_BK: jax.Array, axis_name: str | tuple[str, ...] | None
) -> dict[str, metrics.Metric]:
    """What is logged of a batch: chosen and rejected apart, since a margin grows while both fall."""
    rewards_BK = jax.lax.stop_gradient(rewards_BK)
    logs: dict[str, jax.Array] = {}
    if scored.good_BK is None:
        logs["margin"] = rewards_BK[:, 0] - rewards_BK[:, 1]
        gap, good_BK = logs["margin"], jnp.broadcast_to(jnp.arange(rewards_BK.shape[1]) == 0, rewards_BK.shape)
    else:
        good_BK = scored.good_BK.astype(bool)
        gap = jnp.where(good_BK, rewards_BK, -rewards_BK)
    logs["accuracy"] = jnp.where(gap == 0, 0.5, (gap > 0).astype(jnp.float32))
    if scored.targets_B is not None:
        p_B = masking.as_float32(scored.targets_B)
        logs["accuracy"] = p_B * logs["accuracy"] + (1.0 - p_B) * (1.0 - logs["accuracy"])
    told = {name: metrics.mean_metric(x, axis_name=axis_name) for name, x in logs.items()}
    for side, where_BK in (("chosen", good_BK), ("rejected", ~good_BK)):
        for name, x_BK in (("reward", rewards_BK), ("logprob", jax.lax.stop_gradient(scored.policy_BK))):
            told[f"{side}_{name}"] = metrics.mean_metric(x_BK, where_BK, axis_name=axis_name)
    return told
