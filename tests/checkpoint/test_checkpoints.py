import os
import pathlib
import resource
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import checkpoint
from rlhf_jax.checkpoint import manifest
from rlhf_jax.train import state as state_lib

# After a failed read, an event loop of the checkpoint library warns when it is garbage-collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ADAM = optax.chain(optax.scale_by_adam(), optax.scale(-1.0))


def make_state(seed):
    rng = np.random.default_rng(seed)
    params = {
        "w": jnp.asarray(rng.normal(size=(64, 40)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=3), jnp.bfloat16),
    }
    return {
        "train": state_lib.create(params, ADAM).replace(step=jnp.int32(seed)),
        "key": jax.random.key(seed),
        "keys": jax.random.split(jax.random.key(seed), 3),
        "empty": jnp.zeros((0, 4)),
        "odd": jnp.array([np.nan, -0.0, np.inf, 1e-45], jnp.float32),
        "host": np.arange(5) + seed,
        "flag": jnp.array(seed % 2 == 0),
        "count": seed,
        "ema": 0.1 * seed,
    }


def bits(tree):
    def leaf(x):
        x = np.asarray(jax.random.key_data(x) if manifest.is_prng_key(x) else x)
        return x.dtype, x.shape, x.tobytes()

    return [leaf(x) for x in jax.tree.leaves(tree)]


@pytest.fixture
def two(tmp_path):
    """Returns checkpoints of steps 1 and 2."""
    with checkpoint.Checkpoints(tmp_path / "run") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {"step": step, "nested": {"a": [1.5, None]}})
    return checkpoints


def test_a_restored_state_is_bit_identical_to_the_saved_state(two):
    like = make_state(9)
    step, state, metadata = two.restore(like)
    assert step == 2 and metadata == {"step": 2, "nested": {"a": [1.5, None]}}
    assert bits(state) == bits(make_state(2))
    assert jax.tree.structure(state) == jax.tree.structure(like)
    assert state["train"].tx is like["train"].tx
    assert isinstance(state["host"], np.ndarray) and state["count"] == 2 and isinstance(state["count"], int)
    jax.random.normal(state["key"])
    abstract = jax.eval_shape(lambda: make_state(0) | {"host": jnp.arange(5)})
    abstract = abstract | {"host": like["host"], "count": 0, "ema": 0.0}
    assert bits(two.restore(abstract, step=1)[1]) == bits(make_state(1))


def test_a_restored_state_needs_no_recompilation_and_may_be_donated(two):
    traces = []

    def bump(state):
        traces.append(1)
        return jax.tree.map(lambda x: x + 1, state)

    step = jax.jit(bump, donate_argnums=0)
    step(make_state(1)["train"])
    step(two.restore(make_state(9))[1]["train"])
    assert len(traces) == 1


def test_arrays_may_be_donated_right_after_a_save(tmp_path):
    step = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
    x = step(jnp.arange(2_000_000, dtype=jnp.float32))
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        expected = bits(x)
        checkpoints.save(1, {"x": x})
        for _ in range(3):
            x = step(x)
        assert bits(checkpoints.restore({"x": x})[1]) == expected


def test_the_newest_checkpoints_are_kept_and_an_old_step_is_refused(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "a" / "b", keep=2) as checkpoints:
        assert checkpoints.latest() is None
        with pytest.raises(checkpoint.CheckpointError, match="missing or contains no complete checkpoint"):
            checkpoints.restore({"x": 0})
        for step in (1, 5, 9):
            checkpoints.save(step, {"x": jnp.full(3, step)})
        with pytest.raises(checkpoint.CheckpointError, match="newest step is already 9"):
            checkpoints.save(9, {"x": jnp.zeros(3)})
    assert checkpoints.steps() == [5, 9] and checkpoints.latest() == 9
    with pytest.raises(checkpoint.CheckpointError, match="no step 1"):
        checkpoints.restore({"x": jnp.zeros(3)}, step=1)


def flip(path, position=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * position)] ^= 16
    path.write_bytes(data)


def largest(folder):
    return max((p for p in pathlib.Path(folder).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def damage_flip(folder):
    flip(largest(folder / "state"))


def damage_truncate(folder):
    path = largest(folder / "state")
    path.write_bytes(path.read_bytes()[:100])


def damage_delete_array(folder):
    largest(folder / "state").unlink()


def damage_delete_all_arrays(folder):
    shutil.rmtree(folder / "state")


def damage_delete_manifest(folder):
    shutil.rmtree(folder / "manifest")


def damage_manifest(folder):
    path = folder / "manifest" / "metadata"
    path.write_text(path.read_text().replace("step", "stop", 1))


def damage_empty(folder):
    for path in pathlib.Path(folder).rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


@pytest.mark.parametrize("damage", [v for k, v in sorted(globals().items()) if k.startswith("damage_")])
def test_a_damaged_checkpoint_is_skipped_and_the_previous_one_is_restored(two, damage):
    damage(two.directory / "step_000000002")
    with pytest.warns(UserWarning, match="skipped a damaged checkpoint.*step 2: ") as caught:
        step, state, _ = two.restore(make_state(9))
    assert len(caught) == 1 and step == 1 and bits(state) == bits(make_state(1))
    with pytest.raises(checkpoint.CheckpointError, match="step 2: "):
        two.restore(make_state(9), step=2)
    with pytest.warns(UserWarning):
        two.restore(make_state(9))
    with two:
        two.save(2, make_state(2))  # replaces the damaged one
    assert bits(two.restore(make_state(9))[1]) == bits(make_state(2)) and two.steps() == [1, 2]


def test_flipped_bits_in_the_arrays_are_detected_or_harmless(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        good = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(30, 30)), jnp.float32)}
        checkpoints.save(1, good)
    path = largest(tmp_path / "step_000000001" / "state")
    original, detected = path.read_bytes(), 0
    for position in np.linspace(0.02, 0.98, 12):
        flip(path, position)
        try:
            assert bits(checkpoints.restore(good)[1]) == bits(good)
        except checkpoint.CheckpointError as error:
            assert "digest" in str(error) or "cannot be read" in str(error)
            detected += 1
        path.write_bytes(original)
    assert detected >= 9


def test_the_error_names_the_damage_of_every_checkpoint(two):
    for step in (1, 2):
        damage_flip(two.directory / f"step_{step:09d}")
    with pytest.raises(checkpoint.CheckpointError, match=r"step 2: .*step 1: "):
        two.restore(make_state(9))
    two.close()
    assert two.steps() == [1, 2]


def test_the_first_save_after_restoring_an_older_step_replaces_newer_steps(two):
    two.restore(make_state(9), step=1)
    assert two.steps() == [1, 2]
    with two:
        two.save(2, make_state(7))
    assert bits(two.restore(make_state(9))[1]) == bits(make_state(7))


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda s: {k: v for k, v in s.items() if k != "odd"}, "only in the checkpoint.*odd"),
        (lambda s: s | {"more": jnp.zeros(2)}, "more"),
        (lambda s: s | {"odd": jnp.zeros(5)}, r"\['odd'\] as float32\[4\], but float32\[5\] was requested"),
        (lambda s: s | {"odd": jnp.zeros(4, jnp.int32)}, "int32"),
        (lambda s: s | {"key": jax.random.key(0, impl="rbg")}, "key"),
    ],
)
def test_a_different_structure_is_an_error_and_not_damage(two, change, match):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(checkpoint.CheckpointError, match=match):
            two.restore(change(make_state(9)))


def test_a_python_counter_and_an_array_are_interchangeable(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"step": jnp.int32(7)})
        step = checkpoints.restore({"step": 0})[1]["step"]
        assert step.dtype == jnp.int32 and int(step) == 7
        checkpoints.save(2, {"step": 8})
        step = checkpoints.restore({"step": jnp.int32(0)})[1]["step"]
        assert step.dtype == jnp.int32 and int(step) == 8


def test_states_that_cannot_be_saved_are_errors(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    with pytest.raises(TypeError, match=r"name.*is a str"):
        checkpoints.save(1, {"name": "x"})
    with pytest.raises(TypeError, match="objects"):
        checkpoints.save(1, {"x": np.array([None])})
    with pytest.raises(TypeError, match="JSON"):
        checkpoints.save(1, {"x": 1}, {"y": jnp.ones(1)})
    with pytest.raises(ValueError, match="no leaves"):
        checkpoints.save(1, {})
    with pytest.raises(ValueError, match="keep"):
        checkpoint.Checkpoints(tmp_path, keep=0)
    assert checkpoints.latest() is None


def damage_before_it_is_verified(checkpoints, step):
    """Damages a completed save before `wait` verifies it."""
    checkpoints._checkpointer.wait_until_finished()
    flip(largest(checkpoints.directory / f"step_{step:09d}" / "state"))


@pytest.mark.parametrize("keep", [1, 2])
def test_old_checkpoints_are_removed_only_after_a_newer_one_is_verified(tmp_path, keep):
    warned = []
    state = {"w": jnp.asarray(np.random.default_rng(0).normal(size=500), jnp.float32)}
    with checkpoint.Checkpoints(tmp_path, keep=keep, warn=warned.append) as checkpoints:
        for step in range(1, keep + 1):
            checkpoints.save(step, state)
        checkpoints.save(8, state)
        damage_before_it_is_verified(checkpoints, 8)
        checkpoints.wait()
        assert checkpoints.steps() == [*range(1, keep + 1), 8] and len(warned) == 1
        assert "step 8" in warned[0] and "older checkpoints are kept" in warned[0]
        assert checkpoints.restore(state)[0] == keep and "skipped" in warned[1]
        checkpoints.save(9, state)
        checkpoints.wait()
        assert checkpoints.steps() == [*range(1, keep + 1), 9][-keep:]
        assert checkpoints.restore(state)[0] == 9 and len(warned) == 2
    assert len(list(tmp_path.iterdir())) == keep


def test_a_skipped_checkpoint_is_kept_until_a_newer_one_is_verified(two):
    damage_flip(two.directory / "step_000000002")
    with pytest.warns(UserWarning):
        two.restore(make_state(9))
    with pytest.raises(TypeError):
        two.save(2, {"name": "x"})  # this save fails
    assert two.steps() == [1, 2]
    two.save(2, make_state(2))
    assert len(list(two.directory.glob("set_aside_*"))) == 1
    two.close()
    assert not list(two.directory.glob("set_aside_*")) and two.steps() == [1, 2]


MESHES = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as S
from rlhf_jax import checkpoint
from rlhf_jax.checkpoint import manifest
from rlhf_jax.train import state as state_lib
tx = optax.chain(optax.scale_by_adam(), optax.scale(-1.0))
def make():
    key = jax.random.key(0)
    params = {"w": jax.random.normal(key, (16, 8)), "b": jnp.arange(8.0)}
    return {"train": state_lib.create(params, tx), "key": key, "keys": jax.random.split(key, 8)}
def placed(shape, names, axes, devices):
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=devices)
    sharding = lambda x: NamedSharding(mesh, S(*axes[:x.ndim]) if x.ndim == 2 or x.shape == (8,) else S())
    shapes = jax.eval_shape(make)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x)), shapes)
eight = placed((8,), ("fsdp",), ("fsdp",), jax.devices())
state = jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, eight))()
with checkpoint.Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(1, state)
    checkpoints.wait()
    meshes = [eight, placed((2, 4), ("data", "fsdp"), (("data", "fsdp"),), jax.devices()),
              placed((2, 2, 2), ("data", "fsdp", "tensor"), ("fsdp", "tensor"), jax.devices()),
              placed((1,), ("data",), (None,), jax.devices()[:1]), jax.eval_shape(make)]
    for like in meshes:
        restored = checkpoints.restore(like)[1]
        assert manifest.digest_tree(restored) == manifest.digest_tree(state)
        for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(like)):
            assert y.sharding is None or x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)
print("bit for bit", len(state["train"].params["w"].sharding.device_set))
"""


def test_a_state_saved_on_eight_devices_is_restored_bit_identically_on_other_meshes(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MESHES, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.stdout == "bit for bit 8\n", done.stderr[-3000:]


def test_a_state_is_restored_onto_a_mesh(tmp_path):
    sharding = jax.sharding.NamedSharding(
        jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec("data")
    )
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.arange(8.0), "k": jax.random.split(jax.random.key(0), 2)})
        like = {
            "x": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding),
            "k": jax.device_put(jax.random.split(jax.random.key(1), 2), sharding),
        }
        state = checkpoints.restore(like)[1]
    assert state["x"].sharding == sharding and state["k"].sharding == sharding
    np.testing.assert_array_equal(state["x"], np.arange(8.0))


def test_a_full_disk_is_a_one_line_error(tmp_path):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    big = {"x": jnp.asarray(np.random.default_rng(0).normal(size=300_000), jnp.float32)}
    checkpoints.save(1, {"x": jnp.zeros(300_000)})
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(
            checkpoint.CheckpointError, match=f"cannot save step 2 in {tmp_path}: File too large"
        ) as failed:
            checkpoints.save(2, big)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "\n" not in str(failed.value)
    assert checkpoints.steps() == [1]
    with checkpoints:
        checkpoints.save(2, big)  # works after space is available again
    assert bits(checkpoints.restore(big)[1]) == bits(big)


def test_a_folder_that_is_missing_or_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(checkpoint.CheckpointError, match="file"):
        checkpoint.Checkpoints(tmp_path / "file" / "run").save(1, {"x": 1})
    with pytest.raises(checkpoint.CheckpointError, match="file"):
        checkpoint.Checkpoints(tmp_path / "file").save(1, {"x": 1})
    checkpoints = checkpoint.Checkpoints(tmp_path / "run")
    checkpoints.save(1, {"x": 1})
    checkpoints.wait()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(checkpoint.CheckpointError, match="the directory no longer exists"):
        checkpoints.save(2, {"x": 1})


def test_parameters_are_saved_replaced_and_verified(tmp_path):
    params = {"a": {"w": jnp.arange(6.0).reshape(2, 3)}, "layers": [jnp.ones(2, jnp.bfloat16), {}]}
    checkpoint.save_params(tmp_path / "sft", params)
    loaded = checkpoint.load_params(tmp_path / "sft")
    assert jax.tree.structure(loaded) == jax.tree.structure(params) and bits(loaded) == bits(params)
    newer = jax.tree.map(lambda x: x + 1, params)
    checkpoint.save_params(tmp_path / "sft", newer)
    assert bits(checkpoint.load_params(tmp_path / "sft", like=params)) == bits(newer)
    assert len(list((tmp_path / "sft").iterdir())) == 1
    with pytest.raises(TypeError, match="nested lists or dicts"):
        checkpoint.save_params(tmp_path / "x", (jnp.ones(1),))
    flip(largest(tmp_path / "sft"))
    with pytest.raises(checkpoint.CheckpointError, match=r"digest|read"):
        checkpoint.load_params(tmp_path / "sft")
