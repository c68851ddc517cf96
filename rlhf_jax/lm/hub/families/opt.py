"""OPT, with ReLU and learned positions that start at row 2 of their table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_jax.lm import config
from rlhf_jax.lm.hub.layouts import Family, Tensor, linear, norm


def _tensors(cfg: config.LMConfig) -> list[Tensor]:
    attention = "layers.{i}.self_attn."
    return [
        Tensor("embed_tokens.weight", ("embed/tokens",)),
        Tensor("embed_positions.weight", ("embed/positions",)),
        *norm("layers/attn_norm", "layers.{i}.self_attn_layer_norm", bias=True),
        *linear("q", attention + "q_proj", bias=cfg.qkv_bias),
        *linear("k", attention + "k_proj", bias=cfg.qkv_bias),
        *linear("v", attention + "v_proj", bias=cfg.qkv_bias),
        *linear("out", attention + "out_proj", bias=cfg.out_bias),
        *norm("layers/mlp_norm", "layers.{i}.final_layer_norm", bias=True),
        *linear("up", "layers.{i}.fc1", bias=cfg.mlp_bias),
        *linear("down", "layers.{i}.fc2", bias=cfg.mlp_bias),
        *norm("final_norm", "final_layer_norm", bias=True),
    ]


def _read(hf: Mapping[str, Any]) -> dict[str, Any]:
    width = hf.get("word_embed_proj_dim")
    if width not in (None, hf["hidden_size"]):
        raise ValueError(f"word_embed_proj_dim = {width} is not supported (only {hf['hidden_size']}, the hidden_size)")
    return {name: bool(hf["enable_bias"]) for name in ("qkv_bias", "out_bias", "mlp_bias")}


def _write(cfg: config.LMConfig) -> dict[str, Any]:
    return {"enable_bias": cfg.qkv_bias, "word_embed_proj_dim": cfg.d_model}


OPT = Family(
    trunk="model.decoder.",
    class_name="OPT",
    tensors=_tensors,
    fields={
        "vocab_size": "vocab_size",
        "num_hidden_layers": "n_layers",
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "ffn_dim": "d_mlp",
        "max_position_embeddings": "max_length",
        "activation_function": "activation",
        "tie_word_embeddings": "tie_embeddings",
    },
    fixed={"norm": "layernorm", "norm_eps": 1e-5, "gated_mlp": False, "positions": "learned", "position_offset": 2},
    read=_read,
    write=_write,
    only={"do_layer_norm_before": True, "layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False},
)
