"""Placement of arrays and batches on a mesh, in jobs with one or several hosts."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.distributed import processes

AXES = ("data", "fsdp", "tensor", "sequence")
"""The axes of every mesh. The last axis varies fastest, so ``sequence`` and ``tensor`` span neighbouring devices."""

BATCH_AXES = ("data", "fsdp")
"""The mesh axes that shard the rows of a batch."""


class MeshError(ValueError):
    """A mesh, a sharding rule or a batch is invalid, or they are incompatible."""


def batch_shardings(batch: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Returns shardings that split the rows of each array in a batch over `BATCH_AXES` and replicate scalars."""
    rows, replicated = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((BATCH_AXES,), ()))
    return jax.tree.map(lambda x: rows if np.ndim(x) else replicated, batch)


def num_batch_shards(mesh: Mesh) -> int:
    """Returns the number of shards of a batch on ``mesh``. It must divide the number of rows of every batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def local_rows(batch: Any, mesh: Mesh) -> Any:
    """Returns the rows of a global batch that belong on this host's devices, as `shard_batch` expects them.

    Every host must pass the same global batch. A step then processes exactly this batch, whatever the number of hosts
    and the order of their devices in the mesh. With a single host, the batch is returned unchanged.

    Raises:
        MeshError: If the number of rows is not divisible by `num_batch_shards`.
    """
    if jax.process_count() == 1:
        return batch
    shards = num_batch_shards(mesh)
    local = processes.local_shards(_row_sharding(mesh), shards)

    def select(x: Any) -> Any:
        if not np.ndim(x):
            return x
        if x.shape[0] % shards:
            raise MeshError(f"a batch of {x.shape[0]} rows is not divisible by {shards} batch shards")
        return x[np.arange(x.shape[0]).reshape(shards, -1)[local].ravel()]

    return jax.tree.map(select, batch)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Returns the rows of all hosts as global arrays, sharded over the mesh.

    ``batch`` contains the rows of this host (`local_rows`). Arrays of typed PRNG keys are supported.

    Raises:
        MeshError: If the number of rows is not divisible by the number of this host's batch shards.
    """
    shards, rows = num_batch_shards(mesh), _row_sharding(mesh)
    local = processes.local_shards(rows, shards)

    def place(path: Any, x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x
        if not np.ndim(x):
            return processes.shard(x, NamedSharding(mesh, PartitionSpec()))
        if x.shape[0] % len(local):
            name = jax.tree_util.keystr(path)
            raise MeshError(
                f"a batch of {x.shape[0]} rows{name and f' ({name})'} is not divisible by this host's "
                f"{len(local)} batch shards (mesh: data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']})"
            )
        return processes.assemble(x, rows, shards, local)

    return jax.tree_util.tree_map_with_path(place, batch)


def _row_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def shard(tree: Any, shardings: Any) -> Any:
    """Shards arrays as specified by a matching tree of `shardings`; every host must hold the whole arrays."""
    return jax.tree.map(processes.shard, tree, shardings)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies arrays to every device of the mesh; every host must hold the whole arrays."""
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: processes.shard(x, replicated), tree)
