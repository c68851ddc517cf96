"""What a checkpoint says of itself: every leaf's path, shape, dtype and SHA-256, and a digest of all that.

Orbax keeps no checksum of array data, so this stands beside the arrays, and nothing is handed back that does not match.
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
    """A checkpoint could not be written, or no good one could be read; the message says which, where and why."""


class DamagedError(Exception):
    """What stands on disk is not what was written."""


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed PRNG key."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _dtype_name(leaf: Any) -> str:
    """``float32``, ``key<fry>``, or ``python int`` for a scalar that has no dtype of its own."""
    return str(leaf.dtype) if hasattr(leaf, "dtype") else f"python {type(leaf).__name__}"


def _as_array(leaf: Any, path: str) -> jax.Array | np.ndarray:
    """The plain array that is stored for a leaf; a typed key is stored as its key data."""
    if is_key(leaf):
        return jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array | np.ndarray):
        array = leaf
    elif isinstance(leaf, np.generic | bool | int | float):
        array = np.asarray(leaf)
    else:
        raise TypeError(f"a checkpoint holds arrays and numbers, but {path or 'the state'} is a {type(leaf).__name__}")
    if array.dtype == object:
        raise TypeError(f"a checkpoint holds arrays and numbers, but {path or 'the state'} is an array of objects")
    return array


def digest(array: jax.Array | np.ndarray) -> str:
    """SHA-256 of dtype, shape and bytes."""
    host = np.ascontiguousarray(processes.whole(array))
    found = hashlib.sha256(f"{host.dtype}{host.shape}".encode())
    found.update(host.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def digest_tree(tree: Any) -> str:
    """SHA-256 of the paths and the digests of all leaves."""
    paths, leaves, _ = flatten(tree)
    told = [f"{path} {digest(_as_array(leaf, path))}" for path, leaf in zip(paths, leaves)]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def name_of(index: int) -> str:
    """What a leaf is called beside the manifest."""
    return f"{index:06d}"


def flatten(tree: Any) -> tuple[list[str], list[Any], Any]:
    """``(paths, leaves, treedef)``."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path) for path, _ in leaves], [leaf for _, leaf in leaves], treedef


def skeleton_of(treedef: Any, count: int) -> Any:
    """The tree with leaf numbers for leaves, if JSON can carry it (dicts and lists); otherwise None."""
    numbered = jax.tree.unflatten(treedef, range(count))
    try:
        back = json.loads(json.dumps(numbered))
    except TypeError:
        return None
    return numbered if jax.tree.structure(back) == treedef else None


def describe(state: Any, metadata: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``(arrays by name, manifest)`` of a state."""
    paths, leaves, treedef = flatten(state)
    if not leaves:
        raise ValueError("there is nothing to save: the state has no leaves")
    arrays, entries = {}, []
    for index, (path, leaf) in enumerate(zip(paths, leaves)):
        array = _as_array(leaf, path)
        stored = {"shape": list(array.shape), "dtype": str(array.dtype)}
        prng = {"prng": str(jax.random.key_impl(leaf))} if is_key(leaf) else {}
        entry = {"path": path, "shape": list(np.shape(leaf)), "dtype": _dtype_name(leaf), "stored": stored}
        entries.append(entry | {"sha256": digest(array)} | prng)
        if array.size:  # Orbax refuses empty arrays; shape and dtype say all there is to know of one
            arrays[name_of(index)] = array
    skeleton = skeleton_of(treedef, len(leaves))
    body = json.dumps({"leaves": entries, "skeleton": skeleton, "metadata": metadata})
    return arrays, {"body": body, "sha256": hashlib.sha256(body.encode()).hexdigest()}


def check_like(manifest: dict[str, Any], paths: list[str], leaves: list[Any], where: str) -> None:
    """Raise CheckpointError, naming a leaf, where the state that is asked for is another one than was saved."""
    saved = [entry["path"] for entry in manifest["leaves"]]
    if saved != paths:
        missing, extra = sorted(set(saved) - set(paths))[:3], sorted(set(paths) - set(saved))[:3]
        what = f"only in the checkpoint: {missing}; only in what was asked for: {extra}"
        raise CheckpointError(f"{where} holds another state than the one asked for ({what})")
    for entry, leaf in zip(manifest["leaves"], leaves):
        shape, dtype = list(np.shape(leaf)), _dtype_name(leaf)
        # A step counter starts as a Python int and comes out of the first compiled step as an array.
        loose = "python" in dtype or "python" in entry["dtype"]
        if shape != entry["shape"] or (dtype != entry["dtype"] and not loose):
            saved_as, asked = f"{entry['dtype']}{entry['shape']}", f"{dtype}{shape}"
            raise CheckpointError(f"{where} holds {entry['path']} as {saved_as}, but {asked} was asked for")


def placement(leaf: Any) -> jax.sharding.Sharding | None:
    """Where a leaf has to go, or None where it is free (kept uncommitted, so that it mixes with any mesh)."""
    if isinstance(leaf, jax.Array):
        return leaf.sharding if getattr(leaf, "committed", True) else None
    return getattr(leaf, "sharding", None)


def finish_leaf(array: Any, entry: dict[str, Any], leaf: Any) -> Any:
    """A leaf of the kind that ``leaf`` is, from the plain array that was stored for it."""
    if "prng" in entry:
        key = jax.random.wrap_key_data(jnp.array(array), impl=entry["prng"])
        sharding = placement(leaf)
        return key if sharding is None else jax.device_put(key, sharding)
    if isinstance(leaf, np.ndarray):
        return np.array(array)
    if isinstance(leaf, np.generic):
        return np.asarray(array)[()]
    if isinstance(array, jax.Array):
        return array
    if entry["dtype"].startswith("python"):
        return jnp.array(array, leaf.dtype) if hasattr(leaf, "dtype") else np.asarray(array).item()
    return jnp.array(array)  # a copy: the next step may donate it


def opened(raw: dict[str, Any]) -> dict[str, Any]:
    """Undo what `describe` did to a manifest; DamagedError where it is not what was written."""
    try:
        body, found = raw["body"], raw["sha256"]
        if hashlib.sha256(body.encode()).hexdigest() == found:
            return json.loads(body)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedError("its manifest cannot be read") from error
    raise DamagedError("its manifest does not match its own digest")
