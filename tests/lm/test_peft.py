import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lora_cases import ALL, CFG, CONFIGS, SCALE, TOKENS, adapters, base, close, drawn, fresh, logits_of, same
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
        ("modules_to_save", ["lm_head"]),
        ("modules_to_save", ["score", "embed_tokens"]),
        ("modules_to_save", "score"),
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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("r", value) for value in (0, -4, 2.0, "8", None, True, float("nan"))],
        *[("lora_alpha", value) for value in (0, -16, "16", None, True, float("nan"), float("inf"))],
        *[("rank_pattern", {"q_proj": value}) for value in (0, -1, 1.5, None)],
        *[("alpha_pattern", {"q_proj": value}) for value in (0, "4", float("inf"))],
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"(q_proj": 4}),
        ("target_modules", "(q_proj"),
    ],
)
def test_errors_name_the_file_and_the_senseless_value(field, value, tmp_path):
    peft.save(tmp_path / "a", CFG, adapters(), scale=1.0)
    edited(tmp_path / "a", **{field: value})
    with pytest.raises(ValueError, match=rf"a/adapter_config\.json.*{field}"):
        peft.load(tmp_path / "a", CFG)
    if field in ("r", "lora_alpha"):
        file = tmp_path / "a" / "adapter_config.json"
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != field}))
        with pytest.raises(ValueError, match=rf"a/adapter_config\.json lacks the field {field}"):
            peft.load(tmp_path / "a", CFG)


@pytest.mark.parametrize("dtype", ["F64", "F16", "BF16", "I8", "F8_E4M3"])
def test_only_floating_point_files_are_read(dtype, tmp_path):
    """Quantised adapters would need scales, without which their numbers mean nothing."""
    own = jax.tree.map(lambda x: jnp.round(4 * x), adapters())
    peft.save(tmp_path / "a", CFG, own, scale=1.0)
    file = tmp_path / "a" / "adapter_model.safetensors"
    kinds = {"F64": np.float64, "F16": np.float16, "BF16": jnp.bfloat16, "I8": np.int8, "F8_E4M3": jnp.float8_e4m3fn}
    st_numpy.save_file({name: x.astype(kinds[dtype]) for name, x in st_numpy.load_file(file).items()}, file)
    if dtype in ("I8", "F8_E4M3"):
        with pytest.raises(ValueError, match=rf"adapter_model\.safetensors: base_model.* is {dtype}; only"):
            peft.load(tmp_path / "a", CFG)
    else:
        same(peft.load(tmp_path / "a", CFG)[0], own)


def with_head(own, *, heads=None, seed=3):
    shapes = lm.with_head(jax.random.key(0), {}, CFG, heads=heads)["head"]
    return {**own, "head": drawn(shapes, 1.0, seed)}


def scores_of(params, cfg=CFG):
    lengths = np.array([11, 7, 9])
    return lm.score(params, jnp.asarray(TOKENS), mask_BL=jnp.asarray(np.arange(11) < lengths[:, None]), cfg=cfg)


@pytest.mark.parametrize("heads", [None, 3])
def test_a_head_round_trips(heads, tmp_path):
    own = with_head(adapters(), heads=heads)
    peft.save(tmp_path / "a", CFG, own, scale=SCALE)
    loaded, scale = peft.load(tmp_path / "a", CFG)
    fields, _ = written(tmp_path / "a")
    assert (fields["task_type"], fields["modules_to_save"]) == ("SEQ_CLS", ["classifier", "score"])
    name = "kernel_D" if heads is None else "kernel_HD"
    gain = own["head"]["gain"] if heads is None else own["head"]["gain"][:, None]
    np.testing.assert_array_equal(loaded["head"][name], gain * own["head"][name])
    np.testing.assert_array_equal(loaded["head"]["bias"], own["head"]["bias"])
    np.testing.assert_array_equal(loaded["head"]["gain"], np.ones_like(own["head"]["gain"]))
    same(loaded["layers"], own["layers"])
    # The head of the adapters replaces the head of the base model, whatever its form.
    for start in (base(), base(head=True)):
        for join in (lora.attach, lora.merge):
            np.testing.assert_allclose(
                scores_of(join(start, loaded, scale=scale)), scores_of(join(start, own, scale=SCALE)), rtol=1e-5
            )
    # The form with two entries yields the same files, and so does another round trip.
    peft.save(tmp_path / "b", CFG, {"lora": adapters(), "head": own["head"]}, scale=SCALE)
    peft.save(tmp_path / "c", CFG, loaded, scale=scale)
    for folder in ("b", "c"):
        assert written(tmp_path / folder)[0] == fields
        same(written(tmp_path / folder)[1], written(tmp_path / "a")[1])
        np.testing.assert_array_equal(peft.load(tmp_path / folder, CFG)[0]["head"]["bias"], own["head"]["bias"])


def test_errors_about_heads(tmp_path):
    own = with_head(adapters())
    folder, file = tmp_path / "a", tmp_path / "a" / "adapter_model.safetensors"
    peft.save(folder, CFG, own, scale=1.0)
    tensors = st_numpy.load_file(file)
    name = "base_model.model.score.weight"
    st_numpy.save_file({k: v for k, v in tensors.items() if k != name}, file)
    with pytest.raises(ValueError, match=f"adapter_model.safetensors lacks the tensor {name}, but .*task_type"):
        peft.load(folder, CFG)
    edited(folder, task_type="CAUSAL_LM", modules_to_save=None)
    assert "head" not in peft.load(folder, CFG)[0]
    st_numpy.save_file(tensors | {name: np.zeros((1, 7), np.float32)}, file)
    with pytest.raises(ValueError, match=rf"safetensors: the tensor {name} has shape \(1, 7\)"):
        peft.load(folder, CFG)
    for bias in ("[1, 2]", '"a"', "NaN", "{"):
        st_numpy.save_file(tensors, file, metadata={"reward_bias": bias})
        with pytest.raises(ValueError, match=r"adapter_model.safetensors: .*reward_bias"):
            peft.load(folder, CFG)
    # Other libraries write no bias.
    st_numpy.save_file(tensors, file)
    np.testing.assert_array_equal(peft.load(folder, CFG)[0]["head"]["bias"], 0)
    for wrong in ({"kernel_D": own["head"]["kernel_D"]}, {**own["head"], "kernel_D": np.zeros(7)}):
        with pytest.raises(ValueError, match="the head has the shapes"):
            peft.save(tmp_path / "b", CFG, {**own, "head": wrong}, scale=1.0)
    for scale in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="scale is"):
            peft.save(tmp_path / "b", CFG, own, scale=scale)
    with pytest.raises(ValueError, match="not finite"):
        peft.save(tmp_path / "b", CFG, jax.tree.map(lambda x: x * np.nan, adapters()), scale=1.0)
    with pytest.raises(ValueError, match="head/bias contains a value that is not finite"):
        peft.save(tmp_path / "b", CFG, {**own, "head": {**own["head"], "bias": np.float32(np.nan)}}, scale=1.0)
    assert not (tmp_path / "b").exists()


def test_saving_a_model_with_adapters_names_merge(tmp_path):
    with pytest.raises(ValueError, match=r"lm\.lora\.merge"):
        lm.save(tmp_path / "a", CFG, lora.attach(base(), adapters(), scale=1.0))


def test_adapters_outside_the_targets_are_refused(tmp_path):
    """PEFT ignores tensors of modules that the fields exclude, so that the models would differ."""
    peft.save(tmp_path / "a", CFG, adapters(), scale=1.0)
    kept = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for fields in (
        {"layers_to_transform": 0},
        {"layers_to_transform": [1]},
        {"exclude_modules": ["q_proj"]},
        {"exclude_modules": r".*\.1\..*"},
        {"target_modules": ["q_proj"]},
        {"target_modules": r".*q_proj"},
    ):
        edited(tmp_path / "a", **(kept | {"layers_to_transform": None, "exclude_modules": None} | fields))
        with pytest.raises(ValueError, match=r"which PEFT ignores because .*adapter_config\.json"):
            peft.load(tmp_path / "a", CFG)


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


PATTERNS = {
    "ranks": {"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 7}},
    "alphas": {"alpha_pattern": {"q_proj": 1, r"0\.mlp\.up_proj": 30}},
    # The first pattern that matches decides. PEFT sorts the patterns when it saves them.
    "both": {
        "rank_pattern": {r"0\..*q_proj": 2, "q_proj": 5},
        "alpha_pattern": {"model.layers.1.mlp.up_proj": 9, "up_proj": 3},
    },
    "layers": {"layers_to_transform": [1], "rank_pattern": {"q_proj": 2}},
    "one layer": {"layers_to_transform": 0},
    "regex": {"target_modules": r".*(0.*q_proj|1.*(up|v)_proj)"},
    "excluded": {"exclude_modules": r".*1.*(v|up)_proj"},
}


def randomised(model, seed=0):
    torch = pytest.importorskip("torch")
    torch.manual_seed(seed)
    for key, weight in model.named_parameters():
        if "lora_" in key or "modules_to_save" in key:
            torch.nn.init.normal_(weight, std=0.3)
    return model


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("case", PATTERNS)
def test_patterns_of_peft_compute_the_same_logits(case, rslora, tmp_path):
    transformers, theirs = pytest.importorskip("transformers"), pytest.importorskip("peft")
    lm.save(tmp_path / "base", CFG, base())
    how = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj"], "use_rslora": rslora}
    how = theirs.LoraConfig(**(how | PATTERNS[case]), task_type="CAUSAL_LM")
    model = theirs.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), how)
    randomised(model).save_pretrained(tmp_path / "adapter")
    expected = their_logits(model)
    folder = tmp_path / "adapter"
    for _ in range(2):
        own, scale = peft.load(folder, CFG)
        found = logits_of(lora.attach(base(), own, scale=scale))
        np.testing.assert_array_less(abs(expected - found).max(), 2e-5 * abs(expected).max())
        # PEFT computes the same with the padded adapters.
        folder = tmp_path / "back"
        peft.save(folder, CFG, own, scale=scale)
        whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        np.testing.assert_allclose(
            their_logits(theirs.PeftModel.from_pretrained(whole, folder)), expected, atol=2e-5 * abs(expected).max()
        )


def their_scores(model):
    torch = pytest.importorskip("torch")
    tokens, mask = TOKENS.copy(), np.arange(11) < np.array([11, 7, 9])[:, None]
    tokens[~mask] = 0
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits.numpy()


def sequence_classifier(folder, labels):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
    model.config.pad_token_id = 0
    return model


@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_peft_computes_the_same_scores(name, heads, tmp_path):
    """Reward models in PEFT's form, in both directions; the base model of the directory is a language model."""
    theirs = pytest.importorskip("peft")
    cfg, labels = CONFIGS[name], heads or 1
    lm.save(tmp_path / "base", cfg, base(name))
    own = with_head(adapters(cfg), heads=heads)
    peft.save(tmp_path / "ours", cfg, own, scale=SCALE)
    loaded = theirs.PeftModel.from_pretrained(sequence_classifier(tmp_path / "base", labels), tmp_path / "ours")
    expected = np.asarray(scores_of(lora.attach(base(name), own, scale=SCALE), cfg)).reshape(3, labels)
    found = their_scores(loaded) + np.asarray(own["head"]["bias"])
    np.testing.assert_allclose(found, expected, atol=2e-5 * abs(expected).max())

    how = theirs.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", fan_in_fan_out=name == "gpt2", task_type="SEQ_CLS"
    )
    model = randomised(theirs.get_peft_model(sequence_classifier(tmp_path / "base", labels), how))
    model.save_pretrained(tmp_path / "theirs")
    own, scale = peft.load(tmp_path / "theirs", cfg)
    expected = their_scores(model)
    found = np.asarray(scores_of(lora.attach(base(name), own, scale=scale), cfg)).reshape(3, labels)
    np.testing.assert_allclose(found, expected, atol=2e-5 * abs(expected).max())
    # Our directory contains the same tensors under the same names.
    peft.save(tmp_path / "back", cfg, own, scale=scale)
    same(written(tmp_path / "theirs")[1], written(tmp_path / "back")[1])
