"""Arrays that the processes of one job share, and what all of them have to see alike; to be called by all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


def whole(array: jax.Array | np.ndarray) -> np.ndarray:
    """An array on the host, gathered where it is spread over processes."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def meet(where: str) -> None:
    """Wait until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"rlhf_jax.{where}")


def together(read: Callable[[], Any], error: type[Exception]) -> Any:
    """What ``read()`` gives; an ``error`` that it raises in one process is raised in all."""
    value, raised = None, None
    try:
        value = read()
    except error as mine:
        raised = mine
    if jax.process_count() > 1:
        right = np.ravel(multihost_utils.process_allgather(np.asarray(raised is None)))
        if raised is None and not right.all():
            raised = error(f"process {', '.join(map(str, np.flatnonzero(~right)))} cannot read it")
    if raised is not None:
        raise raised
    return value


def as_first(numbers: list[int], *, most: int = 256) -> list[int]:
    """Process 0's list of numbers of 0 or more, the last ``most`` of it."""
    if jax.process_count() == 1:
        return numbers
    padded = np.full(most, -1, np.int32)
    last = numbers[-most:]
    padded[: len(last)] = last
    return [int(number) for number in multihost_utils.broadcast_one_to_all(padded) if number >= 0]


def put(x: Any, where: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has whole, spread out as ``where`` says."""
    shared = isinstance(x, jax.Array) and not x.is_fully_addressable
    if where.is_fully_addressable or shared:
        return x if shared and x.sharding == where else jax.device_put(x, where)
    # jax.device_put would first compare what the processes have, with a collective each time.
    return _words(x, lambda x: jax.make_array_from_callback(x.shape, where, lambda index: x[index]))


def parts_held(rows: jax.sharding.Sharding, parts: int) -> list[int]:
    """Of an array whose first axis is in so many parts, those that devices of this process hold, in order."""
    found = rows.addressable_devices_indices_map((parts,)).values()
    return sorted({index[0].indices(parts)[0] for index in found if index is not None})


def put_parts(x: Any, rows: jax.sharding.Sharding, parts: int, held: list[int]) -> jax.Array:
    """This process's parts of an array, one after the other, as what all processes have together."""
    if jax.process_count() == 1:
        return jax.device_put(x, rows)
    size = x.shape[0] // len(held)
    shape = (size * parts, *x.shape[1:])

    def part(x: np.ndarray, index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(shape[0])
        at = held.index(start // size) * size
        return x[at : at + stop - start]

    def together(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback((shape[0], *x.shape[1:]), rows, lambda index: part(x, index))

    return _words(x, together)


def _words(x: Any, make: Callable[[np.ndarray], jax.Array]) -> jax.Array:
    """``make`` of an array on the host; of the words of random keys, where it holds them."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(make(np.asarray(jax.random.key_data(x))), impl=jax.random.key_impl(x))
    return make(np.asarray(x))
