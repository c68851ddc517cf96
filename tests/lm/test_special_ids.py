"""Tests of the ids that end an answer and of the pad id in saved directories."""
# pyright: reportArgumentType=false, reportIndexIssue=false, reportUnhashable=false

import json
from typing import Any

import chat_cases
import family_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_families import GOLDEN, golden_directory

from rlhf_jax import generation, lm
from rlhf_jax.data import chat, tokenizers

CFG = lm.LMConfig(vocab_size=50, n_layers=1, d_model=16, n_heads=2, d_mlp=16, max_length=32)


@pytest.fixture
def saved(tmp_path):
    lm.save(tmp_path / "m", CFG, lm.init(jax.random.key(0), CFG))
    return tmp_path / "m"


def write(folder, *, config="absent", generation="absent"):
    """Sets ``eos_token_id`` in the two files of a directory; "absent" leaves the field or the file out."""
    fields = json.loads((folder / "config.json").read_text())
    fields.pop("eos_token_id", None)
    (folder / "config.json").write_text(json.dumps(fields | ({} if config == "absent" else {"eos_token_id": config})))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation != "absent":
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation, "pad_token_id": 7}))


@pytest.mark.parametrize(
    "config, generation, stop_ids",
    [
        ("absent", "absent", ()),
        (None, None, ()),
        (3, "absent", (3,)),
        ("absent", 0, (0,)),
        (9, [2, 0], (0, 2, 9)),
        ([4, 3], 3, (3, 4)),
        ([], [49], (49,)),
    ],
)
def test_both_files_tell_which_ids_end_an_answer(config, generation, stop_ids, saved):
    write(saved, config=config, generation=generation)
    assert lm.load_stop_ids(saved) == stop_ids


@pytest.mark.parametrize("wrong", [-1, 50, "3", 1.0, True, [3, None], [[3]], {"a": 3}])
@pytest.mark.parametrize("file", ["config", "generation"])
def test_an_id_that_cannot_end_an_answer_is_an_error(wrong, file, saved):
    write(saved, **{file: wrong})
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id contains .*; it must be null, an id in \[0, 49"):
        lm.load_stop_ids(saved)


@pytest.mark.parametrize("stop_ids", [(4,), (4, 0), (np.int64(9), 4, 9)])
def test_the_ids_that_end_an_answer_are_saved(stop_ids, tmp_path):
    listed = list(dict.fromkeys(int(i) for i in stop_ids))
    lm.save(tmp_path / "m", CFG, lm.init(jax.random.key(0), CFG), stop_ids=stop_ids)
    config, generated = (
        json.loads((tmp_path / "m" / f"{name}config.json").read_text()) for name in ("", "generation_")
    )
    assert config["eos_token_id"] == (listed if len(listed) > 1 else listed[0])
    assert generated == {"eos_token_id": listed}
    assert lm.load_stop_ids(tmp_path / "m") == tuple(sorted(listed))
    assert lm.load_config(tmp_path / "m").vocab_size == 50


def test_without_stop_ids_the_eos_token_of_the_tokenizer_is_saved(tmp_path):
    tokenizer = tokenizers.word_level(["a", "b"])
    cfg = lm.LMConfig(vocab_size=len(tokenizer), n_layers=1, d_model=16, n_heads=2)
    lm.save(tmp_path / "m", cfg, lm.init(jax.random.key(0), cfg), tokenizer)
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text()) == {
        "eos_token_id": [1],
        "pad_token_id": 0,
    }
    lm.save(tmp_path / "m", cfg, lm.init(jax.random.key(0), cfg))
    assert not (tmp_path / "m" / "generation_config.json").exists() and lm.load_stop_ids(tmp_path / "m") == ()


@pytest.mark.parametrize("argument", [{"stop_ids": (3, 50)}, {"stop_ids": (-1,)}, {"pad_id": 50}])
def test_an_id_outside_the_vocabulary_is_not_saved(argument, tmp_path):
    with pytest.raises(ValueError, match=rf"{next(iter(argument))} contains (50|-1); ids must be in \[0, 49\]"):
        lm.save(tmp_path / "m", CFG, lm.init(jax.random.key(0), CFG), **argument)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "family",
    [name if name == "gemma" else pytest.param(name, marks=pytest.mark.slow) for name in family_cases.FAMILY_CASES],
)
def test_transformers_stops_where_this_library_stops(family, tmp_path):
    torch: Any = pytest.importorskip("torch")
    import transformers

    cfg, params = lm.load(golden_directory(tmp_path / "m", f"{family}-0"))
    prompt = family_cases.prompts(cfg.vocab_size)[0][:1]
    unlimited = GOLDEN[f"{family}-0/greedy"][0].tolist()
    place = max(i for i in range(12) if unlimited[i] not in unlimited[:i])
    never = next(i for i in range(cfg.vocab_size) if i not in unlimited)
    lm.save(tmp_path / "saved", cfg, params, stop_ids=(never, unlimited[place]))
    stop_ids = lm.load_stop_ids(tmp_path / "saved")
    sampling = generation.Sampling(greedy=True, max_new_tokens=20, stop_ids=stop_ids)
    sampler = generation.RaggedSampler(cfg, sampling, widths=(prompt.shape[1],), slots=1)
    answer = sampler(params, jax.random.key(0), prompt.tolist())[0]
    assert answer.stopped and answer.ids == unlimited[: place + 1]
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path / "saved", attn_implementation="eager").eval()
    ids = torch.tensor(prompt)
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
    assert theirs[0, prompt.shape[1] :].tolist() == answer.ids


def reward_model(cfg):
    return lm.with_head(jax.random.key(1), lm.init(jax.random.key(0), cfg), cfg)


TURN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize(
    "specials, names, expected",
    [
        pytest.param(
            TURN_TOKENS, dict(eos="<|im_end|>", pad="<|im_end|>"), "<|endoftext|>", id="pad is the stop token"
        ),
        pytest.param(TURN_TOKENS, dict(eos="<|im_end|>"), "<|endoftext|>", id="no pad"),
        pytest.param(TURN_TOKENS, dict(eos="<|im_end|>", pad="<|endoftext|>"), "<|endoftext|>", id="a pad of its own"),
        pytest.param(TURN_TOKENS, dict(eos="<|endoftext|>", pad="<|endoftext|>"), "<|im_start|>", id="a base model"),
        pytest.param(
            (*TURN_TOKENS, "<|vision_pad|>"), dict(eos="<|endoftext|>"), "<|vision_pad|>", id="named after it"
        ),
        pytest.param(("<|im_end|>",), dict(eos="<|im_end|>", pad="<|im_end|>"), None, id="no other control token"),
    ],
)
def test_no_answer_ends_in_the_pad_token_of_a_reward_model(specials, names, expected, tmp_path):
    import transformers

    names = {f"{name}_token": token for name, token in names.items()}
    tokenizer = chat_cases.byte_level(specials, **names)
    stop_ids = sorted({tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id})
    cfg = lm.LMConfig(vocab_size=len(tokenizer), n_layers=2, d_model=32, n_heads=4, d_mlp=64, max_length=64)
    params = reward_model(cfg)
    lm.save(tmp_path / "m", cfg, params, tokenizer, stop_ids=stop_ids)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    auto: Any = transformers.AutoTokenizer
    saved = auto.from_pretrained(tmp_path / "m")
    pad_id = None if expected is None else tokenizer.convert_tokens_to_ids(expected)
    assert config["pad_token_id"] == saved.pad_token_id == pad_id
    assert saved.get_vocab() == tokenizer.get_vocab() and saved.eos_token == tokenizer.eos_token
    assert tokenizer.pad_token == names.get("pad_token"), "the tokenizer of the caller is unchanged"
    assert not (tmp_path / "m" / "generation_config.json").exists()

    torch: Any = pytest.importorskip("torch")
    end = "<|im_end|>"
    texts = [f"where is it{end}", f"where is the garden{end}{end}", f"the garden{end}" * 3]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    scores = [float(lm.score(params, jnp.asarray([row]), cfg=cfg)[0]) for row in rows]
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    for side in ("left", "right"):
        saved.padding_side = side
        batches = [texts] if expected else [[text] for text in texts]
        with torch.no_grad():
            found = [
                model(**saved(batch, return_tensors="pt", padding=len(batch) > 1)).logits[:, 0] for batch in batches
            ]
        np.testing.assert_allclose(torch.cat(found) + model.config.reward_bias, scores, atol=1e-5)
    if expected is None:
        with pytest.raises(ValueError, match="padding token"):
            saved(texts, return_tensors="pt", padding=True)


def test_the_pad_id_of_a_reward_model_without_a_tokenizer(tmp_path):
    for pad_id, expected in ((None, None), (7, 7), (3, None)):
        lm.save(tmp_path / "m", CFG, reward_model(CFG), stop_ids=(3,), pad_id=pad_id)
        assert json.loads((tmp_path / "m" / "config.json").read_text())["pad_token_id"] == expected


def test_a_language_model_keeps_the_pad_token_of_its_tokenizer(tmp_path):
    tokenizer = chat_cases.byte_level(TURN_TOKENS, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fmt = chat.chat_format(tokenizer, stop_ids=[tokenizer.convert_tokens_to_ids("<|endoftext|>")])
    cfg = lm.LMConfig(vocab_size=len(tokenizer), n_layers=1, d_model=16, n_heads=2)
    lm.save(tmp_path / "m", cfg, lm.init(jax.random.key(0), cfg), fmt.tokenizer)
    assert tokenizers.load(tmp_path / "m").pad_token == "<|im_end|>"
    generated = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert generated == {"eos_token_id": ends, "pad_token_id": ends[0]} and fmt.stop_ids == tuple(ends)
