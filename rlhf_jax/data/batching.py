"""Selection of the examples in each batch, as a pure function of a key and the step.

There is no iterator state to save: a resumed run selects the same batches as an uninterrupted run. However, the same
indices select different examples from different data. Therefore, pass a `fingerprint` of the data to `train.loop.fit`,
which compares it with the saved fingerprint when a run is resumed.
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
    """Returns the indices of the examples in the batch at ``step``.

    Each epoch is a different shuffle of all ``n`` examples, and the epochs follow one another without end. If
    ``batch_size`` does not divide ``n``, a batch can span several epochs; each epoch still contains each example once.
    With ``drop_last``, no batch spans two epochs: an epoch consists of ``n // batch_size`` batches and drops the
    remaining examples, which differ from epoch to epoch.

    >>> import jax, numpy as np
    >>> from rlhf_jax.data import batching
    >>> epoch = batching.epoch_batches(0, n=6, batch_size=2, key=jax.random.key(0), steps=3)
    >>> epoch.shape, np.sort(epoch, axis=None).tolist()
    ((3, 2), [0, 1, 2, 3, 4, 5])

    Args:
        step: Step of the batch, from 0.
        n: Number of examples.
        batch_size: Number of examples in a batch; may exceed ``n`` unless ``drop_last`` is set.
        key: A JAX key for the shuffles. Use the same key at all steps of a run, and for nothing else.
        steps: Number of consecutive batches to return, starting at ``step``. One call for many steps is cheaper than
            many calls, because it shuffles each epoch only once. None returns one batch.
        drop_last: Whether to drop the examples of each epoch that do not fill a batch.

    Returns:
        int32 ``[batch_size]``, or ``[steps, batch_size]`` if ``steps`` is given.

    Raises:
        ValueError: If an argument is out of range.
    """
    if step < 0 or n < 1 or batch_size < 1 or (steps is not None and steps < 1):
        raise ValueError(
            f"step = {step} must be at least 0, and n = {n}, batch_size = {batch_size}, steps = {steps} at least 1"
        )
    if drop_last and batch_size > n:
        raise ValueError(f"batch_size = {batch_size} must not exceed n = {n} if drop_last is set")
    # The products can exceed 2**31 in a long run, so they are Python integers and int64.
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
        drop_last: See `epoch_batches`.

    Returns:
        The epoch, from 0.
    """
    per_epoch = n - n % batch_size if drop_last else n
    return step * batch_size // per_epoch


def split(
    n: int, *, fraction: float, key: jax.Array, group_N: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Splits ``n`` examples at random into a training part and a held-out part, without dividing a group.

    Groups are drawn in random order and held out if they fit in what remains of the share. A smallest group that does
    not fit is held out too if this brings the share closer to ``fraction``, or if nothing fits. The number of held-out
    examples therefore differs from ``round(n * fraction)`` by less than the size of the largest group.

    >>> import jax, numpy as np
    >>> from rlhf_jax.data import batching
    >>> group_N = np.array([0, 0, 0, 0, 0, 0, 1, 1, 2, 2])
    >>> train, held_out = batching.split(10, fraction=0.4, key=jax.random.key(0), group_N=group_N)
    >>> held_out.tolist()
    [6, 7, 8, 9]

    Args:
        n: Number of examples.
        fraction: Share of examples to hold out, between 0 and 1.
        key: A JAX key; do not use it again.
        group_N: An integer per example; examples with the same integer stay together. None means that each example is
            a group, and exactly ``round(n * fraction)`` examples are held out.

    Returns:
        ``(train, held_out)``, disjoint integer indices, each in ascending order.

    Raises:
        ValueError: If one of the parts would be empty, because ``n`` is too small or all examples are in one group.
    """
    wanted = round(n * fraction)
    group_N = np.arange(n) if group_N is None else np.unique(group_N, return_inverse=True)[1]
    size_G = np.bincount(group_N)
    if not 0 < wanted < n or len(size_G) < 2:
        groups = "" if len(size_G) == n else f" in {len(size_G)} groups"
        raise ValueError(f"holding out the fraction {fraction} of {n} examples{groups} leaves one part empty")
    order = _shuffle(len(size_G), key)
    held_G, missing = np.zeros(len(size_G), bool), wanted
    for group in order:
        if size_G[group] <= missing:
            held_G[group], missing = True, missing - size_G[group]
    left = order[~held_G[order]]
    smallest = left[size_G[left].argmin()]
    if not held_G.any() or (size_G[smallest] < 2 * missing and len(left) > 1):
        held_G[smallest] = True
    return np.flatnonzero(~held_G[group_N]), np.flatnonzero(held_G[group_N])


def fingerprint(arrays: Any) -> str:
    """Returns the SHA-256 digest, in hexadecimal, of the names, shapes, dtypes and bytes of a pytree of arrays.

    The result is the same on all machines, and for NumPy and JAX arrays. It depends on the order of the rows.

    Raises:
        ValueError: If an array contains Python objects, whose bytes are addresses.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        array = np.asarray(leaf)
        if array.dtype.hasobject:
            raise ValueError(f"{jax.tree_util.keystr(path)} is an array of Python objects, which cannot be hashed")
        array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
        # repr makes the header self-delimiting, so different pytrees never hash the same bytes.
        digest.update(repr((jax.tree_util.keystr(path), array.shape, array.dtype.name)).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _shuffle(n: int, key: jax.Array) -> np.ndarray:
    """Returns a permutation of ``range(n)``, int32, computed with NumPy.

    The permutation sorts the raw output of a counter-based generator. NumPy guarantees that this output is the same in
    all versions, but gives no such guarantee for ``Generator.permutation``.
    """
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    seed = hashlib.sha256(np.asarray(data).astype("<u4").tobytes()).digest()[:16]
    words = np.random.Philox(key=np.frombuffer(seed, "<u8")).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int32)
