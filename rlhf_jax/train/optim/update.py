"""The part that all train steps share: gradients, mean over devices, clipping, update and metrics.

A stage defines ``loss_fn(params, batch, total) -> (loss, metrics)``, which divides its sums by ``total``, the counts of
the *whole* batch. The results of micro-batches then add up to the result of one large batch::

    total = mask_BL.sum()                                      # over all rows, and psum over devices
    (loss, metrics), grads = loss_and_grads(loss_fn, state.params, batch, total, micro_batches=4)
    state, update_metrics = apply_gradients(state, grads, learning_rate=hyper["learning_rate"], loss=loss)

`gradient_step` combines the last two calls, for stages with one learning rate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.data import errors
from rlhf_jax.train import state as state_lib
from rlhf_jax.train.optim import nonfinite


def all_trained(frozen: Any, params: Any) -> Any:
    """Returns ``params``; this is the ``join`` function of a step that trains all parameters of the model.

    A join function ``join(frozen, params)`` builds the parameters of a model from frozen and trained ones. The step
    calls it inside the loss, so that gradients are taken only with respect to ``params``. `lm.lora.attach` and
    `partition.join` are other examples.
    """
    del frozen
    return params


def split(batch: Any, micro_batches: int) -> Any:
    """Reshapes ``[B, ...]`` leaves to ``[M, B / M, ...]``, M = ``micro_batches``; part i has rows i, i + M, i + 2M, ...

    If the batch is sharded by rows, the stride keeps every micro-batch sharded in the same way. Raises ``ValueError``
    if B is not a multiple of M.
    """

    def leaf(x: jax.Array) -> jax.Array:
        rows = x.shape[0]
        if rows % micro_batches:
            size = errors.counted(rows, "rows")
            raise ValueError(f"a batch of {size} does not divide evenly into {micro_batches} micro-batches")
        return x.reshape(rows // micro_batches, micro_batches, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(leaf, batch)


def check_groups(groups: int, micro_batches: int) -> None:
    """Raises ``ValueError`` if a packed batch has another number of groups than a step has micro-batches."""
    if groups != micro_batches:
        raise ValueError(
            f"the batch is packed into {groups} groups, but micro_batches is {micro_batches}; make them equal"
        )


def loss_and_grads(
    loss_fn: Callable[[Any, Any, Any], tuple[jax.Array, Any]],
    params: Any,
    batch: Any,
    total: Any,
    *,
    micro_batches: int = 1,
    merge: Callable[[Any], Any] | None = None,
) -> tuple[tuple[jax.Array, Any], Any]:
    """Computes loss, metrics and gradients of a batch in ``micro_batches`` parts, of which one is in memory at a time.

    The results of the parts are added, because a mean of their means is wrong if the parts' token counts differ.

    Args:
        loss_fn: ``(params, batch, total) -> (loss, metrics)``. The loss is the contribution of these rows to the loss
            of the whole batch: a sum divided by ``total`` (with a named axis, ``psum(sum) / total``). The metrics must
            also add up over rows: a `metrics.Metric` does, a plain mean does not. A `nonfinite.BadRows`, which marks
            the rows with non-finite numbers, is not added; `nonfinite.merge` puts its rows in batch order.
        params: The parameters with respect to which the loss is differentiated.
        batch: A pytree of ``[B, ...]`` arrays. If the loss is random (dropout), the batch contains one key per row.
        total: Counts of the whole batch over all devices; any pytree, passed to ``loss_fn``.
        micro_batches: Number of parts; must divide B.
        merge: Merges the metrics of the parts, stacked on a new first axis; `nonfinite.merge` (a sum) by default.

    Returns:
        ``((loss, metrics), grads)``. The gradients have the dtype of the parameters if there is one part; otherwise
        they are accumulated in float32 or wider.

    Raises:
        ValueError: If B is not a multiple of ``micro_batches``.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if micro_batches == 1:
        return grad_fn(params, batch, total)
    parts = split(batch, micro_batches)

    def wide(x: jax.Array) -> jax.Array:
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.floating) else x

    def wide_grads(micro: Any) -> tuple[Any, Any]:
        (loss, logs), grads = grad_fn(params, micro, total)
        return jax.tree.map(wide, (loss, grads)), jax.tree.map(wide, logs)

    def add(carry: Any, micro: Any) -> tuple[Any, Any]:
        new, logs = wide_grads(micro)
        return jax.tree.map(jnp.add, carry, new), logs

    shapes, _ = jax.eval_shape(wide_grads, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (loss, grads), logs_M = jax.lax.scan(add, zeros, parts)
    return (loss, (merge or nonfinite.merge)(logs_M)), grads


def global_norm(tree: Any) -> jax.Array:
    """Returns the l2 norm of all leaves together, summed in float32 or wider."""
    return optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree))


def clip(grads: Any, norm: jax.Array, max_norm: Any) -> Any:
    """Returns ``grads``, scaled to the norm ``max_norm`` if their ``norm`` is larger."""
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
    empty: Any = None,
) -> tuple[Any, dict[str, jax.Array]]:
    """Applies one update; if the gradient, loss or learning rate is not finite, only advances the step counter.

    The same holds for a batch with nothing to learn from: its gradient is 0, but momentum and weight decay would move
    the parameters. The optimiser state is unchanged too, so that a later update is as if there had been no such batch.
    The counter always advances, so that ``fold_in(rng, state.step)`` gives every step different random numbers.

    Args:
        state: A ``TrainState`` whose ``tx`` has unit learning rate, such as ``optax.chain(optax.scale_by_adam(),
            optax.scale(-1.0))``. One compiled step then works for every schedule and for every member of a sweep.
        grads: Gradients, a pytree like ``state.params``.
        learning_rate: A scalar, or a prefix of the parameter tree with scalars, such as ``{"policy": a, "critic": b}``.
        max_grad_norm: Largest global norm, a number or traced scalar; larger gradients are scaled down to it. With a
            prefix of the parameter tree, such as ``{"policy": a, "critic": b}``, each part is clipped by its own norm.
            None disables clipping.
        axis_name: Axis (pmap, shard_map, vmap) over which gradients and loss are averaged first.
        loss: Loss to check for non-finite values; None for no check.
        empty: bool scalar, True if the whole batch, over all devices, has nothing to learn from, such as no token in
            the loss mask; None if it has.

    Returns:
        ``(state, metrics)``, float32 scalars: ``grad_norm``, the global norm before clipping, finite or not;
        ``skipped``, 1.0 if the update was skipped, else 0.0; and ``empty_batch``, 1.0 if ``empty``, else 0.0. Code
        that updates an average or a controller after the step must do so only if ``skipped`` is 0.
    """
    empty = jnp.asarray(False if empty is None else empty)
    if axis_name is not None:
        grads = jax.lax.pmean(grads, axis_name)
        loss = None if loss is None else jax.lax.pmean(loss, axis_name)
    norm = global_norm(grads)
    finite = jnp.isfinite(norm) & ~empty
    for number in (loss, *jax.tree.leaves(learning_rate)):
        if number is not None:
            finite &= jnp.all(jnp.isfinite(number))
    if max_grad_norm is not None:
        grads = jax.tree.map(lambda bound, tree: clip(tree, global_norm(tree), bound), max_grad_norm, grads)
    updates, opt_state = state.tx.update(grads, state.opt_state, state.params)
    # `learning_rate` may be a prefix tree: each of its scalars multiplies a whole subtree.
    updates = jax.tree.map(lambda rate, tree: jax.tree.map(lambda u: u * rate, tree), learning_rate, updates)
    params = optax.apply_updates(state.params, updates)

    def keep_old(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    state = state.replace(
        step=state.step + 1,
        params=keep_old(params, state.params),
        opt_state=keep_old(opt_state, state.opt_state),
    )
    return state, {
        "grad_norm": norm,
        "skipped": 1.0 - finite.astype(jnp.float32),
        "empty_batch": empty.astype(jnp.float32),
    }


def gradient_step(
    state: state_lib.TrainState,
    loss_fn: Callable[[Any, Any, Any], tuple[jax.Array, dict[str, Any]]],
    batch: Any,
    total: Any,
    *,
    learning_rate: Any,
    max_grad_norm: Any = None,
    micro_batches: int = 1,
    axis_name: str | tuple[str, ...] | None = None,
    empty: Any = None,
) -> tuple[Any, dict[str, Any]]:
    """Computes gradients and applies them: :func:`loss_and_grads` followed by :func:`apply_gradients`.

    Args:
        state: As in :func:`apply_gradients`.
        loss_fn: As in :func:`loss_and_grads`. Its metrics must include ``"bad"``, a `nonfinite.BadRows`.
        batch: As in :func:`loss_and_grads`.
        total: As in :func:`loss_and_grads`.
        learning_rate: A scalar.
        max_grad_norm: As in :func:`apply_gradients`.
        micro_batches: As in :func:`loss_and_grads`.
        axis_name: Name of the mapped axis over which the batch is split; None if it is not split.
        empty: As in :func:`apply_gradients`.

    Returns:
        ``(state, metrics)``: the metrics of ``loss_fn``, with ``"bad"`` replaced by ``bad_rows`` and ``bad_row``; those
        of :func:`apply_gradients`; and ``learning_rate``.
    """
    (loss, logs), grads = loss_and_grads(loss_fn, state.params, batch, total, micro_batches=micro_batches)
    options = {"max_grad_norm": max_grad_norm, "axis_name": axis_name}
    state, update_logs = apply_gradients(state, grads, learning_rate=learning_rate, loss=loss, empty=empty, **options)
    logs |= nonfinite.row_metrics(logs.pop("bad"), axis_name=axis_name)
    return state, logs | update_logs | {"learning_rate": learning_rate}
