"""Files of records in the array_record format, which are written in parts, so that an interrupted write continues.

A file is one array_record file, which other tools can read. Its first record is a JSON object, the header, which says
what the other records are made from. While a file is being written, its finished parts are in the folder
``PATH.parts``. A write that is interrupted at any point and started again computes only the missing parts. The bytes of
the finished file do not depend on interruptions.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_jax import atomic
from rlhf_jax.data import errors

FORMAT = "rlhf_jax.records.1"
"""Value of ``format`` in the header of every file."""
_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"
_ONE_RECORD_PER_BLOCK = "group_size:1"
_HEADER = "header.json"
"""Name of the file, among the parts, that says what the parts are made from."""
_READ = 64
"""Number of records that are copied at a time."""


class RecordFile:
    """A finished file. Records are read when they are needed, in any order.

    Attributes:
        header: The header, as passed to `write`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens a file that `write` has finished.

        Raises:
            DataError: The file does not exist, is damaged or was not written by `write`; or array_record is not
                installed.
        """
        self._path = os.fspath(path)
        if not os.path.isfile(self._path):
            raise errors.DataError(f"{self._path} is not a file")
        self._reader = _module().ArrayRecordReader(self._path, _RANDOM_ACCESS)
        n = self._reader.num_records()
        found = _parsed(self._reader.read([0])[0]) if self._reader.ok() and n else {}
        if found.get("format") != FORMAT or found.get("records") != n - 1:
            raise errors.DataError(f"{self._path} is damaged or is not a file of records of rlhf_jax; make it again")
        self.header: dict[str, Any] = found["header"]

    def __len__(self) -> int:
        """Returns the number of records, without the header."""
        return self._reader.num_records() - 1

    def read(self, indices: Sequence[int]) -> list[bytes]:
        """Returns the records at ``indices``, which are counted from 0.

        Raises:
            DataError: A record is damaged.
        """
        try:
            return self._reader.read([int(i) + 1 for i in indices])
        except (RuntimeError, ValueError, IndexError) as error:
            raise errors.DataError(f"cannot read {self._path}: {error}; make the file again") from error


def write(
    path: str | os.PathLike[str],
    header: Mapping[str, Any],
    records: Callable[[int, int], Sequence[bytes]],
    *,
    n: int,
    per_part: int,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Writes a file of ``n`` records, or the parts that an interrupted write has left out.

    Only one process may write a file at a time.

    >>> import pathlib, tempfile
    >>> from rlhf_jax.data.stores import record_file
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "numbers.array_record"
    >>> def squares(start, stop):
    ...     return [str(i**2).encode() for i in range(start, stop)]
    >>> record_file.write(path, {"power": 2}, squares, n=10, per_part=4)
    >>> file = record_file.RecordFile(path)
    >>> len(file), file.header, file.read([3, 9])
    (10, {'power': 2}, [b'9', b'81'])

    Args:
        path: The file, which is replaced if it exists.
        header: A JSON object that says what the records are made from.
        records: ``records(start, stop)`` returns the records from ``start`` to ``stop - 1``.
        n: Number of records.
        per_part: Number of records in a part, and of those that an interruption loses at most.
        progress: Called with the number of finished records after each part.

    Raises:
        DataError: array_record is not installed, the folder has parts of another header, or a part has another number
            of records than it should have.
    """
    path = pathlib.Path(path)
    parts, written = _parts_folder(path), {"header": header, "per_part": per_part, "n": n}
    _prepare_parts(parts, json.dumps(written, sort_keys=True).encode())
    made = []
    for start in range(0, n, per_part):
        stop = min(start + per_part, n)
        part = parts / f"{start:012d}"
        if not part.exists() or _count(part) != stop - start:
            found = records(start, stop)
            if len(found) != stop - start:
                raise errors.DataError(f"{len(found)} records were made instead of {stop - start}")
            _write_all(part, [found])
        made.append(part)
        progress(stop)
    first = json.dumps({"format": FORMAT, "records": n, "header": header}, sort_keys=True).encode()
    _write_all(path, [[first], *map(_Part, made)])
    remove_parts(path)


def remove_parts(path: str | os.PathLike[str]) -> None:
    """Removes the parts of a finished file, which a write leaves behind if it is interrupted after its last step."""
    shutil.rmtree(_parts_folder(path), ignore_errors=True)


def _parts_folder(path: str | os.PathLike[str]) -> pathlib.Path:
    return pathlib.Path(f"{os.fspath(path)}.parts")


def _prepare_parts(folder: pathlib.Path, written: bytes) -> None:
    """Makes the folder of the parts, with a file that says what is written; raises DataError for other parts."""
    folder.mkdir(parents=True, exist_ok=True)
    header = folder / _HEADER
    if header.exists() and header.read_bytes() == written:
        return
    if any(not each.name.startswith(_HEADER) for each in folder.iterdir()):
        raise errors.DataError(
            f"{folder} has parts of a file that was made from something else; delete this folder to start again"
        )
    atomic.replace_file(header, written)


class _Part:
    """The records of a part, which are read when they are iterated over."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path

    def __iter__(self) -> Any:
        reader = _module().ArrayRecordReader(os.fspath(self._path), _RANDOM_ACCESS)
        n = reader.num_records()
        for start in range(0, n, _READ):
            yield from reader.read(list(range(start, min(start + _READ, n))))
        reader.close()


def _write_all(path: pathlib.Path, groups: Sequence[Any]) -> None:
    """Writes records to a file, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    writer = _module().ArrayRecordWriter(os.fspath(temporary), _ONE_RECORD_PER_BLOCK)
    for group in groups:
        for record in group:
            writer.write(record)
    writer.close()
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _count(path: pathlib.Path) -> int:
    """Returns the number of records of a part; -1 if it is damaged."""
    reader = _module().ArrayRecordReader(os.fspath(path), _RANDOM_ACCESS)
    return reader.num_records() if reader.ok() else -1


def _parsed(record: bytes) -> dict[str, Any]:
    try:
        found = json.loads(record)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _module() -> Any:
    try:
        from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        raise errors.DataError(
            "files of records need array_record, which is available for Linux and macOS; install it with "
            f"pip install array_record ({error})"
        ) from None
    return array_record_module
