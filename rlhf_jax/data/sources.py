"""Raw records from JSON Lines, JSON and Parquet files and from sets that tensorflow-datasets (TFDS) has prepared.

A raw record is a dictionary of named fields, together with its location. The parsers in `records` check the fields;
this module only raises errors for sources that cannot be read.

=========================  ==========================================================================================
``*.jsonl`` or other name  one JSON object on each line
``*.json``                 one JSON object on each line, or one array of objects
``*.gz``                   one of the forms above, compressed with gzip
``*.parquet``              the rows of a Parquet file, such as those of Hugging Face data sets; needs pyarrow, which the
                           extra ``rlhf_jax[parquet]`` installs
``Tfds(name, split)``      a set that TFDS has prepared as array_record files; TensorFlow is not needed
=========================  ==========================================================================================

A list of paths is read as one source, in order. A path that contains ``*`` is a pattern, whose matches are read in
sorted order, unless a file has exactly this name. A byte order mark at the start of a file and blank lines at its end
are ignored.
"""

from __future__ import annotations

import codecs
import dataclasses
import glob
import gzip
import itertools
import json
import os
import pathlib
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data import errors

JSON_FIELD = "fields_json"
"""Name of the text feature in which `tfds_builder` stores the fields without a separate feature, as one JSON object."""

_TFDS_ERRORS = (ValueError, AssertionError, NotImplementedError, KeyError, OSError, RuntimeError)


class RawRecord(NamedTuple):
    """One record as stored in its source."""

    location: str
    """File and number of the line, row or record, counted from 1, for messages."""
    fields: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A prepared TFDS set, ``name[/config][:version]``, and the split to read."""

    name: str
    split: str = "train"
    """Split in TFDS syntax, such as ``"train"`` or ``"test[:10%]"``."""
    data_dir: str | os.PathLike[str] | None = None
    """Directory of the prepared sets; None means TFDS's default directory."""


Path = str | os.PathLike[str]
Source = Path | Sequence[Path] | Tfds


def describe(source: Source) -> str:
    """Returns a short description of a source for messages."""
    if isinstance(source, Tfds):
        return f"{source.name}[{source.split}]"
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    names = [os.fspath(path) for path in source]
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "") if names else "no file"


def raw_records(source: Source, *, fields: str = "named fields") -> Iterator[RawRecord]:
    """Yields the records of one or several files, or of a TFDS set, in order.

    ``fields`` describes the expected fields in error messages.

    Raises:
        DataError: If a file is missing, unreadable, damaged, truncated, empty or a directory; a line is not a JSON
            object; a required package is not installed; or TFDS has not prepared the set.
    """
    if isinstance(source, Tfds):
        yield from _tfds_records(source)
        return
    for path in expand_paths(source):
        name = os.fspath(path)
        n = 0
        for n, raw in enumerate(_file_records(name, fields), start=1):  # noqa: B007
            yield raw
        if n == 0:
            raise errors.DataError(f"{name} is empty")


def expand_paths(source: Path | Sequence[Path]) -> list[Path]:
    """Returns the files of a source; a path with ``*`` that does not exist is replaced by its matches in sorted order.

    Raises:
        DataError: If no file matches, or ``source`` is empty.
    """
    expanded: list[Path] = []
    for path in [source] if isinstance(source, str | os.PathLike) else source:
        name = os.fspath(path)
        if "*" in name and not os.path.exists(name):
            matches = sorted(glob.glob("*".join(map(glob.escape, name.split("*")))))
            if not matches:
                raise errors.DataError(f"no file matches {name}")
            expanded.extend(matches)
        else:
            expanded.append(path)
    if not expanded:
        raise errors.DataError("no file was given")
    return expanded


def _file_records(name: str, fields: str) -> Iterator[RawRecord]:
    if name.endswith(".parquet"):
        return _parquet_records(name)
    if name.removesuffix(".gz").endswith(".json"):
        return _json_records(name, fields)
    return _json_lines(_read_lines(name), name, fields)


def _refuse_directory(name: str) -> None:
    if pathlib.Path(name).is_dir():
        raise errors.DataError(f"{name} is a directory, not a file; name its files, as in {os.path.join(name, '*')}")


# --------------------------------------------------------------------------------------------------------------- JSON


def require_text(value: Any, key: str) -> str:
    """Returns the value of the field ``key``, or raises DataError if it is not a string of valid characters."""
    if not isinstance(value, str):
        raise errors.DataError(f"{key!r} has type {type(value).__name__}; it must be a string")
    try:
        # JSON strings can contain a lone surrogate, which no tokenizer accepts.
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise errors.DataError(f"{key!r} contains a lone surrogate, which is not a character") from None
    return value


def _read_lines(name: str) -> Iterator[bytes]:
    """Yields the lines of a plain or gzip file, without a byte order mark or trailing blank lines."""
    _refuse_directory(name)
    n, blank = 0, []
    try:
        with gzip.open(name, "rb") if name.endswith(".gz") else open(name, "rb") as file:
            for line in file:
                n += 1
                line = line.removeprefix(codecs.BOM_UTF8) if n == 1 else line
                if line.strip():
                    yield from blank
                    blank.clear()
                    yield line
                else:
                    blank.append(line)
    except FileNotFoundError:
        raise errors.DataError(f"{name} does not exist") from None
    except EOFError:
        raise errors.DataError(f"{errors.location(name, n + 1)}: the gzip file is truncated here") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise errors.DataError(f"{errors.location(name, n + 1)}: the gzip file is damaged ({error})") from None
    except OSError as error:
        raise errors.DataError(f"{name} cannot be read ({error.strerror or error})") from None


def _parse_json(raw: bytes, unit: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_object)
    except errors.DataError:
        raise
    except UnicodeDecodeError as error:
        raise errors.DataError(f"the {unit} is not UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        where = "" if unit == "line" or not isinstance(error, json.JSONDecodeError) else f" in line {error.lineno}"
        why = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply, or a number is too long"
        raise errors.DataError(f"the {unit} is not JSON ({why}{where})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise errors.DataError(f"the field {duplicate!r} occurs twice in one object")
    return record


def _json_lines(lines: Iterator[bytes], name: str, fields: str) -> Iterator[RawRecord]:
    for n, line in enumerate(lines, start=1):
        location = errors.location(name, n)
        try:
            record = _parse_json(line, "line")
        except errors.DataError as error:
            raise errors.DataError(f"{location}: {error}") from None
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise errors.DataError(f"{location}: the line has type {kind}; it must be an object with {fields}")
        yield RawRecord(location, record)


def _json_records(name: str, fields: str) -> Iterator[RawRecord]:
    """Yields the objects of a ``.json`` file, which contains either one array of objects or one object on each line."""
    lines = _read_lines(name)
    head = []
    for line in lines:
        head.append(line)
        if line.strip():
            break
    if not head or not head[-1].lstrip().startswith(b"["):
        yield from _json_lines(itertools.chain(head, lines), name, fields)
        return
    try:
        array = _parse_json(b"".join([*head, *lines]), "file")
    except errors.DataError as error:
        raise errors.DataError(f"{name}: {error}") from None
    for n, record in enumerate(array, start=1):
        location = f"{name}, record {n}"
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise errors.DataError(f"{location}: the record has type {kind}; it must be an object with {fields}")
        yield RawRecord(location, record)


# ------------------------------------------------------------------------------------------------------------ Parquet


def _rows(batch: Any) -> Iterator[dict[str, Any]]:
    """Yields the rows of a record batch; raises at the first row with a value that cannot be converted."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):
        rows = (batch.slice(n, 1).to_pylist()[0] for n in range(batch.num_rows))
    yield from rows


def _parquet_records(name: str) -> Iterator[RawRecord]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise errors.DataError(
            f"{name}: reading Parquet needs pyarrow; install it with pip install 'rlhf_jax[parquet]'"
        ) from None
    if not os.path.exists(name):
        raise errors.DataError(f"{name} does not exist")
    _refuse_directory(name)
    n = 0
    try:
        with pyarrow.parquet.ParquetFile(name) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in _rows(batch):
                    n += 1
                    yield RawRecord(f"{name}, row {n}", record)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        why = " ".join(str(error).split()).rstrip(".")
        raise errors.DataError(f"{name}, row {n + 1}: the Parquet file cannot be read ({why})") from None


# --------------------------------------------------------------------------------------------------------------- TFDS


def tfds_source(tfds_set: Tfds) -> Sequence[dict[str, Any]]:
    """Returns a prepared TFDS set as a sequence with random access, whose records contain texts as bytes.

    Nothing is downloaded or prepared; `tfds_builder` prepares sets.

    Raises:
        DataError: If tensorflow-datasets or array_record is not installed; the set, split or version is not prepared;
            the split is empty; or the set is not in the array_record format and therefore needs TensorFlow.
    """
    name = describe(tfds_set)
    if ":" in tfds_set.name.split("/")[0] and not tfds_set.name.split(":")[1][:1].isdigit():
        raise errors.DataError(
            f"{name}: sets from other namespaces, such as huggingface:, are not downloaded; download the files and "
            "pass their paths instead"
        )
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise errors.DataError(
            f"{name}: reading it needs tensorflow-datasets; install it with pip install tensorflow-datasets"
        ) from None
    data_dir = None if tfds_set.data_dir is None else os.fspath(tfds_set.data_dir)
    try:
        rows: Any = tfds.data_source(tfds_set.name, split=tfds_set.split, data_dir=data_dir, download=False)
        return rows
    except ImportError as error:
        raise errors.DataError(
            f"{name}: reading it needs array_record, which is available for Linux and macOS; install it with "
            f"pip install array_record ({error})"
        ) from None
    except _TFDS_ERRORS as error:
        if _is_empty_split(tfds, tfds_set, data_dir):
            raise errors.DataError(f"{name} is empty") from None
        where = "" if data_dir is None else f" in {data_dir}"
        raise errors.DataError(f"{name}: TFDS has no such prepared set{where} ({_first_sentence(error)})") from None


def _is_empty_split(tfds: Any, tfds_set: Tfds, data_dir: str | None) -> bool:
    """Returns whether the set exists and the split is empty, which array_record reports as a missing file."""
    try:
        return tfds.builder(tfds_set.name, data_dir=data_dir).info.splits[tfds_set.split].num_examples == 0
    except _TFDS_ERRORS:
        return False


def _tfds_records(tfds_set: Tfds) -> Iterator[RawRecord]:
    name = describe(tfds_set)
    rows = tfds_source(tfds_set)
    if not len(rows):
        raise errors.DataError(f"{name} is empty")
    for n in range(len(rows)):
        location = f"{name}, record {n + 1}"
        try:
            fields = plain_fields(rows[n])
        except (ValueError, IndexError, RuntimeError) as error:
            raise errors.DataError(
                f"{location}: the set cannot be read; its files may be damaged or truncated ({_first_sentence(error)})"
            ) from None
        yield RawRecord(location, fields)


def plain_fields(example: dict[str, Any]) -> dict[str, Any]:
    """Converts an example of a TFDS set to JSON types and unpacks the fields inside `JSON_FIELD`."""
    fields = {key: _plain(value) for key, value in example.items()}
    return fields | json.loads(fields.pop(JSON_FIELD, "{}"))


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _first_sentence(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return re.split(r"\n|\. ", text, maxsplit=1)[0].strip().rstrip(".:")
