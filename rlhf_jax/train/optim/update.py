"""Gradient -> mean over devices -> clip -> apply -> metrics: what every stage does at the end of its step.

A stage writes ``loss_fn(params, batch, total) -> (loss, metrics)``, where ``total`` holds the counts of the *whole*
batch that its sums are divided by. Then micro-batches add up to what one large batch gives::

    total = mask_BL.sum()                                      # of all rows, and psum over devices
    (loss, metrics), grads = loss_and_grads(loss_fn, state.params, batch, total, micro_batches=4)
    state, update_metrics = apply_gradients(state, grads, learning_rate=hyper["learning_rate"], loss=loss)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.train import state as state_lib
from rlhf_jax.train.optim import nonfinite


def all_trained(frozen: Any, params: Any) -> Any:
    """The ``join`` of a trainer in which nothing is frozen: ``params``, as they are.

    A ``join(frozen, params)`` makes the model's parameters of what a step must not change and of what it trains,
    inside the loss, so that the gradient is that of ``params`` alone. `lm.lora.attach` is one.
    """
    del frozen
    return params


def split(batch: Any, micro_batches: int) -> Any:
    """``[B, ...]`` leaves as ``[micro_batches, B / micro_batches, ...]``; micro-batch i has rows i, i + m, i + 2m, ...

    Strided, so that a batch that is spread over devices row by row stays spread over them in every micro-batch.
    """

    def leaf(x: jax.Array) -> jax.Array:
        rows = x.shape[0]
        if rows % micro_batches:
            raise ValueError(f"a batch of {rows} rows does not divide into {micro_batches} micro-batches")
        return x.reshape(rows // micro_batches, micro_batches, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(leaf, batch)


def loss_and_grads(
    loss_fn: Callable[[Any, Any, Any], tuple[jax.Array, Any]],
    params: Any,
    batch: Any,
    total: Any,
    *,
    micro_batches: int = 1,
    merge: Callable[[Any], Any] | None = None,
) -> tuple[tuple[jax.Array, Any], Any]:
    """Loss, metrics and gradients of a batch, in ``micro_batches`` parts that are held in memory one at a time.

    The parts are added, not averaged: the mean of per-part means is wrong where the parts have different token counts.

    Args:
        loss_fn: ``(params, batch, total) -> (scalar, metrics)``. The scalar is the share of these rows in the loss of
            the whole batch, i.e. a sum divided by ``total`` (with a named axis: ``psum(sum) / total``). The metrics
            add up over rows in the same way (``metrics.Metric`` does), but for `guard.Rows`; a plain mean does not.
        params: What is differentiated.
        batch: A pytree of ``[B, ...]`` arrays. Randomness per row (dropout) travels in it as one key a row.
        total: The counts of the whole batch, over all devices; any pytree, passed through.
        micro_batches: How many parts; divides B.
        merge: Makes one metrics of those of all parts, stacked on a new first axis, where they do not simply add up.

    Returns:
        ``((loss, metrics), grads)``, gradients in the dtype of the parameters where there is one part, accumulated in
        float32 at least where there are more.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if micro_batches == 1:
        return grad_fn(params, batch, total)
    parts = split(batch, micro_batches)

    def part(index: int) -> Any:
        return jax.tree.map(lambda x: x[index], parts)

    def wide(x: jax.Array) -> jax.Array:
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.floating) else x

    def one(micro: Any) -> tuple[Any, Any]:
        (loss, logs), grads = grad_fn(params, micro, total)
        return jax.tree.map(wide, (loss, grads)), jax.tree.map(wide, logs)

    def add(carry: Any, micro: Any) -> tuple[Any, Any]:
        new, logs = one(micro)
        return jax.tree.map(jnp.add, carry, new), logs

    shapes, _ = jax.eval_shape(one, part(0))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (loss, grads), logs_M = jax.lax.scan(add, zeros, parts)
    return (loss, (merge or nonfinite.merge)(logs_M)), grads


def global_norm(tree: Any) -> jax.Array:
    """The l2 norm of all leaves together, summed in float32 whatever their dtype."""
    return optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree))


def clip(grads: Any, norm: jax.Array, max_norm: Any) -> Any:
    """``grads`` scaled down to ``max_norm`` where their ``norm`` is larger."""
    scale = jnp.where(norm > max_norm, max_norm / norm, 1.0)
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)


def apply_gradients(
    state: state_lib.TrainState,
    grads: Any,
    *,
    learning_rate: Any,
    max_grad_norm: Any = None,
    axis_name: str | tuple[str, ...] | None = None,
    loss: Any = None,
) -> tuple[Any, dict[str, jax.Array]]:
    """One update; a step whose gradient, loss or rate is not finite changes nothing but the step counter.

    The counter goes on so that ``fold_in(rng, state.step)`` draws anew instead of meeting the same bad numbers again.

    Args:
        state: A ``TrainState`` whose ``tx`` has unit rate, such as ``optax.chain(optax.scale_by_adam(),
            optax.scale(-1.0))``: then one compiled step serves every schedule and every member of a sweep.
        grads: As ``state.params``.
        learning_rate: A scalar, or a prefix of the parameter tree with scalars, such as ``{"policy": a, "critic": b}``.
        max_grad_norm: Gradients are scaled down to this global norm; traced, or None for no clipping.
        axis_name: Average gradients and loss over this axis first (pmap, shard_map, vmap).
        loss: Looked at for being finite, where given.

    Returns:
        ``(state, metrics)``, float32 scalars: ``grad_norm``, before clipping and as it is, finite or not; ``skipped``,
        1.0 for a step that was, else 0.0. Code that keeps an average or a controller beside the state holds it back
        too where ``skipped`` is 1.
    """
    if axis_name is not None:
        grads = jax.lax.pmean(grads, axis_name)
        loss = None if loss is None else jax.lax.pmean(loss, axis_name)
    norm = global_norm(grads)
    finite = jnp.isfinite(norm)
    for number in (loss, *jax.tree.leaves(learning_rate)):
        if number is not None:
            finite &= jnp.all(jnp.isfinite(number))
    if max_grad_norm is not None:
        grads = clip(grads, norm, max_grad_norm)
    updates, opt_state = state.tx.update(grads, state.opt_state, state.params)
    # A prefix tree first: each of its scalars meets the whole subtree below it.
    updates = jax.tree.map(lambda rate, tree: jax.tree.map(lambda u: u * rate, tree), learning_rate, updates)
    params = optax.apply_updates(state.params, updates)

    def keep_old(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    state = state.replace(
        step=state.step + 1,
        params=keep_old(params, state.params),
        opt_state=keep_old(opt_state, state.opt_state),
    )
    return state, {"grad_norm": norm, "skipped": 1.0 - finite.astype(jnp.float32)}
