"""Opening of data files. Compression and unsupported formats are recognised by the first bytes of a file."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

from rlhf_jax.data import errors

PARQUET = b"PAR1"
_SQLITE = b"SQLite format 3\x00"

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "Zstandard"}
_REFUSED = {
    b"PK\x03\x04": "a zip archive; unpack it, and pass the files in it",
    b"ARROW1": "an Arrow file; convert it to Parquet, for example with Dataset.to_parquet of the package datasets",
    b"version https://git-lfs": "a pointer to a file in Git LFS; download the file, for example with git lfs pull",
    b"<!DOCTYPE html": "a web page, not data; download the file itself",
}
_REFUSED_NAMES = {
    ".csv": "a table of comma-separated values; convert it to JSON Lines or Parquet, for example with pandas.read_csv",
    ".tsv": "a table of tab-separated values; convert it to JSON Lines or Parquet, for example with pandas.read_csv",
    ".xlsx": "a spreadsheet; convert it to JSON Lines or Parquet, for example with pandas.read_excel",
    ".arrow": _REFUSED[b"ARROW1"],
}
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def is_sqlite(name: str) -> bool:
    """Returns whether a file is an SQLite database, by its first bytes; see `is_parquet` for errors."""
    with _open(name) as file:
        return file.peek(64).startswith(_SQLITE)


def is_parquet(name: str) -> bool:
    """Returns whether a file is a Parquet file, by its first bytes or its name.

    Raises:
        DataError: If the file is missing, unreadable, a directory or in a format that is not supported.
    """
    with _open(name) as file:
        start = file.peek(64)
    refused = next((why for magic, why in _REFUSED.items() if start.startswith(magic)), None)
    path = pathlib.Path(name.lower())
    suffix = path.with_suffix("").suffix if path.suffix in (".gz", ".bz2", ".xz", ".zst") else path.suffix
    refused = _REFUSED_NAMES.get(suffix, refused)
    if refused is not None:
        raise errors.DataError(f"{name} is {refused}")
    return start.startswith(PARQUET) or suffix == ".parquet"


def read_lines(name: str) -> Iterator[bytes]:
    """Yields the lines of a plain or compressed text file, without a byte order mark or trailing blank lines.

    Raises:
        DataError: If the file is missing, unreadable, damaged, truncated, a directory or not in UTF-8.
    """
    n, blank, kind = 0, [], None
    try:
        with _open(name) as file:
            start = file.peek(64)
            kind = next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None)
            for line in _decompressed(file, kind, name):
                n += 1
                if n == 1 and line.startswith(_UTF16):
                    raise errors.DataError(
                        f"{name} is encoded as UTF-16; convert it to UTF-8, for example with iconv -f UTF-16 -t UTF-8"
                    )
                line = line.removeprefix(codecs.BOM_UTF8) if n == 1 else line
                if line.strip():
                    yield from blank
                    blank.clear()
                    yield line
                else:
                    blank.append(line)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if kind is None:
            raise errors.DataError(f"{name} cannot be read ({getattr(error, 'strerror', None) or error})") from None
        cut = isinstance(error, EOFError) or "Truncated" in str(error)
        state = "truncated here" if cut else f"damaged ({error})"
        raise errors.DataError(f"{errors.location(name, n + 1)}: the {kind} file is {state}") from None


def _open(name: str) -> io.BufferedReader:
    if pathlib.Path(name).is_dir():
        raise errors.DataError(f"{name} is a directory, not a file; name its files, as in {os.path.join(name, '*')}")
    try:
        return open(name, "rb")
    except FileNotFoundError:
        advice = "; only local files are read, so download it or mount its bucket" if "://" in name else ""
        raise errors.DataError(f"{name} does not exist{advice}") from None
    except OSError as error:
        raise errors.DataError(f"{name} cannot be read ({error.strerror or error})") from None


def _decompressed(file: io.BufferedReader, kind: str | None, name: str) -> Any:
    if kind == "gzip":
        return gzip.GzipFile(fileobj=file)
    if kind == "bzip2":
        return bz2.BZ2File(file)
    if kind == "xz":
        return lzma.LZMAFile(file)
    if kind is None:
        return file
    try:
        import pyarrow
    except ImportError:
        raise errors.DataError(
            f"{name} is compressed with {kind}, which needs pyarrow; install it with pip install -e '.[parquet]', "
            "or decompress the file with zstd -d"
        ) from None
    stream: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")
    return io.BufferedReader(stream)
