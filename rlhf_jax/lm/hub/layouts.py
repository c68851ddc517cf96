"""What the families of Hugging Face models have in common: how a config.json and a tensor are written and read.

A family (see :mod:`~rlhf_jax.lm.hub.families`) is a table of ``config.json`` fields, a list of tensors, and what is
particular to it as two small functions. :mod:`~rlhf_jax.lm.hub.directory` does the reading and writing.

Every ``config.json`` is seen as ``transformers`` understands it: with its defaults filled in and its older spellings
replaced, so that a family knows one spelling alone.
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
_ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}


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
    fields: Mapping[str, str]
    """Fields of ``config.json`` and what they are called in `LMConfig`."""
    fixed: Mapping[str, Any]
    """Fields of `LMConfig` that are the same in every model of the family."""
    read: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda hf: {}
    """Fields of `LMConfig` from ``config.json`` that are no mere renaming."""
    write: Callable[[config.LMConfig], dict[str, Any]] = lambda cfg: {}
    """Undoes ``read``."""
    only: Mapping[str, Any] = {}
    """Fields of ``config.json`` that change the computation, and the one value that is supported."""
    unembed: str = "lm_head.weight"
    lm_class: str = ""
    """Of the language model, where it is not ``class_name`` and ``ForCausalLM``."""

    @property
    def base(self) -> str:
        """The prefix that files of the bare model lack."""
        return self.trunk.split(".")[0] + "."


# ---------------------------------------------------------------------------------------------------- config.json


def read_fields(hf: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Fields of `LMConfig`; raises ``ValueError`` naming what is not supported."""
    for field, want in family.only.items():
        if hf.get(field, want) not in (want, None):
            raise ValueError(f"{field} = {hf[field]!r} is not supported (only {want!r})")
    found = {ours: hf[theirs] for theirs, ours in family.fields.items() if hf.get(theirs) is not None}
    found |= {**family.fixed, **family.read(hf)}
    activation = found.get("activation", "silu")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not supported (only {', '.join(sorted(_ACTIVATIONS))})")
    return found | {"activation": _ACTIVATIONS[activation]}


def write_fields(cfg: config.LMConfig, family: Family) -> dict[str, Any]:
    """Fields of ``config.json``, each that the computation depends on; what is 0 with us is null there."""
    found: dict[str, Any] = {}
    for theirs, ours in family.fields.items():
        value = getattr(cfg, ours)
        found[theirs] = None if value == 0 and value is not False else value
    for theirs in [theirs for theirs, ours in family.fields.items() if ours == "activation"]:
        found[theirs] = _ACTIVATION_NAMES[cfg.activation]
    return found | dict(family.only) | family.write(cfg)


def read_rope(rope: Mapping[str, Any], *, partial: bool = False) -> dict[str, Any]:
    """Fields of `LMConfig` from ``rope_parameters``; ``partial``: the family can rotate part of a head."""
    kind = rope.get("rope_type", "default")
    found = {"rope_theta": float(rope["rope_theta"]), "rope_fraction": float(rope.get("partial_rotary_factor", 1.0))}
    if found["rope_fraction"] != 1 and not partial:
        raise ValueError(f"partial_rotary_factor = {found['rope_fraction']} is not supported here (only 1)")
    if kind == "default":
        return found
    if kind == "linear":
        return found | {"rope_scaling": config.LinearScaling(float(rope["factor"]))}
    if kind == "llama3":
        factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
        length = int(rope["original_max_position_embeddings"])
        return found | {"rope_scaling": config.Llama3Scaling(factor, low, high, length)}
    raise ValueError(f"rope type {kind!r} is not supported (only 'default', 'linear' and 'llama3')")


def write_rope(cfg: config.LMConfig) -> dict[str, Any]:
    """Undo `read_rope`."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    if cfg.rope_fraction != 1:
        rope["partial_rotary_factor"] = cfg.rope_fraction
    match cfg.rope_scaling:
        case config.LinearScaling(factor):
            rope |= {"rope_type": "linear", "factor": factor}
        case config.Llama3Scaling(factor, low, high, length):
            rope |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            rope["original_max_position_embeddings"] = length
    return rope


def read_window(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `LMConfig` from ``sliding_window``, and from ``layer_types`` where only some layers have it."""
    kinds = hf.get("layer_types") or ["sliding_attention"] * hf["num_hidden_layers"]
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise ValueError(f"layer type {kind!r} is not supported (only 'sliding_attention' and 'full_attention')")
    local = tuple(kind == "sliding_attention" for kind in kinds)
    if not hf.get("sliding_window") or not any(local):
        return {}
    return {"sliding_window": hf["sliding_window"], "local_layers": () if all(local) else local}


def write_window(cfg: config.LMConfig) -> dict[str, Any]:
    """Undo `read_window`."""
    names = ["sliding_attention" if cfg.is_local(i) else "full_attention" for i in range(cfg.n_layers)]
    return {"sliding_window": cfg.sliding_window or None, "layer_types": names}


# -------------------------------------------------------------------------------------------------------- tensors


def linear(ours: str, theirs: str, *, bias: bool, kind: str = "rows_out") -> list[Tensor]:
    """A dense layer, or several in one tensor: ``ours`` names them with spaces between."""
    names = ours.split()
    kernels = Tensor(f"{theirs}.weight", tuple(f"layers/{name}/kernel" for name in names), kind)
    biases = Tensor(f"{theirs}.bias", tuple(f"layers/{name}/bias" for name in names), kind)
    return [kernels, biases] if bias else [kernels]


def norm(ours: str, theirs: str, *, bias: bool = False) -> list[Tensor]:
    """A norm's scale, and its bias."""
    scale, shift = Tensor(f"{theirs}.weight", (f"{ours}/scale",)), Tensor(f"{theirs}.bias", (f"{ours}/bias",))
    return [scale, shift] if bias else [scale]


def input_axes(part: str) -> int:
    """How many leading axes of a parameter (of one layer) are summed over where it is used."""
    if not part.endswith("/kernel"):
        return 0
    return 2 if part == "layers/out/kernel" else 1


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


def _flatten(part: np.ndarray, inputs: int) -> np.ndarray:
    rows = int(np.prod(part.shape[:inputs]))
    return part.reshape(rows, -1) if inputs else part.reshape(-1)
