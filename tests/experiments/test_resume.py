"""Interrupted runs resume bit-identically. Every field of the state is needed; torture.py interrupts real processes."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import types as pytypes

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fault_injection import interruptions, tiny_runs
from launch import run_folder
from recipe import jobs

from rlhf_jax import checkpoint
from rlhf_jax.train import loop

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 6


@functools.cache
def built():
    return tiny_runs.build("ppo", STEPS)


def run(folder, steps, **changes):
    stage = built()
    options = {"batch_at": stage.batch_at, "rng": jax.random.key(0), "fingerprint": stage.fingerprint} | changes
    with checkpoint.Checkpoints(folder) as checkpoints:
        return loop.fit(
            stage.step,
            jax.tree.map(jnp.array, stage.state),
            steps=steps,
            hyper_at=stage.hyper_at,
            frozen=stage.frozen,
            stage="ppo",
            checkpoints=checkpoints,
            **options,
        )


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Returns a run's state and metadata after half of its steps, and the digest of its final state."""
    folder = tmp_path_factory.mktemp("half")
    run(folder, 3)
    _, state, metadata = checkpoint.Checkpoints(folder).restore(built().state)
    return state, metadata, tiny_runs.state_digest(run(folder / "whole", STEPS))


def resumed(folder, half, **changes):
    state, metadata, _ = half
    with checkpoint.Checkpoints(folder) as checkpoints:
        checkpoints.save(3, state.replace(**changes), metadata)
    return tiny_runs.state_digest(run(folder, STEPS))


def test_a_resumed_run_is_bit_identical(half, tmp_path):
    assert resumed(tmp_path, half) == half[2]


FIELDS = ("step", "params", "opt_state", "kl_scale", "ema", "past", "reference")


@pytest.mark.parametrize("field", FIELDS)
def test_losing_any_field_of_the_state_changes_the_result(half, tmp_path, field):
    assert resumed(tmp_path, half, **{field: getattr(built().state, field)}) != half[2]


def test_the_state_has_no_other_fields(half):
    fields = {str(path[0].name) for path, _ in jax.tree_util.tree_flatten_with_path(half[0])[0]}
    assert fields == set(FIELDS)


def test_the_key_and_the_order_of_the_data_change_the_result_and_are_checked(half, tmp_path):
    other = {"rng": jax.random.key(1)}, {"batch_at": lambda i: built().batch_at(i + 1)}, {"fingerprint": "others"}
    for i, changes in enumerate(other[:2]):
        assert tiny_runs.state_digest(run(tmp_path / str(i), STEPS, **changes)) != half[2]
    run(tmp_path / "started", 3)
    for changes in (other[0], other[2]):
        with pytest.raises(checkpoint.CheckpointError, match="cannot resume from"):
            run(tmp_path / "started", STEPS, **changes)


def test_a_stage_of_the_job_has_a_fingerprint_of_its_data(tmp_path):
    data = np.arange(40).reshape(10, 4)
    job = pytypes.SimpleNamespace(settings=pytypes.SimpleNamespace(max_skipped=7), note=print)

    def fingerprint(order, steps=5, rows=2):
        batch_at = lambda i: {"tokens": data[order[i * rows : (i + 1) * rows]]}  # noqa: E731
        return jobs.Job.loop_checks(job, "sft", steps, batch_at)["fingerprint"]  # type: ignore[arg-type]

    order, reverse = np.arange(10), np.arange(10)[::-1]
    first = fingerprint(order)
    assert first == fingerprint(order) == json.loads(json.dumps(first))
    others = (fingerprint(reverse), fingerprint(order, steps=4), fingerprint(order, rows=1))
    assert len({str(each) for each in (first, *others)}) == 4


def test_skipped_checkpoints_are_printed_and_recorded_as_incidents(tmp_path):
    folder, said = run_folder.RunFolder(tmp_path), []
    folder.print_note = lambda stage, text: said.append((stage, text))
    with folder.checkpoints("sft") as saves:
        for step in (1, 2):
            saves.save(step, {"w": jnp.arange(4.0) + step})
    (tmp_path / "checkpoints" / "sft" / "step_000000002" / "manifest" / "metadata").write_text("{}")
    for _ in range(2):
        with folder.checkpoints("sft") as saves:
            assert saves.restore({"w": jnp.zeros(4)})[0] == 1
            assert len(saves.skipped) == 1 and "step 2: its manifest" in saves.skipped[0]
    assert (
        len(said) == 2
        and said[0][0] == "sft"
        and "skipped a damaged checkpoint" in said[0][1]
        and "step 2" in said[0][1]
    )
    assert run_folder.RunFolder(tmp_path).incidents() == [{"stage": "sft", "text": said[0][1]}]


@pytest.mark.parametrize("kept", [1, 30, 37, 46])
def test_partly_written_incident_does_not_corrupt_the_next_one(tmp_path, kept):
    first, second = {"stage": "sft", "text": "bad {array} in row"}, {"stage": "rm", "text": "b"}
    line = json.dumps(first)
    (tmp_path / run_folder.INCIDENTS).write_text(line[:kept])
    folder, complete = run_folder.RunFolder(tmp_path), [first] if kept == len(line) else []
    assert folder.incidents() == complete
    folder.note("rm", "b")
    assert folder.incidents() == [*complete, second]


# --------------------------------------------------------------------------------------------------------- torture.py


def torture(folder, *arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "160"}
    script = str(ROOT / "experiments" / "torture.py")
    process = subprocess.run(
        [sys.executable, script, "--out", str(folder), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    path = folder / "torture.json"
    return process, json.loads(path.read_text()) if path.exists() else {}


def check(process, results, *, kills, terms, corruptions):
    assert process.returncode == 0 and results["failures"] == [], process.stdout[-3000:] + process.stderr[-3000:]
    stages = results["stages"]
    counts = [(sum(each["kills"].values()), sum(each["terms"].values()), each["resumed"]) for each in stages]
    assert [sum(column) for column in zip(*counts)] == [kills, terms, kills + terms]
    assert all(each["runs"] >= 1 for each in stages)
    outcomes = results["damage"]["outcomes"].values()
    assert sum(sum(each.values()) for each in outcomes) == corruptions
    assert sum(each.get("seen", 0) for each in outcomes) >= 3
    n = kills + terms
    assert f"{n} of {n} interrupted runs resumed bit-identically; no failures" in process.stdout


@pytest.mark.slow
def test_interrupted_runs_and_corrupted_checkpoints_lose_nothing(tmp_path):
    few = ("--kills", 4, "--terms", 0, "--flips", 10, "--truncations", 2, "--deletions", 2, "--steps", 16)
    check(*torture(tmp_path / "out", *few), kills=4, terms=0, corruptions=14)


@pytest.mark.slow
def test_a_hundred_kills_lose_nothing(tmp_path):
    process, results = torture(tmp_path / "out")
    check(process, results, kills=100, terms=12, corruptions=140)
    for each in results["stages"]:
        assert all(each["kills"].get(phase, 0) >= 3 for phase in interruptions.PHASES)


def test_differences_from_the_reference_are_detected(tmp_path):
    for name, w, rows in (
        ("reference", "1", b"a\n"),
        ("same", "1", b"a\n"),
        ("leaf", "2", b"a\n"),
        ("rows", "1", b"a\na\n"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / tiny_runs.FINAL).write_text(json.dumps({".params['w']": w}))
        (tmp_path / name / "metrics.jsonl").write_bytes(rows)
    process = interruptions.ProcessResult(0, "step", {1: "x", 2: "y"}, True, None, [], {}, False)
    reference = interruptions.Reference(tmp_path / "reference", process, {".params['w']": "1"}, b"a\n")
    assert interruptions.compare(tmp_path / "same", reference) == []
    assert interruptions.compare(tmp_path / "leaf", reference) == ["the final .params['w'] differs"]
    assert interruptions.compare(tmp_path / "rows", reference) == ["metrics.jsonl differs"]


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [(("--kills", -1), "--kills"), (("--save-every", 40), "--steps"), (("--stages", "sft", "rlhf"), "--stages")],
)
def test_invalid_settings_of_the_command_are_refused_by_flag(tmp_path, arguments, flag, capsys):
    import torture as command

    with pytest.raises(SystemExit) as exit:
        command.main(["--out", str(tmp_path / "out"), *map(str, arguments)])
    assert exit.value.code == 2 and f"error: {flag} is" in capsys.readouterr().err
