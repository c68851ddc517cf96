"""Checks of the files that a command is given: the store, and a file to write."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator

from rlhf_jax.data import files
from rlhf_jax.feedback import store as store_lib

_OF_STORE = ("", "-wal", "-shm", "-journal")
"""Ends of the names of the files in which SQLite keeps a store."""


def is_new(store: str) -> bool:
    """Returns whether a store does not exist; raises StoreError if the folder in which it would be does not either."""
    if os.path.lexists(store):
        return False
    _require_folder(store)
    return True


@contextlib.contextmanager
def output(path: str, *, store: str, overwrite: bool) -> Iterator[None]:
    """Checks that a file can be written, before a ``with`` block that writes it, and names it in errors of the block.

    Args:
        path: The file, which the block writes atomically, with `rlhf_jax.atomic.replace_file`.
        store: The store that the command reads.
        overwrite: Whether a file that exists may be replaced.

    Raises:
        StoreError: The file is part of the store or another SQLite database, exists and is not to be overwritten, is
            not a regular file, or cannot be written.
    """
    for name in (path, f"{path}.tmp"):  # which is written first
        if any(_is_same(name, store + end) for end in _OF_STORE):
            raise store_lib.StoreError(f"{path} would replace the store {store}; choose another file")
    _require_folder(path)
    if os.path.lexists(path):
        if not os.path.isfile(path):
            raise store_lib.StoreError(f"{path} is not a regular file; choose another file")
        if files.is_sqlite(path):
            raise store_lib.StoreError(f"{path} is an SQLite database, which is never replaced; choose another file")
        if not overwrite:
            raise store_lib.StoreError(f"{path} exists; choose another file, or replace it with --overwrite")
    with writing(path):
        yield


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Raises StoreError, which names ``path``, for an OSError in the ``with`` block."""
    try:
        yield
    except OSError as error:
        raise store_lib.StoreError(f"{path} cannot be written ({error.strerror or error})") from None


def _require_folder(path: str) -> None:
    folder = pathlib.Path(path).absolute().parent
    if not folder.is_dir():
        raise store_lib.StoreError(f"{path} cannot be written: the folder {folder} does not exist")


def _is_same(first: str, second: str) -> bool:
    """Returns whether two paths lead to one file, or would if it existed."""
    if os.path.exists(first) and os.path.exists(second):
        return os.path.samefile(first, second)
    return os.path.realpath(first) == os.path.realpath(second)
