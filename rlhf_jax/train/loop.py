"""`fit`: the only training loop.

What happens at iteration i depends on i, the state and the arguments alone: ``batch_at`` and ``hyper_at`` are pure
functions of i, and steps fold ``state.step`` into an unchanging ``rng``. So the position in the data needs no
bookkeeping, and a run that is killed anywhere and started again ends in the same bits.
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
from rlhf_jax.train.optim import nonfinite

Log = Callable[[int, dict[str, float]], None]


class Preempted(Exception):
    """The run was asked to stop (SIGTERM, SIGINT) and did so between two iterations; start it again to go on.

    Attributes:
        stage: What was being trained.
        step: Iterations done.
        saved: Whether a checkpoint of exactly this step is on disk.
    """

    def __init__(self, stage: str, step: int, *, saved: bool) -> None:
        """Say where it stopped."""
        super().__init__(f"{stage or 'training'} was stopped after {step} iterations; {_kept(saved)}")
        self.stage, self.step, self.saved = stage, step, saved


class Alarmed(Exception):
    """A ``log`` found something wrong: it raises ``Alarmed(reason)``, and `fit` saves, stops and says where.

    Attributes: as of `Preempted`, and ``reason``.
    """

    def __init__(self, reason: str, *, stage: str = "", step: int = 0, saved: bool = False) -> None:
        """Say why, and where it stopped; a log knows the first alone."""
        where = f"{stage or 'training'} was stopped after {step} iterations by an alarm; {_kept(saved)}"
        super().__init__(f"{where}: {reason}")
        self.reason, self.stage, self.step, self.saved = reason, stage, step, saved


def _kept(saved: bool) -> str:
    return "a checkpoint of it is on disk" if saved else "no checkpoint was saved"


class DivergedError(RuntimeError):
    """Too many steps in a row were not finite; the weights are those of the last one that was."""


class StageLog:
    """One stage's view of a `metrics.MetricLog`, as a ``log`` for `fit`."""

    def __init__(self, log: metrics_lib.MetricLog, stage: str) -> None:
        """Bind the stage."""
        self._log, self._stage = log, stage

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row."""
        self._log.write(self._stage, step, values)

    def rewind(self, step: int) -> None:
        """Drop this stage's rows after ``step``."""
        self._log.rewind(self._stage, step)


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """``stop() -> bool``: whether SIGTERM or SIGINT came. A second SIGINT interrupts at once.

    Python lets only the main thread install handlers; elsewhere nothing is installed and ``stop`` stays False.
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


@contextlib.contextmanager
def _settled(checkpoints: checkpoint.Checkpoints | None) -> Iterator[None]:
    """Whatever ends the loop, the save under way reaches the disk."""
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
    """Turns the metrics of one iteration into floats while the device is busy with the next one."""

    def __init__(
        self, stage: str, total: int, log: Log | None, log_every: int, progress: Any, max_skipped: int, tell: Any
    ) -> None:
        self.stage, self.total, self.log, self.log_every = stage, total, log, log_every
        self.progress, self.max_skipped, self.tell = progress, max_skipped, tell
        self.skipped = self.skipped_in_all = 0
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

    def _skip(self, done: int, why: str) -> None:
        self.skipped, self.skipped_in_all = self.skipped + 1, self.skipped_in_all + 1
        stage = self.stage or "training"
        if self.skipped_in_all == 1:
            self.tell(f"{stage}: step {done} was skipped, with {why}; others are counted in the metric 'skipped'")
        if self.skipped >= self.max_skipped and not self.diverged:
            self.diverged = (
                f"{stage} met {self.skipped} steps in a row that were skipped, the last one at step {done} of "
                f"{self.total}, with {why}; the weights are the last good ones"
            )


def _to_stderr(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def _identity(stage: str, rng: jax.Array, fingerprint: Any) -> dict[str, Any]:
    """What has to be the same for a resumed run to be the same run, in the form in which JSON gives it back."""
    words = jax.random.key_data(rng) if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) else rng
    return {"stage": stage, "rng": np.asarray(words).ravel().tolist(), "fingerprint": fingerprint}


def _resume(
    checkpoints: checkpoint.Checkpoints | None, state: Any, steps: int, identity: dict[str, Any]
) -> tuple[int, Any, int]:
    """Iterations done, the state after them, and how many of the last ones in a row were skipped."""
    if checkpoints is None or checkpoints.latest() is None:
        return 0, state, 0
    start, state, metadata = checkpoints.restore(state)
    for name, mine in identity.items():
        if metadata.get(name) != mine:
            raise checkpoint.CheckpointError(
                f"cannot go on from {checkpoints.directory}: it was written with {name} {metadata.get(name)!r}, "
                f"and this run has {mine!r}"
            )
    if start > steps:
        raise checkpoint.CheckpointError(
            f"cannot go on from {checkpoints.directory}: it stands at step {start}, and {steps} were asked for"
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
    agreed: Callable[[int, bool], bool] = lambda done, wanted: wanted,
    tell: Callable[[str], None] = _to_stderr,
) -> Any:
    """Run ``steps`` iterations of a compiled step, or what is left of them, and return the final state.

    Steps are counted in iterations *done*: the row logged as step 10 and the checkpoint of step 10 are both of the
    state after ten iterations. Every row up to a checkpoint is logged before the checkpoint is written. On the start, a
    ``log`` with a method ``rewind(step)`` is told to drop its rows after the step it goes on from (0 on a fresh start),
    so that a resumed run leaves rows with neither gap nor double.

    Args:
        train_step: ``(state, frozen, hyper, batch, rng) -> (state, metrics)``, compiled, donating the state (see
            `parallel.jit_step`). Metrics: a dict of scalars or of ``metrics.Metric``; those in `guard.DETAILS` are
            logged of skipped steps alone.
        state: The state to start from, or the example that a checkpoint is restored like. Donated: do not use it again.
        steps: Iterations in all, counted from the very first start.
        batch_at: Iteration (0-based) -> batch. A pure function.
        hyper_at: Iteration (0-based) -> hyperparameters, of the same structure and types each time. A pure function.
        rng: One key for the whole run.
        frozen: What the step reads and does not change, such as a reference model.
        stage: A name for messages, progress and checkpoints.
        log: A ``metrics.MetricLog``, written under ``stage``; or ``log(step, floats)``, one iteration late, which may
            raise `Alarmed` to stop the run before its next iteration, or anything else to stop it at once, unsaved.
        log_every: Log each so many iterations, and the last.
        checkpoints: Where to go on from and to save to; None for neither.
        save_every: Save each so many iterations; None: only at the end, or when asked to stop.
        progress: ``progress(stage, done, steps, floats)``, first with no floats at the start, then one iteration late.
        callbacks: ``callback(done, state, metrics)`` after each iteration, with arrays that are still being computed;
            reading them waits for the device. The state is donated to the next step: copy what has to stay. What it
            returns, if not None, is logged with the iteration's metrics.
        max_skipped: Stop after so many iterations in a row in which the metric ``skipped`` is above 0, their number
            being carried over a resume. The state of a skipped step is that before it, and is saved then: what stopped
            so can be started again, and goes on behind what it could not use.
        fingerprint: What identifies data, seed and batch size, as JSON; a resumed run must have the same one.
        agreed: ``agreed(done, wanted)``, whether to stop after ``done`` iterations, given whether this process wants
            to; for several hosts, `hosts.Hosts.stop_agreement`, so that all of them stop after the same one.
        tell: Called once, with the first step that was skipped: which loss or gradient was not finite, and where. By
            default it becomes a line on stderr.

    Raises:
        Preempted: SIGTERM or Ctrl-C came (in the main thread); state saved, if there are checkpoints.
        Alarmed: The log raised it; state saved, if there are checkpoints.
        DivergedError: ``max_skipped`` was reached; state saved, if there are checkpoints.
        checkpoint.CheckpointError: A save failed, no checkpoint is whole, or it belongs to another run.
    """
    if log_every < 1 or (save_every is not None and save_every < 1):
        raise ValueError(f"save_every and log_every must be positive, not {save_every} and {log_every}")
    identity = _identity(stage, rng, fingerprint)
    start, state, skipped = _resume(checkpoints, state, steps, identity)
    if isinstance(log, metrics_lib.MetricLog):
        log = StageLog(log, stage)
    rewind = getattr(log, "rewind", None)
    if rewind is not None:
        rewind(start)
    if progress is not None:
        progress(stage, start, steps, {})
    report = _Reporter(stage, steps, log, log_every, progress, max_skipped, tell)
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
        kept = checkpoints is not None and done > 0
        if report.diverged:
            raise DivergedError(f"{report.diverged}; {_kept(kept)}")
        if report.alarmed is not None:
            raise Alarmed(report.alarmed.reason, stage=stage, step=done, saved=kept) from report.alarmed
        raise Preempted(stage, done, saved=kept)

    with _stop_signals() as stop, _settled(checkpoints):
        for i in range(start, steps):
            if agreed(i, stop() or report.must_stop()):
                leave(i)
            state, metrics = train_step(state, frozen, hyper_at(i), batch_at(i), rng)
            for callback in callbacks:
                metrics = {**metrics, **(callback(i + 1, state, metrics) or {})}
            report.push(i + 1, metrics)
            if checkpoints is not None and save_every is not None and (i + 1) % save_every == 0:
                saved = save(i + 1)
        report.flush()
        if checkpoints is not None and saved != steps and steps > 0:
            saved = save(steps)
        if agreed(steps, stop() or report.must_stop()):  # all is done, but whoever comes next should not start
            leave(steps)
    return state
