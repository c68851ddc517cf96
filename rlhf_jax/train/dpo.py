"""DPO and related methods: one train step that takes the objective as an argument.

These methods need no sampling, reward model or critic. They need only the log-probabilities of given answers under the
policy and, in most cases, under a frozen reference. They differ in their objective (`train.objectives`)::

    train_step = parallel.jit_step(dpo.make_train_step(logprobs, objectives.dpo))
    state, logs = train_step(state, reference_params, dpo.Hyper(learning_rate=1e-6, beta=0.1), batch, rng)

If the method uses a reference, every step runs a forward pass of the reference, unless `train.reference` has computed
its log-probabilities in advance.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import core

from rlhf_jax import masking, metrics
from rlhf_jax.lm import packed
from rlhf_jax.losses import preference
from rlhf_jax.train import objectives
from rlhf_jax.train.optim import nonfinite, update
from rlhf_jax.types import PackedPreferences, Params, Preferences


@struct.dataclass
class Hyper:
    """Hyperparameters as traced scalars, which can change without recompilation and be swept with `jax.vmap`."""

    learning_rate: Any = 1e-6
    """Learning rate of the policy (DPO: 1e-6)."""
    max_grad_norm: Any = jnp.inf
    """Gradients with a larger global l2 norm are scaled down to this norm; infinity disables clipping."""
    beta: Any = 0.1
    """KL coefficient beta, in reward per nat (DPO: 0.1). In SimPO, beta is the scale of the reward (2 to 2.5)."""
    label_smoothing: Any = 0.0
    """Assumed share of flipped labels, in [0, 1/2), for cDPO and robust DPO (DPO: 0)."""
    desirable_weight: Any = 1.0
    """Weight of good answers in KTO (lambda_D; 1 in the paper)."""
    undesirable_weight: Any = 1.0
    """Weight of bad answers in KTO (lambda_U; 1 in the paper)."""
    odds_weight: Any = 0.1
    """Weight of ORPO's odds-ratio term (lambda; 0.1 in the paper)."""
    margin: Any = 0.5
    """Target margin of SimPO (gamma in the paper)."""
    sft_coef: Any = 1.0
    """Weight of the SFT loss in `objectives.with_sft`."""


def answer_logprobs(
    logprobs: Callable[..., jax.Array], params: Params, batch: Preferences | PackedPreferences
) -> jax.Array:
    """Returns the log-probability of each answer, ``[B, K]`` float32, summed over its tokens.

    ``logprobs`` is described in :func:`make_train_step`. Raises ``ValueError`` if it does not return the columns of
    ``answer_BKC`` or, of packed rows, all columns.
    """
    if isinstance(batch, PackedPreferences):
        rows = logprobs(params, batch.tokens_RL, segments_BL=batch.segments_RL)
        if rows.shape != batch.tokens_RL.shape:
            raise ValueError(
                f"logprobs returned shape {rows.shape} for packed rows of shape {batch.tokens_RL.shape}; it must "
                "return all columns"
            )
        return packed.packed_sums(rows, batch.segments_RL, batch.places_BK, where_BL=batch.answer_RL)
    B, K, L = batch.tokens_BKL.shape
    masked = {} if batch.mask_BKL is None else {"mask_BL": batch.mask_BKL.reshape(B * K, L)}
    rows = logprobs(params, batch.tokens_BKL.reshape(B * K, L), **masked)
    if rows.shape != (B * K, batch.answer_BKC.shape[-1]):
        raise ValueError(
            f"logprobs returned shape {rows.shape} for {B * K} answers; answer_BKC has {batch.answer_BKC.shape[-1]} "
            "columns, and logprobs must return the same columns"
        )
    return masking.masked_sum(rows.reshape(batch.answer_BKC.shape), where=batch.answer_BKC, axis=-1)


def answer_lengths(batch: Preferences | PackedPreferences) -> jax.Array:
    """Returns the number of tokens of each answer, ``[B, K]`` float32, at least 1."""
    if isinstance(batch, PackedPreferences):
        ones_RL = jnp.ones(batch.tokens_RL.shape, jnp.float32)
        counts_BK = packed.packed_sums(ones_RL, batch.segments_RL, batch.places_BK, where_BL=batch.answer_RL)
    else:
        counts_BK = jnp.sum(batch.answer_BKC, axis=-1)
    return jnp.maximum(counts_BK, 1).astype(jnp.float32)


def mismatched(batch: Preferences, *, prompt_width: int, shift: int = 1) -> Preferences:
    """Pairs each prompt with the answers of a row that has a different prompt, for KTO's baseline.

    If possible, that is the row ``shift`` rows earlier. If a row would get answers to its own prompt, as in batches
    with several answers to a prompt, the rows are paired differently: sorted by prompt and shifted by the number of
    rows of the most frequent prompt. Under `jax.jit`, prompts cannot be compared, and rows that are ``shift`` apart,
    cyclically, must have different prompts.

    Args:
        batch: The first P columns of ``tokens_BKL`` hold left-padded prompts, and ``answer_BKC`` covers the columns
            after them.
        prompt_width: P, the width of the prompts.
        shift: Number of rows.

    Returns:
        A batch to store as ``Preferences.mismatched``.

    Raises:
        ValueError: If ``answer_BKC`` does not cover exactly the columns after the prompt, or more than half of the rows
            have the same prompt, as in a batch of one.
    """

    def crossed(x_BKL: Any) -> Any:
        return jnp.concatenate([x_BKL[..., :prompt_width], x_BKL[source_B, :, prompt_width:]], axis=-1)

    if batch.answer_BKC.shape[-1] + prompt_width != batch.tokens_BKL.shape[-1]:
        raise ValueError(
            f"answer_BKC has {batch.answer_BKC.shape[-1]} columns; with prompt_width={prompt_width} it must have the "
            f"{batch.tokens_BKL.shape[-1] - prompt_width} columns after the prompt"
        )
    source_B = _rows_of_other_prompts(batch, prompt_width, shift)
    return Preferences(
        tokens_BKL=crossed(batch.tokens_BKL),
        mask_BKL=None if batch.mask_BKL is None else crossed(batch.mask_BKL),
        answer_BKC=jnp.asarray(batch.answer_BKC)[source_B],
    )


def _rows_of_other_prompts(batch: Preferences, prompt_width: int, shift: int) -> np.ndarray:
    """Returns, for each row, the index of a row with a different prompt; see `mismatched`."""
    B, tokens, mask = batch.tokens_BKL.shape[0], batch.tokens_BKL, batch.mask_BKL
    source_B = (np.arange(B) - shift) % B
    if isinstance(tokens, core.Tracer) or isinstance(mask, core.Tracer):
        most = B if np.any(source_B == np.arange(B)) else 1
    else:
        prompts_BP = np.asarray(tokens)[:, 0, :prompt_width]
        if mask is not None:  # padding may have any id
            prompts_BP = np.where(np.asarray(mask)[:, 0, :prompt_width], prompts_BP, -1)
        _, prompt_B, counts = np.unique(prompts_BP, axis=0, return_inverse=True, return_counts=True)
        prompt_B, most = prompt_B.reshape(-1), int(counts.max())
        if 2 * most <= B and np.any(prompt_B[source_B] == prompt_B):
            order = np.argsort(prompt_B, kind="stable")
            source_B[order] = np.roll(order, most)
    if 2 * most > B:
        raise ValueError(
            f"{most} of {B} rows have the same prompt, so some would be matched with an answer to their own prompt, "
            "which makes KTO's baseline wrong; use a batch in which at most half of the rows share a prompt"
        )
    return source_B


def frozen_as_reference(frozen: Any) -> Params:
    """Returns ``frozen``, for steps whose frozen parameters are the reference, such as the base model of adapters."""
    return frozen


def make_train_step(
    logprobs: Callable[..., jax.Array],
    objective: objectives.Objective,
    *,
    reference: Callable[[Any], Params] | None = frozen_as_reference,
    join: Callable[[Any, Any], Any] = update.all_trained,
    micro_batches: int = 1,
    axis_name: str | tuple[str, ...] | None = None,
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Returns ``train_step(state, frozen, hyper, batch, rng) -> (state, metrics)`` on a `types.Preferences` batch.

    The loss is the mean of the objective over the rows of the batch. The step also accepts `types.PackedPreferences`,
    whose number of groups must equal ``micro_batches``, and computes the same result with less padding.

    Args:
        logprobs: ``(params, tokens_BL, mask_BL=...) -> [B, C]``, such as `lm.token_logprobs`, which returns the T
            columns after the prompt if its ``prompt_width`` is set, and all L columns otherwise. ``mask_BL`` is passed
            only if the batch has one. For packed rows, ``logprobs`` receives ``segments_BL`` instead, and must return
            all columns.
        objective: A function from `train.objectives`, or any function with the same signature.
        reference: Extracts the parameters of the reference from ``frozen``; called only for batches without
            ``reference_BK``. None for methods without a reference.
        join: ``(frozen, params) -> params`` builds the parameters that ``logprobs`` receives. With
            ``partial(lm.lora.attach, scale=...)``, the state holds adapters, and ``frozen`` is their base model and,
            with the default ``reference``, also the reference. The default ``join`` trains all parameters.
        micro_batches: Number of parts into which the batch is split to save memory. The update does not depend on it.
        axis_name: Name of the mapped axis over which the batch is split; None if it is not split.

    Returns:
        A step. ``frozen`` is passed to ``reference`` and, as the first argument, to ``join``; if both have their
        defaults, it holds the reference's parameters. ``hyper`` is a `Hyper`; ``rng`` is not used. Metrics:

        - ``loss``: the loss, in nats per row for DPO.
        - ``accuracy``: for pairs, share of the rows in which the better answer has the higher implicit reward (with
          ``targets_B``, the expected share); for answers labelled good or bad, share of the answers whose reward has
          the right sign. Equal rewards, and rewards of 0, count one half.
        - ``margin``: mean difference between the rewards of the better and the worse answer; for pairs only.
        - ``chosen_reward``, ``rejected_reward``: mean implicit rewards of the better and worse (or good and bad)
          answers, ``beta log(pi / pi_ref)`` for DPO.
        - ``chosen_logprob``, ``rejected_logprob``: their mean log-probabilities, in nats per answer. Both usually fall
          during training.
        - ``baseline``: KTO's baseline, in nats per answer, if the batch has mismatched answers.
        - ``grad_norm``: l2 norm of the gradient before clipping.
        - ``learning_rate``: learning rate of the step.
        - ``skipped``: 1 if the update was skipped, because it was not finite or no answer of the batch has a token
          (``empty_batch`` is then 1), else 0.
        - ``bad_rows``, ``bad_row``: number of rows with a non-finite loss; index of the first, or -1 for none.

        The step raises ``ValueError`` if the reference is needed and missing, if the objective would ignore the labels
        of the batch, if ``logprobs`` does not return the columns of ``answer_BKC``, or if the number of groups of a
        packed batch differs from ``micro_batches``.
    """

    def reference_logprobs(frozen: Any, batch: Preferences | PackedPreferences) -> jax.Array | None:
        if batch.reference_BK is not None:
            return masking.as_float32(batch.reference_BK)
        if reference is None:
            return None
        if frozen is None:
            raise ValueError("the reference is missing: pass its parameters as frozen, or set batch.reference_BK")
        return answer_logprobs(logprobs, reference(frozen), batch)

    def baseline(frozen: Any, params: Any, batch: Preferences | PackedPreferences) -> jax.Array | None:
        """Computes KTO's baseline over the whole batch, for use in all micro-batches; it has no gradient."""
        if batch.mismatched is None:
            return None

        def both_logprobs(part: Preferences | PackedPreferences) -> tuple[jax.Array, jax.Array]:
            reference_BK = reference_logprobs(frozen, part)
            assert reference_BK is not None
            return answer_logprobs(logprobs, join(frozen, params), part), reference_BK

        if reference is None and batch.mismatched.reference_BK is None:
            raise ValueError("mismatched answers need a reference: pass `reference`, or set their reference_BK")
        whole = micro_batches == 1
        parts = batch.mismatched if whole else update.split(batch.mismatched, micro_batches)
        policy, frozen_policy = both_logprobs(parts) if whole else jax.lax.map(both_logprobs, parts)
        return preference.kto_baseline(policy, frozen_policy, axis_name=axis_name)

    def loss_fn(
        frozen: Any,
        hyper: Hyper,
        params: Any,
        batch: Preferences | PackedPreferences,
        total: tuple[jax.Array, jax.Array | None],
    ) -> tuple[jax.Array, dict[str, Any]]:
        rows, kto_baseline = total
        scored = objectives.Scored(
            policy_BK=answer_logprobs(logprobs, join(frozen, params), batch),
            reference_BK=reference_logprobs(frozen, batch),
            lengths_BK=answer_lengths(batch),
            good_BK=batch.good_BK,
            targets_B=batch.targets_B,
            baseline=kto_baseline,
        )
        losses_B, rewards_BK = objective(scored, hyper)
        masking.check_rank(1, losses_B=losses_B)
        loss_sum = masking.masked_sum(losses_B, where=True, axis_name=axis_name)
        logs = {"loss": metrics.Metric(loss_sum, rows / micro_batches), "bad": nonfinite.bad_loss_rows(losses_B)}
        return loss_sum / rows, logs | _reward_metrics(scored, rewards_BK, axis_name)

    def train_step(
        state: Any, frozen: Any, hyper: Hyper, batch: Preferences | PackedPreferences, rng: Any
    ) -> tuple[Any, dict[str, Any]]:
        del rng
        if isinstance(batch, PackedPreferences):
            update.check_groups(batch.groups, micro_batches)
            rows_B, answer = batch.places_BK.row[:, 0], batch.answer_RL
        else:
            rows_B, answer = batch.tokens_BKL[:, 0, 0], batch.answer_BKC
        total = masking.masked_count(rows_B, where=True, axis_name=axis_name).astype(jnp.float32)
        kto_baseline = baseline(frozen, state.params, batch)
        state, logs = update.gradient_step(
            state,
            partial(loss_fn, frozen, hyper),
            batch.replace(mismatched=None),  # type: ignore[attr-defined]
            (total, kto_baseline),
            learning_rate=hyper.learning_rate,
            max_grad_norm=hyper.max_grad_norm,
            micro_batches=micro_batches,
            axis_name=axis_name,
            empty=masking.masked_count(answer, where=answer, axis_name=axis_name) == 0,
        )
        return state, logs if kto_baseline is None else logs | {"baseline": kto_baseline}

    return train_step


def _reward_metrics(
    scored: objectives.Scored, rewards_BK: jax.Array, axis_name: str | tuple[str, ...] | None
) -> dict[str, metrics.Metric]:
    """Returns accuracy and margin, and rewards and log-probabilities separately for chosen and rejected answers."""
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
    means = {name: metrics.mean_metric(x, axis_name=axis_name) for name, x in logs.items()}
    for side, where_BK in (("chosen", good_BK), ("rejected", ~good_BK)):
        for name, x_BK in (("reward", rewards_BK), ("logprob", jax.lax.stop_gradient(scored.policy_BK))):
            means[f"{side}_{name}"] = metrics.mean_metric(x_BK, where_BK, axis_name=axis_name)
    return means
