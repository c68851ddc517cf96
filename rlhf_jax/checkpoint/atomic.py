"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import pathlib


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Puts a file in place of another such that a reader, or a kill, finds the old one or the new one."""
    path = pathlib.Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
