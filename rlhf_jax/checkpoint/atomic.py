"""Atomic file writes."""

from __future__ import annotations

import os
import pathlib


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file atomically: readers see either the old or the new content, even if the process is killed."""
    path = pathlib.Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
