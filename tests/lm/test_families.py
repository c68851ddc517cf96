"""Compares every model family with stored numbers and, if torch is installed, with transformers."""

import functools
import json
import pathlib
from typing import Any

import family_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as st_numpy

from rlhf_jax import generation, lm, masking

GOLDEN = np.load(pathlib.Path(family_cases.__file__).with_name("golden_families.npz"))
TOLERANCE = 2e-4
"""Of a logit, as a share of the largest."""

every_case = pytest.mark.parametrize("name", family_cases.CASES)


def golden_directory(folder, name):
    shapes = json.loads(str(GOLDEN[f"{name}/shapes"]))
    return family_cases.write(folder, name, {tensor: tuple(shape) for tensor, shape in shapes.items()})


@functools.partial(jax.jit, static_argnames="cfg")
def logits_and_greedy(params, tokens_BP, mask_BP, *, cfg):
    hidden_BPD = lm.forward(params, tokens_BP, cfg=cfg, mask_BL=mask_BP).hidden_BLD
    sampling = generation.Sampling(greedy=True, max_new_tokens=family_cases.NEW_TOKENS)
    rng_B = jax.random.split(jax.random.key(0), len(tokens_BP))
    rollout = generation.generate(params, rng_B, tokens_BP, mask_BP, cfg=cfg, sampling=sampling)
    return lm.logits(params, hidden_BPD, cfg=cfg), rollout.tokens_BL[:, tokens_BP.shape[1] :]


def ours(cfg, params):
    tokens, mask = family_cases.prompts(cfg.vocab_size)
    found = logits_and_greedy(params, jnp.asarray(tokens), jnp.asarray(mask), cfg=cfg)
    return tuple(np.asarray(x) for x in found)


def assert_close(theirs, mine):
    assert np.abs(theirs - mine).max() < TOLERANCE * np.abs(theirs).max()


@pytest.mark.parametrize(
    "name", [name if name.endswith("-0") else pytest.param(name, marks=pytest.mark.slow) for name in family_cases.CASES]
)
def test_logits_and_greedy_tokens_equal_the_stored_values(name, tmp_path):
    cfg, params = lm.load(golden_directory(tmp_path / "m", name))
    assert cfg.model_type == family_cases.CASES[name][0] and cfg == lm.load_config(tmp_path / "m")
    logits, tokens = ours(cfg, params)
    assert_close(GOLDEN[f"{name}/logits"], logits[:, -GOLDEN[f"{name}/logits"].shape[1] :])
    np.testing.assert_array_equal(tokens, GOLDEN[f"{name}/greedy"])


@every_case
def test_load_save_load_keeps_the_model_type_and_is_bit_identical(name, tmp_path):
    cfg, params = lm.load(golden_directory(tmp_path / "m", name))
    lm.save(tmp_path / "again", cfg, params)
    assert lm.load_config(tmp_path / "again") == cfg
    first, second = (st_numpy.load_file(tmp_path / folder / "model.safetensors") for folder in ("m", "again"))
    assert first.keys() == second.keys()
    for tensor, array in first.items():
        np.testing.assert_array_equal(array, second[tensor], err_msg=tensor)


@every_case
def test_transformers_computes_the_same_logits(name, tmp_path):
    torch: Any = pytest.importorskip("torch")
    import make_golden
    import transformers

    made = make_golden.model_of(name)
    made.save_pretrained(tmp_path / "theirs")
    cfg, params = lm.load(tmp_path / "theirs")
    tokens, mask = family_cases.prompts(cfg.vocab_size)
    with torch.no_grad():
        theirs = make_golden.logits(made, tokens, mask).numpy()
    logits, chosen = ours(cfg, params)
    assert_close(theirs[mask], logits[mask])
    np.testing.assert_array_equal(chosen, make_golden.greedy(made, tokens, mask, family_cases.NEW_TOKENS))

    lm.save(tmp_path / "ours", cfg, params)
    auto: Any = transformers.AutoModelForCausalLM
    back, info = auto.from_pretrained(tmp_path / "ours", output_loading_info=True, attn_implementation="eager")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(back) is type(made)
    with torch.no_grad():
        assert_close(theirs[mask], make_golden.logits(back.eval(), tokens, mask).numpy()[mask])


@pytest.mark.parametrize("family", family_cases.FAMILY_CASES)
def test_reward_models_are_sequence_classifiers(family, tmp_path):
    torch: Any = pytest.importorskip("torch")
    import transformers

    cfg, params = lm.load(golden_directory(tmp_path / "m", f"{family}-0"))
    params = lm.with_head(jax.random.key(0), params, cfg)
    params["head"] |= {"gain": jnp.float32(1.7), "bias": jnp.float32(-0.3)}
    lm.save(tmp_path / "rm", cfg, params, pad_id=0)
    auto: Any = transformers.AutoModelForSequenceClassification
    model, info = auto.from_pretrained(tmp_path / "rm", output_loading_info=True, attn_implementation="eager")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tokens, mask = family_cases.prompts(cfg.vocab_size)
    tokens, mask = np.where(mask, tokens, 0)[:, ::-1].copy(), mask[:, ::-1].copy()
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(tokens), attention_mask=torch.tensor(mask).long()).logits[:, 0].numpy()
    score = jax.jit(lambda params: lm.score(params, jnp.asarray(tokens), cfg=cfg, mask_BL=jnp.asarray(mask)))
    mine = np.asarray(score(params))
    np.testing.assert_allclose(theirs + model.config.reward_bias, mine, atol=TOLERANCE * np.abs(mine).max())
    # Loads the model that transformers saves.
    model.save_pretrained(tmp_path / "theirs")
    loaded_cfg, loaded = lm.load(tmp_path / "theirs")
    assert loaded_cfg == cfg and "unembed" not in loaded
    np.testing.assert_allclose(score(loaded), mine, atol=1e-5 * np.abs(mine).max())


@pytest.mark.parametrize("name", ["gpt2-0", "gpt2-1", "gpt2-2", "llama-0", "llama-1", "llama-2"])
def test_gradients_of_the_loss(name, tmp_path):
    torch: Any = pytest.importorskip("torch")
    import make_golden

    made = make_golden.model_of(name)
    tokens, mask = family_cases.prompts(made.config.vocab_size)
    where = mask & np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
    made.zero_grad()
    logprobs = torch.log_softmax(make_golden.logits(made, tokens, mask)[:, :-1], -1)
    picked = logprobs.gather(-1, torch.tensor(tokens)[:, 1:, None])[..., 0]
    loss = -picked[torch.tensor(where[:, 1:])].mean()
    loss.backward()

    cfg, params = lm.load(golden_directory(tmp_path / "m", name))

    @jax.jit
    @jax.value_and_grad
    def grads_of(params):
        logprobs_BL = lm.token_logprobs(params, jnp.asarray(tokens), cfg=cfg, mask_BL=jnp.asarray(mask))
        return -masking.masked_mean(logprobs_BL, where=jnp.asarray(where))

    value, grads = grads_of(params)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    # A gradient has the structure of the parameters, so it can be saved in the same layout and compared by name.
    lm.save(tmp_path / "grads", cfg, grads)
    mine = st_numpy.load_file(tmp_path / "grads" / "model.safetensors")
    theirs = {tensor: np.asarray(x.grad) for tensor, x in made.named_parameters()}
    assert mine.keys() == theirs.keys()
    for tensor, grad in theirs.items():
        # The gradient of a key's bias is 0, since the bias shifts all scores of a query equally.
        least = 1e-6 if tensor.endswith("k_proj.bias") else 0.0
        assert np.abs(mine[tensor] - grad).max() <= max(1e-3 * np.abs(grad).max(), least), tensor


def test_missing_config_fields_have_the_defaults_of_transformers(tmp_path):
    import transformers

    for family in family_cases.FAMILY_CASES:
        kind = transformers.CONFIG_MAPPING[family]
        folder = tmp_path / family
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": family}))
        short = lm.load_config(folder)
        kind().save_pretrained(folder)
        assert short == lm.load_config(folder)


@pytest.mark.parametrize(
    "name, change",
    [
        ("llama-0", dict(rope_theta=77.0)),
        ("mistral-1", dict(sliding_window=4)),
        ("qwen3-0", dict(use_sliding_window=True, sliding_window=4, max_window_layers=0)),
        ("gemma2-1", dict(final_logit_softcapping=2.0)),
        ("gemma3_text-1", dict(query_pre_attn_scalar=3)),
    ],
)
def test_each_field_of_the_config_changes_the_logits(name, change, tmp_path):
    folder = golden_directory(tmp_path / "m", name)
    before = ours(*lm.load(folder))[0]
    changed = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(changed))
    after = ours(*lm.load(folder))[0]
    assert np.abs(before - after).max() > 0.01 * np.abs(before).max()
    if family_cases.CASES[name][0] == "mistral":
        # The logits do not change if the window covers all earlier tokens.
        np.testing.assert_allclose(before[-1, -4:], after[-1, -4:], atol=1e-5)
