"""Three small models of every family: a config.json, and weights generated from the names of the tensors.

The parity tests, which need torch, and the tests against golden numbers, which do not, use the same models.
"""

import json
import pathlib
import zlib
from typing import Any

import numpy as np
from safetensors import numpy as st_numpy

_LLAMA: dict[str, Any] = dict(
    vocab_size=97,
    hidden_size=36,
    intermediate_size=50,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)
_LLAMA3_ROPE = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
_GEMMA: dict[str, Any] = _LLAMA | dict(head_dim=8, tie_word_embeddings=True, hidden_size=40, num_attention_heads=4)
_GPT2: dict[str, Any] = dict(vocab_size=89, n_embd=36, n_layer=2, n_head=3, n_positions=96)
_NEOX: dict[str, Any] = dict(
    vocab_size=83,
    hidden_size=48,
    intermediate_size=70,
    num_hidden_layers=2,
    num_attention_heads=3,
    max_position_embeddings=96,
    tie_word_embeddings=False,
)
_OPT: dict[str, Any] = dict(
    vocab_size=79, hidden_size=30, ffn_dim=44, num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=90
)
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"

FAMILY_CASES: dict[str, list[dict[str, Any]]] = {
    "gpt2": [
        _GPT2,
        _GPT2 | dict(n_inner=50, activation_function="gelu", tie_word_embeddings=False),
        _GPT2 | dict(n_head=4, activation_function="relu", layer_norm_epsilon=1e-3),
    ],
    "gpt_neox": [
        _NEOX | dict(rotary_pct=0.25, rotary_emb_base=10000),
        _NEOX | dict(rotary_pct=0.5, rotary_emb_base=500, use_parallel_residual=False, tie_word_embeddings=True),
        _NEOX | dict(rotary_pct=1.0, attention_bias=False, hidden_act="gelu_fast"),
    ],
    "llama": [
        _LLAMA | dict(rope_theta=1234.0),
        _LLAMA | dict(rope_theta=5e5, rope_scaling=_LLAMA3_ROPE, tie_word_embeddings=True, num_key_value_heads=6),
        _LLAMA
        | dict(attention_bias=True, mlp_bias=True, head_dim=10, rope_scaling=dict(rope_type="linear", factor=2.5)),
    ],
    "mistral": [
        _LLAMA | dict(sliding_window=4),
        _LLAMA | dict(sliding_window=None, num_key_value_heads=1, head_dim=8),
        _LLAMA | dict(sliding_window=7, tie_word_embeddings=True, rope_theta=1e6),
    ],
    "qwen2": [
        _LLAMA | dict(use_sliding_window=False, rope_theta=1e6),
        _LLAMA | dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
        _LLAMA | dict(tie_word_embeddings=True, num_key_value_heads=3),
    ],
    "qwen3": [
        _LLAMA | dict(head_dim=16, rope_theta=1e6),
        _LLAMA | dict(head_dim=8, tie_word_embeddings=True, attention_bias=True),
        _LLAMA | dict(head_dim=6, use_sliding_window=True, sliding_window=5, max_window_layers=2),
    ],
    "gemma": [
        _GEMMA | dict(hidden_act="gelu"),
        _GEMMA | dict(num_key_value_heads=1, head_dim=12),
        _GEMMA | dict(attention_bias=True, hidden_act="gelu_pytorch_tanh", num_key_value_heads=4),
    ],
    "gemma2": [
        _GEMMA
        | dict(sliding_window=4, query_pre_attn_scalar=24, attn_logit_softcapping=3.0, final_logit_softcapping=5.0),
        _GEMMA | dict(sliding_window=6, attn_logit_softcapping=None, final_logit_softcapping=None),
        _GEMMA | dict(sliding_window=3, layer_types=[_GLOBAL, _LOCAL, _LOCAL], num_key_value_heads=1, head_dim=14),
    ],
    "gemma3_text": [
        _GEMMA
        | dict(
            sliding_window=5,
            sliding_window_pattern=2,
            rope_theta=1e6,
            rope_local_base_freq=1e4,
            rope_scaling=dict(rope_type="linear", factor=8.0),
        ),
        _GEMMA | dict(sliding_window=4, layer_types=[_LOCAL, _LOCAL, _GLOBAL], query_pre_attn_scalar=10),
        _GEMMA | dict(sliding_window=64, num_hidden_layers=7, final_logit_softcapping=4.0, num_key_value_heads=4),
    ],
    "opt": [
        _OPT,
        _OPT | dict(enable_bias=False, tie_word_embeddings=False),
        _OPT | dict(activation_function="gelu", num_attention_heads=5),
    ],
    "phi3": [
        _LLAMA,
        _LLAMA | dict(partial_rotary_factor=0.5, num_attention_heads=3, num_key_value_heads=3),
        _LLAMA | dict(sliding_window=4, tie_word_embeddings=True, num_key_value_heads=1),
    ],
}
CASES = {f"{family}-{i}": (family, case) for family, cases in FAMILY_CASES.items() for i, case in enumerate(cases)}

NEW_TOKENS = 64
LENGTHS = (15, 9, 4)
"""Lengths of the prompts, which are left-padded to the longest; longer than all windows except one."""

_NO_SPECIALS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)


def config_json(name: str) -> dict[str, Any]:
    """Returns the content of config.json."""
    family, case = CASES[name]
    return {"model_type": family, "dtype": "float32", **_NO_SPECIALS, **case}


def prompts(vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns ``(tokens_BP, mask_BP)``, with ordinary ids at padding."""
    width = max(LENGTHS)
    tokens = np.random.default_rng(7).integers(1, vocab_size, (len(LENGTHS), width))
    return tokens, np.arange(width)[None, :] >= width - np.array(LENGTHS)[:, None]


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns weights without zeros and ones, so that a test fails if a bias, a scale or a row is ignored."""
    name = name.replace("embed_out", "lm_head")  # named embed_out in GPT-NeoX files and lm_head in memory
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = rng.normal(size=shape)
    if len(shape) == 2:
        return (1.5 * values / np.sqrt(shape[1])).astype(np.float32)
    centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
    return (centre + 0.2 * values).astype(np.float32)


def write(folder: pathlib.Path, name: str, shapes: dict[str, tuple[int, ...]]) -> pathlib.Path:
    """Writes a model directory with tensors of these names and shapes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_json(name)))
    tensors = {tensor: weight(tensor, shape) for tensor, shape in shapes.items()}
    st_numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
