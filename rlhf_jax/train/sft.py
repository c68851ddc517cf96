"""Supervised training: next-token loss on the tokens that a mask selects.

Pretraining (all tokens count), supervised fine-tuning (only the response and its end-of-sequence token count) and a mix
of both use the same step and differ only in the loss mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax import masking, metrics
from rlhf_jax.train.optim import nonfinite, update
from rlhf_jax.types import TokenBatch

__all__ = ["TokenBatch", "batch_logprobs", "make_train_step"]


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

    def loss_fn(frozen: Any, params: Any, batch: TokenBatch, total: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        logprobs_BL = batch_logprobs(token_logprobs, join(frozen, params), batch)
        nll = -masking.masked_sum(logprobs_BL, where=batch.loss_mask_BL, axis_name=axis_name)
        bad = nonfinite.bad_token_rows(logprobs_BL, where_BT=batch.loss_mask_BL)
        return nll / jnp.maximum(total, 1), {"loss": metrics.Metric(nll, total / micro_batches), "bad": bad}

    def train_step(state: Any, frozen: Any, hyper: Any, batch: TokenBatch, rng: Any) -> tuple[Any, dict[str, Any]]:
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
