"""Collective operations between the processes of a job: gather, barrier, broadcast, and global arrays.

All processes must call these functions in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


def gather(array: jax.Array | np.ndarray) -> np.ndarray:
    """Converts an array to NumPy, after gathering it from all processes if it is sharded across them."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def barrier(name: str) -> None:
    """Waits until all processes have called this function with the same ``name``."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"rlhf_jax.{name}")


def call_on_all(fn: Callable[[], Any], error: type[Exception]) -> Any:
    """Returns ``fn()``; if ``fn`` raises ``error`` in any process, all processes raise ``error``."""
    value, raised = None, None
    try:
        value = fn()
    except error as own:
        raised = own
    if jax.process_count() > 1:
        succeeded = np.ravel(multihost_utils.process_allgather(np.asarray(raised is None)))
        if raised is None and not succeeded.all():
            raised = error(f"process {', '.join(map(str, np.flatnonzero(~succeeded)))} cannot read it")
    if raised is not None:
        raise raised
    return value


def broadcast_from_first(numbers: list[int], *, max_length: int = 256) -> list[int]:
    """Returns process 0's ``numbers`` on all processes; several processes receive at most the last ``max_length``.

    The numbers must be non-negative and fit in int32.
    """
    if jax.process_count() == 1:
        return numbers
    padded = np.full(max_length, -1, np.int32)
    last = numbers[-max_length:]
    padded[: len(last)] = last
    return [int(number) for number in multihost_utils.broadcast_one_to_all(padded) if number >= 0]


def shard(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Shards an array as specified by ``sharding``; every process must hold the whole array, unless it is global."""
    is_global = isinstance(x, jax.Array) and not x.is_fully_addressable
    if sharding.is_fully_addressable or is_global:
        return x if is_global and x.sharding == sharding else jax.device_put(x, sharding)
    # For each array, jax.device_put would run a collective that compares its values between processes.
    return _with_key_data(x, lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]))


def local_shards(rows: jax.sharding.Sharding, shards: int) -> list[int]:
    """Returns the sorted indices, in ``range(shards)``, of the row shards on this process's devices."""
    indices = rows.addressable_devices_indices_map((shards,)).values()
    return sorted({index[0].indices(shards)[0] for index in indices if index is not None})


def assemble(x: Any, rows: jax.sharding.Sharding, shards: int, local: list[int]) -> jax.Array:
    """Builds a global array from the row shards of all processes.

    Args:
        x: Concatenated row shards of this process.
        rows: Sharding of the rows of the global array.
        shards: Number of row shards of the global array.
        local: Indices of this process's shards (`local_shards`).

    Returns:
        An array with ``len(x) / len(local) * shards`` rows.
    """
    if jax.process_count() == 1:
        return jax.device_put(x, rows)
    size = x.shape[0] // len(local)

    def from_local(x: np.ndarray) -> jax.Array:
        shape = (size * shards, *x.shape[1:])

        def read(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            at = local.index(start // size) * size
            return x[at : at + stop - start]

        return jax.make_array_from_callback(shape, rows, read)

    return _with_key_data(x, from_local)


def _with_key_data(x: Any, make: Callable[[np.ndarray], jax.Array]) -> jax.Array:
    """Applies ``make`` to ``x`` as a NumPy array, or to the key data of ``x`` if it is an array of typed PRNG keys."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(make(np.asarray(jax.random.key_data(x))), impl=jax.random.key_impl(x))
    return make(np.asarray(x))
