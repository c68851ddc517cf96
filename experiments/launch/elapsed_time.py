"""Adds up the time of all processes of a run, in seconds.json in its folder."""

from __future__ import annotations

import contextlib
import json
import pathlib
import time

from launch import process_setup
from rlhf_jax import atomic

NAME = "seconds.json"
INTERVAL = 10.0
"""Seconds between two writes of the file, which a killed process loses at most between two steps."""


class ElapsedTime:
    """The seconds that a run has taken: those of its earlier processes and those of this one since it started."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Reads the seconds of earlier processes; a missing or damaged file counts as none."""
        self._path, self._earlier, self._saved = folder / NAME, 0.0, 0.0
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(self._path.read_text(encoding="utf-8"))
            same = found["process"] == process_setup.START_TIME
            self._earlier = float(found["earlier"]) + (0.0 if same else float(found["seconds"]))

    @property
    def total(self) -> float:
        """The seconds of all processes until now."""
        return self._earlier + self._own()

    def _own(self) -> float:
        return time.time() - process_setup.START_TIME

    def save(self) -> None:
        """Writes the file; does nothing if that fails, because errors of the disk are reported by other files."""
        self._saved = time.monotonic()
        values = {"earlier": self._earlier, "seconds": self._own(), "process": process_setup.START_TIME}
        with contextlib.suppress(OSError):
            atomic.replace_file(self._path, (json.dumps(values) + "\n").encode())

    def tick(self) -> None:
        """Writes the file if the last write was `INTERVAL` seconds ago."""
        if time.monotonic() - self._saved >= INTERVAL:
            self.save()
