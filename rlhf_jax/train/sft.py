"""Supervised training: next-token loss on the tokens that a mask selects.

Pretraining (all tokens count), supervised fine-tuning (only the response and its end-of-sequence token count) and a mix
of both use the same step and differ only in the loss mask. Distillation compares distributions instead of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax import losses, masking, metrics
from rlhf_jax.train.optim import nonfinite, update
from rlhf_jax.types import DistillationBatch, TokenBatch

__all__ = [
    "DistillationBatch",
    "TokenBatch",
    "batch_logprobs",
    "make_distillation_step",
    "make_token_step",
    "make_train_step",
]


def batch_logprobs(token_logprobs: Callable[..., jax.Array], params: Any, batch: TokenBatch) -> jax.Array:
    """Returns ``token_logprobs(params, tokens_BL, mask_BL=...)``, with ``segments_BL=...`` if the batch is packed."""
    packed = {} if batch.segments_BL is None else {"segments_BL": batch.segments_BL}
    return token_logprobs(params, batch.tokens_BL, mask_BL=batch.mask_BL, **packed)


def make_train_step(
    token_logprobs: Callable[..., jax.Array],
    *,
    join: Callable[[Any, Any], Any] = update.all_trained,
    micro_batches: int = 1,
    axis_name: str | tuple[str, ...] | None = None,
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Returns ``train_step(state, frozen, hyper, batch, rng) -> (state, metrics)`` on a `TokenBatch`.

    The loss is ``-sum_t m_t log pi(y_t | y_<t) / sum_t m_t`` with the loss mask ``m``, over all rows of the batch.

    Args:
        token_logprobs: ``(params, tokens_BL, mask_BL=...) -> [B, L]``, such as `lm.token_logprobs`. It also receives
            ``segments_BL=...`` if the batch is packed.
        join: ``(frozen, params) -> params`` builds the model's parameters. With ``partial(lm.lora.attach, scale=...)``,
            ``frozen`` is the base model and the state holds only adapters. By default all parameters are trained.
        micro_batches: Number of parts into which the batch is split to save memory. The update does not depend on it.
        axis_name: Name of the mapped axis over which the batch is split; None if it is not split.

    Returns:
        A step. ``frozen`` is the first argument of ``join``; ``hyper`` is a dict with ``learning_rate`` and
        ``max_grad_norm`` (infinity for no clipping); ``rng`` is not used. Metrics:

        - ``loss``: mean negative log-probability, in nats per token.
        - ``grad_norm``: l2 norm of the gradient before clipping.
        - ``learning_rate``: learning rate of the step.
        - ``skipped``: 1 if the update was skipped, because it was not finite or the batch has no token to learn from
          (``empty_batch`` is then 1), else 0.
        - ``bad_rows``, ``bad_row``: number of rows with a non-finite log-probability; index of the first, or -1 for
          none.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from rlhf_jax.train import sft, state
        >>> def token_logprobs(params, tokens_BL, mask_BL):  # a unigram model; see lm.token_logprobs for a real one
        ...     return jax.nn.log_softmax(params["logits_V"])[tokens_BL]
        >>> step = jax.jit(sft.make_train_step(token_logprobs), donate_argnums=0)
        >>> train_state = state.create({"logits_V": jnp.zeros(4)}, optax.scale(-1.0))
        >>> tokens = jnp.array([[1, 2, 2, 0]])
        >>> batch = sft.TokenBatch(tokens, tokens > 0, tokens > 1)
        >>> hyper = {"learning_rate": 1.0, "max_grad_norm": jnp.inf}
        >>> for _ in range(2):
        ...     train_state, metrics = step(train_state, None, hyper, batch, jax.random.key(0))
        ...     print(round(float(metrics["loss"].value()), 4))
        1.3863
        0.7437
    """

    return make_token_step(
        lambda params, batch: losses.next_token(batch_logprobs(token_logprobs, params, batch)),
        join=join,
        micro_batches=micro_batches,
        axis_name=axis_name,
    )


def make_distillation_step(
    listed_logprobs: Callable[..., jax.Array], **options: Any
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Returns ``train_step(state, frozen, hyper, batch, rng) -> (state, metrics)`` on a `DistillationBatch`.

    The loss is `losses.distill`, the KL from the teacher to the student over K tokens and the rest of the vocabulary,
    averaged over the tokens of the loss mask. In context distillation, the teacher has read a prompt that the student
    does not see (Bai et al. 2022, A.1).

    Args:
        listed_logprobs: ``(params, tokens_BL, ids_BLK, mask_BL=...) -> [B, L, K]``, such as
            `lm.token_listed_logprobs`. It also receives ``segments_BL=...`` if the batch is packed.
        **options: As for `make_train_step`, whose step has the same inputs and metrics.

    Example:
        >>> from functools import partial
        >>> import jax
        >>> import numpy as np
        >>> import optax
        >>> from rlhf_jax import lm
        >>> from rlhf_jax.train import sft, state
        >>> cfg = lm.LMConfig.preset("tiny")
        >>> teacher, student = (lm.init(jax.random.key(i), cfg) for i in (0, 1))
        >>> tokens, mask = np.array([[5, 6, 7, 8]]), np.array([[False, True, True, True]])
        >>> top = lm.token_top_k(teacher, tokens, cfg=cfg, k=50)
        >>> batch = sft.DistillationBatch(tokens, mask | True, mask, ids_BLK=top.ids, logprobs_BLK=top.logprobs)
        >>> step = jax.jit(sft.make_distillation_step(partial(lm.token_listed_logprobs, cfg=cfg)))
        >>> train_state = state.create(student, optax.chain(optax.scale_by_adam(), optax.scale(-1.0)))
        >>> hyper, found = {"learning_rate": 1e-3, "max_grad_norm": np.inf}, []
        >>> for _ in range(9):
        ...     train_state, metrics = step(train_state, None, hyper, batch, None)
        ...     found.append(float(metrics["loss"].value()))
        >>> bool(found[-1] < 0.5 * found[0])
        True
    """

    def token_losses(params: Any, batch: DistillationBatch) -> jax.Array:
        packed = {} if batch.segments_BL is None else {"segments_BL": batch.segments_BL}
        logprobs_BLK = listed_logprobs(params, batch.tokens_BL, batch.ids_BLK, mask_BL=batch.mask_BL, **packed)
        return losses.distill(logprobs_BLK, batch.logprobs_BLK)

    return make_token_step(token_losses, **options)


def make_token_step(
    token_losses: Callable[[Any, Any], jax.Array],
    *,
    join: Callable[[Any, Any], Any] = update.all_trained,
    micro_batches: int = 1,
    axis_name: str | tuple[str, ...] | None = None,
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Returns the step of `make_train_step` with a loss of your own.

    Args:
        token_losses: ``(params, batch) -> [B, L]``, the loss of each token; those outside the loss mask do not count.
        join: As for `make_train_step`.
        micro_batches: As for `make_train_step`.
        axis_name: As for `make_train_step`.

    Returns:
        A step with the inputs and metrics of that of `make_train_step`; ``loss`` is the mean over the loss mask, and
        the bad rows are those with a loss that is not finite.
    """

    def loss_fn(frozen: Any, params: Any, batch: Any, total: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        losses_BL = token_losses(join(frozen, params), batch)
        loss = masking.masked_sum(losses_BL, where=batch.loss_mask_BL, axis_name=axis_name)
        bad = nonfinite.bad_token_rows(losses_BL, where_BT=batch.loss_mask_BL)
        return loss / jnp.maximum(total, 1), {"loss": metrics.Metric(loss, total / micro_batches), "bad": bad}

    def train_step(state: Any, frozen: Any, hyper: Any, batch: Any, rng: Any) -> tuple[Any, dict[str, Any]]:
        del rng
        total = masking.masked_count(batch.loss_mask_BL, where=batch.loss_mask_BL, axis_name=axis_name)
        return update.gradient_step(
            state,
            partial(loss_fn, frozen),
            batch,
            total.astype(jnp.float32),
            learning_rate=hyper["learning_rate"],
            max_grad_norm=hyper["max_grad_norm"],
            micro_batches=micro_batches,
            axis_name=axis_name,
            empty=total == 0,
        )

    return train_step
