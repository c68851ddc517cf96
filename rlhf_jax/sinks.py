"""Places where `metrics.MetricLog` also writes metrics: TensorBoard, Weights & Biases and Trackio."""

from __future__ import annotations

import importlib
import pathlib
import time
import uuid
from collections.abc import Mapping
from typing import Any, Protocol

from rlhf_jax import atomic

_FLUSH_SECONDS = 2


class LogError(RuntimeError):
    """The log cannot be written; the message contains the directory or the service, and the reason."""


class Sink(Protocol):
    """Receives the metrics of a run."""

    def write(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        """Records the finite metrics of one step of a stage."""

    def rewind(self, stage: str, step: int) -> None:
        """Forgets the metrics of a stage after ``step``, if that is possible, because these steps are run again."""

    def close(self) -> None:
        """Writes everything that is still in memory."""


class TensorBoard:
    """TensorBoard files under ``directory/tensorboard``, flushed every few seconds.

    Each stage is a separate TensorBoard run, so that a resumed stage purges only its own points.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        """Writes nothing before the first step."""
        self._directory = directory / "tensorboard"
        self._boards: dict[str, _Board] = {}
        self._purge_steps: dict[str, int] = {}

    def write(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        """Adds the scalars ``stage/name``."""
        if stage not in self._boards:
            self._boards[stage] = _Board(self._directory / stage, self._purge_steps.pop(stage, None))
        self._boards[stage].add(step, {f"{stage}/{name}": number for name, number in numbers.items()})

    def rewind(self, stage: str, step: int) -> None:
        """Purges the points after ``step`` when the next point is added."""
        self._purge_steps[stage] = step + 1
        if stage in self._boards:
            self._boards.pop(stage).close()

    def close(self) -> None:
        """Closes all files."""
        boards, self._boards = self._boards, {}
        for board in boards.values():
            board.close()


class _Service:
    """A run of a tracking service. Its id is saved in a file, so that a resumed run continues the same run.

    The metrics are named ``stage/name``. The metric ``stage/step`` has the step, because the service has only one
    counter. Points cannot be removed, so the steps after the last checkpoint appear twice in a resumed run, with equal
    values.
    """

    package: str

    def __init__(self, directory: pathlib.Path, **options: Any) -> None:
        """Starts the run or continues it; ``options`` are those of the package's ``init``, such as ``project``."""
        path = directory / f"{self.package}_run.txt"
        if not path.exists():
            atomic.replace_file(path, f"{directory.resolve().name}-{uuid.uuid4().hex[:8]}".encode())
        try:
            self._package: Any = importlib.import_module(self.package)
            self._run = self._start(path.read_text(encoding="utf-8"), directory, {"project": "rlhf_jax"} | options)
        except ImportError as error:
            raise LogError(
                f"logging to {self.package} needs its package; install it with pip install -e '.[{self.package}]'"
            ) from error
        except Exception as error:
            text = (str(error) or type(error).__name__).splitlines()[0]
            raise LogError(f"cannot start a run of {self.package}: {text}") from error
        self._stages: set[str] = set()

    def _start(self, name: str, directory: pathlib.Path, options: dict[str, Any]) -> Any:
        raise NotImplementedError

    def _start_stage(self, stage: str) -> None:
        """Defines the metrics of a stage."""

    def write(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        """Logs the metrics ``stage/name`` and ``stage/step``."""
        if stage not in self._stages:
            self._stages.add(stage)
            self._start_stage(stage)
        self._run.log({f"{stage}/step": step} | {f"{stage}/{name}": number for name, number in numbers.items()})

    def rewind(self, stage: str, step: int) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Finishes the run."""
        self._run.finish()


class Wandb(_Service):
    """A run of Weights & Biases; ``WANDB_MODE=offline`` writes it to ``directory/wandb``."""

    package = "wandb"

    def _start(self, name: str, directory: pathlib.Path, options: dict[str, Any]) -> Any:
        return self._package.init(id=name, name=name, dir=str(directory), resume="allow", **options)

    def _start_stage(self, stage: str) -> None:
        self._run.define_metric(f"{stage}/step")
        self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")


class Trackio(_Service):
    """A run of Trackio."""

    package = "trackio"

    def _start(self, name: str, directory: pathlib.Path, options: dict[str, Any]) -> Any:
        del directory
        return self._package.init(name=name, resume="allow", **options)


class _Board:
    """A TensorBoard event file.

    This class writes the events itself, because tensorboardX's ``SummaryWriter`` passes them to a thread through a
    queue: if the disk is full, the thread dies, and a later write blocks forever.
    """

    def __init__(self, folder: pathlib.Path, purge_step: int | None) -> None:
        # Imported here, so that the library also works without tensorboardX if no log is written.
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        self._proto: Any = event_pb2
        self._scalar = summary.scalar
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads event files in the order of their names, which contain the time in whole seconds. The suffix
        # orders files created within the same second and prevents one from overwriting the other.
        self._events = event_file_writer.EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self._flushed = 0.0
        if purge_step is not None:
            start = self._proto.SessionLog(status=self._proto.SessionLog.START)
            self._write(step=purge_step, session_log=start)

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self._write(step=step, summary=self._scalar(name, number))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._events.close()

    def _write(self, **fields: Any) -> None:
        self._events.write_event(self._proto.Event(wall_time=time.time(), **fields))
