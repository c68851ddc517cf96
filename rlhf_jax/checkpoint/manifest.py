"""The manifest of a checkpoint, which records the path, shape, dtype and SHA-256 of every leaf.

Orbax stores no checksums of array data. The manifest is therefore stored next to the arrays, with a digest of itself,
and checked on restore.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.distributed import processes


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or no valid checkpoint could be read."""


class DamagedError(Exception):
    """The files on disk differ from what was written."""


def is_prng_key(leaf: Any) -> bool:
    """Returns whether a leaf is a typed PRNG key."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _dtype_name(leaf: Any) -> str:
    """Returns the dtype as text, such as ``float32`` or ``key<fry>``; ``python int`` for a Python integer."""
    return str(leaf.dtype) if hasattr(leaf, "dtype") else f"python {type(leaf).__name__}"


def _as_array(leaf: Any, path: str) -> jax.Array | np.ndarray:
    """Returns the array to store for a leaf; for a typed PRNG key, its key data."""
    if is_prng_key(leaf):
        return jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array | np.ndarray):
        array = leaf
    elif isinstance(leaf, np.generic | bool | int | float):
        array = np.asarray(leaf)
    else:
        raise TypeError(
            f"a checkpoint may contain arrays and numbers only; {path or 'the state'} is a {type(leaf).__name__}"
        )
    if array.dtype == object:
        raise TypeError(
            f"a checkpoint may contain arrays and numbers only; {path or 'the state'} is an array of objects"
        )
    return array


def digest(array: jax.Array | np.ndarray) -> str:
    """Returns the SHA-256 of an array's dtype, shape and bytes."""
    array = np.ascontiguousarray(processes.gather(array))
    sha = hashlib.sha256(f"{array.dtype}{array.shape}".encode())
    sha.update(array.reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


def digest_tree(tree: Any) -> str:
    """Returns the SHA-256 of the paths and digests of all leaves."""
    paths, leaves, _ = flatten(tree)
    lines = [f"{path} {digest(_as_array(leaf, path))}" for path, leaf in zip(paths, leaves)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def leaf_name(index: int) -> str:
    """Returns the name under which Orbax stores a leaf."""
    return f"{index:06d}"


def flatten(tree: Any) -> tuple[list[str], list[Any], Any]:
    """Returns ``(paths, leaves, treedef)`` of a pytree."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path) for path, _ in leaves], [leaf for _, leaf in leaves], treedef


def json_structure(treedef: Any, count: int) -> Any:
    """Returns the tree with numbers as leaves, or None if it does not consist of lists and dicts with string keys."""
    numbered = jax.tree.unflatten(treedef, range(count))
    try:
        parsed = json.loads(json.dumps(numbered))
    except TypeError:
        return None
    return numbered if jax.tree.structure(parsed) == treedef else None


def make_manifest(state: Any, metadata: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the non-empty arrays of a state, as a dict whose keys are leaf names, and the manifest of the state."""
    paths, leaves, treedef = flatten(state)
    if not leaves:
        raise ValueError("the state has no leaves to save")
    arrays, entries = {}, []
    for index, (path, leaf) in enumerate(zip(paths, leaves)):
        array = _as_array(leaf, path)
        stored = {"shape": list(array.shape), "dtype": str(array.dtype)}
        prng = {"prng": str(jax.random.key_impl(leaf))} if is_prng_key(leaf) else {}
        entry = {"path": path, "shape": list(np.shape(leaf)), "dtype": _dtype_name(leaf), "stored": stored}
        entries.append(entry | {"sha256": digest(array)} | prng)
        if array.size:  # Orbax rejects empty arrays; their shape and dtype suffice
            arrays[leaf_name(index)] = array
    structure = json_structure(treedef, len(leaves))
    body = json.dumps({"leaves": entries, "skeleton": structure, "metadata": metadata})
    return arrays, {"body": body, "sha256": hashlib.sha256(body.encode()).hexdigest()}


def check_structure(manifest: dict[str, Any], paths: list[str], leaves: list[Any], source: str) -> None:
    """Checks that a checkpoint has the structure, shapes and dtypes of the requested state.

    A Python number, saved or requested, matches a scalar of any dtype.

    Args:
        manifest: Manifest of the checkpoint.
        paths: Paths of the requested leaves.
        leaves: Requested leaves; only their shapes and dtypes are used.
        source: Path of the checkpoint, for the error message.

    Raises:
        CheckpointError: The structures, shapes or dtypes differ.
    """
    saved = [entry["path"] for entry in manifest["leaves"]]
    if saved != paths:
        missing, extra = sorted(set(saved) - set(paths))[:3], sorted(set(paths) - set(saved))[:3]
        raise CheckpointError(
            f"{source} does not have the structure of the requested state (only in the checkpoint: {missing}; only in "
            f"the requested state: {extra})"
        )
    for entry, leaf in zip(manifest["leaves"], leaves):
        shape, dtype = list(np.shape(leaf)), _dtype_name(leaf)
        # A step counter starts as a Python int and is an array after the first compiled step.
        is_scalar = "python" in dtype or "python" in entry["dtype"]
        if shape != entry["shape"] or (dtype != entry["dtype"] and not is_scalar):
            saved_as = f"{entry['dtype']}{entry['shape']}"
            raise CheckpointError(f"{source} has {entry['path']} as {saved_as}, but {dtype}{shape} was requested")


def requested_sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """Returns the sharding of a leaf; None if it has none or is an uncommitted array, which may be used on any mesh."""
    if isinstance(leaf, jax.Array):
        return leaf.sharding if getattr(leaf, "committed", True) else None
    return getattr(leaf, "sharding", None)


def restore_leaf(array: Any, entry: dict[str, Any], leaf: Any) -> Any:
    """Converts a stored array to a PRNG key, if it was saved as one, or to the array or scalar type of ``leaf``."""
    if "prng" in entry:
        key = jax.random.wrap_key_data(jnp.array(array), impl=entry["prng"])
        sharding = requested_sharding(leaf)
        return key if sharding is None else jax.device_put(key, sharding)
    if isinstance(leaf, np.ndarray):
        return np.array(array)
    if isinstance(leaf, np.generic):
        return np.asarray(array)[()]
    if isinstance(array, jax.Array):
        return array
    if entry["dtype"].startswith("python"):
        return jnp.array(array, leaf.dtype) if hasattr(leaf, "dtype") else np.asarray(array).item()
    return jnp.array(array)  # copied, because the next step may donate it


def parse_manifest(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of a manifest after checking its digest; raises DamagedError if it was changed."""
    try:
        body, expected = raw["body"], raw["sha256"]
        if hashlib.sha256(body.encode()).hexdigest() == expected:
            return json.loads(body)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedError("its manifest cannot be read") from error
    raise DamagedError("the digest of its manifest does not match")
