"""Which examples stand in the batch of a step: a pure function of key and step, so that resuming is exact.

There is no iterator and no state to save. The data position of a run IS its step: batch ``s`` is the same whether a run
came there from the start or from a checkpoint. What a checkpoint keeps beside the step is a `fingerprint` of the data,
since the same indices into other data are other batches.
"""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def epoch_batches(
    step: int, *, n: int, batch_size: int, key: jax.Array, steps: int | None = None, drop_last: bool = False
) -> np.ndarray:
    """Indices of the examples in the batch at ``step``, over as many epochs as it takes.

    Every epoch is a fresh shuffle of all ``n`` examples, from ``key`` with the epoch folded in. The epochs follow one
    another in one endless stream, and batch ``s`` is its part from ``s * batch_size`` on: where the batch does not
    divide ``n``, the remainder of an epoch begins the batch that the next epoch completes, and each epoch still holds
    each example once. With ``drop_last`` an epoch gives ``n // batch_size`` batches instead, none across its end, and
    the remainder, another one each epoch, is left out.

    Args:
      step: from 0.
      n: number of examples.
      batch_size: may be larger than ``n``, without ``drop_last``.
      key: a JAX key; consumed, and the same for all steps of a run.
      steps: give this many batches in a row, from ``step`` on; cheaper than one call each, the shuffle of an epoch
        being made once.
      drop_last: no batch goes across the end of an epoch.

    Returns:
      int32 ``[batch_size]``, or ``[steps, batch_size]``.

    Raises:
      ValueError: a number is out of its range.
    """
    if step < 0 or n < 1 or batch_size < 1 or (steps is not None and steps < 1):
        raise ValueError(
            f"step = {step} must be 0 or more; n = {n}, batch_size = {batch_size}, steps = {steps} 1 or more"
        )
    if drop_last and batch_size > n:
        raise ValueError(f"batch_size = {batch_size} is more than n = {n}: with drop_last no batch is left")
    # In Python and int64: a long run passes 2**31 examples.
    used = n - n % batch_size if drop_last else n
    first = int(step) * batch_size
    positions = first + np.arange((steps or 1) * batch_size, dtype=np.int64)
    epochs = positions // used
    order = {int(epoch): _shuffle(n, jax.random.fold_in(key, int(epoch))) for epoch in np.unique(epochs)}
    indices = np.concatenate([order[epoch][positions[epochs == epoch] % used] for epoch in sorted(order)])
    return indices if steps is None else indices.reshape(steps, batch_size)


def epoch_of(step: int, *, n: int, batch_size: int, drop_last: bool = False) -> int:
    """The epoch, from 0, that the first example of the batch at ``step`` belongs to."""
    used = n - n % batch_size if drop_last else n
    return step * batch_size // used


def split(n: int, *, fraction: float, key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Split ``n`` examples at random into two parts without a common element.

    Args:
      n: number of examples.
      fraction: share of the held-out part, between 0 and 1; ``round(n * fraction)`` examples.
      key: a JAX key; consumed.

    Returns:
      ``(train, held_out)``, int32 indices, both rising.

    Raises:
      ValueError: one of the parts would be empty.
    """
    held_out = round(n * fraction)
    if not 0 < held_out < n:
        raise ValueError(f"a share of {fraction} of {n} examples leaves one part empty")
    order = _shuffle(n, key)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def fingerprint(arrays: Any) -> str:
    """SHA-256, in hexadecimal, of a pytree of arrays: names, shapes, dtypes and every byte.

    The same on any machine and for NumPy and JAX arrays alike. Order counts: shuffled rows are other data.

    Raises:
      ValueError: an array of Python objects, whose bytes are addresses.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        array = np.asarray(leaf)
        if array.dtype.hasobject:
            raise ValueError(f"{jax.tree_util.keystr(path)} is an array of Python objects, which has no fixed bytes")
        array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
        # repr ends the header without ambiguity: no two pytrees run together into the same bytes.
        digest.update(repr((jax.tree_util.keystr(path), array.shape, array.dtype.name)).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _shuffle(n: int, key: jax.Array) -> np.ndarray:
    """A permutation of ``range(n)``, int32, made on the host: no compilation, no transfer.

    It sorts the raw words of a counter-based generator, which NumPy promises to keep from version to version; it does
    not promise that of ``Generator.permutation``.
    """
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    seed = hashlib.sha256(np.asarray(data).astype("<u4").tobytes()).digest()[:16]
    words = np.random.Philox(key=np.frombuffer(seed, "<u8")).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int32)
