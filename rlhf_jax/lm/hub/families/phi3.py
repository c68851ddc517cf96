"""Phi-3, a Llama with fused projections and, in some models, rotation of only a part of each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_jax.lm import config
from rlhf_jax.lm.hub.families import llama
from rlhf_jax.lm.hub.layouts import Family, Tensor, linear, norm, read_rope, read_window, rope_fields


def _tensors(cfg: config.LMConfig) -> list[Tensor]:
    return [
        Tensor("embed_tokens.weight", ("embed/tokens",)),
        *norm("layers/attn_norm", "layers.{i}.input_layernorm"),
        *linear("q k v", "layers.{i}.self_attn.qkv_proj", bias=False),
        *linear("out", "layers.{i}.self_attn.o_proj", bias=False),
        *norm("layers/mlp_norm", "layers.{i}.post_attention_layernorm"),
        *linear("gate up", "layers.{i}.mlp.gate_up_proj", bias=False),
        *linear("down", "layers.{i}.mlp.down_proj", bias=False),
        *norm("final_norm", "norm"),
    ]


def _read(hf: Mapping[str, Any]) -> dict[str, Any]:
    return read_rope(hf["rope_parameters"], partial=True) | read_window(hf)


def _write(cfg: config.LMConfig) -> dict[str, Any]:
    fields = rope_fields(cfg)
    fields["rope_parameters"]["partial_rotary_factor"] = cfg.rope_fraction
    old = {"partial_rotary_factor": cfg.rope_fraction, "original_max_position_embeddings": cfg.max_length}
    return fields | {"sliding_window": cfg.sliding_window or None} | old


PHI3 = Family("model.", "Phi3", _tensors, llama.FIELDS, {}, _read, _write)
