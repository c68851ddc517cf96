"""Creates the device mesh of a run, rounds batch sizes to it and places arrays on it."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, TypeVar

import jax
import numpy as np

from launch import mesh_settings
from launch.mesh_settings import AXES
from launch.run_settings import SettingError
from rlhf_jax import lm, parallel
from rlhf_jax.data import errors

S = TypeVar("S", bound=Any)


def resolve(settings: S) -> S:
    """Replaces a ``mesh.data`` of -1 with the size of the data axis and returns the settings.

    A run on several hosts without mesh sizes is resolved as if ``mesh.data`` were -1. Must be called before JAX
    initialises its devices, after which ``mesh.simulate`` has no effect. Raises SettingError if the mesh does not fit
    the devices.
    """
    mesh = settings.mesh
    if not mesh_settings.is_sharded(settings):
        if jax.process_count() == 1:
            return settings
        mesh = dataclasses.replace(mesh, data=-1)  # a run on several hosts uses all of their devices
    if mesh.simulate is not None:
        with contextlib.suppress(RuntimeError):  # the devices are already initialised; their number is checked below
            jax.config.update("jax_num_cpu_devices", mesh.simulate)
            jax.config.update("jax_platforms", "cpu")
    devices, others = jax.device_count(), mesh.fsdp * mesh.tensor * mesh.sequence
    data = devices // others if mesh.data == -1 and devices % others == 0 else mesh.data
    if data * others != devices:
        flags = " x ".join(f"--mesh.{axis} {getattr(mesh, axis)}" for axis in AXES)
        kind = jax.default_backend().upper()
        n = abs(data) * others
        hint = f"; --mesh.simulate {n} simulates {n} devices on the CPU" * (kind == "CPU")
        raise SettingError(f"a mesh of {flags} does not fit {devices} {kind} device{'s' * (devices > 1)}{hint}")
    resolved = dataclasses.replace(settings, mesh=dataclasses.replace(mesh, data=data))
    mesh_settings.check(resolved)
    return resolved


def make(settings: Any) -> jax.sharding.Mesh | None:
    """Creates the mesh for settings that `resolve` has returned; returns None if they use a single device."""
    sizes = {axis: getattr(settings.mesh, axis) for axis in AXES}
    return parallel.make_mesh(**sizes) if any(size != 1 for size in sizes.values()) else None


def describe(mesh: jax.sharding.Mesh, cfg: lm.LMConfig) -> list[str]:
    """Returns lines that describe the mesh: its sizes, its devices and the parameters that it cannot shard."""
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    kind = mesh.devices.flat[0].device_kind
    lines = [f"mesh: {sizes}, on {mesh.size} devices ({kind})"]
    if whole := parallel.indivisible(lm.abstract(cfg, head=True), mesh, lm.logical_axes(cfg, head=True)):
        lines.append(f"replicated on every device: {'; '.join(whole)}")
    return lines


def make_sharder(cfg: lm.LMConfig, mesh: jax.sharding.Mesh) -> Any:
    """Returns the ``shard`` argument of `lm.load`, a function from a parameter's logical axes to its sharding."""
    sizes: dict[str, int] = {}  # a logical axis has the same size in all parameters
    for name, axes in _flatten(lm.logical_axes(cfg, head=True)).items():
        sizes |= dict(zip(axes, _flatten(lm.abstract(cfg, head=True))[name].shape))

    def shard(axes: tuple[str, ...]) -> jax.sharding.NamedSharding:
        shape = [sizes.get(axis, 1) for axis in axes]
        return jax.sharding.NamedSharding(mesh, parallel.spec(axes, mesh, shape=shape))

    return shard


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {path: leaf for key, node in tree.items() for path, leaf in _flatten(node, f"{prefix}/{key}").items()}


def round_rows_up(rows: int, mesh: jax.sharding.Mesh | None) -> int:
    """Rounds ``rows`` up to a multiple of the mesh's number of batch shards."""
    parts = 1 if mesh is None else parallel.num_batch_shards(mesh)
    return -(-rows // parts) * parts


def round_rows_down(rows: int, mesh: jax.sharding.Mesh | None, name: str) -> int:
    """Rounds ``rows`` down to a multiple of the mesh's number of batch shards.

    Raises SettingError if the result is 0. ``name`` is the flag that the message names.
    """
    if mesh is None:
        return rows
    rounded = rows - rows % parallel.num_batch_shards(mesh)
    if rounded == 0:
        parts = parallel.num_batch_shards(mesh)
        few = f"{errors.counted(rows, 'rows')} {'is' if rows == 1 else 'are'}"
        raise SettingError(f"{name}: {few} fewer than the {parts} devices of --mesh.data x --mesh.fsdp")
    return rounded


def put_rows(mesh: jax.sharding.Mesh | None, *arrays: np.ndarray) -> tuple[Any, ...]:
    """Places arrays on the mesh, if any. Rows are sharded if the batch shards divide them evenly, else replicated."""
    if mesh is None:
        return arrays
    if len(arrays[0]) % parallel.num_batch_shards(mesh):
        return tuple(parallel.replicate(x, mesh) for x in arrays)
    return tuple(parallel.shard_batch(parallel.local_rows(x, mesh), mesh) for x in arrays)
