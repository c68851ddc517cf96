"""Mergeable metrics, and the log files that record them.

Means cannot be merged without their weights, but sums and weights can. Train steps therefore return `Metric` values,
which are added over micro-batches, minibatches and devices and converted to numbers on the host when they are logged.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rlhf_jax import atomic, masking
from rlhf_jax import sinks as sinks_lib

FILE_NAME = "metrics.jsonl"


LogError = sinks_lib.LogError


@struct.dataclass
class Metric:
    """A weighted mean, stored as a sum and a weight; ``jax.lax.psum(metric, axis_name)`` merges it across devices.

    Example:
        >>> import jax.numpy as jnp
        >>> from rlhf_jax import metrics
        >>> first = metrics.mean_metric(jnp.array([1.0, 2.0]))
        >>> second = metrics.mean_metric(jnp.array([9.0]))
        >>> print(first.merge(second).value())
        4.0
    """

    sum: jax.Array
    weight: jax.Array

    def value(self) -> jax.Array:
        """Returns ``sum / weight``; NaN if the weight is 0, because 0 could be mistaken for a measurement."""
        empty = jnp.asarray(self.weight) == 0
        return jnp.where(empty, jnp.nan, self.sum / jnp.where(empty, 1.0, self.weight))

    def merge(self, other: Metric) -> Metric:
        """Returns the metric of the combined observations."""
        return Metric(sum=self.sum + other.sum, weight=self.weight + other.weight)

    def collapse(self) -> Metric:
        """Merges a metric stacked by ``scan`` or ``vmap`` into a scalar metric."""
        return Metric(sum=jnp.sum(self.sum), weight=jnp.sum(self.weight))


def mean_metric(x: jax.Array, where: jax.Array | bool = True, *, axis_name: masking.AxisName = None) -> Metric:
    """Returns a `Metric`, the mean of ``x`` (any shape) over the mask ``where`` and over the axes ``axis_name``."""
    return Metric(
        sum=masking.masked_sum(x, where=where, axis_name=axis_name),
        weight=masking.masked_count(x, where=where, axis_name=axis_name).astype(jnp.float32),
    )


def to_floats(values: Mapping[str, Metric | jax.Array | float]) -> dict[str, float]:
    """Converts metrics to floats on the host, in a single transfer; stacked metrics are merged.

    Raises TypeError if a value is neither a `Metric` nor a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> from rlhf_jax import metrics
        >>> metrics.to_floats({"loss": metrics.mean_metric(jnp.array([1.0, 2.0])), "step": 3})
        {'loss': 1.5, 'step': 3.0}
    """
    return {name: _number(value) for name, value in jax.device_get(dict(values)).items()}


def read(directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the records in ``directory/metrics.jsonl``, in the order in which they were written.

    An incomplete last line is ignored. Raises ValueError if any other line is invalid.
    """
    return [record for _, record in _records(pathlib.Path(directory) / FILE_NAME)]


class MetricLog:
    """Appends metrics to ``directory/metrics.jsonl`` and to sinks, by default TensorBoard files in the directory.

    ``metrics.jsonl`` is the complete record: `write` flushes each line to the file before it returns. Sinks such as
    TensorBoard write later, so an interrupted process can lose their last points. Each training stage has its own step
    counter.

    All methods that write to disk raise `LogError` if writing fails, for example because the disk is full or read-only.

    Args:
        directory: The folder of the run, which is created.
        sinks: Functions that open a `sinks.Sink` for the directory, such as `sinks.TensorBoard` and `sinks.Wandb`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        sinks: Sequence[Callable[[pathlib.Path], sinks_lib.Sink]] = (sinks_lib.TensorBoard,),
    ):
        """Opens ``metrics.jsonl``; completes or removes a last line without a newline."""
        self._directory = pathlib.Path(directory)
        self._path = self._directory / FILE_NAME
        with self._convert_errors():
            self._directory.mkdir(parents=True, exist_ok=True)
            atomic.repair_last_line(self._path)
            self._file = self._path.open("a", encoding="utf-8")
            self._sinks = [make(self._directory) for make in sinks]

    def write(self, stage: str, step: int, values: Mapping[str, Metric | jax.Array | float]) -> None:
        """Appends the line ``{"stage": ..., "step": ..., **values}`` and passes the values to the sinks.

        NaN and infinity, which JSON cannot represent, become null and are not passed to the sinks. Raises ValueError if
        a value is named "stage" or "step".
        """
        if {"stage", "step"} & values.keys():
            raise ValueError(f'a metric cannot be named "stage" or "step", got {sorted(values)}')
        numbers = to_floats(values)
        finite = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
        with self._convert_errors():
            self._file.write(json.dumps({"stage": stage, "step": int(step), **finite}, allow_nan=False) + "\n")
            self._file.flush()
            shown = {name: number for name, number in finite.items() if number is not None}
            for sink in self._sinks:
                sink.write(stage, int(step), shown)

    def rewind(self, stage: str, step: int, *, drop_stages: Collection[str] = ()) -> None:
        """Removes the lines logged after a checkpoint, so that a resumed run does not log them twice.

        Args:
            stage: The stage to resume; its lines with a step above ``step`` are removed.
            step: The last step to keep.
            drop_stages: Later stages, which run again from the beginning; all their lines are removed.
        """
        with self._convert_errors():
            self._file.close()
            kept = [
                line
                for line, record in _records(self._path)
                if record["stage"] not in drop_stages and not (record["stage"] == stage and record["step"] > step)
            ]
            atomic.replace_file(self._path, b"".join(kept))
            self._file = self._path.open("a", encoding="utf-8")
            for name, last in {**dict.fromkeys(drop_stages, -1), stage: step}.items():
                for sink in self._sinks:
                    sink.rewind(name, last)

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """Returns the records of one stage, in the order in which they were written."""
        return [record for record in read(self._directory) if record["stage"] == stage]

    def close(self) -> None:
        """Flushes and closes all files; nothing can be logged afterwards."""
        sinks, self._sinks = self._sinks, []
        with self._convert_errors():
            self._file.close()
            for sink in sinks:
                sink.close()

    def __enter__(self) -> MetricLog:
        """Returns the log; the end of the ``with`` block closes it."""
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        """Closes the log; if the block raised an exception, a `LogError` raised while closing is suppressed."""
        with contextlib.suppress(*([] if kind is None else [LogError])):
            self.close()

    @contextlib.contextmanager
    def _convert_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LogError(f"cannot write to {self._directory}: {error.strerror or error}") from error


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
            raise ValueError(f"{path}, line {number}: not a JSON object with a stage and a step: {line[:80]!r}")


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"stage", "step"} <= record.keys() else None
