"""Supervised training: next-token loss on the tokens that a mask selects.

One step serves pretraining (every token counts), supervised fine-tuning (only the answer and its end mark count) and
the mix of both (rows of either kind in one batch): they differ in the mask alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax import masking, metrics
from rlhf_jax.train.optim import nonfinite, update


@struct.dataclass
class TokenBatch:
    """Rows of tokens. ``mask_BL``: real tokens; ``loss_mask_BL``: those whose log-probability is trained on.

    ``segments_BL`` in packed rows alone: which sequence of the row each token belongs to (`data.packing`). The first
    token of a sequence is predicted from nothing and has log-probability 0, whatever the loss mask says of it.
    """

    tokens_BL: jax.Array
    mask_BL: jax.Array
    loss_mask_BL: jax.Array
    segments_BL: jax.Array | None = None


def batch_logprobs(token_logprobs: Callable[..., jax.Array], params: Any, batch: TokenBatch) -> jax.Array:
    """``token_logprobs(params, tokens_BL, mask_BL=...)``, which gets ``segments_BL=...`` where the batch is packed."""
    packed = {} if batch.segments_BL is None else {"segments_BL": batch.segments_BL}
    return token_logprobs(params, batch.tokens_BL, mask_BL=batch.mask_BL, **packed)


def make_train_step(
    token_logprobs: Callable[..., jax.Array],
    *,
    join: Callable[[Any, Any], Any] = update.all_trained,
    micro_batches: int = 1,
    axis_name: str | tuple[str, ...] | None = None,
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Build ``train_step(state, frozen, hyper, batch, rng) -> (state, metrics)``.

    ``token_logprobs(params, tokens_BL, mask_BL=...) -> [B, L]`` is aligned as `lm.token_logprobs`, and gets
    ``segments_BL=...`` too where a batch is packed; its ``params`` are ``join(frozen, state.params)``. With
    ``join=partial(lm.lora.attach, scale=...)``, ``frozen`` is the base model and the state holds adapters only;
    without a ``join``, ``frozen`` is not used. Nor is ``rng``.
    ``hyper``: ``learning_rate``, and ``max_grad_norm`` (infinite for none).
    """

    def loss_fn(frozen: Any, params: Any, batch: TokenBatch, total: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        logprobs_BL = batch_logprobs(token_logprobs, join(frozen, params), batch)
        nll = -masking.masked_sum(logprobs_BL, where=batch.loss_mask_BL, axis_name=axis_name)
        bad = nonfinite.of_tokens(logprobs_BL, where_BT=batch.loss_mask_BL)
        return nll / jnp.maximum(total, 1), {"loss": metrics.Metric(nll, total / micro_batches), "bad": bad}

    def train_step(state: Any, frozen: Any, hyper: Any, batch: TokenBatch, rng: Any) -> tuple[Any, dict[str, Any]]:
        del rng
        total = masking.masked_count(batch.loss_mask_BL, where=batch.loss_mask_BL, axis_name=axis_name)
        total = total.astype(jnp.float32)
        (loss, logs), grads = update.loss_and_grads(
            partial(loss_fn, frozen), state.params, batch, total, micro_batches=micro_batches
        )
        state, update_logs = update.apply_gradients(
            state,
            grads,
            learning_rate=hyper["learning_rate"],
            max_grad_norm=hyper["max_grad_norm"],
            axis_name=axis_name,
            loss=loss,
        )
        logs |= nonfinite.numbers(logs.pop("bad"), axis_name=axis_name)
        return state, logs | update_logs | {"learning_rate": hyper["learning_rate"]}

    return train_step
