"""Atomic file writes, and JSON-lines files that survive an interrupted write."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file atomically: readers see either the old or the new content, even if the process is killed."""
    path = pathlib.Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def repair_last_line(path: str | os.PathLike[str]) -> None:
    """Completes or removes a last line without a newline, so that a line can be appended to a JSON-lines file."""
    path = pathlib.Path(path)
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        end = content.rfind(b"\n") + 1
        try:
            json.loads(content[end:])
        except ValueError:
            replace_file(path, content[:end])
        else:
            replace_file(path, content + b"\n")


def append_line(path: str | os.PathLike[str], record: Any) -> None:
    """Appends a JSON value as a line, after `repair_last_line`, and flushes it to the disk."""
    repair_last_line(path)
    with open(path, "ab") as file:
        file.write((json.dumps(record) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
