"""What lies where: logical axes of parameters and activations, and the rules that put them on a mesh."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.parallel.placement import AXES, ROWS, MeshError

Rules = Mapping[str, str | tuple[str, ...] | None]

RULES: Rules = {
    # of parameters
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head": None,
    "mlp": "tensor",
    "score": None,
    "rank": None,
    # of activations; a vocabulary, heads and an MLP's inside lie as in the parameters
    "batch": ROWS,
    "length": "sequence",
}
"""Logical axis -> axis or axes of the mesh, or None for one that is whole on every device."""


def spec(
    axes: Sequence[str | None], mesh: Mesh | Any, *, shape: Sequence[int] | None = None, rules: Rules = RULES
) -> PartitionSpec:
    """How an array with these logical axes lies on ``mesh``.

    A dimension of ``shape`` that its axes of the mesh do not divide is whole on every device; of two dimensions that
    would lie on the same axis, the first does.

    Raises:
        MeshError: An axis has no rule, or its rule names no axis of the mesh.
    """
    taken: set[str] = set()
    entries: list[Any] = []
    for i, name in enumerate(axes):
        if name is None:
            entries.append(None)
            continue
        if name not in rules:
            raise MeshError(f"there is no sharding rule for the axis {name!r}; there are rules for {', '.join(rules)}")
        rule = rules[name]
        wanted = () if rule is None else (rule,) if isinstance(rule, str) else tuple(rule)
        for axis in wanted:
            if axis not in mesh.axis_names:
                raise MeshError(
                    f"the sharding rule {name} = {axis} names no axis of the mesh; it has {', '.join(mesh.axis_names)}"
                )
        free = tuple(axis for axis in wanted if axis not in taken and mesh.shape[axis] > 1)
        parts = math.prod(mesh.shape[axis] for axis in free)
        if shape is not None and shape[i] % parts:
            free = ()
        taken |= set(free)
        entries.append(free if len(free) > 1 else free[0] if free else None)
    return PartitionSpec(*entries)


def shardings(tree: Any, mesh: Mesh | AbstractMesh, axes: Mapping[str, Any], *, rules: Rules = RULES) -> Any:
    """The same tree with a sharding in the place of each array: parameters as `RULES` say, all else whole everywhere.

    What belongs to a parameter is known by the end of its path: ``params/policy/layers/q/kernel``, its moments in the
    optimiser's state and an average of it all lie as ``layers/q/kernel`` does.

    Args:
        tree: Arrays, or their shapes (`jax.eval_shape`); a ``TrainState``, parameters, or a dict of several models.
        axes: What `lm.logical_axes` gives, or a nested dict like it.
    """
    named = {tuple(path): names for path, names in _paths(axes)}
    longest = max(len(path) for path in named)

    def of(path: Any, leaf: Any) -> NamedSharding:
        keys = [_key(entry) for entry in path]
        for length in range(min(longest, len(keys)), 0, -1):
            names = named.get(tuple(keys[-length:]))
            if names is not None and len(names) == len(leaf.shape):
                return NamedSharding(mesh, spec(names, mesh, shape=leaf.shape, rules=rules))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(of, tree)


def undivided(tree: Any, mesh: Mesh, axes: Mapping[str, Any], *, rules: Rules = RULES) -> list[str]:
    """What stays whole on every device though a rule spreads it, because the mesh does not divide it; in words.

    Arguments as of `shardings`. A dimension whose axis of the mesh another one of the same array has is not meant.
    """
    told = []
    known = dict(_paths(axes))
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        keys = tuple(_key(entry) for entry in path)
        names = known.get(keys, ())
        if len(names) != len(leaf.shape):
            continue
        for name, size in zip(names, leaf.shape):
            rule = rules[name]
            wanted = () if rule is None else (rule,) if isinstance(rule, str) else rule
            parts = math.prod(mesh.shape[axis] for axis in wanted)
            if size % parts:
                told.append(f"{'/'.join(keys)}: its {name} {size} does not divide over {' x '.join(wanted)} {parts}")
    return told


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """``x`` with its logical axes pinned to the mesh of the step that is being compiled; ``x`` where there is none.

    Without it the compiler may spread activations as it spread the weights they meet, and move rows between devices.
    """
    mesh = compiled_for()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, spec(axes, mesh, shape=x.shape))


def gathered(x: jax.Array, *axes: str | None, dtype: Any = None) -> jax.Array:
    """A weight as a layer uses it: in ``dtype`` (its own by default), and whole over ``fsdp``; ``x`` without a mesh.

    What is sent is of ``dtype``, and the gradient, of ``dtype`` too, goes back to the devices that hold its parts as
    soon as it is made: no more than one layer is whole at a time, forward or backward.
    """
    if compiled_for() is None:
        return x
    return _gathered(x, axes, jnp.dtype(x.dtype if dtype is None else dtype), jnp.dtype(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(x: jax.Array, axes: tuple[str | None, ...], dtype: Any, given: Any) -> jax.Array:
    # Pinned before as well: else the cast, too, is made of the whole.
    x = constrain(x.astype(dtype), *axes)
    x = constrain(x, *(None if axis is not None and RULES.get(axis) == "fsdp" else axis for axis in axes))
    return checkpoint_name(x, GATHERED)


def _gathered_forward(x: jax.Array, axes: Any, dtype: Any, given: Any) -> tuple[jax.Array, None]:
    return _gathered(x, axes, dtype, given), None


def _gathered_backward(axes: Any, dtype: Any, given: Any, nothing: None, cotangent: jax.Array) -> tuple[jax.Array]:
    del dtype, nothing
    return (constrain(cotangent, *axes).astype(given),)


_gathered.defvjp(_gathered_forward, _gathered_backward)

GATHERED = "gathered"
"""What `gathered` gives is named, for rematerialisation: it must not be kept for the backward pass."""


def parts(*axes: str) -> int:
    """Over how many devices an array with these logical axes is spread, in the step that is being compiled."""
    mesh = compiled_for()
    if mesh is None:
        return 1
    names = [rule if isinstance(rule, tuple) else (rule,) for rule in (RULES[axis] for axis in axes) if rule]
    return math.prod(mesh.shape[name] for name in {name for rule in names for name in rule})


def compiled_for() -> Any:
    """The mesh of the step that is being compiled, if it is one of `make_mesh` and not taken apart by hand."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.manual_axes or not set(AXES) <= set(mesh.axis_names) else mesh


def _paths(axes: Any, before: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    if not isinstance(axes, Mapping):
        return [(before, tuple(axes))]
    return [found for name, node in axes.items() for found in _paths(node, (*before, str(name)))]


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)
