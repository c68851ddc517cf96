"""The mesh of a run: its settings made into devices, and what has to divide over them, said by name."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import numpy as np

from launch import settings as settings_lib
from launch.settings import SettingError, Settings
from rlhf_jax import lm, parallel

AXES = parallel.AXES


def asked_for(settings: Settings) -> bool:
    """Whether a run is to be spread at all."""
    return any(getattr(settings.mesh, axis) != 1 for axis in AXES)


def check(settings: Settings) -> None:
    """Raise SettingError for sizes that cannot be, and for batches that do not divide over data x fsdp.

    Before the devices are counted a mesh of data -1 has no size; `resolved` gives it one.
    """
    mesh = settings.mesh
    for axis in AXES:
        size = getattr(mesh, axis)
        if size < 1 and not (axis == "data" and size == -1):
            raise SettingError(f"--mesh.{axis} is {size}; it must be at least 1{' or -1' * (axis == 'data')}")
    if mesh.simulate is not None and (mesh.simulate < 2 or not asked_for(settings)):
        raise SettingError(
            f"--mesh.simulate is {mesh.simulate}; it must be at least 2, beside the axes of a mesh such as --mesh.data"
        )
    if mesh.data == -1 or parts_of(mesh) == 1:
        return
    ppo, pretrain = settings.ppo, settings.pretrain
    answers = ppo.batch // ppo.minibatches
    minibatch = f"--ppo.batch {ppo.batch} by --ppo.minibatches {ppo.minibatches}"
    parts = f" and --ppo.micro-batches {ppo.micro_batches}" if ppo.micro_batches > 1 else ""
    samples = f" by --ppo.samples {ppo.samples}" if ppo.samples > 1 else ""
    divides(mesh, "--pretrain.batch", pretrain.batch)
    divides(mesh, "--reward-model.batch", settings.reward_model.batch)
    divides(mesh, f"--ppo.batch{f' {ppo.batch}' if samples else ''}{samples}", ppo.batch // ppo.samples)
    divides(mesh, minibatch + parts, answers // ppo.micro_batches)
    divides(mesh, f"--ppo.ptx-ratio {ppo.ptx_ratio:g} of {minibatch}", round(answers * ppo.ptx_ratio))


def parts_of(mesh: settings_lib.Mesh) -> int:
    """In how many parts the rows of a batch lie."""
    return mesh.data * mesh.fsdp


def divides(mesh: settings_lib.Mesh, name: str, rows: int) -> None:
    """Raise SettingError, naming the setting, for a batch of ``rows`` that does not divide over data x fsdp."""
    parts = parts_of(mesh)
    if mesh.data != -1 and rows % parts:
        raise SettingError(
            f"{name} is {rows}, which does not divide over the {parts} devices of --mesh.data {mesh.data} x "
            f"--mesh.fsdp {mesh.fsdp}"
        )


def resolved(settings: Settings) -> Settings:
    """The same with the size of ``data`` in the place of -1; raises SettingError where the devices are others.

    What ``simulate`` asks for has to be asked before JAX has begun with its devices, so this comes first in a run.
    """
    mesh = settings.mesh
    if not asked_for(settings):
        if jax.process_count() == 1:
            return settings
        mesh = dataclasses.replace(mesh, data=-1)  # of several hosts, none is left out
    if mesh.simulate is not None:
        with contextlib.suppress(RuntimeError):  # where JAX has begun, its devices are counted as they are
            jax.config.update("jax_num_cpu_devices", mesh.simulate)
            jax.config.update("jax_platforms", "cpu")
    there, others = jax.device_count(), mesh.fsdp * mesh.tensor * mesh.sequence
    data = there // others if mesh.data == -1 and there % others == 0 else mesh.data
    if data * others != there:
        flags = " x ".join(f"--mesh.{axis} {getattr(mesh, axis)}" for axis in AXES)
        kind = jax.default_backend().upper()
        hint = f"; --mesh.simulate {abs(data) * others} makes the CPU look like as many" * (kind == "CPU")
        raise SettingError(f"a mesh of {flags} does not fit the {there} {kind} device{'s' * (there > 1)} here{hint}")
    found = dataclasses.replace(settings, mesh=dataclasses.replace(mesh, data=data))
    check(found)
    return found


def make(settings: Settings) -> jax.sharding.Mesh | None:
    """The mesh of resolved settings; None for a single device, which takes no part in any of this."""
    sizes = {axis: getattr(settings.mesh, axis) for axis in AXES}
    return parallel.make_mesh(**sizes) if any(size != 1 for size in sizes.values()) else None


def told(mesh: jax.sharding.Mesh, cfg: lm.LMConfig) -> list[str]:
    """What a run says of its mesh at the start: its sizes, and parameters that stay whole since it divides nothing."""
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    kind = mesh.devices.flat[0].device_kind
    lines = [f"mesh: {sizes}, on {mesh.size} devices ({kind})"]
    whole = parallel.indivisible(lm.abstract(cfg, head=True), mesh, lm.logical_axes(cfg, head=True))
    if whole:
        lines.append(f"whole on every device: {'; '.join(whole)}")
    return lines


def shard_of(cfg: lm.LMConfig, mesh: jax.sharding.Mesh) -> Any:
    """Where `lm.load` puts an array of these logical axes: a name has the same size in all parameters of a model."""
    sizes: dict[str, int] = {}
    for name, axes in _flat(lm.logical_axes(cfg, head=True)).items():
        sizes |= dict(zip(axes, _flat(lm.abstract(cfg, head=True))[name].shape))

    def shard(axes: tuple[str, ...]) -> jax.sharding.NamedSharding:
        shape = [sizes.get(axis, 1) for axis in axes]
        return jax.sharding.NamedSharding(mesh, parallel.spec(axes, mesh, shape=shape))

    return shard


def _flat(tree: Any, before: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {before: tree}
    return {path: leaf for key, node in tree.items() for path, leaf in _flat(node, f"{before}/{key}").items()}


def rows_up(rows: int, mesh: jax.sharding.Mesh | None) -> int:
    """The next number of rows that divides over the mesh."""
    parts = 1 if mesh is None else parallel.num_batch_shards(mesh)
    return -(-rows // parts) * parts


def rows_down(rows: int, mesh: jax.sharding.Mesh | None, name: str) -> int:
    """The last number of rows that divides over the mesh; raises SettingError where there are not so many."""
    if mesh is None:
        return rows
    whole = rows - rows % parallel.num_batch_shards(mesh)
    if whole == 0:
        raise SettingError(f"{name} makes a batch of {rows}, too few for {parallel.num_batch_shards(mesh)} devices")
    return whole


def spread(mesh: jax.sharding.Mesh | None, *arrays: np.ndarray) -> tuple[Any, ...]:
    """Rows on the mesh, in parts where they divide and else whole; as they are where there is no mesh."""
    if mesh is None:
        return arrays
    if len(arrays[0]) % parallel.num_batch_shards(mesh):
        return tuple(parallel.replicate(x, mesh) for x in arrays)
    return tuple(parallel.shard_batch(parallel.local_rows(x, mesh), mesh) for x in arrays)
