"""Choice of the examples in each batch as a pure function of key and step, which makes resuming exact.

There is no iterator and no state to save: batch ``s`` is the same whether a run reached it from the start or from a
checkpoint. A checkpoint stores a `fingerprint` of the data next to the step, because the same indices select different
examples from different data.
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
    """Returns the indices of the examples in the batch at ``step``, over as many epochs as needed.

    Every epoch is a fresh shuffle of all ``n`` examples, with the epoch folded into ``key``. The epochs form one
    endless stream, and batch ``s`` is the part of the stream that starts at ``s * batch_size``: if ``batch_size`` does
    not divide ``n``, a batch can span two epochs, and each epoch still contains each example once. With ``drop_last``
    an epoch gives ``n // batch_size`` batches, none of which spans two epochs, and drops a remainder that differs from
    epoch to epoch.

    >>> import jax, numpy as np
    >>> from rlhf_jax.data import batching
    >>> epoch = batching.epoch_batches(0, n=6, batch_size=2, key=jax.random.key(0), steps=3)
    >>> epoch.shape, np.sort(epoch, axis=None).tolist()
    ((3, 2), [0, 1, 2, 3, 4, 5])

    Args:
        step: Step of the batch, from 0.
        n: Number of examples.
        batch_size: Number of examples in a batch; may exceed ``n`` unless ``drop_last`` is set.
        key: A JAX key; consumed. All steps of a run use the same key.
        steps: Number of consecutive batches to return, starting at ``step``; cheaper than one call for each, because an
            epoch is shuffled once. None returns one batch.
        drop_last: Whether to drop the remainder of each epoch.

    Returns:
        int32 ``[batch_size]``, or ``[steps, batch_size]`` if ``steps`` is given.

    Raises:
        ValueError: If a number is out of range.
    """
    if step < 0 or n < 1 or batch_size < 1 or (steps is not None and steps < 1):
        raise ValueError(
            f"step = {step} must be at least 0, and n = {n}, batch_size = {batch_size}, steps = {steps} at least 1"
        )
    if drop_last and batch_size > n:
        raise ValueError(f"batch_size = {batch_size} exceeds n = {n}: with drop_last there is no batch")
    # Python integers and int64: a long run passes 2**31 examples.
    per_epoch = n - n % batch_size if drop_last else n
    first = int(step) * batch_size
    positions = first + np.arange((steps or 1) * batch_size, dtype=np.int64)
    epochs = positions // per_epoch
    order = {int(epoch): _shuffle(n, jax.random.fold_in(key, int(epoch))) for epoch in np.unique(epochs)}
    indices = np.concatenate([order[epoch][positions[epochs == epoch] % per_epoch] for epoch in sorted(order)])
    return indices if steps is None else indices.reshape(steps, batch_size)


def epoch_of(step: int, *, n: int, batch_size: int, drop_last: bool = False) -> int:
    """Returns the epoch of the first example in the batch at ``step``.

    Args:
        step: Step of the batch, from 0.
        n: Number of examples.
        batch_size: Number of examples in a batch.
        drop_last: As for `epoch_batches`.

    Returns:
        The epoch, from 0.
    """
    per_epoch = n - n % batch_size if drop_last else n
    return step * batch_size // per_epoch


def split(n: int, *, fraction: float, key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Splits ``n`` examples at random into a training part and a held-out part.

    Args:
        n: Number of examples.
        fraction: Share of the held-out part, between 0 and 1; it gets ``round(n * fraction)`` examples.
        key: A JAX key; consumed.

    Returns:
        ``(train, held_out)``, disjoint int32 indices, each in ascending order.

    Raises:
        ValueError: If one of the parts would be empty.
    """
    held_out = round(n * fraction)
    if not 0 < held_out < n:
        raise ValueError(f"a held-out share of {fraction} of {n} examples leaves one part empty")
    order = _shuffle(n, key)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def fingerprint(arrays: Any) -> str:
    """Returns the SHA-256 of a pytree of arrays in hexadecimal: names, shapes, dtypes and every byte.

    The result is the same on every machine, and for NumPy and JAX arrays. It depends on the order of the rows.

    Raises:
        ValueError: If an array holds Python objects, whose bytes are addresses.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        array = np.asarray(leaf)
        if array.dtype.hasobject:
            raise ValueError(f"{jax.tree_util.keystr(path)} is an array of Python objects, which cannot be hashed")
        array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
        # repr makes the header self-delimiting, so no two pytrees give the same bytes.
        digest.update(repr((jax.tree_util.keystr(path), array.shape, array.dtype.name)).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _shuffle(n: int, key: jax.Array) -> np.ndarray:
    """Returns a permutation of ``range(n)``, int32, computed on the host without compilation or transfer.

    It sorts the raw output of a counter-based generator, which NumPy promises to keep from version to version; NumPy
    makes no such promise for ``Generator.permutation``.
    """
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    seed = hashlib.sha256(np.asarray(data).astype("<u4").tobytes()).digest()[:16]
    words = np.random.Philox(key=np.frombuffer(seed, "<u8")).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int32)
