import json
import math
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import metrics


def lines(directory):
    return [json.loads(line) for line in (directory / metrics.FILE_NAME).read_text().splitlines()]


def scalars(directory, stage):
    """Returns the scalars that TensorBoard shows for a stage, after later files have purged steps of earlier files."""
    from tensorboardX.proto import event_pb2

    shown = {}
    for path in sorted((directory / "tensorboard" / stage).iterdir()):
        with path.open("rb") as file:
            while header := file.read(12):
                event = event_pb2.Event.FromString(  # pyright: ignore[reportAttributeAccessIssue]
                    file.read(int.from_bytes(header[:8], "little"))
                )
                file.read(4)
                if event.HasField("session_log"):
                    shown = {key: value for key, value in shown.items() if key[1] < event.step}
                for value in event.summary.value:
                    shown[value.tag, event.step] = value.simple_value
    return shown


def test_means_merge_by_weight():
    a = metrics.mean_metric(jnp.array([1.0, 2.0, jnp.nan]), where=jnp.array([True, True, False]))
    b = metrics.mean_metric(jnp.array([9.0]))
    assert a.value() == 1.5 and b.value() == 9.0
    assert a.merge(b).value() == 4.0  # The mean of the means is 5.25.


def test_empty_metric_is_nan_but_can_be_merged():
    empty = metrics.mean_metric(jnp.ones(2), where=jnp.zeros(2, bool))
    assert math.isnan(empty.value())
    assert empty.merge(metrics.mean_metric(jnp.array([3.0]))).value() == 3.0


def test_metrics_add_up_over_devices_and_scans():
    x = jnp.array([[1.0, 2.0], [3.0, 50.0]])
    where = jnp.array([[True, True], [True, False]])
    shared = jax.vmap(lambda x, w: metrics.mean_metric(x, w, axis_name="d").value(), axis_name="d")(x, where)
    np.testing.assert_allclose(shared, [2.0, 2.0])
    _, stacked = jax.lax.scan(lambda c, xw: (c, metrics.mean_metric(*xw)), None, (x, where))
    assert stacked.sum.shape == (2,) and stacked.collapse().value() == 2.0
    empty = metrics.mean_metric(jnp.ones(2), where=False)
    assert math.isnan(metrics.to_floats({"empty": empty})["empty"])
    assert metrics.to_floats({"loss": stacked, "rate": jnp.float32(0.5), "n": 3}) == {
        "loss": 2.0,
        "rate": 0.5,
        "n": 3.0,
    }


def test_lines_can_be_read_while_the_log_is_open(tmp_path):
    log = metrics.MetricLog(tmp_path / "run")
    log.write("sft", 1, {"loss": 2.5, "accuracy": metrics.mean_metric(jnp.array([1.0, 0.0]))})
    log.write("sft", jnp.int32(2), {"loss": jnp.float32(1.5)})
    expected = [
        {"stage": "sft", "step": 1, "loss": 2.5, "accuracy": 0.5},
        {"stage": "sft", "step": 2, "loss": 1.5},
    ]
    assert lines(tmp_path / "run") == metrics.read(tmp_path / "run") == expected
    log.close()
    assert scalars(tmp_path / "run", "sft") == {
        ("sft/loss", 1): 2.5,
        ("sft/accuracy", 1): 0.5,
        ("sft/loss", 2): 1.5,
    }


def test_nan_and_infinity_are_written_as_null(tmp_path):
    with metrics.MetricLog(tmp_path) as log:
        log.write("ppo", 1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})
    text = (tmp_path / metrics.FILE_NAME).read_text()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {"stage": "ppo", "step": 1, "a": None, "b": None, "c": None, "d": 1.0}


def test_reserved_names_raise(tmp_path):
    with metrics.MetricLog(tmp_path) as log, pytest.raises(ValueError, match="step"):
        log.write("ppo", 1, {"step": 2.0})


def test_resumed_log_equals_that_of_an_uninterrupted_run(tmp_path):
    def write_steps(log, stage, steps, offset=0.0):
        for step in steps:
            log.write(stage, step, {"loss": step + offset})

    log = metrics.MetricLog(tmp_path)
    write_steps(log, "sft", range(1, 9))
    write_steps(log, "rm", range(1, 6), offset=100.0)
    write_steps(log, "ppo", range(1, 3), offset=900.0)  # Written after the checkpoint at step 3 of rm.
    log.close()
    with (tmp_path / metrics.FILE_NAME).open("a") as file:
        file.write('{"stage": "ppo", "step": 3, "lo')  # Killed while writing.

    resumed = metrics.MetricLog(tmp_path)
    resumed.rewind("rm", 3, drop_stages={"ppo"})
    write_steps(resumed, "rm", range(4, 6))
    write_steps(resumed, "ppo", range(1, 3))
    resumed.close()

    got = [(record["stage"], record["step"], record["loss"]) for record in lines(tmp_path)]
    assert got == [
        *(("sft", step, float(step)) for step in range(1, 9)),
        *(("rm", step, step + 100.0) for step in range(1, 4)),
        *(("rm", step, float(step)) for step in range(4, 6)),
        *(("ppo", step, float(step)) for step in range(1, 3)),
    ]
    assert scalars(tmp_path, "rm") == {("rm/loss", s): s + (100.0 if s <= 3 else 0.0) for s in range(1, 6)}
    assert scalars(tmp_path, "ppo") == {("ppo/loss", s): float(s) for s in range(1, 3)}
    assert len(scalars(tmp_path, "sft")) == 8  # The steps of other stages are not purged.


def test_rewind_in_the_middle_of_a_run(tmp_path):
    with metrics.MetricLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.write("sft", step, {"loss": 0.0})
        log.rewind("sft", 1)
        log.write("sft", 2, {"loss": 7.0})
    assert [(r["step"], r["loss"]) for r in metrics.read(tmp_path)] == [(1, 0.0), (2, 7.0)]
    assert scalars(tmp_path, "sft") == {("sft/loss", 1): 0.0, ("sft/loss", 2): 7.0}
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("kept", [0, 1, 20, 35, 36])
def test_line_truncated_anywhere_does_not_corrupt_the_next_line(tmp_path, kept):
    line = '{"stage": "sft", "step": 1, "a": 10}'
    (tmp_path / metrics.FILE_NAME).write_text('{"stage": "sft", "step": 0}\n' + line[:kept])
    assert len(metrics.read(tmp_path)) == (2 if kept == len(line) else 1)
    with metrics.MetricLog(tmp_path) as log:
        log.write("sft", 2, {})
    steps = [record["step"] for record in lines(tmp_path)]
    assert steps == ([0, 1, 2] if kept == len(line) else [0, 2])


def test_broken_line_in_the_middle_raises(tmp_path):
    (tmp_path / metrics.FILE_NAME).write_text('{"stage": "sft", "st\n{"stage": "sft", "step": 1}\n')
    with pytest.raises(ValueError, match="line 1"):
        metrics.read(tmp_path)


def test_missing_log_is_empty(tmp_path):
    assert metrics.read(tmp_path) == []
    with metrics.MetricLog(tmp_path) as log:
        log.rewind("sft", 0)
    assert metrics.read(tmp_path) == []


def test_full_disk_raises_a_one_line_error_without_hanging(tmp_path):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = metrics.MetricLog(tmp_path)
    log.write("sft", 1, {"loss": 1.0})
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, old[1]))
    try:
        with pytest.raises(metrics.LogError, match=rf"cannot write to {tmp_path}: File too large") as failed:
            for step in range(2, 40):
                log.write("sft", step, {f"loss_{i}": 1.0 for i in range(20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "\n" not in str(failed.value)
    log = metrics.MetricLog(tmp_path / "other")
    (tmp_path / "other" / "tensorboard").write_text("in the way")
    with pytest.raises(metrics.LogError, match="other"):
        log.write("sft", 1, {"loss": 1.0})
