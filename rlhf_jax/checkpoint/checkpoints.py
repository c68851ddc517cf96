"""Saving and restoring checkpoints, which are written atomically and hashed leaf by leaf.

Orbax writes the arrays in the background to a temporary folder, which is renamed when it is complete. Because Orbax
stores no checksums of array data, a manifest next to the arrays contains the SHA-256 of every leaf and of its own
contents. `Checkpoints.restore` returns only arrays that match their manifest. A checkpoint consists of these files::

    directory/step_000000100/state/...     the leaves, by number
    directory/step_000000100/manifest/...  paths, shapes, dtypes, digests, the caller's metadata

In a multi-process job, all processes must save and restore together, in a directory on a shared file system. The number
of processes and devices may change between saving and restoring. An array that is sharded across processes is gathered
to compute its digest.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath, epy

from rlhf_jax.checkpoint import manifest as manifest_lib
from rlhf_jax.distributed import processes

with epy.lazy_imports():  # a fifth of the time of `import rlhf_jax`
    import orbax.checkpoint as ocp

_STEP = re.compile(r"step_(\d+)")
_ASIDE = "set_aside_"

CheckpointError = manifest_lib.CheckpointError


# `Checkpoints.wait` raises the errors of Orbax's threads, so they need not be logged as well.
logging.getLogger("absl").addFilter(lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname)

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""Numbers of the errors that a full, read-only, missing or broken disk causes."""


def _reason(error: BaseException) -> str:
    """Returns the message of one of `DISK_ERRORS` if ``error`` contains it, otherwise the first line of ``error``."""
    text = str(error).strip()
    for number in DISK_ERRORS:
        if os.strerror(number) in text:
            return os.strerror(number)
    lines = text.splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."


_on_all = partial(processes.call_on_all, error=manifest_lib.DamagedError)
"""Runs a function. If it raises DamagedError in any process, all processes raise DamagedError, so that all of them
resume from the same step."""


def _read_manifest(checkpointer: Any, path: epath.Path) -> dict[str, Any]:
    try:
        raw = checkpointer.restore(path, args=ocp.args.Composite(manifest=ocp.args.JsonRestore()))["manifest"]
    except Exception as error:
        raise manifest_lib.DamagedError(f"its manifest cannot be read ({_reason(error)})") from error
    return manifest_lib.parse_manifest(raw)


def _restore_arg(leaf: Any, stored: dict[str, Any]) -> Any:
    sharding = manifest_lib.requested_sharding(leaf)
    if sharding is None or manifest_lib.is_prng_key(leaf):  # the sharding of a key has no axis for the key data
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=tuple(stored["shape"]))


def _read_arrays(checkpointer: Any, path: epath.Path, entries: list[Any], leaves: list[Any]) -> list[Any]:
    """Returns the stored arrays with the shardings of ``leaves``."""
    names = [manifest_lib.leaf_name(i) for i in range(len(entries))]
    nonempty = [i for i, entry in enumerate(entries) if np.prod(entry["stored"]["shape"])]
    arrays: dict[str, Any] = {}
    if nonempty:
        item = {names[i]: 0 for i in nonempty}
        restore_args = {names[i]: _restore_arg(leaves[i], entries[i]["stored"]) for i in nonempty}
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore(item=item, restore_args=restore_args))
        try:
            arrays = checkpointer.restore(path, args=args)["state"]
        except Exception as error:
            raise manifest_lib.DamagedError(f"its arrays cannot be read ({_reason(error)})") from error
    for name, entry in zip(names, entries):
        stored = entry["stored"]
        arrays.setdefault(name, np.zeros(stored["shape"], jnp.dtype(stored["dtype"])))
    return [arrays[name] for name in names]


def _check_digests(digests: list[str], entries: list[Any]) -> None:
    for digest, entry in zip(digests, entries):
        if digest != entry["sha256"]:
            raise manifest_lib.DamagedError(f"the digest of {entry['path']} does not match the manifest")


def _read_verified(checkpointer: Any, path: epath.Path, entries: list[Any], leaves: list[Any]) -> list[Any]:
    """Returns the stored arrays with the shardings of ``leaves``, after checking their digests in all processes."""
    arrays = _on_all(lambda: _read_arrays(checkpointer, path, entries, leaves))
    digests = [manifest_lib.digest(array) for array in arrays]
    _on_all(lambda: _check_digests(digests, entries))
    return arrays


def _read(checkpointer: Any, path: epath.Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """Returns ``(state, metadata)``.

    Raises DamagedError if files are damaged, and CheckpointError if ``like`` does not fit or is None but required.
    """
    manifest = _on_all(lambda: _read_manifest(checkpointer, path))
    entries = manifest["leaves"]
    if like is None:
        structure = manifest["skeleton"]
        if structure is None:
            raise CheckpointError(f"{path} does not consist of dicts and lists of arrays; pass `like` to restore it")
        treedef, leaves = jax.tree.structure(structure), [None] * len(entries)
    else:
        paths, leaves, treedef = manifest_lib.flatten(like)
        manifest_lib.check_structure(manifest, paths, leaves, str(path))
    arrays = _read_verified(checkpointer, path, entries, leaves)
    state = [manifest_lib.restore_leaf(*each) for each in zip(arrays, entries, leaves)]
    return jax.tree.unflatten(treedef, state), manifest["metadata"]


class Checkpoints:
    """The checkpoints of one run, in one directory.

    Use this class as a context manager, or call `close` at the end. A process that exits during a save loses that save
    but not the previous one. An old checkpoint is removed only after a newer one is complete and, in a single-process
    job, has been read back and verified. The first `save` after `restore` sets aside all checkpoints newer than the
    restored one, damaged or not, by renaming them; they are removed under the same condition.

    Attributes:
        skipped: One message for each checkpoint that `restore` skipped, which states the step and what is damaged.

    Args:
        directory: Directory of the checkpoints, created by the first save; a local path, or any other path that Orbax
            supports, such as ``gs://...``.
        keep: Number of checkpoints to keep, at least 1. With 1, `restore` has no older checkpoint to fall back to.
        warn: Function called with each warning; `warnings.warn` by default.

    Raises:
        ValueError: ``keep`` is below 1.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, keep: int = 2, warn: Callable[[str], None] | None = None
    ) -> None:
        """Stores the settings without accessing the disk."""
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.directory = epath.Path(directory).expanduser().resolve()
        self.keep = keep
        self.skipped: list[str] = []
        self._warn = warn or partial(warnings.warn, stacklevel=3)
        self._checkpointer: Any = None
        self._restored: int | None = None
        self._prepared = False  # whether `_prepare` has run
        self._saving: int | None = None

    def __enter__(self) -> Checkpoints:
        """Returns self."""
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        """Finishes a pending save; if the block raised an exception, a failed save only causes a warning."""
        try:
            self.close()
        except CheckpointError as failed:
            if kind is None:
                raise
            self._warn(str(failed))

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints in ascending order, without checking them for damage."""
        try:
            if not self.directory.exists():
                return []
            folders = [(_STEP.fullmatch(child.name), child) for child in self.directory.iterdir() if child.is_dir()]
            return sorted(int(m[1]) for m, child in folders if m and ocp.utils.is_checkpoint_finalized(child))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot list the checkpoints in {self.directory}: {_reason(error)}") from error

    def latest(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None; all processes must call this together."""
        steps = processes.broadcast_from_first(self.steps())
        return steps[-1] if steps else None

    def save(self, step: int, state: Any, metadata: dict[str, Any] | None = None) -> None:
        """Starts saving ``state`` and returns as soon as its arrays may be donated or modified.

        Args:
            step: Step number, greater than the newest step on disk or, after `restore`, than the restored step.
            state: Any pytree of arrays, numbers and typed PRNG keys, such as a ``TrainState``.
            metadata: Dict of JSON values, which `restore` returns.

        Raises:
            CheckpointError: This save or the previous one failed (for example because the disk is full or read-only),
                or ``step`` is too small.
            TypeError: A leaf is not an array or a number, or JSON cannot represent the metadata.
            ValueError: ``state`` has no leaves.
        """
        arrays, manifest = manifest_lib.make_manifest(state, dict(metadata or {}))
        self.wait()
        if not self._prepared:
            self._prepare(step)
        if not self.directory.exists():
            raise CheckpointError(f"cannot save step {step} in {self.directory}: the directory no longer exists")
        if self._restored is not None:
            newer = [saved for saved in self.steps() if saved > self._restored]
            self._move([(self._path(saved), self.directory / f"{_ASIDE}{saved:09d}") for saved in newer])
        newest = self.latest()
        if newest is not None and step <= newest:
            raise CheckpointError(f"cannot save step {step} in {self.directory}: the newest step is already {newest}")
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), manifest=ocp.args.JsonSave(manifest))
        try:
            self._orbax().save(self._path(step), args=args)
        except Exception as error:
            self._close_writer()
            raise CheckpointError(f"cannot save step {step} in {self.directory}: {_reason(error)}") from error
        self._saving, self._restored = step, None

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any, dict[str, Any]]:
        """Restores ``step`` or, by default, the newest undamaged checkpoint; warns about damaged ones that it skips.

        Args:
            like: Pytree of arrays or ``jax.ShapeDtypeStruct`` with the requested structure, dtypes and shardings. Parts
                of the result that are not leaves, such as the functions of a ``TrainState``, are taken from ``like``.
                None is allowed if the state consists of dicts and lists of arrays.
            step: Step to restore; None means the newest undamaged checkpoint.

        Returns:
            ``(step, state, metadata)``; the arrays are bit-identical to the saved ones.

        Raises:
            CheckpointError: No undamaged checkpoint exists, ``step`` does not exist, or the checkpoint and ``like``
                have different structures, shapes or dtypes.
        """
        self.wait()
        steps = processes.broadcast_from_first(self.steps())
        if step is not None and step not in steps:
            raise CheckpointError(f"there is no step {step} in {self.directory}; the steps are {steps}")
        reasons = []
        for candidate in reversed(steps) if step is None else [step]:
            try:
                state, metadata = _read(self._orbax(), self._path(candidate), like)
            except manifest_lib.DamagedError as damage:
                reasons.append(f"step {candidate}: {damage}")
                continue
            for reason in reasons:
                self._warn(f"skipped a damaged checkpoint in {self.directory}, {reason}")
            self.skipped += reasons
            self._restored = candidate
            return candidate, state, metadata
        why = "; ".join(reasons) or "the directory is missing or contains no complete checkpoint"
        raise CheckpointError(f"there is no checkpoint to restore in {self.directory}: {why}")

    def wait(self) -> None:
        """Waits until a pending save is on disk, and removes obsolete checkpoints once the new one is verified."""
        if self._saving is None:
            return
        step, self._saving = self._saving, None
        try:
            self._checkpointer.wait_until_finished()
        except Exception as error:
            self._close_writer()
            reason = _reason(error) if self.directory.exists() else "the directory no longer exists"
            raise CheckpointError(f"cannot save step {step} in {self.directory}: {reason}") from error
        steps = self.steps()
        if step not in steps:
            raise CheckpointError(f"step {step} was saved in {self.directory} but no longer exists")
        obsolete = [self._path(old) for old in steps[: -self.keep]]
        obsolete += [child for child in self.directory.iterdir() if child.name.startswith(_ASIDE)]
        # Every process must reach the barrier in _move, although the processes may list different steps.
        self._move([(path, None) for path in (obsolete if obsolete and self._is_undamaged(step) else [])])

    def close(self) -> None:
        """Waits for a pending save and stops the writer; the object can be used again afterwards."""
        try:
            self.wait()
        finally:
            self._close_writer()

    def _path(self, step: int) -> epath.Path:
        return self.directory / f"step_{step:09d}"

    def _orbax(self) -> Any:
        if self._checkpointer is None:
            self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        return self._checkpointer

    def _close_writer(self) -> None:
        checkpointer, self._checkpointer = self._checkpointer, None
        if checkpointer is not None:
            with contextlib.suppress(Exception):  # `wait` has already raised the error
                checkpointer.close()

    def _prepare(self, step: int) -> None:
        """Creates the directory and removes incomplete checkpoints left by a killed process."""
        try:
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                for child in self.directory.iterdir():
                    if _STEP.match(child.name) and child.is_dir() and not ocp.utils.is_checkpoint_finalized(child):
                        child.rmtree()
        except OSError as error:
            raise CheckpointError(f"cannot save step {step} in {self.directory}: {_reason(error)}") from error
        self._prepared = True
        processes.barrier("checkpoint.prepare")

    def _is_undamaged(self, step: int) -> bool:
        if jax.process_count() > 1:
            return True
        try:
            entries = _read_manifest(self._orbax(), self._path(step))["leaves"]
            _read_verified(self._orbax(), self._path(step), entries, [None] * len(entries))
        except manifest_lib.DamagedError as damage:
            self._warn(f"step {step} in {self.directory} was written, but {damage}; older checkpoints are kept")
            return False
        return True

    def _move(self, moves: list[tuple[epath.Path, epath.Path | None]]) -> None:
        """Renames folders, or removes those whose new name is None."""
        for path, to in moves if jax.process_index() == 0 else []:
            try:
                if to is None:
                    path.rmtree()
                    continue
                if to.exists():
                    to.rmtree()
                path.rename(to)
            except OSError as error:
                raise CheckpointError(f"cannot rename or remove the old checkpoint {path}: {_reason(error)}") from error
        processes.barrier("checkpoint.change")


def save_params(path: str | os.PathLike[str], params: Any, metadata: dict[str, Any] | None = None) -> None:
    """Saves parameters with their digests, replacing earlier parameters at ``path`` atomically.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> from rlhf_jax import checkpoint
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoint.save_params(folder, {"w": jnp.arange(3.0)})
    ...     print(checkpoint.load_params(folder)["w"])
    [0. 1. 2.]

    Args:
        path: Folder to write to.
        params: Nested dicts or lists of arrays.
        metadata: Dict of JSON values, as in `Checkpoints.save`.

    Raises:
        TypeError: ``params`` contains a container other than a dict with string keys or a list.
        CheckpointError: The files cannot be written.
    """
    _, leaves, treedef = manifest_lib.flatten(params)
    if manifest_lib.json_structure(treedef, len(leaves)) is None:
        raise TypeError("params must consist of arrays in nested lists or dicts with string keys")
    with Checkpoints(path, keep=1) as checkpoints:
        newest = checkpoints.latest()
        checkpoints.save(0 if newest is None else newest + 1, params, metadata)


def load_params(path: str | os.PathLike[str], like: Any = None) -> Any:
    """Returns the parameters that `save_params` wrote, after checking their digests.

    ``like`` is a pytree of arrays or ``jax.ShapeDtypeStruct`` with the requested shardings; without it, the arrays are
    not sharded. Raises `CheckpointError` if the parameters are missing or damaged, or do not fit ``like``.
    """
    with Checkpoints(path, keep=1) as checkpoints:
        return checkpoints.restore(like)[1]
