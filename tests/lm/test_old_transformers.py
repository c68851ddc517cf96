"""Reads saved models with an older version of transformers.

The test needs the path of a Python interpreter with torch and an older version of transformers, for example::

    python -m venv old && old/bin/pip install torch==2.13.0 transformers==4.57.1
    RLHF_JAX_OLD_TRANSFORMERS=$PWD/old/bin/python pytest -m slow tests/lm/test_old_transformers.py
"""

import json
import os
import pathlib
import subprocess

import chat_cases
import family_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_families import GOLDEN, TOLERANCE, golden_directory

from rlhf_jax import lm
from rlhf_jax.data import chat, tokenizers

OLD = os.environ.get("RLHF_JAX_OLD_TRANSFORMERS", "")
READER = pathlib.Path(family_cases.__file__).with_name("read_folder.py")
CHATML = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' }}{%- if m['role'] == 'assistant' -%}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{%- else -%}{{ m['content'] + '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
TEXTS = ["where is it?", " the  garden\n\nso ", "<|im_start|>user\nwhy<|im_end|>", "don't , I 'm 🙂 ", "سلام"]
CONVERSATION = [
    {"role": "user", "content": " where is it?\n"},
    {"role": "assistant", "content": "In the garden. "},
    {"role": "user", "content": "🙂"},
]


def saved_tokenizers():
    """Returns tokenizers of several kinds, with generation marks."""
    qwen = chat_cases.byte_level(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        template=CHATML,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=True,
    )
    own = tokenizers.train_bpe(["where is the garden"], vocab_size=300, special_tokens=["<|more|>"])
    return {
        "qwen": chat.chat_format(qwen),
        "own": chat.chat_format(own),
        "llama2": chat.chat_format(chat_cases.make_llama2(), model_type="llama"),
        "gemma": chat.chat_format(chat_cases.make_gemma(template=None), model_type="gemma"),
    }


@pytest.mark.slow
@pytest.mark.skipif(not OLD, reason="RLHF_JAX_OLD_TRANSFORMERS does not name an interpreter")
def test_an_older_version_of_transformers_computes_the_same(tmp_path):
    expected, rows = {}, {}
    for name, (family, _) in family_cases.CASES.items():
        cfg, params = lm.load(golden_directory(tmp_path / "golden" / name, name))
        tokens, mask = family_cases.prompts(cfg.vocab_size)
        root = tmp_path / str(cfg.vocab_size)
        root.mkdir(exist_ok=True)
        np.savez(root / "tokens.npz", tokens=tokens, mask=mask)
        unlimited = GOLDEN[f"{name}/greedy"][0].tolist()
        place = max(i for i in range(12) if unlimited[i] not in unlimited[:i])
        lm.save(root / name, cfg, params, stop_ids=[unlimited[place]])
        expected[name] = GOLDEN[f"{name}/logits"], unlimited[: place + 1]
        rows.setdefault(root, []).append(name)
        if name.endswith("-0"):
            rewarded = lm.with_head(jax.random.key(0), params, cfg)
            lm.save(root / f"{family}-rm", cfg, rewarded, pad_id=0)
            padded = jnp.asarray(np.where(mask, tokens, 0))
            expected[f"{family}-rm"] = lm.score(rewarded, padded, cfg=cfg, mask_BL=jnp.asarray(mask)), None
            rows[root].append(f"{family}-rm")
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "texts.json").write_text(json.dumps({"texts": TEXTS, "conversation": CONVERSATION}))
    np.savez(texts / "tokens.npz", tokens=np.ones((2, 3), np.int64), mask=np.ones((2, 3), bool))
    for name, fmt in saved_tokenizers().items():
        cfg = lm.LMConfig(vocab_size=len(fmt.tokenizer), n_layers=1, d_model=16, n_heads=2)
        params = lm.with_head(jax.random.key(0), lm.init(jax.random.key(0), cfg), cfg)
        lm.save(texts / name, cfg, params, fmt.tokenizer, stop_ids=fmt.stop_ids)
        rows.setdefault(texts, []).append(name)
    for root, names in rows.items():
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run([OLD, READER, root, *names], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]

    for name, (numbers, answer) in expected.items():
        (file,) = tmp_path.glob(f"*/{name}.npz")
        found = np.load(file)
        theirs = found["numbers"][:, 0] if answer is None else found["numbers"][:, -numbers.shape[1] :]
        assert np.abs(theirs - numbers).max() < TOLERANCE * np.abs(numbers).max(), name
        if answer is not None:
            assert found["answer"].tolist() == answer, name
    for name, fmt in saved_tokenizers().items():
        shown = json.loads(str(np.load(texts / f"{name}.npz")["tokenizer"]))
        ids = [fmt.tokenizer(text)["input_ids"] for text in TEXTS]
        assert shown["ids"] == ids, name
        assert shown["texts"] == [fmt.tokenizer.decode(row) for row in ids], name
        rendered = fmt.tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
        assert shown["rendered"] == rendered, name
        assert shown["pad"] == tokenizers.load(texts / name).pad_token, name
