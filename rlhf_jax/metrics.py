"""Metrics that can be averaged later, and the files they are written to.

A mean alone cannot be merged with another mean; a sum and a weight can. Steps return ``Metric`` values, which add up
over micro-batches, minibatches and devices, and become numbers on the host once, when they are logged.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from rlhf_jax import masking
from rlhf_jax.checkpoint import atomic

FILE_NAME = "metrics.jsonl"

_FLUSH_SECONDS = 2


class LogError(RuntimeError):
    """What is to be logged cannot be written; the message says where and why."""


@struct.dataclass
class Metric:
    """A weighted mean in two parts; a pytree, so ``jax.lax.psum(metric, axis_name)`` merges it across devices."""

    sum: jax.Array
    weight: jax.Array

    def value(self) -> jax.Array:
        """``sum / weight``; NaN where nothing was observed, because 0 would read as a measurement."""
        empty = jnp.asarray(self.weight) == 0
        return jnp.where(empty, jnp.nan, self.sum / jnp.where(empty, 1.0, self.weight))

    def merge(self, other: Metric) -> Metric:
        """The metric of both sets of observations together."""
        return Metric(sum=self.sum + other.sum, weight=self.weight + other.weight)

    def collapse(self) -> Metric:
        """Merges a metric that ``scan`` or ``vmap`` has stacked into one with scalar parts."""
        return Metric(sum=jnp.sum(self.sum), weight=jnp.sum(self.weight))


def mean_metric(
    x: jax.Array, where: jax.Array | bool | None = None, *, axis_name: str | tuple[str, ...] | None = None
) -> Metric:
    """The mean of ``x`` (any shape) over ``where`` (everything if None) as a ``Metric``."""
    mask = True if where is None else where
    return Metric(
        sum=masking.masked_sum(x, where=mask, axis_name=axis_name),
        weight=masking.masked_count(x, where=mask, axis_name=axis_name).astype(jnp.float32),
    )


def to_floats(values: Mapping[str, Metric | jax.Array | float]) -> dict[str, float]:
    """Numbers on the host, with one transfer; stacked metrics are merged.

    Raises:
        TypeError: if a value that is not a ``Metric`` is not a scalar.
    """
    return {name: _number(value) for name, value in jax.device_get(dict(values)).items()}


def read(directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of ``directory/metrics.jsonl`` in the order they were written; a torn last line is left out.

    Raises:
        ValueError: if any other line is broken.
    """
    return [record for _, record in _records(pathlib.Path(directory) / FILE_NAME)]


class MetricLog:
    """Appends numbers to ``directory/metrics.jsonl`` and to TensorBoard files under ``directory/tensorboard``.

    The lines are the exact record: each is in the file when ``write`` returns. TensorBoard's files are written out
    every few seconds, so a killed process can lose the last ones of a curve there.

    Raises:
        LogError: from every method, if the disk is full, read-only or gone.

    Each stage is a TensorBoard run of its own, because a restart purges a whole run from a step on and stages count
    their steps separately.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        """Opens the files, creating the directory; the half line that a killed process left behind is removed."""
        self._directory = pathlib.Path(directory)
        self._path = self._directory / FILE_NAME
        self._boards: dict[str, _Board] = {}
        self._purge_steps: dict[str, int] = {}
        with self._writing():
            self._directory.mkdir(parents=True, exist_ok=True)
            _mend(self._path)
            self._file = self._path.open("a", encoding="utf-8")

    def write(self, stage: str, step: int, values: Mapping[str, Metric | jax.Array | float]) -> None:
        """Appends one line ``{"stage": ..., "step": ..., **values}`` and the scalars ``stage/name``.

        NaN and infinity, which JSON does not have, become null.

        Raises:
            ValueError: if a value is named "stage" or "step".
        """
        if {"stage", "step"} & values.keys():
            raise ValueError(f'"stage" and "step" cannot name values, got {sorted(values)}')
        numbers = to_floats(values)
        finite = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
        with self._writing():
            self._file.write(json.dumps({"stage": stage, "step": int(step), **finite}, allow_nan=False) + "\n")
            self._file.flush()
            shown = {f"{stage}/{name}": number for name, number in finite.items() if number is not None}
            self._board(stage).add(int(step), shown)

    def rewind(self, stage: str, step: int, *, drop_stages: Collection[str] = ()) -> None:
        """Forgets what was logged after a checkpoint, so that a resumed run leaves neither gaps nor double lines.

        Args:
            stage: the stage that resumes; its lines with a step above ``step`` are dropped.
            step: the last step whose line is kept.
            drop_stages: stages that come later and will run again from their start; all their lines are dropped.
        """
        with self._writing():
            self._file.close()
            kept = [
                line
                for line, record in _records(self._path)
                if record["stage"] not in drop_stages and not (record["stage"] == stage and record["step"] > step)
            ]
            atomic.replace_file(self._path, b"".join(kept))
            self._file = self._path.open("a", encoding="utf-8")
        for name, first in {**dict.fromkeys(drop_stages, 0), stage: step + 1}.items():
            self._purge_steps[name] = first
            if name in self._boards:
                self._boards.pop(name).close()

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """The lines of one stage, as `read` gives them."""
        return [record for record in read(self._directory) if record["stage"] == stage]

    def close(self) -> None:
        """Flushes and closes everything; the object cannot be written to afterwards."""
        boards, self._boards = self._boards, {}
        with self._writing():
            self._file.close()
            for board in boards.values():
                board.close()

    def __enter__(self) -> MetricLog:
        """The log itself; it is closed on leaving the ``with`` block."""
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        """Closes the log; a failure to do so does not hide an exception that is already on its way."""
        with contextlib.suppress(*([] if kind is None else [LogError])):
            self.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LogError(f"cannot write to {self._directory}: {error.strerror or error}") from error

    def _board(self, stage: str) -> _Board:
        if stage not in self._boards:
            folder = self._directory / "tensorboard" / stage
            self._boards[stage] = _Board(folder, self._purge_steps.pop(stage, None))
        return self._boards[stage]


class _Board:
    """One file of TensorBoard's.

    tensorboardX's own writer hands its numbers to a thread through a queue of ten: where the disk is full the thread
    dies, and whoever writes next waits for it for ever.
    """

    def __init__(self, folder: pathlib.Path, purge_step: int | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Event files are read in the order of their names, which hold whole seconds; the suffix orders two starts
        # within one second and keeps the second from overwriting the first.
        self._events = event_file_writer.EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self._flushed = 0.0
        if purge_step is not None:
            log: Any = event_pb2
            self._write(step=purge_step, session_log=log.SessionLog(status=log.SessionLog.START))

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self._write(step=step, summary=summary.scalar(name, number))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._events.close()

    def _write(self, **what: Any) -> None:
        make: Any = event_pb2
        self._events.write_event(make.Event(wall_time=time.time(), **what))


def _number(value: Any) -> float:
    if not isinstance(value, Metric):
        return float(value)
    weight = float(np.sum(value.weight))
    return float(np.sum(value.sum)) / weight if weight else math.nan


def _records(path: pathlib.Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            yield line if line.endswith(b"\n") else line + b"\n", record
        elif line.endswith(b"\n"):
            raise ValueError(f"{path}, line {number}, is not a metrics line: {line[:80]!r}")


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"stage", "step"} <= record.keys() else None


def _mend(path: pathlib.Path) -> None:
    """Completes or removes a last line that has no newline."""
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        whole, tail = content[: content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1 :]
        atomic.replace_file(path, content + b"\n" if _parse(tail) is not None else whole)
