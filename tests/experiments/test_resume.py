"""A run that was killed ends in the same bits: each part of the state that it takes, and the command that tries it."""

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


def run(folder, steps, state=None, **options):
    made = built()
    how = {"batch_at": made.batch_at, "rng": jax.random.key(0), "fingerprint": made.fingerprint} | options
    with checkpoint.Checkpoints(folder) as checkpoints:
        return loop.fit(
            made.step,
            jax.tree.map(jnp.array, made.state if state is None else state),
            steps=steps,
            hyper_at=made.hyper_at,
            frozen=made.frozen,
            stage="ppo",
            checkpoints=checkpoints,
            **how,
        )


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run's state after half of its steps, and what it ends in."""
    folder = tmp_path_factory.mktemp("half")
    run(folder, 3)
    _, state, metadata = checkpoint.Checkpoints(folder).restore(built().state)
    return state, metadata, tiny_runs.state_digest(run(folder / "whole", STEPS))


def resumed(folder, half, **changes):
    state, metadata, _ = half
    with checkpoint.Checkpoints(folder) as checkpoints:
        checkpoints.save(3, state.replace(**changes), metadata)
    return tiny_runs.state_digest(run(folder, STEPS))


def test_goes_on_to_the_same_bits(half, tmp_path):
    assert resumed(tmp_path, half) == half[2]


PARTS = ("step", "params", "opt_state", "kl_scale", "ema", "past", "reference")


@pytest.mark.parametrize("part", PARTS)
def test_without_any_part_of_the_state_the_end_would_be_another(half, tmp_path, part):
    assert resumed(tmp_path, half, **{part: getattr(built().state, part)}) != half[2]


def test_the_parts_are_all_there_is(half):
    parts = {str(path[0].name) for path, _ in jax.tree_util.tree_flatten_with_path(half[0])[0]}
    assert parts == set(PARTS)


def test_the_key_and_the_order_of_the_data_decide_the_end_and_are_checked(half, tmp_path):
    other = {"rng": jax.random.key(1)}, {"batch_at": lambda i: built().batch_at(i + 1)}, {"fingerprint": "others"}
    for i, options in enumerate(other[:2]):
        assert tiny_runs.state_digest(run(tmp_path / str(i), STEPS, **options)) != half[2]
    run(tmp_path / "begun", 3)
    for options in (other[0], other[2]):
        with pytest.raises(checkpoint.CheckpointError, match="cannot go on from"):
            run(tmp_path / "begun", STEPS, **options)


def test_a_stage_of_the_job_has_a_fingerprint_of_its_data(tmp_path):
    data = np.arange(40).reshape(10, 4)
    job = pytypes.SimpleNamespace(settings=pytypes.SimpleNamespace(max_skipped=7), note=print)

    def of(order, steps=5, rows=2):
        batch_at = lambda i: {"tokens": data[order[i * rows : (i + 1) * rows]]}  # noqa: E731
        return jobs.Job.guarded(job, "sft", steps, batch_at)["fingerprint"]  # type: ignore[arg-type]

    same, turned = np.arange(10), np.arange(10)[::-1]
    assert of(same) == of(same) == json.loads(json.dumps(of(same)))
    assert len({str(each) for each in (of(same), of(turned), of(same, steps=4), of(same, rows=1))}) == 4


def test_what_was_passed_over_is_said_and_kept_for_the_results(tmp_path):
    folder, said = run_folder.RunFolder(tmp_path), []
    folder.say = lambda stage, text: said.append((stage, text))
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


# -------------------------------------------------------------------------------------------------------- the command


def torture(folder, *arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "160"}
    script = str(ROOT / "experiments" / "torture.py")
    done = subprocess.run(
        [sys.executable, script, "--out", str(folder), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    path = folder / "torture.json"
    return done, json.loads(path.read_text()) if path.exists() else {}


def check(done, results, *, kills, terms, damages):
    assert done.returncode == 0 and results["failures"] == [], done.stdout[-3000:] + done.stderr[-3000:]
    struck = [(sum(each["kills"].values()), sum(each["terms"].values()), each["resumed"]) for each in results["stages"]]
    assert [sum(column) for column in zip(*struck)] == [kills, terms, kills + terms]
    assert all(each["runs"] >= 1 for each in results["stages"])
    found = results["damage"]["outcomes"].values()
    assert sum(sum(each.values()) for each in found) == damages and sum(each.get("seen", 0) for each in found) >= 3
    assert (
        f"{kills + terms} of {kills + terms} kills and stops resumed to the same bits; nothing was lost" in done.stdout
    )


def test_killed_stopped_and_damaged_runs_lose_nothing(tmp_path):
    few = ("--kills", 4, "--terms", 0, "--flips", 10, "--truncations", 2, "--deletions", 2, "--steps", 16)
    check(*torture(tmp_path / "out", *few), kills=4, terms=0, damages=14)


@pytest.mark.slow
def test_a_hundred_kills_lose_nothing(tmp_path):
    done, results = torture(tmp_path / "out")
    check(done, results, kills=100, terms=12, damages=140)
    for each in results["stages"]:
        assert all(each["kills"].get(phase, 0) >= 3 for phase in interruptions.PHASES)


def test_a_difference_would_be_seen(tmp_path):
    for name, w, rows in (
        ("peace", "1", b"a\n"),
        ("same", "1", b"a\n"),
        ("leaf", "2", b"a\n"),
        ("rows", "1", b"a\na\n"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / tiny_runs.FINAL).write_text(json.dumps({".params['w']": w}))
        (tmp_path / name / "metrics.jsonl").write_bytes(rows)
    life = interruptions.Life(0, "step", {1: "x", 2: "y"}, True, None, [], {}, False)
    whole = interruptions.Reference(tmp_path / "peace", life, {".params['w']": "1"}, b"a\n")
    assert interruptions.compare(tmp_path / "same", whole) == []
    assert interruptions.compare(tmp_path / "leaf", whole) == ["the final .params['w'] is another"]
    assert interruptions.compare(tmp_path / "rows", whole) == ["metrics.jsonl is another"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(("--kills", -1), "--kills"), (("--save-every", 40), "--steps"), (("--stages", "sft", "rlhf"), "--stages")],
)
def test_settings_of_the_command_that_cannot_be_are_named(tmp_path, arguments, named, capsys):
    import torture as command

    with pytest.raises(SystemExit) as left:
        command.main(["--out", str(tmp_path / "out"), *map(str, arguments)])
    assert left.value.code == 2 and f"error: {named} is" in capsys.readouterr().err.replace("stages are", "stages is")
