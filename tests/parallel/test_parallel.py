"""Sharding rules, and every training stage on eight simulated devices in a separate process (`mesh_cases`)."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import instructgpt
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from launch import device_mesh, setting_checks, settings

from rlhf_jax import lm, parallel
from rlhf_jax.train import minibatches

ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "experiments", ROOT / "tests")))}
MESH: Any = AbstractMesh((2, 4, 2, 1), parallel.AXES)
TOLERANCE = 1e-5


def run_cases(*arguments):
    """Runs `mesh_cases` and returns its results."""
    command = [sys.executable, str(ROOT / "tests" / "cases" / "mesh_cases.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_cases(results):
    """Checks that parameters, metrics and PPO's answers equal those of one device, and that training has an effect."""
    cases = [each for each in results if "form" in each]
    for each in cases:
        name = f"{each['stage']}, {each['form']}, {each['micro_batches']} micro-batches"
        print(f"{name}: {each['params']:.1e}, loss {each['metrics'].get('loss', 0):.1e}")
        assert each["same_answers"], name
        assert each["params"] < TOLERANCE, name
        for metric in ("loss", "policy_loss", "value_loss", "ptx_loss", "grad_norm", "reward", "kl", "length"):
            assert each["metrics"].get(metric, 0.0) < TOLERANCE, (name, metric)
        for metric in ("reward_std", "sampler_ess", "explained_variance", "ptx_coef_per_sequence", "stopped"):
            assert each["metrics"].get(metric, 0.0) < 10 * TOLERANCE, (name, metric)
    assert all(each["moved"] > 50 * TOLERANCE for each in results if "moved" in each)
    return {(each["stage"], each["form"], each["micro_batches"]) for each in cases}


@pytest.fixture(scope="module")
def results():
    return run_cases("short")


def test_every_stage_on_eight_devices_equals_one_device(results):
    done = check_cases(results)
    assert {stage for stage, _, _ in done} == {"sft", "reward", "dpo", "ppo"}
    assert {form.partition(" ")[0] for _, form, _ in done} == {"jit", "shard_map", "pmap"}
    assert {("sft", "jit sequence", 2), ("reward", "jit 2x4", 1), ("ppo", "shard_map 8", 2)} <= done
    assert ("ppo", "shard_map 8 checked", 1) in done


def test_a_job_trained_on_one_mesh_resumes_on_another(results):
    (job,) = [each for each in results if "job" in each]
    assert job["sharded"] and all(job["sharded"])
    for other in ("2x4", "one"):
        assert job[f"restored on {other}"] == 0.0 and job[f"retrained on {other}"] == 0


def test_indivisible_batches_and_meshes_are_errors(results):
    errors = [each["error"] for each in results if "error" in each]
    assert len(errors) == 4
    indivisible = "6 rows (.tokens_BL) is not divisible by this host's 4 batch shards (mesh: data 2 x fsdp 2)"
    assert indivisible in errors[0]
    assert "is not divisible by 8 devices" in errors[1]
    assert "the mesh axis tensor is 2; use jit_step" in errors[2]
    assert errors[3] == "a mesh of data 3 x fsdp 1 x tensor 1 x sequence 1 does not fit 8 devices"


@pytest.mark.slow
def test_every_stage_in_every_configuration_on_every_mesh():
    results = run_cases("long")
    assert len(check_cases(results)) == 4 * 10 + 1
    (job,) = [each for each in results if "job" in each]
    assert job["programs"] == {"supervised": 1, "reward_model": 1, "ppo": 1, "sampling": 2}
    assert max(job["difference"].values()) < TOLERANCE, "the job on one device"


@pytest.mark.slow
def test_instructgpt_runs_on_the_mesh_that_its_flags_describe(tmp_path):
    command = [sys.executable, str(ROOT / "experiments" / "instructgpt.py"), "--preset", "smoke"]
    flags = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2", "--mesh.simulate", "8", "--ppo.shards", "4"]
    done = subprocess.run([*command, *flags, "--out", tmp_path], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mesh: data 2 x fsdp 2 x tensor 2 x sequence 1, on 8 devices (cpu)" in done.stdout
    assert "whole on every device: embed/tokens" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["programs"] == {"supervised": 1, "reward_model": 1, "ppo": 1, "sampling": 3}
    assert set(results["policies"]) == {"base", "sft", "sft_mix", "ppo", "ppo_ptx", "best_of_n"}


# ------------------------------------------------------------------------------------------------- rules and layouts


def test_rules_map_logical_axes_to_mesh_axes():
    assert parallel.spec(("embed", "heads", "head"), MESH) == PartitionSpec("fsdp", "tensor", None)
    assert parallel.spec(("batch", "length"), MESH) == PartitionSpec(("data", "fsdp"), None)
    assert parallel.spec(("embed",), MESH, shape=(6,)) == PartitionSpec(None), "4 devices do not divide 6"
    assert parallel.spec(("heads", "mlp"), MESH) == PartitionSpec("tensor", None), "the first dimension gets the axis"


def test_unknown_axes_and_invalid_sizes_are_errors():
    with pytest.raises(
        parallel.MeshError, match="no sharding rule for the logical axis 'expert'; the rules cover layers"
    ):
        parallel.spec(("expert",), MESH)
    with pytest.raises(
        parallel.MeshError, match="rule mlp = model names an unknown mesh axis; the mesh has data, fsdp"
    ):
        parallel.spec(("mlp",), MESH, rules={"mlp": "model"})
    invalid: tuple[dict[str, Any], ...] = ({"tensor": 0}, {"data": 0}, {"data": -2})
    for sizes in invalid:
        with pytest.raises(parallel.MeshError, match="it must be at least 1"):
            parallel.make_mesh(**sizes)


def test_moments_and_averages_are_sharded_like_their_parameters():
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    cfg = lm.LMConfig.preset("tiny")
    shapes = lm.abstract(cfg)
    tree = {"params": {"policy": shapes}, "mu": shapes, "count": jax.ShapeDtypeStruct((), jnp.int32)}
    shardings = parallel.shardings(tree, mesh, lm.logical_axes(cfg))
    assert shardings["mu"] == shardings["params"]["policy"]
    assert shardings["count"] == NamedSharding(mesh, PartitionSpec())


def test_indivisible_dimensions_are_listed():
    cfg = lm.LMConfig(vocab_size=31, n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, d_mlp=24, max_length=8)
    messages = parallel.indivisible(lm.abstract(cfg), MESH, lm.logical_axes(cfg))
    assert "embed/tokens: its axis vocab of size 31 is not divisible by tensor = 2" in messages
    assert "layers/k/kernel: its axis kv_heads of size 1 is not divisible by tensor = 2" in messages
    assert not any("mlp" in each or "layers/q/" in each for each in messages)


def test_constrain_without_a_mesh_has_no_effect():
    x = jnp.ones((4, 2))
    assert parallel.constrain(x, "batch", None) is x


# ------------------------------------------------------------------------------------------------- minibatches


@pytest.mark.parametrize(("shards", "devices"), [(1, 1), (4, 1), (4, 2), (4, 4)])
def test_minibatches_depend_on_the_shards_and_not_on_the_devices(shards, devices):
    rows, epochs, count = 48, 2, 3
    indices = minibatches.minibatches(jax.random.key(3), rows, epochs=epochs, count=count, shards=shards)
    taken = jax.vmap(lambda rows_SR: minibatches.take(jnp.arange(rows), rows_SR))(indices)
    assert taken.shape == (epochs * count, rows // count)
    for epoch in np.asarray(taken).reshape(epochs, rows):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(rows))
    assert not np.array_equal(taken[0], taken[count]), "the order differs between epochs"
    for update in np.asarray(taken):  # the same number of rows from each block
        np.testing.assert_array_equal(np.bincount(update // (rows // shards)), rows // count // shards)

    def local(local_rows):
        indices = minibatches.minibatches(
            jax.random.key(3), len(local_rows), epochs=epochs, count=count, shards=shards, axis_name="d"
        )
        return jax.vmap(lambda rows_SR: minibatches.take(local_rows, rows_SR))(indices)

    each = jax.vmap(local, axis_name="d")(jnp.arange(rows).reshape(devices, -1))
    np.testing.assert_array_equal(jnp.concatenate(list(each), axis=1), taken)


def test_one_shard_is_a_permutation_of_all_rows():
    indices = minibatches.minibatches(jax.random.key(0), 12, epochs=2, count=3)
    expected = [jax.random.permutation(key, 12) for key in jax.random.split(jax.random.key(0), 2)]
    np.testing.assert_array_equal(indices.reshape(2, 12), jnp.stack(expected))
    with pytest.raises(
        ValueError,
        match="12 responses does not divide evenly into 3 minibatches with equally many rows from each of 8 shards",
    ):
        minibatches.minibatches(jax.random.key(0), 12, epochs=1, count=3, shards=8)


def test_keys_and_pretraining_rows_of_a_device_are_its_share_of_all():
    keys = jax.random.split(jax.random.key(1), 12)
    local = jax.vmap(lambda _: minibatches.row_keys(jax.random.key(1), 3, axis_name="d"), axis_name="d")(jnp.arange(4))
    np.testing.assert_array_equal(jax.random.key_data(local).reshape(12, -1), jax.random.key_data(keys))
    rows = jnp.arange(24)
    full = minibatches.split_updates(rows, 3, shards=4)
    np.testing.assert_array_equal(full[0], [0, 1, 6, 7, 12, 13, 18, 19])
    split = [minibatches.split_updates(part, 3, shards=2) for part in (rows[:12], rows[12:])]
    np.testing.assert_array_equal(jnp.concatenate(split, axis=1), full)
    np.testing.assert_array_equal(minibatches.split_updates(rows, 3, shards=1), rows.reshape(3, 8))
    with pytest.raises(ValueError, match="24, must be a multiple of 5 updates x 1 shards"):
        minibatches.split_updates(rows, 5, shards=1)


# ------------------------------------------------------------------------------------------------- flags


MESH_FLAGS = ["--mesh.data", "2", "--mesh.fsdp", "3"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh.tensor", "0"], "--mesh.tensor is 0; it must be at least 1"),
        (["--mesh.simulate", "8"], "--mesh.simulate is 8; it must be at least 2 and requires mesh sizes"),
        (
            MESH_FLAGS,
            "--pretrain.batch is 32; it must be a multiple of 6, the number of devices of --mesh.data 2 x --mesh.fsdp",
        ),
        ([*MESH_FLAGS, "--pretrain.batch", "36"], "--reward-model.batch is 8; it must be a multiple of 6"),
        (
            [*MESH_FLAGS, "--pretrain.batch", "36", "--reward-model.batch", "6"],
            "--ppo.batch is 64; it must be a multiple of 6, the number of devices",
        ),
        (
            ["--mesh.fsdp", "4", "--ppo.minibatches", "32"],
            "--ppo.batch 64 divided by --ppo.minibatches 32 is 2; it must be a multiple of 4",
        ),
        (["--mesh.data", "2", "--ppo.ptx-ratio", "0.04"], "--ppo.ptx-ratio 0.04 times --ppo.batch 64 divided by"),
        (["--ppo.shards", "3"], "--ppo.shards is 3; it must divide 32, the number of answers in a minibatch"),
        (
            ["--mesh.data", "4"],
            "a mesh of --mesh.data 4 x --mesh.fsdp 1 x --mesh.tensor 1 x --mesh.sequence 1 does not",
        ),
    ],
)
def test_an_invalid_mesh_is_a_one_line_error_with_status_2(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        instructgpt.main(["--preset", "smoke", "--out", str(tmp_path / "run"), *flags])
    printed = capsys.readouterr().err
    assert exit.value.code == 2 and message in printed and printed.count("\n") == 1
    assert not (tmp_path / "run").exists(), "no run was started"


def test_one_device_needs_no_mesh_and_data_minus_one_uses_the_remaining_devices():
    default = settings.preset("smoke")
    setting_checks.check(default)
    assert device_mesh.make(device_mesh.resolve(default)) is None
    automatic = instructgpt.parse(["--preset", "smoke", "--mesh.data", "-1"])
    assert device_mesh.resolve(automatic).mesh.data == jax.device_count()
    too_many = instructgpt.parse(["--preset", "smoke", "--mesh.data", "-1", "--mesh.fsdp", "4"])
    with pytest.raises(settings.SettingError, match=r"--mesh.simulate 4 simulates 4 devices on the CPU"):
        device_mesh.resolve(too_many)
