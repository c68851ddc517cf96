"""Gemma 1, 2 and 3 (text only).

All three scale the embeddings and multiply by 1 + scale in norms. Gemma 2 also has soft caps, and Gemma 2 and 3 use
a sliding window only in some layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_jax.lm import config
from rlhf_jax.lm.hub.families import llama
from rlhf_jax.lm.hub.layouts import Family, Tensor, norm, read_rope, read_window, rope_fields, write_rope, write_window

_FIXED = {"norm_plus_one": True, "embed_scale": True}
_FIELDS = {theirs: ours for theirs, ours in llama.FIELDS.items() if theirs != "hidden_act"}
_FIELDS_2 = _FIELDS | {
    "hidden_activation": "activation",
    "final_logit_softcapping": "final_softcap",
    "attn_logit_softcapping": "attn_softcap",
}
_ONLY = {"use_bidirectional_attention": False}


def _tensors_2(cfg: config.LMConfig) -> list[Tensor]:
    # In other families, this norm is the one before the MLP; in Gemma 2 and 3, the norm after attention has this name.
    before = "layers.{i}.post_attention_layernorm.weight"
    return [
        *(tensor for tensor in llama.tensors(cfg) if tensor.name != before),
        *norm("layers/attn_post_norm", "layers.{i}.post_attention_layernorm"),
        *norm("layers/mlp_norm", "layers.{i}.pre_feedforward_layernorm"),
        *norm("layers/mlp_post_norm", "layers.{i}.post_feedforward_layernorm"),
    ]


def _read_1(hf: Mapping[str, Any]) -> dict[str, Any]:
    return read_rope(hf["rope_parameters"]) | llama.read_biases(hf)


def _write_1(cfg: config.LMConfig) -> dict[str, Any]:
    return rope_fields(cfg) | {"attention_bias": cfg.qkv_bias}


def _read_2(hf: Mapping[str, Any]) -> dict[str, Any]:
    return _read_1(hf) | read_window(hf) | {"attn_scale": hf["query_pre_attn_scalar"] ** -0.5}


def _write_2(cfg: config.LMConfig) -> dict[str, Any]:
    exact = cfg.attn_scale**-2
    scalar = round(exact) if round(exact) ** -0.5 == cfg.attn_scale else exact
    return _write_1(cfg) | write_window(cfg) | {"query_pre_attn_scalar": scalar}


def _read_3(hf: Mapping[str, Any]) -> dict[str, Any]:
    ropes = hf["rope_parameters"]
    found = _read_2({**hf, "rope_parameters": ropes["full_attention"]})
    local = read_rope(ropes["sliding_attention"])
    if "sliding_window" not in found or ropes["sliding_attention"] == ropes["full_attention"]:
        return found
    if local.get("rope_scaling") is not None:
        raise ValueError("rope scaling of sliding_attention layers is not supported (only of full_attention layers)")
    return found | {"local_rope_theta": local["rope_theta"]}


def _write_3(cfg: config.LMConfig) -> dict[str, Any]:
    rope = write_rope(cfg)
    local = {"rope_type": "default", "rope_theta": cfg.local_rope_theta} if cfg.local_rope_theta else rope
    nested = {"full_attention": rope, "sliding_attention": local}
    return _write_2(cfg) | {"rope_parameters": nested, "rope_local_base_freq": local["rope_theta"]}


GEMMA = Family(
    trunk="model.",
    class_name="Gemma",
    tensors=llama.tensors,
    fields=_FIELDS | {"hidden_act": "activation"},
    fixed=_FIXED,
    read=_read_1,
    write=_write_1,
    only=_ONLY,
)
GEMMA2 = Family(
    trunk="model.",
    class_name="Gemma2",
    tensors=_tensors_2,
    fields=_FIELDS_2,
    fixed=_FIXED | {"post_norms": True},
    read=_read_2,
    write=_write_2,
    only=_ONLY,
)
GEMMA3 = Family(
    trunk="model.",
    class_name="Gemma3Text",
    tensors=_tensors_2,
    fields=_FIELDS_2,
    fixed=_FIXED | {"post_norms": True, "qk_norm": True},
    read=_read_3,
    write=_write_3,
    only=_ONLY,
    lm_class="Gemma3ForCausalLM",
)
