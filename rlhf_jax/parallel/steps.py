"""Compilation of train steps with `jax.jit` on a mesh, `jax.shard_map` or `jax.pmap`."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.parallel.placement import AXES, BATCH_AXES, MeshError, replicate, shard_batch
from rlhf_jax.parallel.pmap import PmapStep


def make_mesh(
    *, data: int = -1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Returns a mesh with the axes `AXES`.

    >>> import jax
    >>> from rlhf_jax import parallel
    >>> mesh = parallel.make_mesh(devices=jax.devices()[:1])
    >>> dict(mesh.shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1, 'sequence': 1}

    Args:
        data: Number of model replicas, which process different rows; -1 uses all remaining devices.
        fsdp: Number of shards of the parameters and the optimiser state; this axis also shards the rows of a batch.
        tensor: Number of shards of the attention heads, the MLP and the vocabulary.
        sequence: Number of shards along the columns of a batch.
        devices: Devices of the mesh; by default, all of `jax.devices`. Devices of a topology description
            (``jax.experimental.topologies``) are accepted as well.

    Returns:
        A mesh whose axes all have the type ``Auto``.

    Raises:
        MeshError: If a size is below 1, or the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "sequence": sequence}
    for name, size in sizes.items():
        if size < 1 and not (name == "data" and size == -1):
            raise MeshError(f"the mesh axis {name} is {size}; it must be at least 1" + " (or -1)" * (name == "data"))
    others = fsdp * tensor * sequence
    if data == -1 and len(devices) % others == 0:
        sizes["data"] = len(devices) // others
    if math.prod(sizes.values()) != len(devices):
        requested = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise MeshError(f"a mesh of {requested} does not fit {len(devices)} devices")
    auto = (AxisType.Auto,) * len(AXES)
    shape = tuple(sizes.values())
    # jax.make_mesh orders devices by their interconnect, including the devices of a topology description.
    return jax.make_mesh(shape, AXES, axis_types=auto, devices=devices)


class JitStep:
    """A compiled train step that counts how often it is traced.

    Call it like the wrapped step. ``traces`` stays 1 while the arguments keep their shapes, dtypes and structure. If
    they change, for example because a batch has a different width, the step is traced and compiled again.
    """

    def __init__(
        self,
        train_step: Callable[..., Any],
        *,
        donate_argnums: tuple[int, ...] = (0,),
        mesh: Mesh | None = None,
        batch_args: tuple[int, ...] = (3,),
        replicated_args: tuple[int, ...] = (2, 4),
    ) -> None:
        """Wraps ``train_step``; the first call compiles it.

        Args:
            train_step: Function to compile.
            donate_argnums: Positions of the donated arguments. On a mesh, if the first argument is donated, the first
                result has the shardings of that argument.
            mesh: Mesh to run on; None for a single device. Arguments at positions outside ``batch_args`` and
                ``replicated_args`` keep their shardings.
            batch_args: Positions of the arguments that are batches; these are sharded over the mesh (`shard_batch`).
            replicated_args: Positions of arguments that are copied to every device.
        """
        self.traces = 0
        self.mesh = mesh
        self._batch_args, self._replicated_args = batch_args, replicated_args
        self._last_replicated: dict[int, tuple[Any, Any]] = {}
        self._compilation: concurrent.futures.Future | None = None

        @functools.wraps(train_step)
        def counted(*args: Any) -> Any:
            self.traces += 1
            return train_step(*args)

        self._jit = functools.partial(jax.jit, counted, donate_argnums=donate_argnums)
        self._step = self._jit() if mesh is None or 0 not in donate_argnums else None

    def __call__(self, *args: Any) -> Any:
        """Runs the step; the donated arguments must not be used afterwards."""
        if self._compilation is not None:
            # A compilation that is still queued is cancelled; the call below compiles instead.
            if not self._compilation.cancel():
                concurrent.futures.wait([self._compilation])
            self._compilation = None
        if self.mesh is None:
            return self._compiled(args)(*args)
        args = tuple(self._place(i, x, self.mesh) for i, x in enumerate(args))
        with jax.set_mesh(self.mesh):
            return self._compiled(args)(*args)

    def compile_ahead(self, executor: concurrent.futures.Executor, *args: Any) -> None:
        """Starts compiling the step for the given arrays or shapes in a thread of ``executor``; returns immediately.

        The next call of the step uses the result, and waits for it if the compilation is running. If the compilation is
        still queued, the call cancels it and compiles the step itself. Use this method to compile a large step in
        advance, while the device runs other work.
        """
        shapes = jax.eval_shape(lambda *same: same, *args)  # keeps weak types, which later calls must match
        # An error in the thread is ignored, because the next call raises it again.
        self._compilation = executor.submit(lambda: self.lower(*shapes).compile())

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """Lowers the step as ``jax.jit(step).lower`` does, for cost and memory analysis."""
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            return self._compiled(args).lower(*args)

    def _place(self, i: int, x: Any, mesh: Mesh) -> Any:
        if i in self._batch_args:
            return shard_batch(x, mesh)
        if i not in self._replicated_args:
            return x
        last, copies = self._last_replicated.get(i, (None, None))
        if not (isinstance(x, jax.Array) and x is last):  # a run passes the same key to every step; copy it once
            copies = replicate(x, mesh)
            self._last_replicated[i] = (x, copies)
        return copies

    def _compiled(self, args: tuple[Any, ...]) -> Any:
        if self._step is None:
            assert self.mesh is not None
            replicated = NamedSharding(self.mesh, PartitionSpec())

            def sharding(x: Any) -> Any:
                return x.sharding if isinstance(x.sharding, NamedSharding) else replicated

            # The new state keeps the shardings of the old one, because it is the argument of the next call.
            metrics = None if jax.process_count() == 1 else replicated  # each host reads its own copy
            self._step = self._jit(out_shardings=(jax.tree.map(sharding, args[0]), metrics))
        return self._step


def jit_step(train_step: Callable[..., Any], *, mesh: Mesh | None = None) -> JitStep:
    """Compiles ``train_step(state, frozen, hyper, batch, rng) -> (state, metrics)`` and donates the state.

    The new state reuses the buffers of the donated state. The caller must therefore not use the old state again, and
    two states must not share arrays (`train.state.create` copies the parameters for this reason).

    With a ``mesh``, the state and the frozen models keep the shardings with which they were created (see `shardings`),
    the batch contains the rows of this host, and one program runs on all devices. Sums over rows are global, so losses
    need no changes.
    """
    return JitStep(train_step, mesh=mesh)


def shard_map_step(train_step: Callable[..., Any], mesh: Mesh) -> JitStep:
    """Compiles a step that each device runs on its own rows, with explicit sums over devices inside the step.

    ``train_step`` has the signature described in `jit_step` and must be created with
    ``axis_name=parallel.BATCH_AXES``. The library's steps sum losses and counts over devices before dividing, so
    masks may differ between devices. Parameters are replicated (`replicate`), and all devices return the same results.

    Raises:
        MeshError: If the ``tensor`` or ``sequence`` axis of the mesh is larger than 1, because the devices along this
            axis would repeat the same work.
    """
    for axis in ("tensor", "sequence"):
        if mesh.shape[axis] > 1:
            raise MeshError(
                f"shard_map_step shards rows only, but the mesh axis {axis} is {mesh.shape[axis]}; use jit_step"
            )

    @functools.wraps(train_step)
    def mapped(state: Any, frozen: Any, hyper: Any, batch: Any, rng: Any) -> Any:
        replicated = PartitionSpec()
        rows = jax.tree.map(lambda x: PartitionSpec(BATCH_AXES) if np.ndim(x) else replicated, batch)
        local_step = jax.shard_map(
            train_step,
            mesh=mesh,
            in_specs=(replicated, replicated, replicated, rows, replicated),
            out_specs=(replicated, replicated),
            check_vma=False,  # the step itself sums over devices
        )
        return local_step(state, frozen, hyper, batch, rng)

    return JitStep(mapped, mesh=mesh)


def pmap_step(
    train_step: Callable[..., Any], *, axis_name: str = "devices", devices: Sequence[Any] | None = None
) -> PmapStep:
    """Compiles a step with `jax.pmap`; the step must be created with the same ``axis_name``.

    As in `shard_map_step`, each device runs the step on its own rows. Use this function in existing pmap code, whose
    states have a leading device axis (`PmapStep.replicate` adds one); otherwise, prefer `jit_step`. For example::

        step = parallel.pmap_step(sft.make_train_step(..., axis_name="devices"))
        state, metrics = step(step.replicate(state), None, hyper, batch, rng)
    """
    return PmapStep(train_step, axis_name=axis_name, devices=jax.local_devices() if devices is None else devices)
