"""Metrics that can be averaged later, and the files they are written to.

A mean alone cannot be merged with another mean; a sum and a weight can. Steps return ``Metric`` values, which add up
over micro-batches, minibatches and devices, and become numbers on the host once, when they are logged.
"""

from __future__ import annotations

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
import tensorboardX
from flax import struct

from rlhf_jax import atomic, reduce

FILE_NAME = "metrics.jsonl"

_FLUSH_SECONDS = 2


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
        sum=reduce.masked_sum(x, where=mask, axis_name=axis_name),
        weight=reduce.masked_count(x, where=mask, axis_name=axis_name).astype(jnp.float32),
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

    The lines are the exact record: each is in the file when ``write`` returns. TensorBoard's files are written by a
    thread of their own, so a killed process can lose the last seconds of a curve there.

    Each stage is a TensorBoard run of its own, because a restart purges a whole run from a step on and stages count
    their steps separately.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        """Opens the files, creating the directory; the half line that a killed process left behind is removed."""
        self._directory = pathlib.Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._path = self._directory / FILE_NAME
        _mend(self._path)
        self._file = self._path.open("a", encoding="utf-8")
        self._boards: dict[str, tensorboardX.SummaryWriter] = {}
        self._purge_steps: dict[str, int] = {}

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
        self._file.write(json.dumps({"stage": stage, "step": int(step), **finite}, allow_nan=False) + "\n")
        self._file.flush()
        board = self._board(stage)
        for name, number in finite.items():
            if number is not None:
                board.add_scalar(f"{stage}/{name}", number, int(step))

    def rewind(self, stage: str, step: int, *, drop_stages: Collection[str] = ()) -> None:
        """Forgets what was logged after a checkpoint, so that a resumed run leaves neither gaps nor double lines.

        Args:
            stage: the stage that resumes; its lines with a step above ``step`` are dropped.
            step: the last step whose line is kept.
            drop_stages: stages that come later and will run again from their start; all their lines are dropped.
        """
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
        self._file.close()
        for board in self._boards.values():
            board.close()
        self._boards = {}

    def __enter__(self) -> MetricLog:
        """The log itself; it is closed on leaving the ``with`` block."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes the log."""
        self.close()

    def _board(self, stage: str) -> tensorboardX.SummaryWriter:
        if stage not in self._boards:
            # Event files are read in the order of their names, which hold whole seconds; the suffix orders two
            # starts within one second and keeps the second from overwriting the first.
            self._boards[stage] = tensorboardX.SummaryWriter(
                str(self._directory / "tensorboard" / stage),
                purge_step=self._purge_steps.pop(stage, None),
                filename_suffix=f".{time.time_ns()}",
                flush_secs=_FLUSH_SECONDS,
            )
        return self._boards[stage]


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
