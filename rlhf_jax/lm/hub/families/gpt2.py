"""GPT-2, with learned positions, layer norms, and one tensor for queries, keys and values."""

from __future__ import annotations

from rlhf_jax.lm import config
from rlhf_jax.lm.hub.layouts import Family, Tensor, linear, norm


def _tensors(cfg: config.LMConfig) -> list[Tensor]:
    return [
        Tensor("wte.weight", ("embed/tokens",)),
        Tensor("wpe.weight", ("embed/positions",)),
        *norm("layers/attn_norm", "h.{i}.ln_1", bias=True),
        *linear("q k v", "h.{i}.attn.c_attn", bias=True, kind="rows_in"),
        *linear("out", "h.{i}.attn.c_proj", bias=True, kind="rows_in"),
        *norm("layers/mlp_norm", "h.{i}.ln_2", bias=True),
        *linear("up", "h.{i}.mlp.c_fc", bias=True, kind="rows_in"),
        *linear("down", "h.{i}.mlp.c_proj", bias=True, kind="rows_in"),
        *norm("final_norm", "ln_f", bias=True),
    ]


GPT2 = Family(
    trunk="transformer.",
    class_name="GPT2",
    tensors=_tensors,
    fields={
        "vocab_size": "vocab_size",
        "n_layer": "n_layers",
        "n_embd": "d_model",
        "n_head": "n_heads",
        "n_inner": "d_mlp",
        "n_positions": "max_length",
        "layer_norm_epsilon": "norm_eps",
        "activation_function": "activation",
        "tie_word_embeddings": "tie_embeddings",
    },
    fixed={
        "norm": "layernorm",
        "gated_mlp": False,
        "positions": "learned",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
    },
    only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    lm_class="GPT2LMHeadModel",
)
