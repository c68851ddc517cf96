"""GPT-NeoX and Pythia, with attention and MLP in parallel and rotation of only a part of each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_jax.lm import config
from rlhf_jax.lm.hub.families import llama
from rlhf_jax.lm.hub.layouts import Family, Tensor, linear, norm, read_rope, rope_fields


def _tensors(cfg: config.LMConfig) -> list[Tensor]:
    attention, mlp = "layers.{i}.attention.", "layers.{i}.mlp."
    return [
        Tensor("embed_in.weight", ("embed/tokens",)),
        *norm("layers/attn_norm", "layers.{i}.input_layernorm", bias=True),
        *linear("q k v", attention + "query_key_value", bias=cfg.qkv_bias, kind="interleaved"),
        *linear("out", attention + "dense", bias=cfg.out_bias),
        *norm("layers/mlp_norm", "layers.{i}.post_attention_layernorm", bias=True),
        *linear("up", mlp + "dense_h_to_4h", bias=True),
        *linear("down", mlp + "dense_4h_to_h", bias=True),
        *norm("final_norm", "final_layer_norm", bias=True),
    ]


def _read(hf: Mapping[str, Any]) -> dict[str, Any]:
    return read_rope(hf["rope_parameters"], partial=True) | llama.read_biases(hf)


def _write(cfg: config.LMConfig) -> dict[str, Any]:
    fields = rope_fields(cfg)
    fields["rope_parameters"]["partial_rotary_factor"] = cfg.rope_fraction
    old = {"rotary_pct": cfg.rope_fraction, "rotary_emb_base": fields.pop("rope_theta")}
    return fields | {"attention_bias": cfg.qkv_bias} | old


GPT_NEOX = Family(
    trunk="gpt_neox.",
    class_name="GPTNeoX",
    tensors=_tensors,
    fields={
        "vocab_size": "vocab_size",
        "num_hidden_layers": "n_layers",
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "intermediate_size": "d_mlp",
        "max_position_embeddings": "max_length",
        "layer_norm_eps": "norm_eps",
        "hidden_act": "activation",
        "use_parallel_residual": "parallel_residual",
        "tie_word_embeddings": "tie_embeddings",
    },
    fixed={"norm": "layernorm", "gated_mlp": False, "mlp_bias": True},
    read=_read,
    write=_write,
    unembed="embed_out.weight",
)
