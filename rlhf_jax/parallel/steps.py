"""Compiling a train step: `jax.jit` on a mesh, `jax.shard_map` or `jax.pmap`."""

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

from rlhf_jax.parallel.placement import (
    AXES,
    ROWS,
    MeshError,
    put_batch,
    whole,
)
from rlhf_jax.parallel.pmap import PmapStep


def make_mesh(
    *, data: int = -1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of ``devices`` (all there are by default) with the axes `AXES`.

    Args:
        data: Copies of the model, each with rows of its own; -1 for as many as the other axes leave devices for.
        fsdp: Over how many devices parameters and optimiser state are spread; rows too.
        tensor: Over how many heads, MLP and vocabulary are.
        sequence: Over how many the columns of a row are.
        devices: In the order in which they are next to each other; `jax.devices` of a topology that is not there, too.

    Raises:
        MeshError: The sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "sequence": sequence}
    for name, size in sizes.items():
        if size < 1 and not (name == "data" and size == -1):
            raise MeshError(f"the mesh's axis {name} is {size}; it must be at least 1" + " (or -1)" * (name == "data"))
    others = fsdp * tensor * sequence
    if data == -1 and len(devices) % others == 0:
        sizes["data"] = len(devices) // others
    if math.prod(sizes.values()) != len(devices):
        asked = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise MeshError(f"a mesh of {asked} does not fit {len(devices)} devices")
    auto = (AxisType.Auto,) * len(AXES)
    shape = tuple(sizes.values())
    # Given devices may be those of a described topology, which only jax.make_mesh lays out by their wiring.
    return jax.make_mesh(shape, AXES, axis_types=auto, devices=devices)


class JitStep:
    """A compiled train step that counts how often it was traced.

    Call it as the step it wraps. ``traces`` stays 1 while the arguments keep their shapes, dtypes and structure; it
    grows where a hyperparameter became static or a batch changed its width, and each time means compiling again.
    """

    def __init__(
        self,
        train_step: Callable[..., Any],
        *,
        donate_argnums: tuple[int, ...] = (0,),
        mesh: Mesh | None = None,
        rows: tuple[int, ...] = (3,),
        small: tuple[int, ...] = (2, 4),
    ) -> None:
        """Wrap; nothing is compiled yet.

        On a ``mesh`` the arguments at the places ``rows`` are batches, those at ``small`` are whole everywhere, and
        all others lie where the caller put them. Where the first is donated, the first result lies as it did.
        """
        self.traces = 0
        self.mesh = mesh
        self._rows, self._small, self._keeps = rows, small, 0 in donate_argnums
        self._placed_last: dict[int, tuple[Any, Any]] = {}
        self._ahead: concurrent.futures.Future | None = None

        @functools.wraps(train_step)
        def counted(*args: Any) -> Any:
            self.traces += 1
            return train_step(*args)

        self._jit = functools.partial(jax.jit, counted, donate_argnums=donate_argnums)
        self._step = self._jit() if mesh is None or not self._keeps else None

    def __call__(self, *args: Any) -> Any:
        """Run the step; the donated arguments are gone afterwards."""
        if self._ahead is not None:
            # Still waiting for its turn, it is compiled here instead; under way, it is waited for.
            if not self._ahead.cancel():
                concurrent.futures.wait([self._ahead])
            self._ahead = None
        if self.mesh is None:
            return self._compiled(args)(*args)
        args = tuple(self._placed(i, x, self.mesh) for i, x in enumerate(args))
        with jax.set_mesh(self.mesh):
            return self._compiled(args)(*args)

    def compile_ahead(self, executor: concurrent.futures.Executor, *args: Any) -> None:
        """Compile in a thread of ``executor`` for arguments like these, arrays or their shapes; returns at once.

        The next call waits for it and then finds the program there. Threads compile beside whatever the device does,
        which is worth most for a large program that is needed late.
        """
        shapes = jax.eval_shape(lambda *same: same, *args)  # with weak types, which a call is matched by too
        # What goes wrong here goes wrong again in the call, which raises it.
        self._ahead = executor.submit(lambda: self.lower(*shapes).compile())

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """As ``jax.jit(step).lower``: for cost and memory analysis, and for compiling ahead of time."""
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            return self._compiled(args).lower(*args)

    def _placed(self, i: int, x: Any, mesh: Mesh) -> Any:
        if i in self._rows:
            return put_batch(x, mesh)
        if i not in self._small:
            return x
        given, placed = self._placed_last.get(i, (None, None))
        if not (isinstance(x, jax.Array) and x is given):  # the one key of a run is put there once
            placed = whole(x, mesh)
            self._placed_last[i] = (x, placed)
        return placed

    def _compiled(self, args: tuple[Any, ...]) -> Any:
        if self._step is None:
            assert self.mesh is not None
            everywhere = NamedSharding(self.mesh, PartitionSpec())

            def where(x: Any) -> Any:
                return x.sharding if isinstance(x.sharding, NamedSharding) else everywhere

            # The new state lies as the old one did, whatever the compiler would like better: what comes out is what
            # goes in next time.
            logged = None if jax.process_count() == 1 else everywhere  # each host reads its own copy
            self._step = self._jit(out_shardings=(jax.tree.map(where, args[0]), logged))
        return self._step


def jit_step(train_step: Callable[..., Any], *, mesh: Mesh | None = None) -> JitStep:
    """Compile ``train_step(state, frozen, hyper, batch, rng) -> (state, metrics)``, donating the state.

    A donated state's buffers are reused for the new one: the caller must not touch the old one again, and no two
    states may share arrays (`train.state.create` copies for this reason).

    On a ``mesh``, state and frozen models lie where the caller put them (`shardings`), the batch is this host's rows,
    and one program runs on all devices: sums over rows are sums over all of them, so every loss is right as it is.
    """
    return JitStep(train_step, mesh=mesh)


def shard_map_step(train_step: Callable[..., Any], mesh: Mesh) -> JitStep:
    """Compile a step for one program that each device runs on its own rows, with sums over devices in the step itself.

    The same steps as of `jit_step`, made with ``axis_name=parallel.ROWS``; the library's add up losses and counts over
    the devices before they divide, and so do they here whatever each device's masks are. Parameters are whole on every
    device (`whole`), and results are the same on all.

    Raises:
        MeshError: The mesh has a ``tensor`` or ``sequence`` axis, over which such a program would do everything twice.
    """
    for axis in ("tensor", "sequence"):
        if mesh.shape[axis] > 1:
            raise MeshError(
                f"shard_map_step spreads rows alone, and the mesh's axis {axis} is {mesh.shape[axis]}; use jit_step"
            )

    @functools.wraps(train_step)
    def spread(state: Any, frozen: Any, hyper: Any, batch: Any, rng: Any) -> Any:
        everywhere = PartitionSpec()
        rows = jax.tree.map(lambda x: PartitionSpec(ROWS) if np.ndim(x) else everywhere, batch)
        # What is the same on all devices is not tracked: the steps say themselves what is summed over devices.
        own = jax.shard_map(
            train_step,
            mesh=mesh,
            in_specs=(everywhere, everywhere, everywhere, rows, everywhere),
            out_specs=(everywhere, everywhere),
            check_vma=False,
        )
        return own(state, frozen, hyper, batch, rng)

    return JitStep(spread, mesh=mesh)


def pmap_step(
    train_step: Callable[..., Any], *, axis_name: str = "devices", devices: Sequence[Any] | None = None
) -> PmapStep:
    """Compile a step, made with this ``axis_name``, for `jax.pmap`, which JAX keeps but does not develop further.

    As `shard_map_step`, for code that has its states stacked ``[devices, ...]`` already; `PmapStep.copies` stacks::

        step = parallel.pmap_step(sft.make_train_step(..., axis_name="devices"))
        state, metrics = step(step.copies(state), None, hyper, batch, rng)
    """
    return PmapStep(train_step, axis_name=axis_name, devices=jax.local_devices() if devices is None else devices)
