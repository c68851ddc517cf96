"""Llama 2 to 3.3 and three similar families: Mistral, Qwen2 (which includes Qwen2.5) and Qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_jax.lm import config
from rlhf_jax.lm.hub.layouts import Family, Tensor, linear, norm, read_rope, read_window, rope_fields, write_window

FIELDS = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layers",
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "d_head",
    "intermediate_size": "d_mlp",
    "max_position_embeddings": "max_length",
    "rms_norm_eps": "norm_eps",
    "hidden_act": "activation",
    "tie_word_embeddings": "tie_embeddings",
}


def tensors(cfg: config.LMConfig) -> list[Tensor]:
    """Returns the tensors of the trunk, which have the same names in Llama, Mistral, Qwen2, Qwen3 and Gemma 1."""
    attention, mlp = "layers.{i}.self_attn.", "layers.{i}.mlp."
    listed = [
        Tensor("embed_tokens.weight", ("embed/tokens",)),
        *norm("layers/attn_norm", "layers.{i}.input_layernorm"),
        *linear("q", attention + "q_proj", bias=cfg.qkv_bias),
        *linear("k", attention + "k_proj", bias=cfg.qkv_bias),
        *linear("v", attention + "v_proj", bias=cfg.qkv_bias),
        *linear("out", attention + "o_proj", bias=cfg.out_bias),
        *norm("layers/mlp_norm", "layers.{i}.post_attention_layernorm"),
        *linear("gate", mlp + "gate_proj", bias=cfg.mlp_bias),
        *linear("up", mlp + "up_proj", bias=cfg.mlp_bias),
        *linear("down", mlp + "down_proj", bias=cfg.mlp_bias),
        *norm("final_norm", "norm"),
    ]
    if cfg.qk_norm:
        listed += norm("layers/q_norm", attention + "q_norm") + norm("layers/k_norm", attention + "k_norm")
    return listed


def read_biases(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `LMConfig` for ``attention_bias``, a single flag for q, k, v and output projections."""
    return {"qkv_bias": bool(hf.get("attention_bias")), "out_bias": bool(hf.get("attention_bias"))}


def _read_llama(hf: Mapping[str, Any]) -> dict[str, Any]:
    return read_rope(hf["rope_parameters"]) | read_biases(hf)


def _write_llama(cfg: config.LMConfig) -> dict[str, Any]:
    return rope_fields(cfg) | {"attention_bias": cfg.qkv_bias}


def _read_mistral(hf: Mapping[str, Any]) -> dict[str, Any]:
    return read_rope(hf["rope_parameters"]) | read_window(hf)


def _write_mistral(cfg: config.LMConfig) -> dict[str, Any]:
    return rope_fields(cfg) | {"sliding_window": cfg.sliding_window or None}


def _write_qwen2(cfg: config.LMConfig) -> dict[str, Any]:
    first = min((i for i in range(cfg.n_layers) if cfg.is_local(i)), default=cfg.n_layers)
    window = write_window(cfg) | {"use_sliding_window": cfg.windowed, "max_window_layers": first}
    return rope_fields(cfg) | window


LLAMA = Family(
    trunk="model.",
    class_name="Llama",
    tensors=tensors,
    fields=FIELDS | {"mlp_bias": "mlp_bias"},
    fixed={},
    read=_read_llama,
    write=_write_llama,
    only={"pretraining_tp": 1},
)
MISTRAL = Family("model.", "Mistral", tensors, FIELDS, {}, _read_mistral, _write_mistral)
QWEN2 = Family("model.", "Qwen2", tensors, FIELDS, {"qkv_bias": True}, _read_mistral, _write_qwen2)
QWEN3 = Family(
    trunk="model.",
    class_name="Qwen3",
    tensors=tensors,
    fields=FIELDS,
    fixed={"qk_norm": True},
    read=lambda hf: _read_mistral(hf) | read_biases(hf),
    write=lambda cfg: _write_qwen2(cfg) | {"attention_bias": cfg.qkv_bias},
)
