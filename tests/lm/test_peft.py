import json

import numpy as np
import pytest
from lora_cases import ALL, CFG, CONFIGS, SCALE, TOKENS, adapters, base, close, fresh, logits_of, same
from safetensors import numpy as st_numpy

from rlhf_jax import lm
from rlhf_jax.lm import lora
from rlhf_jax.lm.hub import peft


def shared_a(own):
    """Returns the adapters with a shared A for the tensors that a checkpoint fuses."""
    layers = {name: dict(node) for name, node in own["layers"].items()}
    for node, other in {"k": "q", "v": "q", "up": "gate"}.items():
        if other in layers:
            layers[node]["lora_a"] = layers[other]["lora_a"]
    return {"layers": layers}


def written(folder):
    fields = json.loads((folder / "adapter_config.json").read_text())
    return fields, st_numpy.load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("pattern", [ALL, "layers/(q|v|up)/kernel", "layers/out/kernel"])
@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load_round_trip_is_bit_identical(name, pattern, tmp_path):
    cfg = CONFIGS[name]
    for number, own in enumerate([adapters(cfg, pattern=pattern), fresh(cfg, pattern=pattern)]):
        peft.save(tmp_path / "one", cfg, own, scale=2.0)
        loaded, scale = peft.load(tmp_path / "one", cfg)
        assert scale == 2.0, number
        same(loaded, own)
        peft.save(tmp_path / "two", cfg, loaded, scale=scale)
        configs, tensors = zip(*(written(tmp_path / folder) for folder in ("one", "two")))
        assert configs[0] == configs[1]
        same(*tensors)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize("scale", [0.1, 1 / 3, 16 / 7, np.float32(0.7)])
def test_scale_round_trips(scale, tmp_path):
    peft.save(tmp_path / "a", CFG, adapters(rank=7), scale=scale)
    np.testing.assert_allclose(peft.load(tmp_path / "a", CFG)[1], float(scale), rtol=1e-15)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3"])
def test_fused_adapters_with_a_shared_a_have_the_smaller_rank(name, tmp_path):
    cfg = CONFIGS[name]
    for rank, own in [(3, shared_a(adapters(cfg))), (9, adapters(cfg))]:
        peft.save(tmp_path / "a", cfg, own, scale=2.0)
        fields, tensors = written(tmp_path / "a")
        assert (fields["r"], fields["lora_alpha"]) == (rank, 2 * rank)
        same(peft.load(tmp_path / "a", cfg)[0], own)
        # Without the metadata, which other libraries do not save, the adapters are wider but the model is the same.
        st_numpy.save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
        plain, scale = peft.load(tmp_path / "a", cfg)
        merged, expected = (lora.merge(base(name), own_, scale=scale) for own_ in (plain, own))
        close(merged["layers"]["v"]["kernel"], expected["layers"]["v"]["kernel"], 1e-6)
        # Another round trip is bit-identical.
        peft.save(tmp_path / "b", cfg, plain, scale=scale)
        again, _ = peft.load(tmp_path / "b", cfg)
        same(again, plain)
        assert written(tmp_path / "b")[0]["r"] == rank


def edited(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 4}),
        ("modules_to_save", ["lm_head"]),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("layers_to_transform", [1]),
        ("init_lora_weights", "pissa"),
        ("peft_type", "IA3"),
        ("fan_in_fan_out", True),
        ("something_new", 1),
    ],
)
def test_errors_name_unsupported_fields(field, value, tmp_path):
    peft.save(tmp_path / "a", CFG, adapters(), scale=1.0)
    edited(tmp_path / "a", **{field: value})
    with pytest.raises(ValueError, match=field):
        peft.load(tmp_path / "a", CFG)


def test_errors_name_missing_and_unexpected_tensors(tmp_path):
    folder, file = tmp_path / "a", tmp_path / "a" / "adapter_model.safetensors"
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        peft.load(folder, CFG)
    peft.save(folder, CFG, adapters(pattern="layers/q/kernel"), scale=1.0)
    tensors = st_numpy.load_file(file)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    st_numpy.save_file({k: v for k, v in tensors.items() if k != name}, file)
    with pytest.raises(ValueError, match=f"lacks the tensor {name}"):
        peft.load(folder, CFG)
    head = "base_model.model.lm_head.lora_A.weight"
    st_numpy.save_file(tensors | {head: tensors[name]}, file)
    with pytest.raises(ValueError, match=f"without a kernel in this LMConfig: {head}"):
        peft.load(folder, CFG)
    st_numpy.save_file(tensors | {name: tensors[name][:2].copy()}, file)
    with pytest.raises(ValueError, match=rf"{name} has shape \(2, 32\)"):
        peft.load(folder, CFG)
    st_numpy.save_file(tensors, file, metadata={"rlhf_jax": json.dumps({"layers/q": [0, 2]})})
    with pytest.raises(ValueError, match="contradicts the header of its file"):
        peft.load(folder, CFG)
    st_numpy.save_file({}, file)
    with pytest.raises(ValueError, match="has no adapters"):
        peft.load(folder, CFG)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        peft.load(folder, CFG)
    with pytest.raises(ValueError, match="nothing to write"):
        peft.save(tmp_path / "b", CFG, {}, scale=1.0)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"adapter_config\.json"):
        peft.save(tmp_path / "c", CFG, adapters(), scale=1.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "c"]


TARGETS = {
    "llama": [["q_proj", "v_proj"], "all-linear"],
    "gpt2": [["c_attn"], ["attn.c_proj", "c_attn", "c_fc"], "all-linear"],
    "gpt_neox": [["query_key_value"], "all-linear"],
    "phi3": [["qkv_proj"], "all-linear"],
}


def their_logits(model):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("name", "targets"), [(name, targets) for name in TARGETS for targets in TARGETS[name]])
def test_adapters_saved_by_peft_compute_the_same_logits(name, targets, rslora, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = pytest.importorskip("peft")
    cfg = CONFIGS[name]
    lm.save(tmp_path / "base", cfg, base(name))
    torch.manual_seed(0)
    how = theirs.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=targets,
        use_rslora=rslora,
        fan_in_fan_out=name == "gpt2",
        lora_dropout=0.1,
        task_type="CAUSAL_LM",
    )
    model = theirs.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), how)
    for key, weight in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    own, scale = peft.load(tmp_path / "adapter", cfg)
    assert scale == (3.0 if rslora else 1.5)
    expected = their_logits(model)
    np.testing.assert_array_less(
        abs(expected - logits_of(lora.attach(base(name), own, scale=scale), cfg)).max(), 2e-4 * abs(expected).max()
    )
    assert abs(expected - logits_of(base(name), cfg)).max() > 0.05 * abs(expected).max()
    # After a round trip, the tensors are bit-identical to PEFT's.
    peft.save(tmp_path / "back", cfg, own, scale=scale)
    same(written(tmp_path / "adapter")[1], written(tmp_path / "back")[1])


@pytest.mark.parametrize("pattern", [ALL, "layers/(q|v|out)/kernel"])
@pytest.mark.parametrize("name", CONFIGS)
def test_peft_loads_saved_adapters(name, pattern, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = pytest.importorskip("peft")
    cfg = CONFIGS[name]
    lm.save(tmp_path / "base", cfg, base(name))
    for own in (adapters(cfg, pattern=pattern), shared_a(adapters(cfg))):
        peft.save(tmp_path / "adapter", cfg, own, scale=SCALE, base_model_name=str(tmp_path / "base"))
        whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        adapted = theirs.PeftModel.from_pretrained(whole, tmp_path / "adapter")
        info = adapted.load_adapter(str(tmp_path / "adapter"), "default")
        assert not info.unexpected_keys and not [key for key in info.missing_keys if "lora" in key], info
        expected = logits_of(lora.attach(base(name), own, scale=SCALE), cfg)
        np.testing.assert_array_less(abs(their_logits(adapted) - expected).max(), 2e-4 * abs(expected).max())
