"""Sharding rules, which map the logical axes of parameters and activations to the axes of a mesh."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.parallel.placement import AXES, BATCH_AXES, MeshError

Rules = Mapping[str, str | tuple[str, ...] | None]

RULES: Rules = {
    # parameters
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head": None,
    "mlp": "tensor",
    "score": None,
    "rank": None,
    # activations; their vocab, heads and mlp axes use the rules for parameters
    "batch": BATCH_AXES,
    "length": "sequence",
}
"""Maps each logical axis to one or more mesh axes, or to None if the logical axis is not sharded."""


def spec(
    axes: Sequence[str | None], mesh: Mesh | Any, *, shape: Sequence[int] | None = None, rules: Rules = RULES
) -> PartitionSpec:
    """Returns the `PartitionSpec` of an array with the given logical axes.

    >>> import jax
    >>> from rlhf_jax import parallel
    >>> mesh = jax.sharding.AbstractMesh((2, 4, 2, 1), parallel.AXES)
    >>> parallel.spec(("embed", "heads", None), mesh)
    P('fsdp', 'tensor', None)
    >>> parallel.spec(("embed", "heads", None), mesh, shape=(6, 8, 64))  # fsdp = 4 does not divide 6
    P(None, 'tensor', None)

    Args:
        axes: Logical axis of each dimension; None for a dimension that is not sharded.
        mesh: A mesh with the axes `AXES`.
        shape: Shape of the array. A dimension stays unsharded if its size is not divisible by the number of devices
            along its mesh axes. If ``shape`` is None, all dimensions are assumed to be divisible.
        rules: Mapping from logical axes to mesh axes. If two dimensions map to the same mesh axis, only the first one
            is sharded over it.

    Returns:
        The partition spec, with one entry for each dimension.

    Raises:
        MeshError: If a logical axis has no rule, or its rule names an axis that the mesh does not have.
    """
    used: set[str] = set()
    entries: list[Any] = []
    for i, name in enumerate(axes):
        if name is None:
            entries.append(None)
            continue
        if name not in rules:
            raise MeshError(f"no sharding rule for the logical axis {name!r}; the rules cover {', '.join(rules)}")
        mesh_axes = _mesh_axes(rules[name])
        for axis in mesh_axes:
            if axis not in mesh.axis_names:
                raise MeshError(
                    f"the sharding rule {name} = {axis} names an unknown mesh axis; the mesh has "
                    + ", ".join(mesh.axis_names)
                )
        free = tuple(axis for axis in mesh_axes if axis not in used and mesh.shape[axis] > 1)
        if shape is not None and shape[i] % math.prod(mesh.shape[axis] for axis in free):
            free = ()
        used |= set(free)
        entries.append(free if len(free) > 1 else free[0] if free else None)
    return PartitionSpec(*entries)


def shardings(tree: Any, mesh: Mesh | AbstractMesh, axes: Mapping[str, Any], *, rules: Rules = RULES) -> Any:
    """Returns a sharding for each array in ``tree``: parameters follow ``rules``, and other arrays are replicated.

    An array is sharded like a parameter if its path ends with the path of the parameter and both have equally many
    dimensions. For example, the entry ``layers/q/kernel`` in ``axes`` applies to ``params/policy/layers/q/kernel``, and
    to the moments and the running average of this parameter.

    Args:
        tree: Pytree of arrays or their shapes (`jax.eval_shape`), such as a ``TrainState``, the parameters of a model,
            or a dict of several models.
        mesh: A mesh with the axes `AXES`.
        axes: Nested dict with the logical axes of each parameter, such as the result of `lm.logical_axes`.
        rules: Mapping from logical axes to mesh axes.

    Returns:
        A tree of the same structure with a `NamedSharding` for each array.

    Raises:
        MeshError: If a logical axis has no rule, or its rule names an axis that the mesh does not have.
    """
    logical = {tuple(path): names for path, names in _paths(axes)}
    longest = max(len(path) for path in logical)

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        keys = [_key(entry) for entry in path]
        for length in range(min(longest, len(keys)), 0, -1):
            names = logical.get(tuple(keys[-length:]))
            if names is not None and len(names) == len(leaf.shape):
                return NamedSharding(mesh, spec(names, mesh, shape=leaf.shape, rules=rules))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def indivisible(tree: Any, mesh: Mesh, axes: Mapping[str, Any], *, rules: Rules = RULES) -> list[str]:
    """Describes the dimensions that stay unsharded because the shards would not all have the same size.

    Args:
        tree: Pytree of parameters or their shapes, with the structure of ``axes``.
        mesh: A mesh with the axes `AXES`.
        axes: Logical axes of the parameters, as in `shardings`.
        rules: Mapping from logical axes to mesh axes.

    Returns:
        A sentence for each such dimension. Divisible dimensions that stay unsharded because an earlier dimension of the
        array uses their mesh axis are not listed.
    """
    messages = []
    logical = dict(_paths(axes))
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        keys = tuple(_key(entry) for entry in path)
        names = logical.get(keys, ())
        if len(names) != len(leaf.shape):
            continue
        for name, size in zip(names, leaf.shape):
            mesh_axes = _mesh_axes(rules[name])
            shards = math.prod(mesh.shape[axis] for axis in mesh_axes)
            if size % shards:
                messages.append(
                    f"{'/'.join(keys)}: its axis {name} of size {size} is not divisible by "
                    f"{' x '.join(mesh_axes)} = {shards}"
                )
    return messages


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains ``x`` to the sharding of the logical ``axes`` on the `active_mesh`; without a mesh, returns ``x``.

    Without such constraints, the compiler may shard activations in the same way as weights, and move rows between
    devices.
    """
    mesh = active_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, spec(axes, mesh, shape=x.shape))


def gather_weight(x: jax.Array, *axes: str | None, dtype: Any = None) -> jax.Array:
    """Casts a weight to ``dtype``, if given, and gathers it over ``fsdp``; without a mesh, returns ``x`` unchanged.

    The weight is communicated in ``dtype``. Its gradient, also in ``dtype``, is scattered to the shards as soon as it
    is computed. If gathered weights are not saved for the backward pass (see `GATHERED`), at most one layer is gathered
    at a time in both passes.
    """
    if active_mesh() is None:
        return x
    return _gather(x, axes, jnp.dtype(x.dtype if dtype is None else dtype), jnp.dtype(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(x: jax.Array, axes: tuple[str | None, ...], dtype: Any, own_dtype: Any) -> jax.Array:
    # The constraint before the gather makes the cast run on shards.
    x = constrain(x.astype(dtype), *axes)
    x = constrain(x, *(None if axis is not None and RULES.get(axis) == "fsdp" else axis for axis in axes))
    return checkpoint_name(x, GATHERED)


def _gather_forward(x: jax.Array, axes: Any, dtype: Any, own_dtype: Any) -> tuple[jax.Array, None]:
    return _gather(x, axes, dtype, own_dtype), None


def _gather_backward(axes: Any, dtype: Any, own_dtype: Any, residuals: None, cotangent: jax.Array) -> tuple[jax.Array]:
    del dtype, residuals
    return (constrain(cotangent, *axes).astype(own_dtype),)


_gather.defvjp(_gather_forward, _gather_backward)

GATHERED = "gathered"
"""Name of gathered weights (`jax.ad_checkpoint.checkpoint_name`); rematerialisation policies must not save them."""


def num_shards(*axes: str) -> int:
    """Returns the number of shards of an array with these logical axes on the `active_mesh`; 1 without a mesh."""
    mesh = active_mesh()
    if mesh is None:
        return 1
    return math.prod(mesh.shape[name] for name in {name for axis in axes for name in _mesh_axes(RULES[axis])})


def active_mesh() -> Any:
    """Returns the mesh of the step being traced.

    Returns None without a mesh, if the mesh lacks one of `AXES`, or if an axis is manual (inside `jax.shard_map`).
    """
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.manual_axes or not set(AXES) <= set(mesh.axis_names) else mesh


def _mesh_axes(rule: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if rule is None else (rule,) if isinstance(rule, str) else tuple(rule)


def _paths(axes: Any, before: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    if not isinstance(axes, Mapping):
        return [(before, tuple(axes))]
    return [entry for name, node in axes.items() for entry in _paths(node, (*before, str(name)))]


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)
