"""Arrays and rows of batches put on a mesh, by one host or by several."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.distributed import processes

AXES = ("data", "fsdp", "tensor", "sequence")
"""Of every mesh, the slowest first: devices that stand next to each other share ``tensor`` and ``sequence``."""

ROWS = ("data", "fsdp")
"""The axes over which the rows of a batch are spread."""


class MeshError(ValueError):
    """A mesh, a rule or a batch that do not go together; the message says which and why."""


def batch_shardings(batch: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The sharding of each ``[B, ...]`` array of a batch, rows over `ROWS`; scalars are whole everywhere."""
    rows = NamedSharding(mesh, PartitionSpec(ROWS))
    return jax.tree.map(lambda x: rows if np.ndim(x) else NamedSharding(mesh, PartitionSpec()), batch)


def row_parts(mesh: Mesh) -> int:
    """In how many parts the rows of a batch lie on ``mesh``: what every batch divides by."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def own_rows(batch: Any, mesh: Mesh) -> Any:
    """Of a batch that every host has whole, the rows that this host's devices hold: what `put_batch` takes.

    However many hosts there are, and in whatever order the mesh has their devices, the batch is the same. All of it,
    for one host.

    Raises:
        MeshError: The rows do not divide over the devices.
    """
    if jax.process_count() == 1:
        return batch
    parts, held = row_parts(mesh), processes.parts_held(_rows_over(mesh), row_parts(mesh))

    def own(x: Any) -> Any:
        if not np.ndim(x):
            return x
        if x.shape[0] % parts:
            raise MeshError(f"a batch of {x.shape[0]} rows does not divide over {parts} devices")
        return x[np.arange(x.shape[0]).reshape(parts, -1)[held].ravel()]

    return jax.tree.map(own, batch)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """This host's rows of a batch as global arrays, spread over the mesh; arrays of random keys are rows like others.

    Raises:
        MeshError: The rows do not divide over the devices.
    """
    parts, rows = row_parts(mesh), _rows_over(mesh)
    held = processes.parts_held(rows, parts)

    def put(path: Any, x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x
        if not np.ndim(x):
            return processes.put(x, NamedSharding(mesh, PartitionSpec()))
        if x.shape[0] % len(held):
            name = jax.tree_util.keystr(path)
            raise MeshError(
                f"a batch of {x.shape[0]} rows{f' on this host ({name})' if name else ''} does not divide over "
                f"{len(held)} devices (data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']})"
            )
        return processes.put_parts(x, rows, parts, held)

    return jax.tree_util.tree_map_with_path(put, batch)


def _rows_over(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(ROWS))


def put(tree: Any, where: Any) -> Any:
    """Arrays that every host holds whole, spread out as ``where`` says (`shardings`)."""
    return jax.tree.map(processes.put, tree, where)


def whole(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every host holds, whole on every device of the mesh."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: processes.put(x, everywhere), tree)
