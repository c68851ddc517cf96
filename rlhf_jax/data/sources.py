"""Raw records from JSON Lines, JSON and Parquet files, comparison stores and sets of tensorflow-datasets (TFDS).

A raw record is a dictionary of named fields, together with its location. The parsers in `records` check the fields;
this module only raises errors for sources that cannot be read.

=================================  ==================================================================================
JSON Lines, ``*.jsonl``            one JSON object on each line
JSON, ``*.json``                   one array of objects, or one object whose field ``data`` is such an array
Parquet, ``*.parquet``             the rows of a Parquet file, such as those of Hugging Face data sets; needs pyarrow,
                                   which the extra ``rlhf_jax[parquet]`` installs
``*.gz``, ``.bz2``, ``.xz``,       JSON or JSON Lines, compressed; Zstandard (``.zst``) needs pyarrow
``.zst``
``*.sqlite``                       a comparison store (`rlhf_jax.feedback.store`), with one record for each item in it
``Tfds(name, split)``              a set that TFDS has prepared as array_record files; TensorFlow is not needed
=================================  ==================================================================================

The form of a file is recognised by its contents; its name does not matter.

A list of paths is read as one source, in order. A path that contains ``*`` is a pattern, whose matches are read in
sorted order, unless a file has exactly this name. A byte order mark at the start of a file and blank lines at its end
are ignored.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import glob
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data import errors, files

NOT_UTF8 = "a character is not UTF-8"
"""Reason for which records with a broken character are dropped."""

JSON_FIELD = "fields_json"
"""Name of the text feature in which `tfds_builder` stores the fields without a separate feature, as one JSON object."""

_TFDS_ERRORS = (ValueError, AssertionError, NotImplementedError, KeyError, OSError, RuntimeError)


class RawRecord(NamedTuple):
    """One record as stored in its source."""

    location: str
    """File and number of the line, row or record, counted from 1, for messages."""
    fields: dict[str, Any]
    flaw: str | None = None
    """Reason why the record cannot be used, or None."""
    skipped: str | None = None
    """Reason why an item of a comparison store is no comparison, or None."""


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
    if files.is_sqlite(name):
        return _store_records(name)
    return _parquet_records(name) if files.is_parquet(name) else _json_records(name, fields)


def _store_records(name: str) -> Iterator[RawRecord]:
    """Yields the items of all sets of a comparison store."""
    from rlhf_jax.feedback import store, store_export

    try:
        with store.Store(name, read_only=True) as opened:
            rows = store_export.rows(opened)
    except store.StoreError as error:
        raise errors.DataError(str(error)) from None
    for row in rows:
        yield RawRecord(f"{name}, item {row.item}", row.fields, skipped=row.skipped)


# --------------------------------------------------------------------------------------------------------------- JSON


def require_text(value: Any, key: str) -> str:
    """Returns the value of the field ``key``.

    Raises:
        DataError: If the value is not a string.
        UnusableRecord: If the string contains a character that no tokenizer accepts.
    """
    if isinstance(value, bytes):  # which `_plain` could not decode
        raise errors.UnusableRecord(NOT_UTF8)
    if not isinstance(value, str):
        raise errors.DataError(f"{key!r} has type {type(value).__name__}; it must be a string")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            # A byte that is not UTF-8 was decoded as one of these surrogates; others are written as "\\ud83d".
            escaped = "\udc80" <= value[error.start] <= "\udcff"
            raise errors.UnusableRecord(NOT_UTF8 if escaped else "a character is a lone surrogate") from None
    return value


def _parse_json(raw: bytes, unit: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8", "surrogateescape"), object_pairs_hook=_object)
    except errors.DataError:
        raise
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


def _json_records(name: str, fields: str) -> Iterator[RawRecord]:
    """Yields the objects of a JSON file: one on each line, an array of objects, or one object that contains them."""
    lines = files.read_lines(name)
    head = []
    for line in lines:
        head.append(line)
        if line.strip():
            break
    if head and head[-1].lstrip().startswith(b"["):
        try:
            array = _parse_json(b"".join([*head, *lines]), "file")
        except errors.DataError as error:
            raise errors.DataError(f"{name}: {error}") from None
        return _array_records(array, name, fields)
    document = _parsed(head)
    head.extend(itertools.islice(lines, 1))
    if document is not None:
        array = _contained(document) if len(head) == 1 else None
    else:
        head.extend(lines)  # an object on several lines, unless the first line is broken
        document = _parsed(head)
        array = None if document is None else _contained(document) or [document]
    if array is not None:
        return _array_records(array, name, fields)
    return _json_lines(itertools.chain(head, lines), name, fields)


def _parsed(lines: list[bytes]) -> Any:
    try:
        return _parse_json(b"".join(lines), "file")
    except errors.DataError:
        return None


def _contained(document: Any) -> list[Any] | None:
    """Returns the records in the field ``data`` of an object, or None."""
    data = document.get("data") if isinstance(document, dict) else None
    return data if isinstance(data, list) and data and isinstance(data[0], dict) else None


_FORMATS = "the file does not look like JSON Lines, JSON or Parquet, the formats that are read (docs/data.md)"


def _json_lines(lines: Iterable[bytes], name: str, fields: str) -> Iterator[RawRecord]:
    for n, line in enumerate(lines, start=1):
        location = errors.location(name, n)
        try:
            record = _parse_json(line, "line")
        except errors.DataError as error:
            kind = f"; {_FORMATS}" if n == 1 and not line.lstrip().startswith(b"{") else ""
            raise errors.DataError(f"{location}: {error}{kind}") from None
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise errors.DataError(f"{location}: the line has type {kind}; it must be an object with {fields}")
        yield RawRecord(location, record)


def _array_records(array: list[Any], name: str, fields: str) -> Iterator[RawRecord]:
    for n, record in enumerate(array, start=1):
        location = f"{name}, record {n}"
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise errors.DataError(f"{location}: the record has type {kind}; it must be an object with {fields}")
        yield RawRecord(location, record)


# ------------------------------------------------------------------------------------------------------------ Parquet


def _rows(batch: Any) -> Iterator[dict[str, Any] | None]:
    """Yields the rows of a record batch, and None for a row with a text that is not UTF-8."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):
        rows = (_row(batch.slice(n, 1)) for n in range(batch.num_rows))
    yield from rows


def _row(batch: Any) -> dict[str, Any] | None:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError:
        return None


def _without_nulls(value: Any) -> Any:
    """Drops the null fields inside objects, except null contents of messages.

    All objects in a column of a Parquet file have the same fields, so those that an object lacks are null.
    """
    if isinstance(value, dict):
        kept = ("content", "value")
        return {key: _without_nulls(item) for key, item in value.items() if item is not None or key in kept}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _parquet_records(name: str) -> Iterator[RawRecord]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise errors.DataError(
            f"{name}: reading Parquet needs pyarrow; install it with pip install -e '.[parquet]'"
        ) from None
    n = 0
    try:
        with pyarrow.parquet.ParquetFile(name) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in _rows(batch):
                    n += 1
                    location = f"{name}, row {n}"
                    if record is None:
                        yield RawRecord(location, {}, NOT_UTF8)
                    else:
                        yield RawRecord(location, {key: _without_nulls(_plain(record[key])) for key in record})
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
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, decimal.Decimal):
        return float(value)
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else value


def _first_sentence(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return re.split(r"\n|\. ", text, maxsplit=1)[0].strip().rstrip(".:")
