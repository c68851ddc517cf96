"""float16 is a format of files: models that are stored in it compute in float32."""
# pyright: reportArgumentType=false

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from rlhf_jax import lm
from rlhf_jax.train import state

CFG = lm.LMConfig(vocab_size=16, n_layers=2, d_model=16, n_heads=2, d_mlp=32, max_length=16, model_type="llama")


def stored(folder, *, file="float16", config="float16", key="torch_dtype", own=None):
    """Writes a folder as found on the hub and returns its tensors."""
    lm.save(folder, CFG, lm.init(jax.random.key(0), CFG), dtype=jnp.float32 if file == "float64" else file)
    path = folder / "model.safetensors"
    if file == "float64":
        safetensors.numpy.save_file(
            {name: x.astype(np.float64) for name, x in safetensors.numpy.load_file(path).items()}, path
        )
    written = json.loads((folder / "config.json").read_text())
    written = {name: value for name, value in written.items() if name not in ("rlhf_jax", "dtype", "torch_dtype")}
    written |= ({key: config} if config else {}) | ({"rlhf_jax": own} if own else {})
    (folder / "config.json").write_text(json.dumps(written))
    return safetensors.numpy.load_file(path) if file != "bfloat16" else None


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("file", "config", "compute"),
    [
        ("float16", "float16", "float32"),
        ("float16", None, "float32"),
        ("float16", "bfloat16", "bfloat16"),
        ("float32", "float16", "float32"),
        ("float32", "float32", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float64", "float64", "float32"),
    ],
)
def test_the_compute_dtype_follows_the_config_and_is_never_float16(tmp_path, file, config, compute, key):
    tensors = stored(tmp_path, file=file, config=config, key=key)
    cfg, params = lm.load(tmp_path)
    assert cfg.dtype == compute == lm.load_config(tmp_path).dtype
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    if tensors is not None:
        np.testing.assert_array_equal(
            params["embed"]["tokens"], tensors["model.embed_tokens.weight"].astype(np.float32)
        )


def test_a_folder_saved_by_an_earlier_version_computes_in_float32(tmp_path):
    stored(tmp_path, own={"dtype": "float16", "remat": "none", "attention": "auto"})
    assert lm.load_config(tmp_path).dtype == "float32"


def test_float16_compute_is_refused():
    with pytest.raises(ValueError, match=r"LMConfig.dtype is 'float16'; .* float16 is for files only"):
        dataclasses.replace(CFG, dtype="float16")
    with pytest.raises(ValueError, match="dtype is 'int8'; it must be one of float32, bfloat16"):
        dataclasses.replace(CFG, dtype="int8")


def test_float16_parameters_are_not_trained(tmp_path):
    stored(tmp_path)
    _, params = lm.load(tmp_path, dtype=jnp.float16)  # to store a frozen model
    with pytest.raises(ValueError, match=r"params\['embed'\]\['tokens'\] is float16, in which small gradients become"):
        state.create(params, optax.scale(-1.0))


def test_values_that_are_too_large_for_float16_are_not_saved_as_infinity(tmp_path):
    params = lm.init(jax.random.key(0), CFG)
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].set(7e4)
    lm.save(tmp_path / "whole", CFG, params)
    with pytest.raises(
        ValueError, match=r"model.norm.weight contains a value that is not finite or too large for floa"
    ):
        lm.save(tmp_path / "half", CFG, params, dtype=jnp.float16)


def test_small_gradients_of_a_float16_file_are_those_of_float32(tmp_path):
    """The gradient of a mean over many tokens is below the smallest float16 number, as late in training."""
    stored(tmp_path)
    cfg, params = lm.load(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 16, (2, 8)).astype(np.int32)

    def gradient(scale):
        return jax.grad(lambda p: scale * lm.token_logprobs(p, tokens, cfg=cfg).sum())(params)

    small, large = gradient(2.0**-40), gradient(1.0)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a) * 2.0**40, b), small, large)
