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
import orbax.checkpoint as ocp
from etils import epath

from rlhf_jax.checkpoint import manifest as manifest_lib
from rlhf_jax.distributed import processes

_STEP = re.compile(r"step_(\d+)")
_ASIDE = "set_aside_"

CheckpointError = manifest_lib.CheckpointError


# What goes wrong in Orbax's threads is raised where it is waited for, and told there in one sentence.
logging.getLogger("absl").addFilter(lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname)

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def _reason(error: BaseException) -> str:
    """What the operating system says, wherever it stands in the message; else its first line."""
    text = str(error).strip()
    for number in _OF_THE_DISK:
        if os.strerror(number) in text:
            return os.strerror(number)
    lines = text.splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."


_together = partial(processes.together, error=manifest_lib.DamagedError)
"""What is damaged for one process is for all: they go on from the same step."""


def _read_manifest(checkpointer: Any, path: epath.Path) -> dict[str, Any]:
    try:
        raw = checkpointer.restore(path, args=ocp.args.Composite(manifest=ocp.args.JsonRestore()))["manifest"]
    except Exception as error:
        raise manifest_lib.DamagedError(f"its manifest cannot be read ({_reason(error)})") from error
    return manifest_lib.opened(raw)


def _restore_arg(leaf: Any, stored: dict[str, Any]) -> Any:
    sharding = manifest_lib.placement(leaf)
    if sharding is None or manifest_lib.is_key(leaf):  # a key's sharding has no axis for the key's words
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=tuple(stored["shape"]))


def _read_arrays(checkpointer: Any, path: epath.Path, entries: list[Any], leaves: list[Any]) -> list[Any]:
    """The stored arrays, placed as their leaves are."""
    names = [manifest_lib.name_of(i) for i in range(len(entries))]
    full = [i for i, entry in enumerate(entries) if np.prod(entry["stored"]["shape"])]
    arrays: dict[str, Any] = {}
    if full:
        item = {names[i]: 0 for i in full}
        restore_args = {names[i]: _restore_arg(leaves[i], entries[i]["stored"]) for i in full}
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore(item=item, restore_args=restore_args))
        try:
            arrays = checkpointer.restore(path, args=args)["state"]
        except Exception as error:
            raise manifest_lib.DamagedError(f"its arrays cannot be read ({_reason(error)})") from error
    for name, entry in zip(names, entries):
        stored = entry["stored"]
        arrays.setdefault(name, np.zeros(stored["shape"], jnp.dtype(stored["dtype"])))
    return [arrays[name] for name in names]


def _check_digests(found: list[str], entries: list[Any]) -> None:
    for digest, entry in zip(found, entries):
        if digest != entry["sha256"]:
            raise manifest_lib.DamagedError(f"the digest of {entry['path']} does not match what was saved")


def _read_whole(checkpointer: Any, path: epath.Path, entries: list[Any], leaves: list[Any]) -> list[Any]:
    """The stored arrays, each checked against its digest, and placed as its leaf is; in all processes or in none."""
    arrays = _together(lambda: _read_arrays(checkpointer, path, entries, leaves))
    found = [manifest_lib.digest(array) for array in arrays]
    _together(lambda: _check_digests(found, entries))
    return arrays


def _read(checkpointer: Any, path: epath.Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """``(state, metadata)``; DamagedError if the disk is at fault, CheckpointError if ``like`` does not fit."""
    manifest = _together(lambda: _read_manifest(checkpointer, path))
    entries = manifest["leaves"]
    if like is None:
        skeleton = manifest["skeleton"]
        if skeleton is None:
            raise CheckpointError(f"{path} holds more than dicts and lists of arrays: pass `like` to restore it")
        treedef, leaves = jax.tree.structure(skeleton), [None] * len(entries)
    else:
        paths, leaves, treedef = manifest_lib.flatten(like)
        manifest_lib.check_like(manifest, paths, leaves, str(path))
    arrays = _read_whole(checkpointer, path, entries, leaves)
    state = [manifest_lib.finish_leaf(*of) for of in zip(arrays, entries, leaves)]
    return jax.tree.unflatten(treedef, state), manifest["metadata"]


class Checkpoints:
    """The checkpoints of one run in one directory, newest first in line to be restored.

    Use it as a context manager, or call `close`: a save that is still being written when the process leaves is lost
    (the one before it is not). Nothing is removed before what has been saved since was read back and found whole
    (arrays that span processes are not read back), so that there is always one to go on from. After `restore`, steps
    newer than the restored one belong to a future that is given up, or are the damaged ones that `restore` passed over:
    the first `save` sets them aside under another name, and they go when it is whole.

    Attributes:
        passed_over: Of each damaged one that `restore` met, its step and what is wrong with it.

    Args:
        directory: Made at the first save; local, or whatever Orbax can write to (``gs://...``).
        keep: How many finished steps stay on disk; with 1 there is nothing to fall back to.
        tell: Called with what a user should know, in words; by default it becomes a Python warning.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, keep: int = 2, tell: Callable[[str], None] | None = None
    ) -> None:
        """Touch nothing on disk yet."""
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.directory = epath.Path(directory).expanduser().resolve()
        self.keep = keep
        self.passed_over: list[str] = []
        self._tell = tell or partial(warnings.warn, stacklevel=3)
        self._checkpointer: Any = None
        self._restored: int | None = None
        self._prepared = False  # the folder is there and clean: if it is gone later, someone took it away
        self._saving: int | None = None

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
            self._tell(str(failed))

    def steps(self) -> list[int]:
        """Every finished step on disk, ascending; whether they are whole is seen when one is restored."""
        try:
            if not self.directory.exists():
                return []
            found = [(_STEP.fullmatch(child.name), child) for child in self.directory.iterdir() if child.is_dir()]
            return sorted(int(m[1]) for m, child in found if m and ocp.utils.is_checkpoint_finalized(child))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot list the checkpoints in {self.directory}: {_reason(error)}") from error

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
        arrays, manifest = manifest_lib.describe(state, dict(metadata or {}))
        self.wait()
        if not self._prepared:
            self._prepare(step)
        if not self.directory.exists():
            raise CheckpointError(f"cannot save step {step} in {self.directory}: the folder has vanished")
        if self._restored is not None:
            self._set_aside([old for old in self.steps() if old > self._restored])
        newest = self.latest()
        if newest is not None and step <= newest:
            raise CheckpointError(f"cannot save step {step} in {self.directory}: step {newest} is already there")
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), manifest=ocp.args.JsonSave(manifest))
        try:
            self._orbax().save(self._path(step), args=args)
        except Exception as error:
            self._drop()
            raise CheckpointError(f"cannot save step {step} in {self.directory}: {_reason(error)}") from error
        self._saving, self._restored = step, None

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any, dict[str, Any]]:
        """The newest step that is whole; each one passed over is told.

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
            except manifest_lib.DamagedError as damage:
                reasons.append(f"step {candidate}: {damage}")
                continue
            for reason in reasons:
                self._tell(f"passed over a damaged checkpoint in {self.directory}, {reason}")
            self.passed_over += reasons
            self._restored = candidate
            return candidate, state, metadata
        why = "; ".join(reasons) or "it is empty or not there"
        raise CheckpointError(f"there is no checkpoint to restore in {self.directory}: {why}")

    def wait(self) -> None:
        """Return when the save under way is on disk; what it makes superfluous is removed then."""
        if self._saving is None:
            return
        step, self._saving = self._saving, None
        try:
            self._checkpointer.wait_until_finished()
        except Exception as error:
            self._drop()
            reason = _reason(error) if self.directory.exists() else "the folder has vanished"
            raise CheckpointError(f"cannot save step {step} in {self.directory}: {reason}") from error
        steps = self.steps()
        if step not in steps:
            raise CheckpointError(f"step {step} was saved in {self.directory}, and has vanished")
        superfluous = [self._path(old) for old in steps[: -self.keep]] + self._aside()
        # Of several processes each comes here, whatever it sees of the folder that the first one changes.
        self._remove(superfluous if superfluous and self._is_whole(step) else [])

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
            raise CheckpointError(f"cannot save step {step} in {self.directory}: {_reason(error)}") from error

        self._prepared = True
        processes.meet("checkpoint.prepare")

    def _is_whole(self, step: int) -> bool:
        if jax.process_count() > 1:
            return True
        try:
            entries = _read_manifest(self._orbax(), self._path(step))["leaves"]
            _read_whole(self._orbax(), self._path(step), entries, [None] * len(entries))
        except manifest_lib.DamagedError as damage:
            self._tell(f"step {step} in {self.directory} was written, but {damage}; those before it are kept")
            return False
        return True

    def _aside(self) -> list[epath.Path]:
        return [child for child in self.directory.iterdir() if child.name.startswith(_ASIDE)]

    def _set_aside(self, steps: list[int]) -> None:
        self._change([(self._path(step), self.directory / f"{_ASIDE}{step:09d}") for step in steps])

    def _remove(self, paths: list[epath.Path]) -> None:
        self._change([(path, None) for path in paths])

    def _change(self, moves: list[tuple[epath.Path, epath.Path | None]]) -> None:
        """Rename folders, or remove them."""
        for path, to in moves if jax.process_index() == 0 else []:
            try:
                if to is None:
                    path.rmtree()
                    continue
                if to.exists():
                    to.rmtree()
                path.rename(to)
            except OSError as error:
                raise CheckpointError(f"cannot remove the old {path}: {_reason(error)}") from error
        processes.meet("checkpoint.change")


def save_params(path: str | os.PathLike[str], params: Any, metadata: dict[str, Any] | None = None) -> None:
    """Write the parameters of a finished stage, digests beside them; what stood at ``path`` is replaced atomically.

    Args:
        path: A folder.
        params: Nested dicts (or lists) of arrays, so that `load_params` needs no example of them.
        metadata: As in `Checkpoints.save`.
    """
    _, leaves, treedef = manifest_lib.flatten(params)
    if manifest_lib.skeleton_of(treedef, len(leaves)) is None:
        raise TypeError("save_params takes nested dicts with string keys, or lists, of arrays")
    with Checkpoints(path, keep=1) as checkpoints:
        newest = checkpoints.latest()
        checkpoints.save(0 if newest is None else newest + 1, params, metadata)


def load_params(path: str | os.PathLike[str], like: Any = None) -> Any:
    """The parameters that `save_params` wrote, checked; ``like`` gives shardings where they should be spread out."""
    with Checkpoints(path, keep=1) as checkpoints:
        return checkpoints.restore(like)[1]
