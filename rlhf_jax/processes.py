"""What the processes of one job have to see alike; each of these is to be called by all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
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
