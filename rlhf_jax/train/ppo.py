"""PPO and PPO-ptx for language models (InstructGPT, sections 3.5 and C.4; Stiennon 2020; Ziegler 2019).

The functions of this module follow the algorithm. `collect` samples and scores, `loss` is the objective of a minibatch,
`update` runs the optimiser steps, and `make_train_step` combines them into one program::

    collect  1. rollout              responses sampled from the policy                    InstructGPT C.4
             2. score                reward model; rule for responses without a stop      Ziegler 2019
             3. KL-penalised reward  r_t = -beta (log pi - log pi_ref) + [t is last] s     InstructGPT Eq 2
             4. GAE                  A_t = sum_k (gamma lambda)^k delta_{t+k}              Schulman 2016 Eq 16
    loss     5. clipped losses       of the policy                                        Schulman 2017 Eq 7
                                     and of the value                                     Ziegler 2019, code
    update   6. ptx                  gamma times the pretraining loss                     InstructGPT Eq 2
             7. optimiser step       and moving average of the policy weights             InstructGPT C.4

An estimator from `train.estimators` performs steps 3 and 4. With estimators other than GAE and without a critic, the
same functions implement REINFORCE, RLOO, GRPO, Dr. GRPO and REINFORCE++.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax import aggregation, masking, metrics
from rlhf_jax.losses import policy as policy_losses
from rlhf_jax.losses import value as value_losses
from rlhf_jax.train import estimators, ppo_metrics, ppo_state, scoring
from rlhf_jax.train import minibatches as minibatch_lib
from rlhf_jax.train import ptx as ptx_lib
from rlhf_jax.train.minibatches import AxisName
from rlhf_jax.train.optim import update as optim_update
from rlhf_jax.train.ppo_state import (
    Batch,
    Denominators,
    ExtraMetrics,
    Frozen,
    Hyper,
    Models,
    PPOState,
    RunningMeans,
    RunningMoments,
    create,
    replace_score,
    shared_trunk,
    subtract_penalty,
)
from rlhf_jax.train.ptx import ptx_loss
from rlhf_jax.train.sft import TokenBatch
from rlhf_jax.types import Experience, Params

__all__ = [
    "Batch",
    "Denominators",
    "Frozen",
    "Hyper",
    "Models",
    "PPOState",
    "RunningMeans",
    "RunningMoments",
    "collect",
    "create",
    "loss",
    "make_train_step",
    "ptx_loss",
    "replace_score",
    "shared_trunk",
    "subtract_penalty",
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
    past: RunningMeans | None = None,
    samples: int = 1,
    estimate: estimators.Estimator = estimators.gae,
    unfinished: Callable[..., jax.Array] = replace_score,
    normalise_values: bool = False,
    correct_sampler: bool = False,
    axis_name: AxisName = None,
) -> tuple[Experience, dict[str, Any]]:
    """Samples responses, scores them and computes advantages and returns (InstructGPT, section 3.5).

    `Models.logprobs` computes the log-probabilities of the old policy, of the reference and of the updated policy.
    Before the first update, the probability ratio is therefore 1, and the KL between equal models is 0. The metric
    ``sampler_gap`` compares the old log-probabilities with those that the sampler reports.

    Args:
        models: The functions to call.
        params: Trained parameters, as in `PPOState`.
        frozen: Parameters of the reference and of the reward model.
        hyper: Hyperparameters.
        batch: Prompts; ``ptx`` is not used.
        rng: Key of the iteration; consumed.
        kl_scale: Factor by which the adaptive controller multiplies `Hyper.kl_coef`.
        past: Running means of earlier iterations, used by REINFORCE's baseline and ``normalise_values``; None if there
            are none.
        samples, estimate, unfinished, normalise_values, correct_sampler, axis_name: As in `make_train_step`.

    Returns:
        ``(experience, metrics)``. The metrics are described in `make_train_step`. ``target`` and ``target_variance``,
        the mean and the variance of the critic's targets, are only used by `ppo_state.finish_iteration` and are not
        logged.

    Raises:
        ValueError: If `Models.score` does not return one score per response or per token, or if the estimator rejects
            the batch.
    """
    params = models.join(frozen, params)

    # 1. Rollout: responses from the policy (InstructGPT C.4).
    B = batch.prompts_BP.shape[0] * samples
    rng_B = minibatch_lib.row_keys(rng, B, axis_name=axis_name)
    rollout = models.generate(params["policy"], rng_B, batch.prompts_BP, batch.mask_BP, hyper.temperature)
    tokens_BL, mask_BL, response_BT = rollout.tokens_BL, rollout.mask_BL, rollout.response_mask_BT

    # 2. Score: s(x, y), replaced for responses without a stop token (Ziegler 2019).
    raw = scoring.score(models, frozen.reward, rollout, responses=B)
    scores_B, token_scores_BT = scoring.training_scores(raw, rollout, hyper, unfinished)

    # Log-probabilities of policy and reference, and values of the critic, V_t.
    logprobs_BT, entropy_BT = models.logprobs(params["policy"], tokens_BL, mask_BL, hyper.temperature)
    reference_BT, _ = models.logprobs(frozen.reference, tokens_BL, mask_BL, hyper.temperature)
    critic_BT = None if models.values is None else models.values(params["critic"], tokens_BL, mask_BL)
    scale = past.targets.scale() if past is not None and normalise_values else None
    values_BT = critic_BT if scale is None or critic_BT is None else critic_BT * scale[1] + scale[0]

    # 3. and 4. KL-penalised reward (InstructGPT Eq 2), GAE (Schulman 2016 Eq 16).
    kl_coef = hyper.kl_coef * kl_scale
    past_return = jnp.zeros(()) if past is None else jnp.where(past.returns.weight > 0, past.returns.value(), 0.0)
    scored = estimators.Scored(
        scores_B, logprobs_BT, reference_BT, values_BT, response_BT, kl_coef, past_return, token_scores_BT
    )
    axis: Any = {} if axis_name is None else {"axis_name": axis_name}
    advantages_BT, returns_BT = estimate(scored, hyper, **axis)

    experience = Experience(
        tokens_BL=tokens_BL,
        mask_BL=mask_BL,
        response_mask_BT=response_BT,
        logprobs_BT=logprobs_BT,
        values_BT=critic_BT,
        advantages_BT=advantages_BT,
        returns_BT=returns_BT if scale is None or returns_BT is None else (returns_BT - scale[0]) / scale[1],
        weights_BT=policy_losses.importance_weights(logprobs_BT, rollout.logprobs_BT, cap=hyper.sampler_cap)
        if correct_sampler
        else None,
        reference_BT=reference_BT,
    )
    logs = ppo_metrics.rollout_metrics(rollout, raw.raw_B, entropy_BT, scored, returns_BT, axis_name=axis_name)
    mean = partial(metrics.mean_metric, axis_name=axis_name)
    if frozen.heldout is not None:
        logs["heldout_reward"] = mean(scoring.score(models, frozen.heldout, rollout, responses=B).raw_B)
    watched = raw.parts if models.watch is None else raw.parts | models.watch(rollout)
    logs |= {name: mean(numbers_B) for name, numbers_B in watched.items()}
    return experience, logs


def loss(
    models: Models,
    params: Params,
    experience: Experience,
    hyper: Hyper,
    *,
    weights_B: jax.Array | None = None,
    denominators: Denominators | None = None,
    policy_loss: Callable[..., jax.Array] = policy_losses.clipped_policy,
    extra_metrics: ExtraMetrics | None = None,
    kl_loss: Callable[..., jax.Array] | None = None,
    entropy_bonus: bool = False,
    axis_name: AxisName = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the clipped policy loss plus the clipped value loss of a minibatch.

    With ``u = exp(log pi - log pi_old)``, the policy loss is the mean of ``max(-A u, -A clip(u, 1 - eps, 1 + eps))``
    (Schulman 2017 Eq 7), and the value loss is half the mean of ``max((V - R)^2, (clip(V, V_old +- eps_v) - R)^2)``
    (Ziegler 2019, code). ``eps`` is `Hyper.clip`, and ``eps_v`` is `Hyper.value_clip`.

    Args:
        models: The functions to call.
        params: Parameters of policy and critic, as `Models.join` returns them.
        experience: The minibatch.
        hyper: Hyperparameters.
        weights_B: Weight of the tokens of each response in the policy loss. By default the loss is a mean over tokens.
        denominators: Denominators for ``weights_B``; pass both or neither.
        policy_loss, extra_metrics, kl_loss, entropy_bonus, axis_name: As in `make_train_step`.

    Returns:
        ``(loss, metrics)``, float32 scalars.
    """
    where_BT = experience.response_mask_BT
    if weights_B is None or denominators is None:
        weights_B, count = aggregation.token_mean(where_BT, axis_name=axis_name)
        denominators = Denominators(count, count)

    def token_mean(x_BT: jax.Array) -> jax.Array:
        return masking.masked_sum(x_BT, where=where_BT, axis_name=axis_name) / denominators.tokens

    # 5a. Clipped policy loss (Schulman 2017 Eq 7).
    tokens_BL, mask_BL, old_BT = experience.tokens_BL, experience.mask_BL, experience.logprobs_BT
    logprobs_BT, entropy_BT = models.logprobs(params["policy"], tokens_BL, mask_BL, hyper.temperature)
    surrogate = (logprobs_BT, old_BT, experience.advantages_BT)
    policy_BT = policy_loss(*surrogate, clip=hyper.clip)
    if experience.weights_BT is not None:
        policy_BT = experience.weights_BT * policy_BT
    if kl_loss is not None:
        assert experience.reference_BT is not None
        policy_BT = policy_BT + hyper.kl_loss_coef * kl_loss(logprobs_BT, experience.reference_BT)
    policy_sum = aggregation.weighted_sum(policy_BT, weights_B, where=where_BT, axis_name=axis_name)
    objective = policy_sum / denominators.policy
    log_ratio_BT = jnp.where(where_BT, logprobs_BT - old_BT, 0.0)
    ratio_BT = jnp.exp(log_ratio_BT)
    logs = {
        "policy_loss": objective,
        "approx_kl": token_mean(0.5 * jnp.square(log_ratio_BT)),
        "clip_fraction": token_mean(policy_losses.policy_is_clipped(*surrogate, clip=hyper.clip)),
        "ratio_mean": token_mean(ratio_BT),
        "ratio_max": masking.global_max(ratio_BT, axis_name=axis_name),
        "ratio_error": masking.global_max(jnp.abs(ratio_BT - 1.0), axis_name=axis_name),
    }

    # 5b. Clipped value loss (Ziegler 2019, code).
    if models.values is not None and experience.values_BT is not None and experience.returns_BT is not None:
        values_BT = models.values(params["critic"], tokens_BL, mask_BL)
        value_loss = token_mean(
            value_losses.clipped_value(values_BT, experience.values_BT, experience.returns_BT, clip=hyper.value_clip)
        )
        objective += hyper.value_coef * value_loss
        logs["value_loss"] = value_loss
    if entropy_bonus:
        objective -= hyper.entropy_coef * token_mean(entropy_BT)
    extra = {} if extra_metrics is None else extra_metrics(experience, logprobs_BT, entropy_BT, hyper)
    return objective, logs | {name: token_mean(jax.lax.stop_gradient(x_BT)) for name, x_BT in extra.items()}


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
    shards: int = 1,
    axis_name: AxisName = None,
    **loss_options: Any,
) -> tuple[PPOState, dict[str, jax.Array]]:
    """Trains policy and critic on a batch of experience: ``epochs * minibatches`` optimiser steps in one scan.

    Each epoch draws new minibatches. In PPO-ptx, the gradients of the PPO loss and of the pretraining loss are computed
    one after the other and added before each optimiser step (InstructGPT C.4).

    Args:
        models: The functions to call.
        state: The state to train; donate it if this function is compiled separately.
        experience: Experience of B responses, from `collect`.
        hyper: Hyperparameters.
        ptx: Pretraining rows, as in `Batch`; None for plain PPO.
        rng: Key for the order of the responses; consumed.
        frozen: The first argument of `Models.join`.
        epochs, minibatches, micro_batches, reduction, shards, axis_name: As in `make_train_step`.
        **loss_options: Further arguments of `loss`.

    Returns:
        ``(state, metrics)``. The metrics are described in `make_train_step`.

    Raises:
        ValueError: If B or the number of pretraining rows is not divisible as required, or if ``ptx`` is given and
            `Models.token_logprobs` is None.
    """
    B = experience.tokens_BL.shape[0]
    rows_USR = minibatch_lib.minibatches(rng, B, epochs=epochs, count=minibatches, shards=shards, axis_name=axis_name)
    ptx_U = minibatch_lib.split_updates(ptx, rows_USR.shape[0], shards=rows_USR.shape[1])
    join = partial(models.join, frozen)
    options: Any = {**loss_options, "axis_name": axis_name}

    def loss_fn(
        params: Params, part: tuple[Experience, jax.Array], denominators: Denominators
    ) -> tuple[jax.Array, Any]:
        rows, weights_B = part
        return loss(models, join(params), rows, hyper, weights_B=weights_B, denominators=denominators, **options)

    def one_update(state: PPOState, inputs: tuple[jax.Array, TokenBatch | None]) -> tuple[PPOState, dict[str, Any]]:
        rows_SR, pretraining = inputs
        minibatch = minibatch_lib.take(experience, rows_SR)
        mask_MT, merge = minibatch.response_mask_BT, ppo_metrics.merge_micro_batches
        weights_M, total = reduction(mask_MT, axis_name=axis_name)
        denominators = Denominators(total, aggregation.token_mean(mask_MT, axis_name=axis_name)[1])
        (value, logs), grads = optim_update.loss_and_grads(
            loss_fn, state.params, (minibatch, weights_M), denominators, micro_batches=micro_batches, merge=merge
        )

        # 6. PPO-ptx: add gamma times the gradient of the pretraining loss (InstructGPT Eq 2 and C.4). The branch is
        # taken at run time, so that PPO and PPO-ptx are one program and PPO skips the pretraining loss.
        if pretraining is not None:

            def pretraining_loss(policy: Params) -> jax.Array:
                policy = join({**state.params, "policy": policy})["policy"]
                return ptx_loss(models, policy, pretraining, axis_name=axis_name)

            nll, ptx_grads = jax.lax.cond(
                hyper.ptx_coef > 0,
                jax.value_and_grad(pretraining_loss),
                lambda p: (jnp.zeros(()), jax.tree.map(jnp.zeros_like, p)),
                state.params["policy"],
            )
            grads["policy"] = jax.tree.map(lambda g, h: g + hyper.ptx_coef * h, grads["policy"], ptx_grads)
            logs["ptx_loss"] = jnp.where(hyper.ptx_coef > 0, nll, jnp.nan)
            logs |= ptx_lib.coefficients(
                hyper.ptx_coef, pretraining, mask_MT, weights_B=weights_M, total=total, axis_name=axis_name
            )

        learnt = masking.masked_count(mask_MT, where=mask_MT, axis_name=axis_name) > 0
        if pretraining is not None:
            text_BL = pretraining.loss_mask_BL
            some_text = masking.masked_count(text_BL, where=text_BL, axis_name=axis_name) > 0
            learnt |= (hyper.ptx_coef > 0) & some_text

        # 7. Optimiser step and average of the policy weights (InstructGPT C.4).
        if axis_name is not None:
            grads = jax.lax.pmean(grads, axis_name)
        logs |= {f"grad_norm_{part}": optim_update.global_norm(grads[part]) for part in grads}
        rates = {"policy": hyper.learning_rate, "critic": hyper.critic_learning_rate}
        rates = {part: rates[part] for part in grads}
        # A large value loss must not shrink the policy's update, unless both networks share the trunk.
        joint = models.join is shared_trunk
        max_norms = hyper.max_grad_norm if joint else dict.fromkeys(grads, hyper.max_grad_norm)
        state, update_logs = optim_update.apply_gradients(
            state, grads, learning_rate=rates, max_grad_norm=max_norms, loss=value, empty=~learnt
        )
        # A skipped update does not change the average either.
        decay = jnp.where(update_logs["skipped"] > 0, 1.0, hyper.ema_decay)
        ema = ppo_state.moving_average(state.ema, state.params["policy"], decay)
        return state.replace(ema=ema), logs | update_logs

    state, logs_U = jax.lax.scan(one_update, state, (rows_USR, ptx_U))
    return state, ppo_metrics.merge_updates(logs_U)


def make_train_step(
    models: Models,
    *,
    epochs: int = 1,
    minibatches: int = 8,
    micro_batches: int = 1,
    samples: int = 1,
    estimate: estimators.Estimator = estimators.gae,
    reduction: aggregation.Reduction = aggregation.token_mean,
    policy_loss: Callable[..., jax.Array] = policy_losses.clipped_policy,
    extra_metrics: ExtraMetrics | None = None,
    kl_loss: Callable[..., jax.Array] | None = None,
    entropy_bonus: bool = False,
    unfinished: Callable[..., jax.Array] = replace_score,
    normalise_values: bool = False,
    correct_sampler: bool = False,
    shards: int = 1,
    axis_name: AxisName = None,
) -> Callable[..., tuple[PPOState, dict[str, Any]]]:
    """Returns ``train_step(state, frozen, hyper, batch, rng) -> (state, metrics)``, which runs an iteration of PPO.

    Args:
        models: The functions to call.
        epochs: Passes over each rollout (1 in InstructGPT, 4 in Ziegler and Stiennon).
        minibatches: Optimiser steps per epoch (8 in InstructGPT); must divide the number of responses.
        micro_batches: Number of parts into which a minibatch is split to save memory. The gradient does not depend on
            it.
        samples: Number of responses to each prompt. `Models.generate` receives ``samples`` keys per prompt and returns
            one row per key, with the rows of a prompt next to each other.
        estimate: Computes advantages and returns of a scored batch; see `train.estimators`.
        reduction: Reduces the token losses of the policy to a scalar; see `aggregation`. The value loss is always a
            mean over tokens.
        policy_loss: The loss of a token, ``(logprobs_BT, old_logprobs_BT, advantages_BT, *, clip) -> [B, T]``;
            ``clip`` is `Hyper.clip`. ``clip_fraction`` is always that of the default.
        extra_metrics: ``(experience, logprobs_BT, entropy_BT, hyper) -> {name: [B, T]}``, called with each minibatch
            and the policy that is trained; means over response tokens are logged.
        kl_loss: `kl.k2` or `kl.k3`, added to the policy loss with weight `Hyper.kl_loss_coef`; None for no KL loss.
        entropy_bonus: Whether to subtract `Hyper.entropy_coef` times the entropy from the loss.
        unfinished: ``(scores_B, stopped_B, hyper) -> scores_B``, the rule for responses without a stop token:
            `replace_score` or `subtract_penalty`. For scores of tokens, see `train.scoring.training_scores`.
        normalise_values: Whether the critic learns returns minus their running mean, divided by their running
            standard deviation (Xu 2024).
        correct_sampler: Whether to weight the policy loss of each token by the ratio of its probabilities under policy
            and sampler, capped at `Hyper.sampler_cap`. Use it if the sampler draws from a different distribution
            (top-p, a different kernel).
        shards: Number of blocks of adjacent rows into which responses and pretraining rows are divided; a minibatch
            takes the same number of rows from each block (`train.minibatches`). If ``shards`` is a multiple of the
            number of devices, no row leaves its device.
        axis_name: Name of the mapped axis (`shard_map`, `pmap`) over which prompts and pretraining rows are split; None
            if they are not split. The number of devices must divide ``shards``. The result is the same as on one device
            with all rows.

    Returns:
        The train step; compile it with `parallel.jit_step`, which donates ``state``. ``state`` is a `PPOState`,
        ``frozen`` a `Frozen`, ``hyper`` a `Hyper`, ``batch`` a `Batch`, and ``rng`` one key for the whole run, into
        which the step folds ``state.step``. Metrics of the critic, the pretraining rows and `Frozen.heldout` are logged
        only if these are given. Metrics of the rollout:

        - ``reward``, ``reward_std``: mean and standard deviation of the scores of `Models.score`, summed over tokens.
        - ``training_reward``, ``training_reward_std``: the same for the rewards that the policy is trained on, after
          clipping and ``unfinished``: a response without a stop token gets `Hyper.missing_stop_score`, not its score.
        - ``kl``: mean over the responses of the summed ``log pi - log pi_ref``, in nats per response.
        - ``kl_coef``: the coefficient used, in reward per nat.
        - ``return``: ``training_reward`` minus ``kl_coef`` times the KL.
        - ``length``: mean length of a response, in tokens; ``stopped``: share of responses with a stop token.
        - ``entropy``: mean entropy of the policy, in nats per token.
        - ``sampler_gap``, ``sampler_gap_mean``: largest and mean absolute difference between the log-probabilities of
          the sampler and those of the scoring pass, in nats.
        - ``sampler_ess``: effective sample size of the importance weights, as a share of the tokens.
        - ``explained_variance``: 1 - (mean squared error of the critic) / (variance of the returns).
        - ``heldout_reward``: mean score under `Frozen.heldout`. The means of `Models.watch` are logged under its names.
        - ``bad_rows``, ``bad_row``: number of responses with a NaN or infinity; index of the first, or -1 for none.

        Metrics of the updates, averaged over the updates if not stated otherwise:

        - ``policy_loss``, ``value_loss``: the clipped losses. The value loss includes the factor 1/2 but not
          `Hyper.value_coef`.
        - ``ptx_loss``: pretraining loss in nats per token; NaN if it is not computed because ``ptx_coef`` is 0.
          ``ptx_coef_per_token``, ``ptx_coef_per_sequence``: its weight in two normalisations (`ptx.coefficients`).
        - ``approx_kl``: half the mean squared log-ratio of new and old policy, in nats per token.
        - ``clip_fraction``: share of tokens for which the clipped branch of the policy loss is the larger one, so that
          they have no gradient; ``ratio_mean``: mean ratio.
        - ``ratio_max``: largest ratio in any update; ``first_ratio_error``: largest distance of a ratio from 1 in the
          first update, when policy and old policy are still equal.
        - ``grad_norm``, ``grad_norm_policy``, ``grad_norm_critic``: l2 norms of the gradients before clipping.
        - ``skipped``: number of updates that were skipped, because they were not finite or their minibatch has no token
          to learn from (``empty_batch`` is then above 0); ``bad_update``: index of the first, or -1 for none.
        - ``learning_rate``: learning rate of the policy.

        The step raises ``ValueError`` for the reasons given in `collect` and `update`.
    """
    rollout = partial(
        collect,
        models,
        samples=samples,
        estimate=estimate,
        unfinished=unfinished,
        normalise_values=normalise_values,
        correct_sampler=correct_sampler,
        axis_name=axis_name,
    )
    train = partial(
        update,
        models,
        epochs=epochs,
        minibatches=minibatches,
        micro_batches=micro_batches,
        reduction=reduction,
        policy_loss=policy_loss,
        extra_metrics=extra_metrics,
        kl_loss=kl_loss,
        entropy_bonus=entropy_bonus,
        shards=shards,
        axis_name=axis_name,
    )

    def train_step(
        state: PPOState, frozen: Frozen, hyper: Hyper, batch: Batch, rng: jax.Array
    ) -> tuple[PPOState, dict[str, Any]]:
        sample_rng, order_rng = jax.random.split(jax.random.fold_in(rng, state.step))
        frozen = frozen if state.reference is None else frozen._replace(reference=state.reference)
        experience, logs = rollout(
            state.params, frozen, hyper, batch, sample_rng, kl_scale=state.kl_scale.kl_coef, past=state.past
        )
        state, update_logs = train(state, experience, hyper, batch.ptx, order_rng, frozen=frozen)
        state = ppo_state.finish_iteration(state, hyper, logs, skipped=update_logs["skipped"] > 0)
        logs = {name: value for name, value in logs.items() if name not in ("target", "target_variance")}
        return state, logs | update_logs | {"learning_rate": hyper.learning_rate}

    return train_step
