"""How three families of Hugging Face models write what is in an ``LMConfig`` and in its parameters.

A family is a pair of functions for ``config.json`` and a list of tensors. Each tensor names the parameters in it and
how they lie there; :mod:`rlhf_jax.lm.hf` does the reading and writing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.lm import config

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
_ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}


class Tensor(NamedTuple):
    """One tensor of a checkpoint."""

    name: str
    """As in the file, ``{i}`` standing for the layer."""
    parts: tuple[str, ...]
    """The parameters in it; those under ``layers`` are taken at layer i."""
    kind: str = "as_is"
    """``as_is``; ``rows_out`` (a torch Linear, ``[out, in]``); ``rows_in`` (a Conv1D, ``[in, out]``);
    ``interleaved`` (a Linear whose output goes head by head, q then k then v)."""


class Family(NamedTuple):
    """What is particular to one model type."""

    trunk: str
    """Prefix of all tensors but the output layers."""
    class_name: str
    tensors: Callable[[config.LMConfig], list[Tensor]]
    """Those of the trunk, without the prefix."""
    unembed: str
    from_json: Callable[[Mapping[str, Any]], dict[str, Any]]
    to_json: Callable[[config.LMConfig], dict[str, Any]]
    requires: Callable[[config.LMConfig], dict[str, Any]]
    """What fields must be for ``cfg`` to be expressible."""


def pack(parts: list[np.ndarray], kind: str, inputs: int) -> np.ndarray:
    """Lay parameters out as a checkpoint tensor; ``inputs`` is how many leading axes of a kernel are summed over."""
    if kind == "as_is":
        (part,) = parts
        return part
    if kind == "interleaved":
        joined = np.stack(parts, axis=-2)
        flat = joined.reshape(joined.shape[0], -1) if inputs else joined.reshape(-1)
    else:
        flat = np.concatenate([_flatten(part, inputs) for part in parts], axis=-1)
    return flat.T if inputs and kind != "rows_in" else flat


def unpack(tensor: np.ndarray, kind: str, inputs: int, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """Undo :func:`pack`, given the parameters' shapes."""
    if kind == "as_is":
        return [tensor]
    flat = tensor.T if inputs and kind != "rows_in" else tensor
    if kind == "interleaved":
        first = shapes[0]
        joined = flat.reshape(*first[:-1], len(shapes), first[-1])
        return [joined[..., part, :] for part in range(len(shapes))]
    widths = [int(np.prod(shape[inputs:])) for shape in shapes]
    pieces = np.split(flat, np.cumsum(widths)[:-1], axis=-1)
    return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def packed_shape(shapes: list[tuple[int, ...]], kind: str, inputs: int) -> tuple[int, ...]:
    """Shape of :func:`pack`'s result."""
    if kind == "as_is":
        return shapes[0]
    out = sum(int(np.prod(shape[inputs:])) for shape in shapes)
    if not inputs:
        return (out,)
    rows = int(np.prod(shapes[0][:inputs]))
    return (rows, out) if kind == "rows_in" else (out, rows)


def family_of(cfg: config.LMConfig) -> str:
    """Return the model type that can hold ``cfg``; raises ``ValueError`` saying what each one lacks."""
    reasons = []
    for name, family in FAMILIES.items():
        wrong = {field: want for field, want in family.requires(cfg).items() if getattr(cfg, field) != want}
        if not wrong:
            return name
        reasons.append(f"{name} needs " + ", ".join(f"{field}={want!r}" for field, want in wrong.items()))
    raise ValueError("no known Hugging Face layout holds this LMConfig: " + "; ".join(reasons))


def _flatten(part: np.ndarray, inputs: int) -> np.ndarray:
    rows = int(np.prod(part.shape[:inputs]))
    return part.reshape(rows, -1) if inputs else part.reshape(-1)


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not supported; known: {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[name]


def _refuse(hf: Mapping[str, Any], **wanted: Any) -> None:
    for field, want in wanted.items():
        if hf.get(field, want) != want:
            raise ValueError(f"config.json has {field} = {hf[field]!r}, which is not supported (only {want!r})")


def _rope(hf: Mapping[str, Any], *, theta_key: str, theta: float, share_key: str, share: float) -> dict[str, Any]:
    # Two spellings: "rope_parameters" since transformers 5, loose fields and "rope_scaling" before.
    rope = dict(hf.get("rope_scaling") or {}) | dict(hf.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope type {kind!r} is not supported (only 'default')")
    return {
        "rope_theta": float(rope.get("rope_theta", hf.get(theta_key, theta))),
        "rope_fraction": float(rope.get("partial_rotary_factor", hf.get(share_key, share))),
    }


def _linear(ours: tuple[str, ...], theirs: str, kind: str, *, bias: bool) -> list[Tensor]:
    kernels = Tensor(f"{theirs}.weight", tuple(f"layers/{name}/kernel" for name in ours), kind)
    biases = Tensor(f"{theirs}.bias", tuple(f"layers/{name}/bias" for name in ours), kind)
    return [kernels, biases] if bias else [kernels]


def _norm(ours: str, theirs: str, *, bias: bool) -> list[Tensor]:
    scale, shift = Tensor(f"{theirs}.weight", (f"{ours}/scale",)), Tensor(f"{theirs}.bias", (f"{ours}/bias",))
    return [scale, shift] if bias else [scale]


def _llama_tensors(cfg: config.LMConfig) -> list[Tensor]:
    attention, mlp = "layers.{i}.self_attn.", "layers.{i}.mlp."
    return [
        Tensor("embed_tokens.weight", ("embed/tokens",)),
        *_norm("layers/attn_norm", "layers.{i}.input_layernorm", bias=False),
        *_linear(("q",), attention + "q_proj", "rows_out", bias=cfg.qkv_bias),
        *_linear(("k",), attention + "k_proj", "rows_out", bias=cfg.qkv_bias),
        *_linear(("v",), attention + "v_proj", "rows_out", bias=cfg.qkv_bias),
        *_linear(("out",), attention + "o_proj", "rows_out", bias=cfg.out_bias),
        *_norm("layers/mlp_norm", "layers.{i}.post_attention_layernorm", bias=False),
        *_linear(("gate",), mlp + "gate_proj", "rows_out", bias=cfg.mlp_bias),
        *_linear(("up",), mlp + "up_proj", "rows_out", bias=cfg.mlp_bias),
        *_linear(("down",), mlp + "down_proj", "rows_out", bias=cfg.mlp_bias),
        *_norm("final_norm", "norm", bias=False),
    ]


def _llama_from_json(hf: Mapping[str, Any]) -> dict[str, Any]:
    _refuse(hf, pretraining_tp=1)
    rope = _rope(hf, theta_key="rope_theta", theta=10_000.0, share_key="partial_rotary_factor", share=1.0)
    return rope | {
        "vocab_size": hf["vocab_size"],
        "n_layers": hf["num_hidden_layers"],
        "d_model": hf["hidden_size"],
        "n_heads": hf["num_attention_heads"],
        "n_kv_heads": hf.get("num_key_value_heads") or 0,
        "d_head": hf.get("head_dim") or 0,
        "d_mlp": hf["intermediate_size"],
        "max_length": hf.get("max_position_embeddings", 2048),
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "activation": _activation(hf.get("hidden_act", "silu")),
        "qkv_bias": hf.get("attention_bias", False),
        "out_bias": hf.get("attention_bias", False),
        "mlp_bias": hf.get("mlp_bias", False),
        "tie_embeddings": hf.get("tie_word_embeddings", False),
    }


def _llama_to_json(cfg: config.LMConfig) -> dict[str, Any]:
    return {
        "vocab_size": cfg.vocab_size,
        "num_hidden_layers": cfg.n_layers,
        "hidden_size": cfg.d_model,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.d_head,
        "intermediate_size": cfg.d_mlp,
        "max_position_embeddings": cfg.max_length,
        "rms_norm_eps": cfg.norm_eps,
        "hidden_act": _ACTIVATION_NAMES[cfg.activation],
        "attention_bias": cfg.qkv_bias,
        "mlp_bias": cfg.mlp_bias,
        "tie_word_embeddings": cfg.tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
        "rope_theta": cfg.rope_theta,
    }


def _llama_requires(cfg: config.LMConfig) -> dict[str, Any]:
    return {
        "norm": "rmsnorm",
        "positions": "rope",
        "rope_fraction": 1.0,
        "gated_mlp": True,
        "parallel_residual": False,
        "out_bias": cfg.qkv_bias,
    }


def _gpt2_tensors(cfg: config.LMConfig) -> list[Tensor]:
    return [
        Tensor("wte.weight", ("embed/tokens",)),
        Tensor("wpe.weight", ("embed/positions",)),
        *_norm("layers/attn_norm", "h.{i}.ln_1", bias=True),
        *_linear(("q", "k", "v"), "h.{i}.attn.c_attn", "rows_in", bias=True),
        *_linear(("out",), "h.{i}.attn.c_proj", "rows_in", bias=True),
        *_norm("layers/mlp_norm", "h.{i}.ln_2", bias=True),
        *_linear(("up",), "h.{i}.mlp.c_fc", "rows_in", bias=True),
        *_linear(("down",), "h.{i}.mlp.c_proj", "rows_in", bias=True),
        *_norm("final_norm", "ln_f", bias=True),
    ]


def _gpt2_from_json(hf: Mapping[str, Any]) -> dict[str, Any]:
    _refuse(hf, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return {
        "vocab_size": hf["vocab_size"],
        "n_layers": hf["n_layer"],
        "d_model": hf["n_embd"],
        "n_heads": hf["n_head"],
        "d_mlp": hf.get("n_inner") or 0,
        "max_length": hf.get("n_positions", hf.get("n_ctx", 1024)),
        "norm": "layernorm",
        "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        "activation": _activation(hf.get("activation_function", "gelu_new")),
        "gated_mlp": False,
        "positions": "learned",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "tie_embeddings": hf.get("tie_word_embeddings", True),
    }


def _gpt2_to_json(cfg: config.LMConfig) -> dict[str, Any]:
    return {
        "vocab_size": cfg.vocab_size,
        "n_layer": cfg.n_layers,
        "n_embd": cfg.d_model,
        "n_head": cfg.n_heads,
        "n_inner": cfg.d_mlp,
        "n_positions": cfg.max_length,
        "layer_norm_epsilon": cfg.norm_eps,
        "activation_function": _ACTIVATION_NAMES[cfg.activation],
        "tie_word_embeddings": cfg.tie_embeddings,
    }


def _gpt2_requires(cfg: config.LMConfig) -> dict[str, Any]:
    return {
        "norm": "layernorm",
        "positions": "learned",
        "gated_mlp": False,
        "parallel_residual": False,
        "n_kv_heads": cfg.n_heads,
        "d_head": cfg.d_model // cfg.n_heads,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
    }


def _neox_tensors(cfg: config.LMConfig) -> list[Tensor]:
    attention, mlp = "layers.{i}.attention.", "layers.{i}.mlp."
    return [
        Tensor("embed_in.weight", ("embed/tokens",)),
        *_norm("layers/attn_norm", "layers.{i}.input_layernorm", bias=True),
        *_linear(("q", "k", "v"), attention + "query_key_value", "interleaved", bias=cfg.qkv_bias),
        *_linear(("out",), attention + "dense", "rows_out", bias=cfg.out_bias),
        *_norm("layers/mlp_norm", "layers.{i}.post_attention_layernorm", bias=True),
        *_linear(("up",), mlp + "dense_h_to_4h", "rows_out", bias=True),
        *_linear(("down",), mlp + "dense_4h_to_h", "rows_out", bias=True),
        *_norm("final_norm", "final_layer_norm", bias=True),
    ]


def _neox_from_json(hf: Mapping[str, Any]) -> dict[str, Any]:
    rope = _rope(hf, theta_key="rotary_emb_base", theta=10_000.0, share_key="rotary_pct", share=0.25)
    return rope | {
        "vocab_size": hf["vocab_size"],
        "n_layers": hf["num_hidden_layers"],
        "d_model": hf["hidden_size"],
        "n_heads": hf["num_attention_heads"],
        "d_mlp": hf["intermediate_size"],
        "max_length": hf.get("max_position_embeddings", 2048),
        "norm": "layernorm",
        "norm_eps": hf.get("layer_norm_eps", 1e-5),
        "activation": _activation(hf.get("hidden_act", "gelu")),
        "gated_mlp": False,
        "parallel_residual": hf.get("use_parallel_residual", True),
        "qkv_bias": hf.get("attention_bias", True),
        "out_bias": hf.get("attention_bias", True),
        "mlp_bias": True,
        "tie_embeddings": hf.get("tie_word_embeddings", False),
    }


def _neox_to_json(cfg: config.LMConfig) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta, "partial_rotary_factor": cfg.rope_fraction}
    return {
        "vocab_size": cfg.vocab_size,
        "num_hidden_layers": cfg.n_layers,
        "hidden_size": cfg.d_model,
        "num_attention_heads": cfg.n_heads,
        "intermediate_size": cfg.d_mlp,
        "max_position_embeddings": cfg.max_length,
        "layer_norm_eps": cfg.norm_eps,
        "hidden_act": _ACTIVATION_NAMES[cfg.activation],
        "use_parallel_residual": cfg.parallel_residual,
        "attention_bias": cfg.qkv_bias,
        "tie_word_embeddings": cfg.tie_embeddings,
        "rope_parameters": rope,
        "rotary_emb_base": cfg.rope_theta,
        "rotary_pct": cfg.rope_fraction,
    }


def _neox_requires(cfg: config.LMConfig) -> dict[str, Any]:
    return {
        "norm": "layernorm",
        "positions": "rope",
        "gated_mlp": False,
        "n_kv_heads": cfg.n_heads,
        "d_head": cfg.d_model // cfg.n_heads,
        "out_bias": cfg.qkv_bias,
        "mlp_bias": True,
    }


FAMILIES: dict[str, Family] = {
    "llama": Family(
        "model.", "Llama", _llama_tensors, "lm_head.weight", _llama_from_json, _llama_to_json, _llama_requires
    ),
    "gpt2": Family(
        "transformer.", "GPT2", _gpt2_tensors, "lm_head.weight", _gpt2_from_json, _gpt2_to_json, _gpt2_requires
    ),
    "gpt_neox": Family(
        "gpt_neox.", "GPTNeoX", _neox_tensors, "embed_out.weight", _neox_from_json, _neox_to_json, _neox_requires
    ),
}
