"""Train steps compiled with `jax.pmap`, whose states have a leading device axis."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class PmapStep:
    """A train step compiled with `jax.pmap`; see `parallel.pmap_step`."""

    def __init__(self, train_step: Callable[..., Any], *, axis_name: str, devices: Sequence[Any]) -> None:
        """Wraps ``train_step``; the first call compiles it."""
        self.traces = 0
        self._devices = list(devices)

        @functools.wraps(train_step)
        def counted(*args: Any) -> Any:
            self.traces += 1
            return train_step(*args)

        self._step = jax.pmap(
            counted, axis_name, in_axes=(0, 0, None, 0, None), devices=self._devices, donate_argnums=(0,)
        )

    def __call__(self, state: Any, frozen: Any, hyper: Any, batch: Any, rng: Any) -> Any:
        """Runs the step on a ``[B, ...]`` batch and donates the state.

        Args:
            state: Train state with a leading device axis (`replicate`).
            frozen: Frozen models with a leading device axis, or None.
            hyper: Hyperparameters, the same on all devices.
            batch: Pytree of ``[B, ...]`` arrays; B must be divisible by the number of devices.
            rng: PRNG key, the same on all devices.

        Returns:
            ``(state, metrics)``: the new state with its device axis, and the metrics of the first device.

        Raises:
            ValueError: If an array of the batch is a scalar, or its number of rows is not divisible by the number of
                devices.
        """
        n = len(self._devices)

        def split(path: Any, x: Any) -> Any:
            if not np.ndim(x) or x.shape[0] % n:
                name = jax.tree_util.keystr(path)
                raise ValueError(
                    f"a batch of shape {np.shape(x)}{name and f' ({name})'} is not divisible by {n} devices"
                )
            return x.reshape(n, x.shape[0] // n, *x.shape[1:])

        state, metrics = self._step(state, frozen, hyper, jax.tree_util.tree_map_with_path(split, batch), rng)
        return state, self.unreplicate(metrics)

    def replicate(self, tree: Any) -> Any:
        """Copies a state or frozen models to each device, adding a leading device axis."""
        mesh = Mesh(np.array(self._devices), ("devices",))
        sharding = NamedSharding(mesh, PartitionSpec("devices"))

        def copy(x: Any) -> jax.Array:
            return jax.device_put(jnp.broadcast_to(x, (len(self._devices), *np.shape(x))), sharding)

        return jax.tree.map(copy, tree)

    def unreplicate(self, tree: Any) -> Any:
        """Returns the first device's copy; the inverse of `replicate`."""
        return jax.tree.map(lambda x: x[0], tree)
