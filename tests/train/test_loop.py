import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import checkpoint, metrics, parallel
from rlhf_jax.train import loop, state
from rlhf_jax.train.optim import schedules
from rlhf_jax.train.optim import update as step

ADAM = optax.chain(optax.scale_by_adam(), optax.scale(-1.0))
STEPS = 20
DATA = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)


def train_step(state, frozen, hyper, batch, rng):
    """Trains a noisy regression, whose result depends on data order, noise, schedule and step counter."""
    noise = jax.random.normal(jax.random.fold_in(rng, state.step), (batch.shape[0],))

    def loss_fn(params, batch, total):
        error = batch @ params["w"] - batch @ frozen - 0.1 * noise
        return jnp.sum(error**2) / total, {"loss": metrics.mean_metric(error**2)}

    (loss, logged), grads = step.loss_and_grads(loss_fn, state.params, batch, batch.shape[0])
    state, update = step.apply_gradients(state, grads, loss=loss, **hyper)
    return state, logged | update


def batch_at(i):
    return DATA[np.random.default_rng((7, i)).permutation(50)[:8]]


def hyper_at(i):
    return {"learning_rate": np.float32(0.1) * schedules.cosine(i, STEPS), "max_grad_norm": np.float32(1)}


def run(directory=None, *, steps=STEPS, compiled=None, **options):
    options = {"batch_at": batch_at, "hyper_at": hyper_at, "rng": jax.random.key(3), "stage": "toy"} | options
    start = state.create({"w": jnp.zeros(4)}, ADAM)
    compiled = compiled or parallel.jit_step(train_step)
    if directory is None:
        return loop.fit(compiled, start, steps=steps, frozen=jnp.arange(4.0), **options)
    with checkpoint.Checkpoints(directory / "ckpt") as checkpoints, metrics.MetricLog(directory) as log:
        options = {"log": log, "checkpoints": checkpoints, "save_every": 6} | options
        return loop.fit(compiled, start, steps=steps, frozen=jnp.arange(4.0), **options)


def same(a, b):
    assert jax.tree.structure(a.params) == jax.tree.structure(b.params)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes() and x.dtype == y.dtype


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Returns the final state and the log rows of an uninterrupted run."""
    directory = tmp_path_factory.mktemp("whole")
    return run(directory), metrics.read(directory)


def test_trains_and_logs_every_step(whole):
    final, rows = whole
    assert int(final.step) == STEPS
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"] and {row["skipped"] for row in rows} == {0.0}


@pytest.mark.parametrize("fail_at", [3, 6, 8, 13])
def test_run_resumes_exactly_after_an_exception(whole, tmp_path, fail_at):
    def failing(i):
        if i == fail_at:
            raise OSError("no more data")
        return batch_at(i)

    with pytest.raises(OSError, match="no more data"):
        run(tmp_path, batch_at=failing)
    assert checkpoint.Checkpoints(tmp_path / "ckpt").latest() == (fail_at // 6 * 6 or None)
    same(run(tmp_path), whole[0])
    assert metrics.read(tmp_path) == whole[1]


def test_finished_run_is_restored_without_training(whole, tmp_path):
    run(tmp_path, save_every=None)
    assert checkpoint.Checkpoints(tmp_path / "ckpt").steps() == [STEPS]
    compiled = parallel.jit_step(train_step)
    same(run(tmp_path, compiled=compiled), whole[0])
    assert compiled.traces == 0 and metrics.read(tmp_path) == whole[1]


def test_resumes_from_the_previous_checkpoint_if_the_newest_is_damaged(whole, tmp_path):
    run(tmp_path, steps=14)
    newest = tmp_path / "ckpt" / "step_000000014"
    for path in newest.rglob("*"):
        if path.is_file() and path.stat().st_size > 200:
            path.write_bytes(path.read_bytes()[:-50])
    with pytest.warns(UserWarning, match="skipped a damaged checkpoint"):
        same(run(tmp_path), whole[0])
    assert metrics.read(tmp_path) == whole[1]


@pytest.mark.parametrize(
    "options, match",
    [
        ({"rng": jax.random.key(4)}, "rng"),
        ({"stage": "other"}, "stage"),
        ({"fingerprint": "other data"}, "fingerprint"),
        ({"steps": 5}, "from step 8, but the run has only 5 steps; use"),
    ],
)
def test_checkpoints_of_another_run_are_refused(tmp_path, options, match):
    run(tmp_path, steps=8)
    with pytest.raises(checkpoint.CheckpointError, match=match):
        run(tmp_path, **options)


def script(directory, pause):
    """Runs the same training in a separate process."""
    code = f"""
import pathlib, sys, time
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
import test_loop
def batch_at(i):
    time.sleep({pause})
    return test_loop.batch_at(i)
try:
    test_loop.run(pathlib.Path({str(directory)!r}), batch_at=batch_at, save_every=2)
except test_loop.loop.Preempted as stopped:
    print(stopped, stopped.saved)
    sys.exit(75)
"""
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)


def wait_for_rows(process, directory, count):
    deadline = time.time() + 60
    path = directory / metrics.FILE_NAME
    while not path.exists() or path.read_text().count("\n") < count:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)


def test_killed_process_resumes_exactly(whole, tmp_path):
    process = script(tmp_path, 0.1)
    wait_for_rows(process, tmp_path, 5)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    reached = len((tmp_path / metrics.FILE_NAME).read_text().splitlines())
    assert 5 <= reached < STEPS and checkpoint.Checkpoints(tmp_path / "ckpt").latest() is not None
    same(run(tmp_path), whole[0])
    assert metrics.read(tmp_path) == whole[1]


def test_terminated_process_saves_and_resumes_exactly(whole, tmp_path):
    process = script(tmp_path, 0.1)
    wait_for_rows(process, tmp_path, 3)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "toy was stopped after" in out and "True" in out
    latest = checkpoint.Checkpoints(tmp_path / "ckpt").latest()
    assert latest is not None and latest == len(metrics.read(tmp_path)) < STEPS
    same(run(tmp_path), whole[0])
    assert metrics.read(tmp_path) == whole[1]


def test_interrupt_stops_between_iterations_and_restores_handlers(whole, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def interrupt(done, state, metrics):
        if done in (5, STEPS):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(loop.Preempted) as stopped:
        run(tmp_path, callbacks=[interrupt])
    assert (stopped.value.step, stopped.value.saved, stopped.value.stage) == (5, True, "toy")
    # The last iteration is complete, but the next stage must not start.
    with pytest.raises(loop.Preempted) as stopped:
        run(tmp_path, callbacks=[interrupt])
    assert (stopped.value.step, stopped.value.saved) == (STEPS, True)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    same(run(tmp_path), whole[0])
    with pytest.raises(loop.Preempted, match="no checkpoint was saved"):
        run(callbacks=[interrupt])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_the_last_save_is_awaited_stops_the_run(whole, tmp_path, monkeypatch, number):
    wait = checkpoint.Checkpoints.wait

    def interrupted(self):
        last = self._saving == STEPS
        wait(self)
        if last:
            signal.raise_signal(number)

    monkeypatch.setattr(checkpoint.Checkpoints, "wait", interrupted)
    with pytest.raises(loop.Preempted) as stopped:
        run(tmp_path)
    assert (stopped.value.step, stopped.value.saved) == (STEPS, True)
    monkeypatch.undo()
    same(run(tmp_path), whole[0])
    assert metrics.read(tmp_path) == whole[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_after_the_last_check_reaches_the_previous_handler(whole, number):
    received = []

    def check(done, wanted):
        if done == STEPS:
            signal.raise_signal(number)
        return wanted  # evaluated before the signal

    before = signal.signal(number, lambda number, frame: received.append(number))
    try:
        same(run(should_stop=check), whole[0])
    finally:
        signal.signal(number, before)
    assert received == [number]


def test_runs_in_a_thread(whole):
    result = []
    thread = threading.Thread(target=lambda: result.append(run()))
    thread.start()
    thread.join(60)
    same(result[0], whole[0])


def test_compiles_once_and_reports_in_order():
    compiled, logged, progress = parallel.jit_step(train_step), [], []
    run(
        compiled=compiled,
        steps=7,
        log=lambda done, row: logged.append((done, sorted(row))),
        log_every=3,
        progress=lambda *call: progress.append(call[:3]),
    )
    assert compiled.traces == 1
    assert logged == [(done, ["grad_norm", "loss", "skipped"]) for done in (3, 6, 7)]
    assert progress == [("toy", done, 7) for done in range(8)]


def test_only_the_metrics_of_the_previous_step_are_copied_to_the_host(monkeypatch):
    kind: Any = type(jnp.zeros(1))
    copies, logged = [], []
    read = kind._value.fget
    monkeypatch.setattr(kind, "_value", property(lambda self: copies.append(self.shape) or read(self)))
    seen_before = [len(copies)]

    def callback(done, state, logs):
        logged.append(len(jax.tree.leaves(logs)))
        seen_before.append(len(copies))

    run(callbacks=[callback], steps=6, log=lambda step, floats: None)
    each = np.diff(seen_before)
    assert len(set(logged)) == 1 and set(copies) == {()}, "only scalars are read"
    # Between two callbacks, only the metrics of the previous step are read; before the first, nothing.
    assert each[0] <= 2 and set(each[2:]) == {logged[0]}


def test_values_returned_by_a_callback_are_logged(whole):
    rows = {}

    def measure(done, state, logs):
        return {"doubled": 2 * done} if done % 3 == 0 else None

    same(run(callbacks=[measure], log=lambda done, row: rows.update({done: row})), whole[0])
    assert {done: row["doubled"] for done, row in rows.items() if "doubled" in row} == {
        done: 2.0 * done for done in range(3, STEPS + 1, 3)
    }
    assert all("loss" in row for row in rows.values())


def test_metrics_are_read_one_step_late():
    order = []
    run(
        steps=3,
        batch_at=lambda i: order.append(f"batch {i}") or batch_at(i),
        log=lambda done, row: order.append(f"row {done}"),
    )
    assert order == ["batch 0", "batch 1", "row 1", "batch 2", "row 2", "row 3"]


@pytest.mark.parametrize(("at", "stopped_at"), [(4, 5), (6, 6), (STEPS, STEPS)])
def test_alarm_of_the_log_saves_and_stops_the_run(whole, tmp_path, at, stopped_at):
    def stop(log):
        def alarmed(done, row):
            log.write("toy", done, row)
            if done in (at, at + 1):
                raise loop.Alarmed(f"row {done} looks bad")

        return alarmed

    with metrics.MetricLog(tmp_path) as log, pytest.raises(loop.Alarmed) as stopped:
        run(tmp_path, log=stop(log))
    alarm = stopped.value
    assert (alarm.step, alarm.saved, alarm.stage, alarm.reason) == (stopped_at, True, "toy", f"row {at} looks bad")
    assert f"an alarm (row {at} looks bad) stopped toy after {stopped_at} iterations; a checkpoint" in str(alarm)
    assert checkpoint.Checkpoints(tmp_path / "ckpt").latest() == stopped_at
    assert [row["step"] for row in metrics.read(tmp_path)] == list(range(1, stopped_at + 1))
    same(run(tmp_path), whole[0])
    assert metrics.read(tmp_path) == whole[1]


def test_bad_batches_are_skipped_until_too_many_stop_the_run(tmp_path):
    bad = {4, 5, 9}
    poison = lambda i: batch_at(i) * (np.nan if i in bad else 1)  # noqa: E731
    final = run(tmp_path / "a", batch_at=poison, max_skipped=3)
    rows = metrics.read(tmp_path / "a")
    assert {row["step"] - 1 for row in rows if row["skipped"]} == bad and int(final.step) == STEPS
    assert np.isfinite(final.params["w"]).all()
    json.dumps(rows, allow_nan=False)
    bad |= set(range(9, 20))
    with pytest.raises(
        loop.DivergedError, match=r"toy skipped 3 steps in a row.*step 12 of 20: loss and the gradient are not finite"
    ):
        run(tmp_path / "b", batch_at=poison, max_skipped=3)


def test_failed_save_raises_checkpoint_error(tmp_path):
    (tmp_path / "ckpt").write_text("in the way")
    with pytest.raises(checkpoint.CheckpointError, match="ckpt"):
        run(tmp_path)


def test_zero_steps_and_invalid_intervals(tmp_path):
    assert int(run(tmp_path, steps=0).step) == 0
    with pytest.raises(ValueError, match="save_every"):
        run(save_every=0)
