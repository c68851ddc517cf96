"""Raw records out of files: JSON lines, JSON, Parquet, and what tensorflow-datasets has prepared.

A record is an object with named fields, and comes with the place it stands at. Which fields it must have is the
business of `records`; here only what keeps a file from being read is an error.

=========================  ==========================================================================================
``*.jsonl`` or other name  one JSON object a line
``*.json``                 the same, or one array of objects
``*.gz``                   either of them, compressed with gzip
``*.parquet``              the rows of a Parquet file, as Hugging Face data sets are kept; through pyarrow, which the
                           extra ``rlhf_jax[parquet]`` installs
``Tfds(name, split)``      a set that tensorflow-datasets has prepared as array_record files; no TensorFlow is needed
=========================  ==========================================================================================

Several files are read one after the other as one: give a list of paths, or a name with ``*`` in it, which stands for
all files it fits, sorted. Blank lines at the end and a byte order mark are no part of a file.
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
"""A field of TFDS sets: a text that holds further fields of the record, as one JSON object."""

_TFDS_ERRORS = (ValueError, AssertionError, NotImplementedError, KeyError, OSError, RuntimeError)


class Raw(NamedTuple):
    """One record as it stands in its file."""

    where: str
    """For messages: file and line, or row, or record, counted from 1."""
    fields: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A prepared set of tensorflow-datasets: ``name[/config][:version]``, and the split or part of one to read."""

    name: str
    split: str = "train"
    """As TFDS has it: ``"train"``, ``"test[:10%]"``."""
    data_dir: str | os.PathLike[str] | None = None
    """Where TFDS keeps its sets; its own default where None."""


Path = str | os.PathLike[str]
Source = Path | Sequence[Path] | Tfds


def source_name(source: Source) -> str:
    """A source in words, for messages."""
    if isinstance(source, Tfds):
        return f"{source.name}[{source.split}]"
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    given = list(source)
    return os.fspath(given[0]) + (f" and {len(given) - 1} more" if len(given) > 1 else "") if given else "no file"


def raw_records(source: Source, *, fields: str = "named fields") -> Iterator[Raw]:
    """The records of a file, of several, or of a TFDS set, in order.

    Args:
      source: see the table of this module.
      fields: what a record should have, in words, for messages.

    Raises:
      DataError: a file is missing, a directory, unreadable, damaged, cut off or empty; a line is no JSON object; a
        package that the form needs is missing; TFDS has no such prepared set.
    """
    if isinstance(source, Tfds):
        yield from _tfds_records(source)
        return
    for path in paths(source):
        name = os.fspath(path)
        n = 0
        for n, raw in enumerate(_file_records(name, fields), start=1):  # noqa: B007
            yield raw
        if n == 0:
            raise errors.DataError(f"{name} is empty")


def paths(source: Path | Sequence[Path]) -> list[Path]:
    """The files that a source names, with ``*`` replaced by what fits; raises DataError where nothing does."""
    given = [source] if isinstance(source, str | os.PathLike) else list(source)
    found: list[Path] = []
    for path in given:
        name = os.fspath(path)
        if "*" in name and not os.path.exists(name):
            fitting = sorted(glob.glob("*".join(map(glob.escape, name.split("*")))))
            if not fitting:
                raise errors.DataError(f"no file fits {name}")
            found.extend(fitting)
        else:
            found.append(path)
    if not found:
        raise errors.DataError("no file was given")
    return found


def _file_records(name: str, fields: str) -> Iterator[Raw]:
    if name.endswith(".parquet"):
        return _parquet_records(name)
    if name.removesuffix(".gz").endswith(".json"):
        return _json_records(name, fields)
    return _json_lines(lines(name), name, fields)


# --------------------------------------------------------------------------------------------------------------- JSON


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a plain or gzip file as bytes; whatever keeps them from being read becomes one DataError.

    Without a byte order mark and without the blank lines at the end.
    """
    name = os.fspath(path)
    if pathlib.Path(path).is_dir():
        raise errors.DataError(f"{name} is a directory, not a file; name its files, as in {os.path.join(name, '*')}")
    n, blank = 0, []
    try:
        with gzip.open(path, "rb") if name.endswith(".gz") else open(path, "rb") as file:
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
        raise errors.DataError(f"{errors.at(path, n + 1)}: the gzip file is cut off here") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise errors.DataError(f"{errors.at(path, n + 1)}: the gzip file is damaged ({error})") from None
    except OSError as error:
        raise errors.DataError(f"{name} cannot be read ({error.strerror or error})") from None


def parse_line(raw: bytes, *, fields: str = "named fields") -> dict[str, Any]:
    """The JSON object that a line holds.

    Raises:
      DataError: it holds none.
    """
    record = _parse(raw, "line")
    if not isinstance(record, dict):
        raise errors.DataError(f"the line holds a {type(record).__name__}, not an object with {fields}")
    return record


def text(value: Any, key: str) -> str:
    """The value of a field, which must be a string of whole characters.

    Raises:
      DataError: it is not; ``key`` says which field.
    """
    if not isinstance(value, str):
        raise errors.DataError(f"{key!r} is a {type(value).__name__}, not a string")
    try:
        # JSON may hold half a surrogate pair, which no tokenizer takes: better named here than failing far away.
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise errors.DataError(f"{key!r} holds half a surrogate pair, which is not a character") from None
    return value


def _parse(raw: bytes, what: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_object)
    except errors.DataError:
        raise
    except UnicodeDecodeError as error:
        raise errors.DataError(f"the {what} is not UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        where = "" if what == "line" or not isinstance(error, json.JSONDecodeError) else f" in line {error.lineno}"
        why = error.msg if isinstance(error, json.JSONDecodeError) else "it is nested too deeply, or a number too long"
        raise errors.DataError(f"the {what} is not JSON ({why}{where})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise errors.DataError(f"the field {twice!r} stands twice in one object")
    return made


def _json_lines(rows: Iterator[bytes], name: str, fields: str) -> Iterator[Raw]:
    for n, raw in enumerate(rows, start=1):
        where = errors.at(name, n)
        try:
            record = parse_line(raw, fields=fields)
        except errors.DataError as error:
            raise errors.DataError(f"{where}: {error}") from None
        yield Raw(where, record)


def _json_records(name: str, fields: str) -> Iterator[Raw]:
    """An array of objects, or lines after all: files of either form are called ``.json``."""
    rows = lines(name)
    head = []
    for row in rows:
        head.append(row)
        if row.strip():
            break
    if not head or not head[-1].lstrip().startswith(b"["):
        yield from _json_lines(itertools.chain(head, rows), name, fields)
        return
    try:
        array = _parse(b"".join([*head, *rows]), "file")
    except errors.DataError as error:
        raise errors.DataError(f"{name}: {error}") from None
    for n, record in enumerate(array, start=1):
        where = f"{name}, record {n}"
        if not isinstance(record, dict):
            raise errors.DataError(f"{where}: it is a {type(record).__name__}, not an object with {fields}")
        yield Raw(where, record)


# ------------------------------------------------------------------------------------------------------------ Parquet


def _rows(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a record batch; one by one where a value has no Python form, up to the row it stands in."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):
        rows = (batch.slice(n, 1).to_pylist()[0] for n in range(batch.num_rows))
    yield from rows


def _parquet_records(name: str) -> Iterator[Raw]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise errors.DataError(
            f"{name}: reading Parquet needs pyarrow, which pip install 'rlhf_jax[parquet]' installs"
        ) from None
    if not os.path.exists(name):
        raise errors.DataError(f"{name} does not exist")
    if os.path.isdir(name):
        raise errors.DataError(f"{name} is a directory, not a file; name its files, as in {os.path.join(name, '*')}")
    n = 0
    try:
        with pyarrow.parquet.ParquetFile(name) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in _rows(batch):
                    n += 1
                    yield Raw(f"{name}, row {n}", record)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        why = " ".join(str(error).split()).rstrip(".")
        raise errors.DataError(f"{name}, row {n + 1}: the Parquet file cannot be read ({why})") from None


# --------------------------------------------------------------------------------------------------------------- TFDS


def tfds_source(tfds_set: Tfds) -> Sequence[dict[str, Any]]:
    """A prepared TFDS set as a sequence with random access, its records as TFDS decodes them: texts are bytes.

    Nothing is downloaded and nothing prepared: see `tfds_builder` for that.

    Raises:
      DataError: tensorflow-datasets or array_record is missing; no such set, split or version is prepared, or the part
        is empty, or the set is in another format than array_record, which only TensorFlow reads.
    """
    name = source_name(tfds_set)
    if ":" in tfds_set.name.split("/")[0] and not tfds_set.name.split(":")[1][:1].isdigit():
        raise errors.DataError(
            f"{name}: sets of another name space, such as huggingface:, come over the network and are not read; "
            "name their files instead"
        )
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise errors.DataError(
            f"{name}: reading it needs tensorflow-datasets: pip install tensorflow-datasets"
        ) from None
    data_dir = None if tfds_set.data_dir is None else os.fspath(tfds_set.data_dir)
    try:
        rows: Any = tfds.data_source(tfds_set.name, split=tfds_set.split, data_dir=data_dir, download=False)
        return rows
    except ImportError as error:
        raise errors.DataError(
            f"{name}: reading it needs array_record, which has packages for Linux and macOS: pip install array_record "
            f"({error})"
        ) from None
    except _TFDS_ERRORS as error:
        if _is_empty_part(tfds, tfds_set, data_dir):
            raise errors.DataError(f"{name} is empty") from None
        where = "" if data_dir is None else f" in {data_dir}"
        raise errors.DataError(f"{name}: TFDS has no such prepared set{where} ({_first_sentence(error)})") from None


def _is_empty_part(tfds: Any, tfds_set: Tfds, data_dir: str | None) -> bool:
    """Whether a set is there and the part asked for has no record, which array_record takes for no file."""
    try:
        return tfds.builder(tfds_set.name, data_dir=data_dir).info.splits[tfds_set.split].num_examples == 0
    except _TFDS_ERRORS:
        return False


def _tfds_records(tfds_set: Tfds) -> Iterator[Raw]:
    name = source_name(tfds_set)
    rows = tfds_source(tfds_set)
    if not len(rows):
        raise errors.DataError(f"{name} is empty")
    for n in range(len(rows)):
        where = f"{name}, record {n + 1}"
        try:
            fields = plain_fields(rows[n])
        except (ValueError, IndexError, RuntimeError) as error:
            raise errors.DataError(
                f"{where}: the set cannot be read, its files may be damaged or cut off ({_first_sentence(error)})"
            ) from None
        yield Raw(where, fields)


def plain_fields(example: dict[str, Any]) -> dict[str, Any]:
    """An example of a TFDS set as JSON would hold it: texts, lists and numbers, and the fields of `JSON_FIELD`."""
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
