"""Meshes: rules in this process, and every stage on eight simulated devices in one of its own (`mesh_cases`)."""

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
from launch import checks, mesh_settings, settings

from rlhf_jax import lm, parallel
from rlhf_jax.train import minibatches

ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "experiments", ROOT / "tests")))}
MESH: Any = AbstractMesh((2, 4, 2, 1), parallel.AXES)
CLOSE = 1e-5


def lines_of(*arguments):
    """What `mesh_cases` found, line by line."""
    command = [sys.executable, str(ROOT / "tests" / "cases" / "mesh_cases.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_cases(found):
    """Parameters as on one device, which have moved; PPO's answers are the same, token by token."""
    cases = [each for each in found if "form" in each]
    for each in cases:
        name = f"{each['stage']}, {each['form']}, {each['micro_batches']} micro-batches"
        print(f"{name}: {each['params']:.1e}, loss {each['metrics'].get('loss', 0):.1e}")
        assert each["same_answers"], name
        assert each["params"] < CLOSE, name
        for metric in ("loss", "policy_loss", "value_loss", "ptx_loss", "grad_norm", "reward", "kl", "length"):
            assert each["metrics"].get(metric, 0.0) < CLOSE, (name, metric)
        for metric in ("reward_std", "sampler_ess", "explained_variance", "ptx_coef_per_sequence", "stopped"):
            assert each["metrics"].get(metric, 0.0) < 10 * CLOSE, (name, metric)
    assert all(each["moved"] > 50 * CLOSE for each in found if "moved" in each)
    return {(each["stage"], each["form"], each["micro_batches"]) for each in cases}


@pytest.fixture(scope="module")
def found():
    return lines_of("short")


def test_every_stage_on_eight_devices_is_what_it_is_on_one(found):
    done = check_cases(found)
    assert {stage for stage, _, _ in done} == {"sft", "reward", "dpo", "ppo"}
    assert {form.partition(" ")[0] for _, form, _ in done} == {"jit", "shard_map", "pmap"}
    assert {("sft", "jit sequence", 2), ("reward", "jit 2x4", 1), ("ppo", "shard_map 8", 2)} <= done


def test_a_job_trained_on_one_mesh_goes_on_on_another(found):
    (job,) = [each for each in found if "job" in each]
    assert job["spread"] and all(job["spread"])
    for other in ("2x4", "one"):
        assert job[f"restored on {other}"] == 0.0 and job[f"trained anew on {other}"] == 0


def test_what_does_not_fit_is_refused_in_a_sentence(found):
    told = [each["refused"] for each in found if "refused" in each]
    assert len(told) == 4
    assert "6 rows" in told[0] and "(.tokens_BL) does not divide over 4 devices (data 2 x fsdp 2)" in told[0]
    assert "does not divide over 8 devices" in told[1]
    assert "the mesh's axis tensor is 2; use jit_step" in told[2]
    assert told[3] == "a mesh of data 3 x fsdp 1 x tensor 1 x sequence 1 does not fit 8 devices"


@pytest.mark.slow
def test_every_stage_in_every_form_on_every_mesh():
    found = lines_of("long")
    assert len(check_cases(found)) == 4 * 9 + 1
    (job,) = [each for each in found if "job" in each]
    assert job["programs"] == {"supervised": 1, "reward_model": 1, "ppo": 1, "sampling": 2}
    assert max(job["apart"].values()) < CLOSE, "one device learns the same"


@pytest.mark.slow
def test_the_main_job_runs_on_a_mesh_that_its_flags_describe(tmp_path):
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


def test_a_rule_says_where_each_axis_lies():
    assert parallel.spec(("embed", "heads", "head"), MESH) == PartitionSpec("fsdp", "tensor", None)
    assert parallel.spec(("batch", "length"), MESH) == PartitionSpec(("data", "fsdp"), None)
    assert parallel.spec(("embed",), MESH, shape=(6,)) == PartitionSpec(None), "4 devices do not divide 6"
    assert parallel.spec(("heads", "mlp"), MESH) == PartitionSpec("tensor", None), "the first one has the axis"


def test_axes_and_rules_that_name_nothing_are_refused():
    with pytest.raises(parallel.MeshError, match="no sharding rule for the axis 'expert'; there are rules for layers"):
        parallel.spec(("expert",), MESH)
    with pytest.raises(parallel.MeshError, match="rule mlp = model names no axis of the mesh; it has data, fsdp"):
        parallel.spec(("mlp",), MESH, rules={"mlp": "model"})
    wrong: tuple[dict[str, Any], ...] = ({"tensor": 0}, {"data": 0}, {"data": -2})
    for sizes in wrong:
        with pytest.raises(parallel.MeshError, match="it must be at least 1"):
            parallel.make_mesh(**sizes)


def test_moments_and_averages_lie_as_their_parameters_do():
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    cfg = lm.LMConfig.preset("tiny")
    shapes = lm.abstract(cfg)
    tree = {"params": {"policy": shapes}, "mu": shapes, "count": jax.ShapeDtypeStruct((), jnp.int32)}
    where = parallel.shardings(tree, mesh, lm.logical_axes(cfg))
    assert where["mu"] == where["params"]["policy"]
    assert where["count"] == NamedSharding(mesh, PartitionSpec())


def test_what_nothing_divides_is_told():
    cfg = lm.LMConfig(vocab_size=31, n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, d_mlp=24, max_length=8)
    told = parallel.undivided(lm.abstract(cfg), MESH, lm.logical_axes(cfg))
    assert "embed/tokens: its vocab 31 does not divide over tensor 2" in told
    assert "layers/k/kernel: its kv_heads 1 does not divide over tensor 2" in told
    assert not any("mlp" in each or "layers/q/" in each for each in told)


def test_an_activation_is_pinned_only_where_there_is_a_mesh():
    x = jnp.ones((4, 2))
    assert parallel.constrain(x, "batch", None) is x


# ------------------------------------------------------------------------------------------------- dealing out rows


@pytest.mark.parametrize(("shards", "devices"), [(1, 1), (4, 1), (4, 2), (4, 4)])
def test_minibatches_depend_on_the_shards_and_not_on_the_devices(shards, devices):
    rows, epochs, count = 48, 2, 3
    made = minibatches.minibatches(jax.random.key(3), rows, epochs=epochs, count=count, shards=shards)
    taken = jax.vmap(lambda rows_SR: minibatches.take(jnp.arange(rows), rows_SR))(made)
    assert taken.shape == (epochs * count, rows // count)
    for epoch in np.asarray(taken).reshape(epochs, rows):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(rows))
    assert not np.array_equal(taken[0], taken[count]), "each epoch has an order of its own"
    for update in np.asarray(taken):  # as many rows of each block
        np.testing.assert_array_equal(np.bincount(update // (rows // shards)), rows // count // shards)

    def own(mine):
        dealt = minibatches.minibatches(
            jax.random.key(3), len(mine), epochs=epochs, count=count, shards=shards, axis_name="d"
        )
        return jax.vmap(lambda rows_SR: minibatches.take(mine, rows_SR))(dealt)

    each = jax.vmap(own, axis_name="d")(jnp.arange(rows).reshape(devices, -1))
    np.testing.assert_array_equal(jnp.concatenate(list(each), axis=1), taken)


def test_one_shard_is_a_permutation_of_all_rows():
    made = minibatches.minibatches(jax.random.key(0), 12, epochs=2, count=3)
    plain = [jax.random.permutation(key, 12) for key in jax.random.split(jax.random.key(0), 2)]
    np.testing.assert_array_equal(made.reshape(2, 12), jnp.stack(plain))
    with pytest.raises(ValueError, match="12 responses does not divide evenly into 3 minibatches of 8 shards"):
        minibatches.minibatches(jax.random.key(0), 12, epochs=1, count=3, shards=8)


def test_keys_and_pretraining_rows_are_each_devices_part_of_all():
    keys = jax.random.split(jax.random.key(1), 12)
    own = jax.vmap(lambda _: minibatches.row_keys(jax.random.key(1), 3, axis_name="d"), axis_name="d")(jnp.arange(4))
    np.testing.assert_array_equal(jax.random.key_data(own).reshape(12, -1), jax.random.key_data(keys))
    rows = jnp.arange(24)
    whole = minibatches.split_updates(rows, 3, shards=4)
    np.testing.assert_array_equal(whole[0], [0, 1, 6, 7, 12, 13, 18, 19])
    apart = [minibatches.split_updates(part, 3, shards=2) for part in (rows[:12], rows[12:])]
    np.testing.assert_array_equal(jnp.concatenate(apart, axis=1), whole)
    np.testing.assert_array_equal(minibatches.split_updates(rows, 3, shards=1), rows.reshape(3, 8))
    with pytest.raises(ValueError, match="24 rows do not divide evenly into 5 updates of 1 shards"):
        minibatches.split_updates(rows, 5, shards=1)


# ------------------------------------------------------------------------------------------------- flags


MESH_FLAGS = ["--mesh.data", "2", "--mesh.fsdp", "3"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--mesh.tensor", "0"], "--mesh.tensor is 0; it must be at least 1"),
        (["--mesh.simulate", "8"], "--mesh.simulate is 8; it must be at least 2, beside the axes of a mesh"),
        (MESH_FLAGS, "--pretrain.batch is 32, which does not divide over the 6 devices of --mesh.data 2 x --mesh.fsdp"),
        ([*MESH_FLAGS, "--pretrain.batch", "36"], "--reward-model.batch is 8, which does not divide over the 6"),
        (
            [*MESH_FLAGS, "--pretrain.batch", "36", "--reward-model.batch", "6"],
            "--ppo.batch is 64, which does not divide over the 6 devices",
        ),
        (
            ["--mesh.fsdp", "4", "--ppo.minibatches", "32"],
            "--ppo.batch 64 by --ppo.minibatches 32 is 2, which does not divide over the 4",
        ),
        (["--mesh.data", "2", "--ppo.ptx-ratio", "0.04"], "--ppo.ptx-ratio 0.04 of --ppo.batch 64 by"),
        (["--ppo.shards", "3"], "--ppo.shards is 3; it must be a divisor of a minibatch's 32 answers"),
        (
            ["--mesh.data", "4"],
            "a mesh of --mesh.data 4 x --mesh.fsdp 1 x --mesh.tensor 1 x --mesh.sequence 1 does not",
        ),
    ],
)
def test_meshes_that_cannot_be_end_in_one_line_and_status_2(flags, told, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        instructgpt.main(["--preset", "smoke", "--out", str(tmp_path / "run"), *flags])
    said = capsys.readouterr().err
    assert left.value.code == 2 and told in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_one_device_is_no_mesh_and_data_takes_what_is_left():
    plain = settings.preset("smoke")
    checks.check(plain)
    assert mesh_settings.make(mesh_settings.resolved(plain)) is None
    asked = instructgpt.parse(["--preset", "smoke", "--mesh.data", "-1"])
    assert mesh_settings.resolved(asked).mesh.data == jax.device_count()
    more = instructgpt.parse(["--preset", "smoke", "--mesh.data", "-1", "--mesh.fsdp", "4"])
    with pytest.raises(settings.SettingError, match=r"--mesh.simulate 4 makes the CPU look like as many"):
        mesh_settings.resolved(more)
