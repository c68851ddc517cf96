"""A train step under `jax.pmap`: every array with one axis more, over the devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class PmapStep:
    """A train step under `jax.pmap`; see `parallel.pmap_step`."""

    def __init__(self, train_step: Callable[..., Any], *, axis_name: str, devices: Sequence[Any]) -> None:
        """Wrap; nothing is compiled yet."""
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
        """Run the step on all rows of a batch; the state is gone afterwards."""
        n = len(self._devices)

        def deal(path: Any, x: Any) -> Any:
            if not np.ndim(x) or x.shape[0] % n:
                name = jax.tree_util.keystr(path)
                raise ValueError(
                    f"a batch of shape {np.shape(x)}{name and f' ({name})'} does not divide over {n} devices"
                )
            return x.reshape(n, x.shape[0] // n, *x.shape[1:])

        state, metrics = self._step(state, frozen, hyper, jax.tree_util.tree_map_with_path(deal, batch), rng)
        return state, self.first(metrics)

    def copies(self, tree: Any) -> Any:
        """A state, or frozen models, as the step takes them: ``[devices, ...]``, one on each device."""
        mesh = Mesh(np.array(self._devices), ("devices",))
        where = NamedSharding(mesh, PartitionSpec("devices"))

        def leaf(x: Any) -> jax.Array:
            return jax.device_put(jnp.broadcast_to(x, (len(self._devices), *np.shape(x))), where)

        return jax.tree.map(leaf, tree)

    def first(self, tree: Any) -> Any:
        """Undo `copies`: the first device's."""
        return jax.tree.map(lambda x: x[0], tree)
