"""Reading and writing of the files in a model directory, one tensor at a time.

The module writes the safetensors format (header length, JSON header, raw bytes) itself, because the writer of the
safetensors library requires all tensors of a file to be in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_WRAPPERS = re.compile(r"((_orig_mod|module)\.)*")
"""Prefix of the tensor names of a model that was saved within a wrapper, such as that of ``torch.compile``."""


class Stored(NamedTuple):
    """Reference to a tensor in a file; `read` loads the tensor."""

    file: pathlib.Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    """Name of the dtype in safetensors."""

    def read(self) -> np.ndarray:
        """Returns the tensor in the dtype of the file. Each call opens and closes the file to free its mapped pages."""
        if self.dtype not in _DTYPES:
            raise ValueError(f"{self.file}: {self.name} is {self.dtype}; only {', '.join(_DTYPES)} are supported")
        with safetensors.safe_open(self.file, framework="np") as opened:
            return opened.get_tensor(self.name)


def stored(folder: pathlib.Path) -> dict[str, Stored]:
    """Returns references to all tensors of a model directory, in one file or several, keyed by name.

    The prefix of a wrapper, which all names have in common, is removed from the keys.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is truncated or not a safetensors file, the index contradicts the files, or the directory
            contains both an index and a ``model.safetensors`` that the index does not list.
    """
    index = folder / INDEX
    places: dict[str, str] = read_json(index).get("weight_map", {}) if index.exists() else {}
    if places and SINGLE not in places.values() and (folder / SINGLE).exists():
        raise ValueError(
            f"{folder} contains two models: {SINGLE}, which transformers reads, and the files in {INDEX}, which other "
            "libraries read. Delete the older one"
        )
    found: dict[str, Stored] = {}
    for name in sorted(set(places.values())) or [SINGLE]:
        for tensor in tensors_in(folder / name):
            if tensor.name in found:
                raise ValueError(f"the tensor {tensor.name} is in both {found[tensor.name].file} and {tensor.file}")
            found[tensor.name] = tensor
    for tensor, name in places.items():
        if tensor not in found or found[tensor].file != folder / name:
            raise ValueError(f"{index} lists {tensor} in {name}, which does not contain it")
    prefixes = {_WRAPPERS.match(name)[0] for name in found}  # type: ignore[index]
    return {name.removeprefix(*prefixes): tensor for name, tensor in found.items()} if len(prefixes) == 1 else found


def refuse_adapters(folder: pathlib.Path) -> None:
    """Raises ValueError if a model directory contains PEFT adapters, which transformers would add to the model."""
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} contains PEFT adapters (adapter_config.json), which are not part of the model: read them with "
            "lm.peft.load. If the directory contains a model as well, move the adapters to another directory"
        )


def unreadable(file: pathlib.Path, error: Exception) -> ValueError:
    """Returns an error for a file that is not a safetensors file."""
    with file.open("rb") as opened:
        if opened.read(40).startswith(b"version https://git-lfs"):
            return ValueError(f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` in {file.parent}")
    return ValueError(f"{file} is truncated or not a safetensors file: {error}")


def equal(left: Stored, right: Stored, *, rows: int = 4096) -> bool:
    """Returns whether two tensors have the same shape and values; reads ``rows`` rows of each at a time."""
    if left.shape != right.shape:
        return False
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(safetensors.safe_open(each.file, framework="np")) for each in (left, right)]
        slices = [file.get_slice(each.name) for file, each in zip(opened, (left, right), strict=True)]
        n = left.shape[0]
        spans = (slice(i, min(i + rows, n)) for i in range(0, n, rows))
        return all(np.array_equal(*(part[span] for part in slices)) for span in spans)


def write(
    folder: pathlib.Path,
    shapes: Mapping[str, tuple[int, ...]],
    arrays: Iterable[tuple[str, Callable[[], np.ndarray]]],
    *,
    dtype: Any,
    max_shard_bytes: int,
) -> None:
    """Writes tensors as ``model.safetensors``, or as numbered files with an index if one file would be too large.

    Args:
        folder: Directory to write to.
        shapes: Shape of each tensor.
        arrays: Name of each tensor and a function that returns it, in the order of ``shapes``.
        dtype: Dtype of the files, to which values are rounded.
        max_shard_bytes: Maximum size of each file; a larger tensor is written to a separate file.

    Raises:
        ValueError: A value is not finite in ``dtype``, or ``shapes`` and ``arrays`` disagree.
    """
    dtype = np.dtype(dtype)
    sizes = {name: int(np.prod(shape)) * dtype.itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    remaining = max_shard_bytes
    for name, size in sizes.items():
        if shards[-1] and size > remaining:
            shards.append([])
            remaining = max_shard_bytes
        shards[-1].append(name)
        remaining -= size
    total = len(shards)
    files = [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    files = files if total > 1 else ["model.safetensors"]
    following = iter(arrays)
    for file, names in zip(files, shards, strict=True):
        with (folder / file).open("wb") as out:
            out.write(_header(names, shapes, sizes, _NAMES[dtype]))
            for name in names:
                given, make = next(following)
                with np.errstate(over="ignore"):  # checked below
                    array = make().astype(dtype, copy=False)
                if given != name or array.shape != shapes[name]:
                    raise ValueError(f"expected {name} with shape {shapes[name]}, got {given} with shape {array.shape}")
                if not np.isfinite(array).all():
                    raise ValueError(f"{name} contains a value that is not finite or too large for {dtype.name}")
                # A transposed view is copied because its bytes are in a different order.
                out.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    if total > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places})


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the JSON object in a file; raises a FileNotFoundError or ValueError that names the file."""
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not contain a JSON object")
    return content


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes an indented JSON object to a file."""
    path.write_text(json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def atomic_folder(folder: pathlib.Path, *, marker: str) -> Iterator[pathlib.Path]:
    """Yields a temporary directory that replaces ``folder`` when the block ends without an error.

    Raises:
        FileExistsError: ``folder`` exists, is not empty and does not contain the file ``marker``.
    """
    if folder.exists() and not (folder.is_dir() and ((folder / marker).exists() or not any(folder.iterdir()))):
        raise FileExistsError(f"{folder} exists and has no {marker}, so it is not overwritten; choose a different path")
    temporary, old = (folder.with_name(f".{folder.name}.{kind}-{os.getpid()}") for kind in ("writing", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def tensors_in(file: pathlib.Path) -> list[Stored]:
    """Returns references to the tensors of a file; raises the errors of `stored` if it is missing or unreadable."""
    if not file.exists():
        if others := sorted(path.name for path in file.parent.glob("*.safetensors")):
            raise FileNotFoundError(
                f"{file.parent} has no {file.name}, but has {', '.join(others[:3])}{' ...' * (len(others) > 3)}: the "
                f"directory is incomplete, or {INDEX}, which lists its files, is missing or old"
            )
        if any(file.parent.glob("*.bin")) or any(file.parent.glob("*.pt")):
            raise FileNotFoundError(f"{file.parent} has no {file.name}; pickled weights (.bin, .pt) are not supported")
        raise FileNotFoundError(f"{file.parent} has no {file.name}")
    try:
        with safetensors.safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return [Stored(file, name, tuple(x.get_shape()), x.get_dtype()) for name, x in slices.items()]
    except safetensors.SafetensorError as error:
        raise unreadable(file, error) from error


def _header(names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int], dtype: str) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        end = start + sizes[name]
        entries[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": [start, end]}
        start = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header
