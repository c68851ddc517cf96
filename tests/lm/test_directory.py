import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as st_numpy

from rlhf_jax import lm
from rlhf_jax.lm import params as lm_params

SMALL: dict[str, Any] = dict(vocab_size=97, n_layers=2, d_model=32, n_heads=4, d_mlp=48, max_length=32)
GPT2: dict[str, Any] = dict(
    norm="layernorm",
    activation="gelu_tanh",
    gated_mlp=False,
    positions="learned",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    tie_embeddings=True,
)
NEOX: dict[str, Any] = GPT2 | dict(positions="rope", rope_fraction=0.25, parallel_residual=True, tie_embeddings=False)
CONFIGS = {
    "llama": lm.LMConfig(**SMALL, n_kv_heads=2, d_head=16, rope_theta=5e4),
    "llama-tied-biased": lm.LMConfig(**SMALL, tie_embeddings=True, qkv_bias=True, out_bias=True, mlp_bias=True),
    "gpt2": lm.LMConfig(**SMALL, **GPT2),
    "neox": lm.LMConfig(**SMALL, **NEOX),
    "mistral": lm.LMConfig(**SMALL, sliding_window=4),
    "qwen2": lm.LMConfig(**SMALL, qkv_bias=True, sliding_window=4, local_layers=(False, True)),
    "qwen3": lm.LMConfig(**SMALL, qk_norm=True),
    "phi3": lm.LMConfig(**SMALL, rope_fraction=0.5),
}
TOKENS = np.random.default_rng(0).integers(1, 97, (3, 11))


def random_params(cfg, *, head=False, seed=0):
    """Returns parameters without zeros and ones, so that a test fails if a bias or a scale is lost."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32), lm.abstract(cfg, head=head))


def logits_of(params, cfg):
    @jax.jit
    def run(params):
        return lm.logits(params, lm.forward(params, jnp.asarray(TOKENS), cfg=cfg).hidden_BLD, cfg=cfg)

    return run(params)


def assert_same_bits(left, right):
    left, right = lm_params.flatten(left), lm_params.flatten(right)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(np.asarray(left[name]), np.asarray(right[name]), err_msg=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_save_load_round_trip_is_bit_identical(name, tmp_path):
    cfg, params = CONFIGS[name], random_params(CONFIGS[name])
    lm.save(tmp_path / "one", cfg, params)
    loaded_cfg, loaded = lm.load(tmp_path / "one")
    assert loaded_cfg == dataclasses.replace(cfg, model_type=loaded_cfg.model_type)
    assert loaded_cfg.model_type == {"neox": "gpt_neox"}.get(name, name.removesuffix("-tied-biased"))
    assert_same_bits(loaded, params)
    lm.save(tmp_path / "two", loaded_cfg, loaded)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_sharded_files_are_loaded(tmp_path):
    cfg, params = CONFIGS["llama"], random_params(CONFIGS["llama"])
    lm.save(tmp_path / "m", cfg, params, max_shard_bytes=20_000)
    assert len(list((tmp_path / "m").glob("model-*-of-*.safetensors"))) > 2
    assert not (tmp_path / "m" / "model.safetensors").exists()
    assert_same_bits(lm.load(tmp_path / "m")[1], params)


def test_gpt2_without_prefix_and_with_buffers(tmp_path):
    cfg, params = CONFIGS["gpt2"], random_params(CONFIGS["gpt2"])
    lm.save(tmp_path / "m", cfg, params)
    file = tmp_path / "m" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): x for name, x in st_numpy.load_file(file).items()}
    st_numpy.save_file(tensors | {"h.0.attn.bias": np.ones((1, 1, 8, 8), np.float32)}, file)
    assert_same_bits(lm.load(tmp_path / "m")[1], params)


def test_bfloat16_files_are_read_into_float32(tmp_path):
    cfg, params = CONFIGS["llama"], random_params(CONFIGS["llama"])
    lm.save(tmp_path / "m", cfg, params)
    file = tmp_path / "m" / "model.safetensors"
    st_numpy.save_file({k: x.astype(jnp.bfloat16) for k, x in st_numpy.load_file(file).items()}, file)
    loaded = lm.load(tmp_path / "m")[1]
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(loaded))
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    assert_same_bits(loaded, rounded)


def test_extra_fields_round_trip_and_the_file_dtype_is_the_default(tmp_path):
    cfg = lm.LMConfig(**SMALL, dtype="bfloat16", remat="full", attention="xla")
    lm.save(tmp_path / "m", cfg, random_params(cfg))
    assert lm.load(tmp_path / "m")[0] == dataclasses.replace(cfg, model_type="llama")
    written = edit_config(tmp_path / "m", torch_dtype="bfloat16", dtype=None, rlhf_jax=...)
    assert "rlhf_jax" not in written
    assert lm.load(tmp_path / "m")[0] == lm.LMConfig(**SMALL, dtype="bfloat16", model_type="llama")


def with_output_layer(folder, cfg, array, *, without=""):
    """Saves a tied model whose file contains ``lm_head.weight`` too, and lacks the tensor ``without``."""
    params = random_params(cfg)
    lm.save(folder, cfg, params)
    file = folder / "model.safetensors"
    tensors = {name: x for name, x in st_numpy.load_file(file).items() if name != without}
    st_numpy.save_file(tensors | {"lm_head.weight": array(np.asarray(params["embed"]["tokens"]))}, file)
    return params


@pytest.mark.parametrize("name", ["llama-tied-biased", "gpt2"])
def test_an_output_layer_equal_to_the_embeddings_is_tied(name, tmp_path):
    params = with_output_layer(tmp_path / "m", CONFIGS[name], np.array)
    cfg, loaded = lm.load(tmp_path / "m")
    assert cfg == lm.load_config(tmp_path / "m")
    assert_same_bits(loaded, params)
    params = with_output_layer(
        tmp_path / "m", CONFIGS["llama-tied-biased"], np.array, without="model.embed_tokens.weight"
    )
    assert_same_bits(lm.load(tmp_path / "m")[1], params)


@pytest.mark.parametrize("name", ["llama-tied-biased", "gpt2"])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_an_output_layer_that_differs_from_tied_embeddings_is_kept(name, dtype, tmp_path):
    def change(embeddings):
        head = embeddings.copy()
        head[-1, -1] += 1.0
        return head.astype(dtype)

    params = with_output_layer(tmp_path / "m", CONFIGS[name], change)
    with pytest.warns(
        UserWarning, match=r"tie_word_embeddings is true in config\.json, but lm_head\.weight differs from"
    ):
        cfg, loaded = lm.load(tmp_path / "m")
    assert cfg == dataclasses.replace(lm.load_config(tmp_path / "m"), tie_embeddings=False)
    head = change(np.asarray(params["embed"]["tokens"])).astype(np.float32)
    np.testing.assert_array_equal(loaded["unembed"]["kernel"], head.T)
    hidden = lm.forward(loaded, jnp.asarray(TOKENS), cfg=cfg).hidden_BLD
    np.testing.assert_allclose(logits_of(loaded, cfg), np.asarray(hidden) @ head.T, rtol=1e-4, atol=1e-4)
    lm.save(tmp_path / "again", cfg, loaded)
    again, restored = lm.load(tmp_path / "again")
    assert again == cfg
    assert_same_bits(restored, loaded)


def test_only_an_older_model_is_overwritten(tmp_path):
    cfg = CONFIGS["llama"]
    first, second = random_params(cfg), random_params(cfg, seed=7)
    lm.save(tmp_path / "m", cfg, first)
    lm.save(tmp_path / "m", cfg, second)
    assert_same_bits(lm.load(tmp_path / "m")[1], second)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="is not overwritten"):
        lm.save(tmp_path / "thesis", cfg, first)
    assert (tmp_path / "thesis" / "chapter.tex").exists()


def edit_config(folder, **changes):
    file = folder / "config.json"
    content = json.loads(file.read_text()) | changes
    content = {key: value for key, value in content.items() if value is not ...}
    file.write_text(json.dumps(content))
    return content


@pytest.fixture
def saved(tmp_path):
    lm.save(tmp_path / "m", CONFIGS["llama"], random_params(CONFIGS["llama"]))
    return tmp_path / "m"


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_type="mamba"), r"config\.json: model type 'mamba' is not supported; known types: llama, gpt2"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}), "rope type 'yarn' is not"),
        (dict(rope_parameters=..., rope_scaling={"type": "dynamic", "factor": 2.0}), "rope type 'dynamic' is not"),
        (dict(hidden_act="tanh_exp"), "activation 'tanh_exp' is not supported"),
        (dict(pretraining_tp=2), "pretraining_tp = 2 is not supported"),
        (dict(quantization_config={"quant_method": "awq"}), "quantized weights"),
        (dict(hidden_size="wide"), "hidden_size"),
        (dict(num_key_value_heads=3), "n_kv_heads is 3"),
        (dict(intermediate_size=50), r"of the wrong shape: .*mlp.down_proj.weight \[32, 48\] instead of \[32, 50\]"),
        (dict(num_hidden_layers=3), r"missing: model.layers.2.input_layernorm.weight, .* and 1 more"),
        (dict(num_hidden_layers=1), "unexpected: model.layers.1.input_layernorm.weight"),
        (dict(vocab_size=...), r"embed_tokens.weight \[97, 32\] instead of \[32000, 32\]"),
    ],
)
def test_load_errors_name_the_problem(saved, changes, message):
    edit_config(saved, **changes)
    with pytest.raises(ValueError, match=message):
        lm.load(saved)


def test_missing_files_are_errors(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model directory"):
        lm.load(tmp_path / "nowhere")
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        lm.load(saved)
    (saved / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        lm.load(saved)


def test_save_errors_name_the_problem(tmp_path):
    cfg, params = CONFIGS["llama"], random_params(CONFIGS["llama"])
    mixed = lm.LMConfig(**SMALL, norm="layernorm", gated_mlp=False)
    with pytest.raises(ValueError, match=r"no known Hugging Face model type.*llama needs norm='rmsnorm'"):
        lm.save(tmp_path / "m", mixed, params)
    foreign = dataclasses.replace(cfg, model_type="phi3", qkv_bias=True)
    with pytest.raises(ValueError, match=r"represent this LMConfig: phi3 needs qkv_bias=False$"):
        lm.save(tmp_path / "m", foreign, params)
    with pytest.raises(ValueError, match="lack embed/tokens"):
        lm.save(tmp_path / "m", cfg, {k: v for k, v in params.items() if k != "embed"})
    with pytest.raises(ValueError, match=r"final_norm/scale\] has shape"):
        lm.save(tmp_path / "m", cfg, params | {"final_norm": {"scale": jnp.ones(5)}})
    with pytest.raises(ValueError, match="this LMConfig lacks: lora"):
        lm.save(tmp_path / "m", cfg, params | {"lora": jnp.ones(5)})
    assert not list(tmp_path.iterdir())


def test_tokenizer_is_saved_with_the_model(tmp_path):
    class Tokenizer:
        pad_token_id, bos_token_id, eos_token_id = 3, 1, 2

        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    lm.save(tmp_path / "m", CONFIGS["llama"], random_params(CONFIGS["llama"], head=True), Tokenizer())
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (written["pad_token_id"], written["eos_token_id"]) == (3, 2)
    assert (tmp_path / "m" / "tokenizer.json").exists()


def test_truncated_file_is_an_error(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or not a safetensors file"):
        lm.load(saved)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="is truncated"):
        lm.load(saved)


def test_non_finite_values_are_errors(saved, tmp_path):
    file = saved / "model.safetensors"
    tensors = st_numpy.load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = np.nan
    st_numpy.save_file(tensors, file)
    with pytest.raises(ValueError, match=r"the tensor model\.layers\.1\.mlp\.up_proj\.weight contains a value"):
        lm.load(saved)
    cfg, params = CONFIGS["llama"], random_params(CONFIGS["llama"])
    params["layers"]["up"]["kernel"] = params["layers"]["up"]["kernel"].at[1, 2, 3].set(jnp.inf)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight contains a value that is not finite"):
        lm.save(tmp_path / "broken", cfg, params)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_failed_export_keeps_the_older_model(saved, tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device")

    before = (saved / "model.safetensors").read_bytes()
    with pytest.raises(OSError, match="No space left"):
        lm.save(saved, CONFIGS["llama"], random_params(CONFIGS["llama"], seed=3), Tokenizer())
    assert (saved / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_index_that_contradicts_its_files_is_an_error(tmp_path):
    lm.save(tmp_path / "m", CONFIGS["llama"], random_params(CONFIGS["llama"]), max_shard_bytes=20_000)
    file = tmp_path / "m" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shards = sorted(set(index["weight_map"].values()))
    moved = next(name for name, shard in index["weight_map"].items() if shard == shards[0])
    index["weight_map"][moved] = shards[1]
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"lists {moved} in {shards[1]}, which does not contain it"):
        lm.load(tmp_path / "m")
    (tmp_path / "m" / shards[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {shards[1]}"):
        lm.load(tmp_path / "m")
    file.write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is not JSON"):
        lm.load(tmp_path / "m")


def test_pickled_weights_are_refused(saved):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pickled weights \(\.bin, \.pt\) are not supported"):
        lm.load(saved)


def test_half_precision_files_are_saved_and_loaded(tmp_path):
    cfg, params = CONFIGS["gpt2"], random_params(CONFIGS["gpt2"])
    lm.save(tmp_path / "m", cfg, params, dtype=jnp.bfloat16)
    assert {x.dtype.name for x in st_numpy.load_file(tmp_path / "m" / "model.safetensors").values()} == {"bfloat16"}
    loaded = lm.load(tmp_path / "m", dtype=jnp.bfloat16)[1]
    assert_same_bits(loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    # 16-bit parameters are saved and loaded without loss.
    lm.save(tmp_path / "again", cfg, loaded, dtype=jnp.bfloat16)
    first, second = (tmp_path / name / "model.safetensors" for name in ("m", "again"))
    assert first.read_bytes() == second.read_bytes()


def run_apart(program, *arguments, **environment):
    """Runs a program in a new interpreter; returns the last line of its output."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def test_loading_into_sharded_arrays(tmp_path):
    program = """
import sys, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from rlhf_jax import lm
from rlhf_jax.lm import params as lm_params
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("fsdp", "tensor"))
rules = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor"}
cfg, params = lm.load(sys.argv[1], shard=lambda axes: NamedSharding(mesh, P(*(rules.get(a) for a in axes))))
flat, plain = lm_params.flatten(params), lm_params.flatten(lm.load(sys.argv[1])[1])
for name, x in flat.items():
    np.testing.assert_array_equal(np.asarray(x), np.asarray(plain[name]))
up = flat["layers/up/kernel"]
assert up.sharding.spec == P(None, "fsdp", "tensor"), up.sharding
assert {s.data.shape for s in up.addressable_shards} == {(2, 16, 24)}
print("same")
"""
    lm.save(tmp_path / "m", CONFIGS["llama"], random_params(CONFIGS["llama"], head=True))
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    assert run_apart(program, tmp_path / "m", XLA_FLAGS=flags) == "same"


MEMORY = """
import resource, sys, jax, jax.numpy as jnp
from rlhf_jax import lm
def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
lm.load_config(sys.argv[1])  # transformers is imported
jax.block_until_ready(jnp.ones(3) + 1)
before = peak_mb()
params = jax.block_until_ready(lm.load(sys.argv[1])[1])
final = sum(x.nbytes for x in jax.tree.leaves(params)) / 2**20
print(round(peak_mb() - before - final))
"""


def over_the_final_arrays(folder, layers):
    cfg = lm.LMConfig(vocab_size=1000, n_layers=layers, d_model=1024, n_heads=8, d_mlp=4096, max_length=64)
    lm.save(folder, cfg, jax.tree.map(lambda x: jnp.ones(x.shape), lm.abstract(cfg)), max_shard_bytes=200_000_000)
    return int(run_apart(MEMORY, folder))


@pytest.mark.slow  # measures memory in a separate process
def test_loading_holds_at_most_one_extra_tensor(tmp_path):
    # 0.5 GB of parameters in tensors of 16 MB; reading all of them first would need another 0.5 GB.
    assert over_the_final_arrays(tmp_path / "m", 8) < 350


@pytest.mark.slow
def test_loading_a_model_of_several_gigabytes(tmp_path):
    # 3.2 GB of parameters; the documented limit is one extra tensor and 1 GB.
    assert over_the_final_arrays(tmp_path / "m", 50) < 1016


def test_loading_does_not_depend_on_torch(tmp_path):
    program = """
import importlib.util, importlib.metadata, sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoTorch())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "torch" else find_spec(name, *rest)
import rlhf_jax
from rlhf_jax import lm
cfg, params = lm.load(sys.argv[1])
lm.save(sys.argv[1] + "-again", cfg, params)
print("torch" in sys.modules)
"""
    lm.save(tmp_path / "m", CONFIGS["llama"], random_params(CONFIGS["llama"]))
    assert run_apart(program, tmp_path / "m") == "False"
    assert_same_bits(lm.load(tmp_path / "m-again")[1], lm.load(tmp_path / "m")[1])
