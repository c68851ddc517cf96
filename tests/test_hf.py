import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as st_numpy

from rlhf_jax import lm
from rlhf_jax.lm import hf
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
}
TOKENS = np.random.default_rng(0).integers(1, 97, (3, 11))


def random_params(cfg, *, head=False, seed=0):
    """No zeros and no ones: a bias or a scale that is dropped on the way must show."""
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
def test_save_load_round_trip_keeps_every_bit(name, tmp_path):
    cfg, params = CONFIGS[name], random_params(CONFIGS[name])
    lm.save(tmp_path / "one", cfg, params)
    loaded_cfg, loaded = lm.load(tmp_path / "one")
    assert loaded_cfg == cfg
    assert_same_bits(loaded, params)
    lm.save(tmp_path / "two", loaded_cfg, loaded)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_computes_the_same_logits(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    cfg, params = CONFIGS[name], random_params(CONFIGS[name])
    lm.save(tmp_path / "m", cfg, params)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(TOKENS)).logits.numpy()
    ours = logits_of(params, cfg)
    assert np.abs(theirs - ours).max() < 2e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_writes_can_be_read(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    cfg = CONFIGS[name]
    lm.save(tmp_path / "m", cfg, random_params(cfg))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path / "m"))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
        theirs = model.eval()(torch.tensor(TOKENS)).logits.numpy()
    model.save_pretrained(tmp_path / "theirs")
    loaded_cfg, loaded = lm.load(tmp_path / "theirs")
    assert loaded_cfg == cfg
    ours = logits_of(loaded, cfg)
    assert np.abs(theirs - ours).max() < 2e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_reward_model_as_sequence_classifier(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    cfg, params = CONFIGS[name], random_params(CONFIGS[name], head=True)
    params["head"] |= {"gain": jnp.float32(1.7), "bias": jnp.float32(-0.3)}
    lm.save(tmp_path / "rm", cfg, params, pad_id=0)
    auto = transformers.AutoModelForSequenceClassification
    model, info = auto.from_pretrained(tmp_path / "rm", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert model.config.num_labels == 1 and model.config.pad_token_id == 0

    lengths = np.array([11, 7, 3])
    mask = np.arange(11)[None, :] < lengths[:, None]
    tokens = np.where(mask, TOKENS, 0)
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(tokens), attention_mask=torch.tensor(mask).long()).logits[:, 0].numpy()
    score = jax.jit(lambda params: lm.score(params, jnp.asarray(tokens), cfg=cfg, mask_BL=jnp.asarray(mask)))
    ours = score(params)
    np.testing.assert_allclose(theirs + model.config.reward_bias, ours, atol=2e-4)

    loaded_cfg, loaded = lm.load(tmp_path / "rm")
    assert "unembed" not in loaded
    assert loaded_cfg == cfg
    np.testing.assert_allclose(score(loaded), ours, atol=1e-5)
    lm.save(tmp_path / "again", loaded_cfg, loaded)
    assert_same_bits(lm.load(tmp_path / "again")[1], loaded)


def test_sharded_files(tmp_path):
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


def test_own_fields_survive_and_foreign_dtype_is_taken(tmp_path):
    cfg = lm.LMConfig(**SMALL, dtype="bfloat16", remat="full", attention="xla")
    lm.save(tmp_path / "m", cfg, random_params(cfg))
    assert lm.load(tmp_path / "m")[0] == cfg
    written = edit_config(tmp_path / "m", torch_dtype="bfloat16", dtype=None, rlhf_jax=...)
    assert "rlhf_jax" not in written
    assert lm.load(tmp_path / "m")[0] == lm.LMConfig(**SMALL, dtype="bfloat16")


def test_an_older_model_is_replaced_and_anything_else_is_not(tmp_path):
    cfg = CONFIGS["llama"]
    first, second = random_params(cfg), random_params(cfg, seed=7)
    lm.save(tmp_path / "m", cfg, first)
    lm.save(tmp_path / "m", cfg, second)
    assert_same_bits(lm.load(tmp_path / "m")[1], second)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not replaced"):
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
        (dict(model_type="mamba"), "model type 'mamba'"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope type 'yarn'"),
        (dict(rope_parameters=..., rope_scaling={"type": "linear", "factor": 2.0}), "rope type 'linear'"),
        (dict(hidden_act="tanh_exp"), "activation 'tanh_exp'"),
        (dict(intermediate_size=50), r"mlp.gate_proj.weight has shape \(48, 32\).*\(50, 32\)"),
        (dict(num_hidden_layers=3), "lack the tensor model.layers.2"),
        (dict(num_hidden_layers=1), "no place for: model.layers.1"),
        (dict(vocab_size=...), "lacks the field 'vocab_size'"),
    ],
)
def test_errors_of_load(saved, changes, message):
    edit_config(saved, **changes)
    with pytest.raises(ValueError, match=message):
        lm.load(saved)


def test_missing_files(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model directory"):
        lm.load(tmp_path / "nowhere")
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        lm.load(saved)
    (saved / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        lm.load(saved)


def test_errors_of_save(tmp_path):
    cfg, params = CONFIGS["llama"], random_params(CONFIGS["llama"])
    with pytest.raises(ValueError, match=r"no known Hugging Face layout.*llama needs rope_fraction=1.0"):
        lm.save(tmp_path / "m", lm.LMConfig(**SMALL, rope_fraction=0.5), params)
    with pytest.raises(ValueError, match="lack embed/tokens"):
        lm.save(tmp_path / "m", cfg, {k: v for k, v in params.items() if k != "embed"})
    with pytest.raises(ValueError, match=r"final_norm/scale\] has shape"):
        lm.save(tmp_path / "m", cfg, params | {"final_norm": {"scale": jnp.ones(5)}})
    with pytest.raises(ValueError, match="does not have: lora"):
        lm.save(tmp_path / "m", cfg, params | {"lora": jnp.ones(5)})
    assert not list(tmp_path.iterdir())


def test_tokenizer_is_saved_beside_the_model(tmp_path):
    class Tokenizer:
        pad_token_id, bos_token_id, eos_token_id = 3, 1, 2

        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    lm.save(tmp_path / "m", CONFIGS["llama"], random_params(CONFIGS["llama"], head=True), Tokenizer())
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (written["pad_token_id"], written["eos_token_id"]) == (3, 2)
    assert (tmp_path / "m" / "tokenizer.json").exists()


def test_loading_needs_no_torch(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    cfg, params = CONFIGS["llama"], random_params(CONFIGS["llama"])
    hf.save(tmp_path / "m", cfg, params)
    assert_same_bits(hf.load(tmp_path / "m")[1], params)
