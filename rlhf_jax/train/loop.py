"""`fit`, the training loop of all stages.

Iteration i depends only on i, the state and the arguments: ``batch_at`` and ``hyper_at`` are pure functions of i, and
steps fold ``state.step`` into a constant ``rng``. The position in the data therefore needs no bookkeeping. If the
compiled step is deterministic, a resumed run gives results bit-identical to those of an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import checkpoint
from rlhf_jax import metrics as metrics_lib
from rlhf_jax.data import errors
from rlhf_jax.train.optim import nonfinite

Log = Callable[[int, dict[str, float]], None]


class Preempted(Exception):
    """SIGTERM, SIGINT or ``should_stop`` stopped the run between two iterations; `fit` resumes from a saved checkpoint.

    Attributes:
        stage: Name of the stage.
        step: Number of iterations done.
        saved: Whether a checkpoint of this step is on disk.
    """

    def __init__(self, stage: str, step: int, *, saved: bool) -> None:
        """Builds the message from the attributes."""
        done = errors.counted(step, "iterations")
        super().__init__(f"{stage or 'training'} was stopped after {done}; {_saved_text(saved)}")
        self.stage, self.step, self.saved = stage, step, saved


class Alarmed(Exception):
    """A ``log`` raises ``Alarmed(reason)`` to stop the run; `fit` then raises it again with all attributes set.

    Attributes:
        reason: The reason that the log gave.
        stage: Name of the stage.
        step: Number of iterations done.
        saved: Whether a checkpoint of this step is on disk.
    """

    def __init__(self, reason: str, *, stage: str = "", step: int = 0, saved: bool = False) -> None:
        """Builds the message.

        Args:
            reason: The reason for stopping; the only argument that a log passes.
            stage: Name of the stage.
            step: Number of iterations done.
            saved: Whether a checkpoint of this step is on disk.
        """
        stopped = f"an alarm ({reason}) stopped {stage or 'training'} after {errors.counted(step, 'iterations')}"
        super().__init__(f"{stopped}; {_saved_text(saved)}")
        self.reason, self.stage, self.step, self.saved = reason, stage, step, saved


def _saved_text(saved: bool) -> str:
    return "a checkpoint of this step is on disk" if saved else "no checkpoint was saved"


class DivergedError(RuntimeError):
    """Too many consecutive steps were not finite and were skipped; the weights are those of the last finite step."""


class StageLog:
    """A ``log`` for `fit` that writes the rows of one stage to a `metrics.MetricLog`."""

    def __init__(self, log: metrics_lib.MetricLog, stage: str) -> None:
        """Stores the log and the name of the stage."""
        self._log, self._stage = log, stage

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a row."""
        self._log.write(self._stage, step, values)

    def rewind(self, step: int) -> None:
        """Drops the rows of this stage after ``step``."""
        self._log.rewind(self._stage, step)


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields ``stop() -> bool``, whether SIGTERM or SIGINT was received. A later SIGINT interrupts immediately.

    A signal that did not end the block with an exception is raised again afterwards, for the previous handlers. Python
    allows only the main thread to install handlers. In other threads ``stop`` always returns False.
    """
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)

    old: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        old = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if received:
        signal.raise_signal(received[0])


@contextlib.contextmanager
def _finish_saving(checkpoints: checkpoint.Checkpoints | None) -> Iterator[None]:
    """Waits for an unfinished save when the loop ends, whether normally or by an exception."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(checkpoint.CheckpointError):
            if checkpoints is not None:
                checkpoints.wait()
        raise
    if checkpoints is not None:
        checkpoints.wait()


class _Reporter:
    """Converts and logs the metrics of an iteration while the device computes the next one."""

    def __init__(
        self, stage: str, total: int, log: Log | None, log_every: int, progress: Any, max_skipped: int, warn: Any
    ) -> None:
        self.stage, self.total, self.log, self.log_every = stage, total, log, log_every
        self.progress, self.max_skipped, self.warn = progress, max_skipped, warn
        self.skipped = self.skipped_total = 0
        self.alarmed: Alarmed | None = None
        self.diverged = ""
        self.pending: tuple[int, Mapping[str, Any]] | None = None

    def push(self, done: int, metrics: Mapping[str, Any]) -> None:
        self.flush()
        self.pending = (done, metrics)

    def flush(self) -> None:
        if self.pending is None:
            return
        (done, metrics), self.pending = self.pending, None
        floats = metrics_lib.to_floats(metrics)
        skipped = floats.get("skipped", 0.0)
        bad = skipped > 0 or math.isnan(skipped)
        if bad:
            self._skip(done, nonfinite.explain(floats))
        else:
            self.skipped = 0
            floats = {name: number for name, number in floats.items() if name not in nonfinite.DETAILS}
        if self.log is not None and (done % self.log_every == 0 or done == self.total):
            try:
                self.log(done, floats)
            except Alarmed as alarmed:
                self.alarmed = self.alarmed or alarmed
        if self.progress is not None:
            self.progress(self.stage, done, self.total, floats)

    def must_stop(self) -> bool:
        return self.alarmed is not None or bool(self.diverged)

    def _skip(self, done: int, reason: str) -> None:
        self.skipped, self.skipped_total = self.skipped + 1, self.skipped_total + 1
        stage = self.stage or "training"
        if self.skipped_total == 1:
            self.warn(f"{stage}: skipped step {done}: {reason}; further skips appear only in the metric 'skipped'")
        if self.skipped >= self.max_skipped and not self.diverged:
            self.diverged = (
                f"{stage} skipped {errors.counted(self.skipped, 'steps')} in a row, the last at step {done} of "
                f"{self.total}: {reason}; "
                "the weights are those of the last finite step"
            )


def _warn_on_stderr(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def _identity(stage: str, rng: jax.Array, fingerprint: Any) -> dict[str, Any]:
    """Returns the values by which a checkpoint is matched to its run, as plain JSON types."""
    words = jax.random.key_data(rng) if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) else rng
    return {"stage": stage, "rng": np.asarray(words).ravel().tolist(), "fingerprint": fingerprint}


def _resume(
    checkpoints: checkpoint.Checkpoints | None, state: Any, steps: int, identity: dict[str, Any]
) -> tuple[int, Any, int]:
    """Returns the number of iterations done, the state after them, and the current number of consecutive skips."""
    if checkpoints is None or checkpoints.latest() is None:
        return 0, state, 0
    start, state, metadata = checkpoints.restore(state)
    for name, value in identity.items():
        if metadata.get(name) != value:
            raise checkpoint.CheckpointError(
                f"cannot resume from {checkpoints.directory}: it was written with {name} {metadata.get(name)!r}, and "
                f"this run has {value!r}; use a different folder for a different run"
            )
    if start > steps:
        raise checkpoint.CheckpointError(
            f"cannot resume from {checkpoints.directory}: its checkpoint is from step {start}, but the run has only "
            f"{steps} steps; use a different folder for a shorter run"
        )
    return start, state, metadata.get("skipped", 0)


def fit(
    train_step: Callable[..., tuple[Any, Mapping[str, Any]]],
    state: Any,
    *,
    steps: int,
    batch_at: Callable[[int], Any],
    hyper_at: Callable[[int], Any],
    rng: jax.Array,
    frozen: Any = None,
    stage: str = "",
    log: Log | metrics_lib.MetricLog | None = None,
    log_every: int = 1,
    checkpoints: checkpoint.Checkpoints | None = None,
    save_every: int | None = None,
    progress: Callable[[str, int, int, dict[str, float]], None] | None = None,
    callbacks: Sequence[Callable[[int, Any, Mapping[str, Any]], Mapping[str, Any] | None]] = (),
    max_skipped: int = 10,
    fingerprint: Any = None,
    should_stop: Callable[[int, bool], bool] = lambda done, wanted: wanted,
    warn: Callable[[str], None] = _warn_on_stderr,
) -> Any:
    """Runs ``steps`` iterations of a compiled step, or those that remain after a resume, and returns the final state.

    Steps count iterations *done*: the row logged as step 10 and the checkpoint of step 10 both describe the state after
    ten iterations. All rows up to a checkpoint are logged before the checkpoint is written. If ``log`` has a method
    ``rewind(step)``, it is called at the start to drop rows after the step from which the run resumes (0 for a new
    run), so that the rows of a resumed run have neither gaps nor duplicates.

    Args:
        train_step: ``(state, frozen, hyper, batch, rng) -> (state, metrics)``, compiled so that it donates the state
            (see `parallel.jit_step`). The metrics are a dict of scalars or `metrics.Metric`; those in
            `nonfinite.DETAILS` are logged for skipped steps only.
        state: The initial state, which is also the template for restoring a checkpoint. It is donated; do not use it
            afterwards.
        steps: Total number of iterations, including those before a resume.
        batch_at: Pure function that returns the batch of an iteration, counted from 0.
        hyper_at: Pure function that returns the hyperparameters of an iteration, counted from 0, always with the same
            structure and types.
        rng: One key for the whole run.
        frozen: Inputs that the step uses but does not change, such as the parameters of a reference model.
        stage: Name of the stage in messages, progress and checkpoints.
        log: A `metrics.MetricLog`, whose rows are written under ``stage``, or a function ``log(step, floats)``. To keep
            the device busy, an iteration is usually logged after the next one has been dispatched. The function may
            raise `Alarmed` to stop the run before a further iteration is dispatched. Any other exception stops the run
            immediately, without saving.
        log_every: Logging interval, in iterations. The last iteration is always logged.
        checkpoints: Checkpoints from which to resume and to which to save; None for neither.
        save_every: Checkpoint interval, in iterations; None to save only at the end or when the run is stopped.
        progress: ``progress(stage, done, steps, floats)``, called with an empty dict at the start and then once per
            iteration, with the same delay as ``log``.
        callbacks: Called as ``callback(done, state, metrics)`` after each iteration, with arrays that may not be
            computed yet; reading them waits for the device. The state is donated to the next step, so copy what you
            keep. A dict that a callback returns is logged with the metrics of the iteration.
        max_skipped: Stop after this many consecutive iterations with the metric ``skipped`` above 0, counted across
            resumes. A skipped update leaves the parameters unchanged. The state is saved when the run stops, so that
            starting it again resumes after the skipped iterations.
        fingerprint: JSON value that identifies data, seed and batch size. It must be the same when a run is resumed.
        should_stop: ``should_stop(done, wanted)`` returns whether to stop after ``done`` iterations; ``wanted`` is
            whether this process has a reason to stop (a signal, an alarm or divergence). With several hosts, pass the
            result of `distributed.hosts.Hosts.stop_agreement`, so that all hosts stop after the same iteration.
        warn: Called once, for the first skipped step, with a message that names the non-finite loss or gradient. By
            default the message is printed to stderr.

    Returns:
        The state after ``steps`` iterations.

    Raises:
        Preempted: On SIGTERM or Ctrl-C if the main thread runs the loop, and if ``should_stop`` returns True for
            another reason; the state is saved if ``checkpoints`` is given. A signal for which ``should_stop`` returns
            False is raised again at the end.
        Alarmed: If the log raised it; the state is saved if ``checkpoints`` is given.
        DivergedError: After ``max_skipped`` consecutive skipped iterations; the state is saved if ``checkpoints`` is
            given.
        checkpoint.CheckpointError: If a save fails, no checkpoint is intact, or the checkpoint belongs to another run.
        ValueError: If ``log_every`` or ``save_every`` is not positive.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from rlhf_jax.train import loop
        >>> def train_step(state, frozen, hyper, batch, rng):
        ...     return state + hyper * batch, {"batch": batch}
        >>> float(loop.fit(
        ...     jax.jit(train_step, donate_argnums=0),
        ...     jnp.zeros(()),
        ...     steps=4,
        ...     batch_at=float,
        ...     hyper_at=lambda i: 0.5,
        ...     rng=jax.random.key(0),
        ...     log=lambda step, floats: print(step, floats["batch"]),
        ...     log_every=2,
        ... ))
        2 1.0
        4 3.0
        3.0
    """
    for name, interval in (("log_every", log_every), ("save_every", save_every)):
        if interval is not None and interval < 1:
            raise ValueError(f"{name} is {interval}; it must be positive")
    identity = _identity(stage, rng, fingerprint)
    start, state, skipped = _resume(checkpoints, state, steps, identity)
    if isinstance(log, metrics_lib.MetricLog):
        log = StageLog(log, stage)
    rewind = getattr(log, "rewind", None)
    if rewind is not None:
        rewind(start)
    if progress is not None:
        progress(stage, start, steps, {})
    report = _Reporter(stage, steps, log, log_every, progress, max_skipped, warn)
    report.skipped = skipped
    saved = start if start else None

    def save(done: int) -> int:
        report.flush()
        assert checkpoints is not None
        checkpoints.save(done, state, identity | {"skipped": 0 if report.diverged else report.skipped})
        return done

    def leave(done: int) -> NoReturn:
        report.flush()
        if checkpoints is not None and done > 0:
            if saved != done:
                save(done)
            checkpoints.wait()
        is_saved = checkpoints is not None and done > 0
        if report.diverged:
            raise DivergedError(f"{report.diverged}; {_saved_text(is_saved)}")
        if report.alarmed is not None:
            raise Alarmed(report.alarmed.reason, stage=stage, step=done, saved=is_saved) from report.alarmed
        raise Preempted(stage, done, saved=is_saved)

    with _stop_signals() as stop, _finish_saving(checkpoints):
        for i in range(start, steps):
            if should_stop(i, stop() or report.must_stop()):
                leave(i)
            state, metrics = train_step(state, frozen, hyper_at(i), batch_at(i), rng)
            for callback in callbacks:
                metrics = {**metrics, **(callback(i + 1, state, metrics) or {})}
            report.push(i + 1, metrics)
            if checkpoints is not None and save_every is not None and (i + 1) % save_every == 0:
                saved = save(i + 1)
        report.flush()
        if checkpoints is not None and steps > 0:
            if saved != steps:
                saved = save(steps)
            checkpoints.wait()  # before the last check, so that a signal during this wait is not missed
        if should_stop(steps, stop() or report.must_stop()):  # this stage is complete, but the next must not start
            leave(steps)
    return state
