"""Model directories as other tools leave them; most are cases from public bug reports."""

import json
import shutil

import numpy as np
import pytest
from lora_cases import CFG, adapters, base, same
from safetensors import numpy as st_numpy

from rlhf_jax import lm

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def saved(tmp_path):
    lm.save(tmp_path / "m", CFG, base())
    return tmp_path / "m"


@pytest.fixture
def sharded(tmp_path):
    lm.save(tmp_path / "shards", CFG, base(), max_shard_bytes=20_000)
    return tmp_path / "shards"


def test_an_older_file_beside_an_index_is_refused(saved, sharded):
    """transformers reads the single file and ignores the index; other libraries do the opposite."""
    shutil.copy(saved / SINGLE, sharded / SINGLE)
    with pytest.raises(ValueError, match=r"shards contains two models: model\.safetensors, .*Delete the older one"):
        lm.load(sharded)
    (sharded / INDEX).unlink()
    same(lm.load(sharded)[1], base())


def test_an_index_may_list_a_single_file_beside_others(saved):
    places = dict.fromkeys(st_numpy.load_file(saved / SINGLE), SINGLE)
    (saved / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    st_numpy.save_file({"other": np.zeros(2)}, saved / "auxiliary.safetensors")
    same(lm.load(saved)[1], base())


def test_an_index_may_list_files_in_subdirectories(saved):
    places = dict.fromkeys(st_numpy.load_file(saved / SINGLE), f"weights/{SINGLE}")
    (saved / "weights").mkdir()
    (saved / SINGLE).rename(saved / "weights" / SINGLE)
    (saved / INDEX).write_text(json.dumps({"weight_map": places}))
    same(lm.load(saved)[1], base())


def test_errors_name_the_files_of_an_incomplete_directory(sharded):
    first, second, *_ = sorted(path.name for path in sharded.glob("*.safetensors"))
    (sharded / second).unlink()
    with pytest.raises(FileNotFoundError, match=rf"has no {second}, but has {first}, .*the directory is incomplete"):
        lm.load(sharded)
    (sharded / INDEX).unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"has no model\.safetensors, but has {first}, .*index\.json.* missing"
    ):
        lm.load(sharded)


def test_git_lfs_pointers_are_named(saved, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123456\n"
    (saved / SINGLE).write_text(pointer)
    with pytest.raises(ValueError, match=r"m/model\.safetensors is a Git LFS pointer.*git lfs pull"):
        lm.load(saved)
    lm.peft.save(tmp_path / "a", CFG, adapters(), scale=1.0)
    (tmp_path / "a" / "adapter_model.safetensors").write_text(pointer)
    with pytest.raises(ValueError, match=r"a/adapter_model\.safetensors is a Git LFS pointer"):
        lm.peft.load(tmp_path / "a", CFG)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_removed(prefix, saved):
    tensors = st_numpy.load_file(saved / SINGLE)
    st_numpy.save_file({prefix + name: tensor for name, tensor in tensors.items()}, saved / SINGLE)
    same(lm.load(saved)[1], base())
    some = {(prefix if "layers.0" in name else "") + name: tensor for name, tensor in tensors.items()}
    st_numpy.save_file(some, saved / SINGLE)
    with pytest.raises(ValueError, match=r"missing: model\.layers\.0"):
        lm.load(saved)


def test_adapters_in_a_model_directory_are_refused(saved, tmp_path):
    """transformers applies them, so that its model would be a different one."""
    lm.peft.save(tmp_path / "a", CFG, adapters(), scale=1.0)
    with pytest.raises(ValueError, match=r"a contains PEFT adapters .*lm\.peft\.load"):
        lm.load(tmp_path / "a")
    for file in (tmp_path / "a").iterdir():
        shutil.copy(file, saved)
    for load in (lm.load, lm.load_config):
        with pytest.raises(ValueError, match=r"m contains PEFT adapters .*move the adapters to another directory"):
            load(saved)
