"""Checkpoints: atomic, digested leaf by leaf, and restored from the newest one that is whole.

Orbax writes the arrays, in the background, into a temporary folder that is renamed once complete. It keeps no checksum
of array data, so a manifest stands beside the arrays with a SHA-256 for every leaf (and one for itself), and nothing is
handed back that does not match. On disk::

    directory/step_000000100/state/...     the leaves, by number
    directory/step_000000100/manifest/...  paths, shapes, dtypes, digests, the caller's metadata

Several processes may share a directory on a common file system; all of them save and restore, onto as many processes
and devices as there are then. Arrays that span processes are gathered leaf by leaf for their digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from rlhf_jax import processes

_STEP = re.compile(r"step_(\d+)")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or no good one could be read; the message says which, where and why."""


class _DamagedError(Exception):
    """What stands on disk is not what was written."""


# --- leaves -----------------------------------------------------------------------------------------------------------


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _dtype_name(leaf: Any) -> str:
    """``float32``, ``key<fry>``, or ``python int`` for a scalar that has no dtype of its own."""
    return str(leaf.dtype) if hasattr(leaf, "dtype") else f"python {type(leaf).__name__}"


def _as_array(leaf: Any, path: str) -> jax.Array | np.ndarray:
    """The plain array that is stored for a leaf; a typed key is stored as its key data."""
    if _is_key(leaf):
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


def _digest(array: jax.Array | np.ndarray) -> str:
    host = np.ascontiguousarray(processes.whole(array))
    digest = hashlib.sha256(f"{host.dtype}{host.shape}".encode())
    digest.update(host.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _name(index: int) -> str:
    return f"{index:06d}"


def _flatten(tree: Any) -> tuple[list[str], list[Any], Any]:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path) for path, _ in leaves], [leaf for _, leaf in leaves], treedef


def _skeleton(treedef: Any, count: int) -> Any:
    """The tree with leaf numbers for leaves, if JSON can carry it (dicts and lists); otherwise None."""
    numbered = jax.tree.unflatten(treedef, range(count))
    try:
        back = json.loads(json.dumps(numbered))
    except TypeError:
        return None
    return numbered if jax.tree.structure(back) == treedef else None


# --- one checkpoint ---------------------------------------------------------------------------------------------------


def _describe(state: Any, metadata: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``(arrays by name, manifest)`` of a state."""
    paths, leaves, treedef = _flatten(state)
    if not leaves:
        raise ValueError("there is nothing to save: the state has no leaves")
    arrays, entries = {}, []
    for index, (path, leaf) in enumerate(zip(paths, leaves)):
        array = _as_array(leaf, path)
        stored = {"shape": list(array.shape), "dtype": str(array.dtype)}
        prng = {"prng": str(jax.random.key_impl(leaf))} if _is_key(leaf) else {}
        entry = {"path": path, "shape": list(np.shape(leaf)), "dtype": _dtype_name(leaf), "stored": stored}
        entries.append(entry | {"sha256": _digest(array)} | prng)
        if array.size:  # Orbax refuses empty arrays; shape and dtype say all there is to know of one
            arrays[_name(index)] = array
    skeleton = _skeleton(treedef, len(leaves))
    body = json.dumps({"leaves": entries, "skeleton": skeleton, "metadata": metadata})
    return arrays, {"body": body, "sha256": hashlib.sha256(body.encode()).hexdigest()}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."


def _read_manifest(checkpointer: Any, path: epath.Path) -> dict[str, Any]:
    try:
        raw = checkpointer.restore(path, args=ocp.args.Composite(manifest=ocp.args.JsonRestore()))["manifest"]
        body, digest = raw["body"], raw["sha256"]
    except Exception as error:
        raise _DamagedError(f"its manifest cannot be read ({_first_line(error)})") from error
    if hashlib.sha256(body.encode()).hexdigest() != digest:
        raise _DamagedError("its manifest does not match its own digest")
    return json.loads(body)


def _check_like(manifest: dict[str, Any], paths: list[str], leaves: list[Any], where: str) -> None:
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


def _placement(leaf: Any) -> jax.sharding.Sharding | None:
    """Where a leaf has to go, or None where it is free (kept uncommitted, so that it mixes with any mesh)."""
    if isinstance(leaf, jax.Array):
        return leaf.sharding if getattr(leaf, "committed", True) else None
    return getattr(leaf, "sharding", None)


def _restore_arg(leaf: Any, stored: dict[str, Any]) -> Any:
    sharding = _placement(leaf)
    if sharding is None or _is_key(leaf):  # a key's sharding has no axis for the key's words
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=tuple(stored["shape"]))


def _finish_leaf(array: Any, entry: dict[str, Any], leaf: Any) -> Any:
    if "prng" in entry:
        key = jax.random.wrap_key_data(jnp.array(array), impl=entry["prng"])
        sharding = _placement(leaf)
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


def _read_arrays(checkpointer: Any, path: epath.Path, restore_args: dict[str, Any]) -> dict[str, Any]:
    item = dict.fromkeys(restore_args, 0)
    args = ocp.args.Composite(state=ocp.args.PyTreeRestore(item=item, restore_args=restore_args))
    try:
        return checkpointer.restore(path, args=args)["state"]
    except Exception as error:
        raise _DamagedError(f"its arrays cannot be read ({_first_line(error)})") from error


def _check_digests(found: list[str], entries: list[dict[str, Any]]) -> None:
    for digest, entry in zip(found, entries):
        if digest != entry["sha256"]:
            raise _DamagedError(f"the digest of {entry['path']} does not match what was saved")


def _read(checkpointer: Any, path: epath.Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """``(state, metadata)``; `_DamagedError` if the disk is at fault, `CheckpointError` if ``like`` does not fit."""
    manifest = processes.together(lambda: _read_manifest(checkpointer, path), _DamagedError)
    entries = manifest["leaves"]
    if like is None:
        skeleton = manifest["skeleton"]
        if skeleton is None:
            raise CheckpointError(f"{path} holds more than dicts and lists of arrays: pass `like` to restore it")
        treedef, leaves = jax.tree.structure(skeleton), [None] * len(entries)
    else:
        paths, leaves, treedef = _flatten(like)
        _check_like(manifest, paths, leaves, str(path))
    full = {_name(i): i for i, entry in enumerate(entries) if np.prod(entry["stored"]["shape"])}
    restore_args = {name: _restore_arg(leaves[i], entries[i]["stored"]) for name, i in full.items()}
    arrays: dict[str, Any] = {}
    if full:
        arrays = processes.together(lambda: _read_arrays(checkpointer, path, restore_args), _DamagedError)
    for i, entry in enumerate(entries):
        stored = entry["stored"]
        arrays.setdefault(_name(i), np.zeros(stored["shape"], jnp.dtype(stored["dtype"])))
    found = [_digest(arrays[_name(i)]) for i in range(len(entries))]
    processes.together(lambda: _check_digests(found, entries), _DamagedError)
    state = [_finish_leaf(arrays[_name(i)], entry, leaves[i]) for i, entry in enumerate(entries)]
    return jax.tree.unflatten(treedef, state), manifest["metadata"]


# --- a directory of them ----------------------------------------------------------------------------------------------


class Checkpoints:
    """The checkpoints of one run in one directory, newest first in line to be restored.

    Use it as a context manager, or call `close`: a save that is still being written when the process leaves is lost
    (the one before it is not). After `restore`, the first `save` removes every step newer than the restored one: they
    belong to a future that is given up, or are the damaged ones that `restore` passed over.

    Args:
        directory: Made at the first save; local, or whatever Orbax can write to (``gs://...``).
        keep: How many finished steps stay on disk; with 1 there is nothing to fall back to.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 2) -> None:
        """Touch nothing on disk yet."""
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.directory = epath.Path(directory).expanduser().resolve()
        self.keep = keep
        self._checkpointer: Any = None
        self._restored: int | None = None
        self._prepared = False  # the folder is there and clean: if it is gone later, someone took it away
        self._saving = False

    def __enter__(self) -> Checkpoints:
        """Return self."""
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        """Finish the save under way; its failure does not hide an exception that is already on its way."""
        try:
            self.close()
        except CheckpointError as failed:
            if kind is None:
                raise
            warnings.warn(str(failed), stacklevel=2)

    def steps(self) -> list[int]:
        """Every finished step on disk, ascending; whether they are whole is seen when one is restored."""
        try:
            if not self.directory.exists():
                return []
            found = [(_STEP.fullmatch(child.name), child) for child in self.directory.iterdir() if child.is_dir()]
            return sorted(int(m[1]) for m, child in found if m and ocp.utils.is_checkpoint_finalized(child))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot list the checkpoints in {self.directory}: {_first_line(error)}") from error

    def latest(self) -> int | None:
        """The newest finished step, or None where there is none; of several processes, all must ask."""
        steps = processes.as_first(self.steps())
        return steps[-1] if steps else None

    def save(self, step: int, state: Any, metadata: dict[str, Any] | None = None) -> None:
        """Start writing ``state`` as ``step``; return once the arrays may be donated or changed.

        Args:
            step: Greater than every step on disk (see the class for the exception after `restore`).
            state: Any pytree of arrays, numbers and typed PRNG keys, such as a ``TrainState``.
            metadata: What JSON can carry; comes back from `restore` as it is.

        Raises:
            CheckpointError: The disk is full, read-only or gone, here or in the save before; or the step is not new.
            TypeError: A leaf is no array, or the metadata is no JSON.
        """
        arrays, manifest = _describe(state, dict(metadata or {}))
        self.wait()
        if not self._prepared:
            self._prepare(step)
        if not self.directory.exists():
            raise CheckpointError(f"cannot save step {step}: the folder {self.directory} has vanished")
        if self._restored is not None:
            self._remove([old for old in self.steps() if old > self._restored])
        newest = self.latest()
        if newest is not None and step <= newest:
            raise CheckpointError(f"cannot save step {step} in {self.directory}: step {newest} is already there")
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), manifest=ocp.args.JsonSave(manifest))
        try:
            self._orbax().save(self._path(step), args=args)
        except Exception as error:
            self._drop()
            raise CheckpointError(f"cannot save step {step} in {self.directory}: {_first_line(error)}") from error
        self._saving, self._restored = True, None

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any, dict[str, Any]]:
        """The newest step that is whole, with a warning for each one passed over.

        Args:
            like: A pytree of arrays or ``jax.ShapeDtypeStruct`` that gives structure, dtypes and shardings; what is no
                leaf (a ``TrainState``'s functions) is taken from it. None: dicts and lists as they were saved.
            step: This one and no other.

        Returns:
            ``(step, state, metadata)``; the arrays are the saved ones bit for bit.

        Raises:
            CheckpointError: There is none, none is whole, or it holds another state than ``like``.
        """
        self.wait()
        steps = processes.as_first(self.steps())
        if step is not None and step not in steps:
            raise CheckpointError(f"there is no step {step} in {self.directory}; there are {steps}")
        reasons = []
        for candidate in reversed(steps) if step is None else [step]:
            try:
                state, metadata = _read(self._orbax(), self._path(candidate), like)
            except _DamagedError as damage:
                reasons.append(f"step {candidate}: {damage}")
                continue
            for reason in reasons:
                warnings.warn(f"passed over a damaged checkpoint in {self.directory}, {reason}", stacklevel=2)
            self._restored = candidate
            return candidate, state, metadata
        why = "; ".join(reasons) or "it is empty or not there"
        raise CheckpointError(f"there is no checkpoint to restore in {self.directory}: {why}")

    def wait(self) -> None:
        """Return when the save under way is on disk; old steps beyond ``keep`` are removed then."""
        if not self._saving:
            return
        self._saving = False
        try:
            self._checkpointer.wait_until_finished()
        except Exception as error:
            self._drop()
            raise CheckpointError(f"the last save in {self.directory} failed: {_first_line(error)}") from error
        self._remove(self.steps()[: -self.keep])

    def close(self) -> None:
        """Wait, and stop the writer; the object can be used again afterwards."""
        try:
            self.wait()
        finally:
            self._drop()

    def _path(self, step: int) -> epath.Path:
        return self.directory / f"step_{step:09d}"

    def _orbax(self) -> Any:
        if self._checkpointer is None:
            self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        return self._checkpointer

    def _drop(self) -> None:
        checkpointer, self._checkpointer = self._checkpointer, None
        if checkpointer is not None:
            with contextlib.suppress(Exception):  # `wait` has told what was wrong
                checkpointer.close()

    def _prepare(self, step: int) -> None:
        """Make the directory, and clear away what a killed process left half written."""
        try:
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                for child in self.directory.iterdir():
                    if _STEP.match(child.name) and child.is_dir() and not ocp.utils.is_checkpoint_finalized(child):
                        child.rmtree()
        except OSError as error:
            raise CheckpointError(f"cannot save step {step} in {self.directory}: {_first_line(error)}") from error

        self._prepared = True
        processes.meet("checkpoint.prepare")

    def _remove(self, steps: list[int]) -> None:
        for step in steps if jax.process_index() == 0 else []:
            try:
                self._path(step).rmtree()
            except OSError as error:
                raise CheckpointError(f"cannot remove the old {self._path(step)}: {_first_line(error)}") from error
        processes.meet("checkpoint.remove")


def save_params(path: str | os.PathLike[str], params: Any, metadata: dict[str, Any] | None = None) -> None:
    """Write the parameters of a finished stage, digests beside them; what stood at ``path`` is replaced atomically.

    Args:
        path: A folder.
        params: Nested dicts (or lists) of arrays, so that `load_params` needs no example of them.
        metadata: As in `Checkpoints.save`.
    """
    _, leaves, treedef = _flatten(params)
    if _skeleton(treedef, len(leaves)) is None:
        raise TypeError("save_params takes nested dicts with string keys, or lists, of arrays")
    with Checkpoints(path, keep=1) as checkpoints:
        newest = checkpoints.latest()
        checkpoints.save(0 if newest is None else newest + 1, params, metadata)


def load_params(path: str | os.PathLike[str], like: Any = None) -> Any:
    """The parameters that `save_params` wrote, checked; ``like`` gives shardings where they should be spread out."""
    with Checkpoints(path, keep=1) as checkpoints:
        return checkpoints.restore(like)[1]
