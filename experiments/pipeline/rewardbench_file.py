"""Reader of files in RewardBench's form: one record a line or row, ``prompt``, ``chosen``, ``rejected``, ``subset``.

JSONL, compressed where the name ends in ``.gz``, or Parquet where it ends in ``.parquet``. A prompt is a string or a
list of ``{"role", "content"}`` messages; answers are strings. ``subset`` may be absent.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from typing import Any

from rlhf_jax.data import dialogues, errors


@dataclasses.dataclass(frozen=True)
class Record:
    """Two answers to one prompt, the first preferred."""

    prompt: tuple[dialogues.Turn, ...]
    chosen: str
    rejected: str
    subset: str | None
    place: int
    """Line or row of the file, from 1."""


def read(path: str, *, counts: errors.DropCount) -> list[Record]:
    """All records, less those left out and counted: ``"empty answer"``, ``"same answer twice"``.

    Raises:
      DataError: the file cannot be read or is empty; a record is not what this reader takes, which names its line; too
        large a share is left out.
    """
    stage, records, n = counts.stage(), [], 0
    for n, raw in enumerate(_rows(path), start=1):
        record = _record(raw, where=errors.at(path, n), place=n)
        if not record.chosen.strip() or not record.rejected.strip():
            stage.drop("empty answer")
        elif record.chosen == record.rejected:
            stage.drop("same answer twice")
        else:
            records.append(record)
    if n == 0:
        raise errors.DataError(f"{path} is empty")
    counts.add(stage, records=n, source=path)
    return records


def _record(raw: Any, *, where: str, place: int) -> Record:
    if not isinstance(raw, dict):
        raise errors.DataError(f"{where}: holds a {type(raw).__name__}, not an object")
    for name in ("prompt", "chosen", "rejected"):
        if name not in raw:
            raise errors.DataError(f"{where}: the record has no {name!r}")
    for name in ("chosen", "rejected"):
        _text(raw[name], name, where)
    prompt, subset = raw["prompt"], raw.get("subset")
    if isinstance(prompt, list):
        turns = tuple(_turn(each, where) for each in prompt)
    else:
        turns = (dialogues.Turn(dialogues.USER, _text(prompt, "prompt", where)),)
    named = None if subset is None else _text(subset, "subset", where)
    return Record(turns, raw["chosen"], raw["rejected"], named, place)


def _turn(message: Any, where: str) -> dialogues.Turn:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise errors.DataError(f"{where}: a message of 'prompt' is not an object with role and content")
    return dialogues.Turn(_text(message["role"], "role", where), _text(message["content"], "content", where))


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise errors.DataError(f"{where}: {name!r} is a {type(value).__name__}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise errors.DataError(f"{where}: {name!r} holds half a surrogate pair, which is not a character") from None
    return value


def _rows(path: str) -> Iterator[Any]:
    if os.path.isdir(path):
        raise errors.DataError(f"{path} is a directory, not a file of comparisons")
    try:
        if path.endswith(".parquet"):
            yield from _parquet(path)
            return
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            for n, line in enumerate(file, start=1):
                try:
                    yield json.loads(line.decode("utf-8"))
                except (ValueError, RecursionError) as error:
                    raise errors.DataError(f"{errors.at(path, n)}: the line is not JSON ({error})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise errors.DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _parquet(path: str) -> Iterator[Any]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise errors.DataError(f"reading {path} needs pyarrow (pip install pyarrow)") from None
    try:
        with parquet.ParquetFile(path) as file:
            known = [name for name in ("prompt", "chosen", "rejected", "subset") if name in file.schema_arrow.names]
            for batch in file.iter_batches(columns=known):
                yield from batch.to_pylist()
    except ArrowException as error:
        raise errors.DataError(f"{path} cannot be read: {error}") from None
