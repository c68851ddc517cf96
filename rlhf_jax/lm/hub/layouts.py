"""Conversion of ``config.json`` and tensors, shared by all families of Hugging Face models.

A `Family` (see :mod:`rlhf_jax.lm.hub.families`) consists of a table of ``config.json`` fields, a list of tensors, and
two functions for fields that must be computed. :mod:`rlhf_jax.lm.hub.directory` reads and writes the files.

`read_fields` and `Family.read` receive ``config.json`` as ``transformers`` reads it, with defaults filled in and older
field names replaced.
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
    """Name in the file, with ``{i}`` for the layer."""
    parts: tuple[str, ...]
    """Names of the parameters in the tensor; parameters under ``layers`` are those of layer i."""
    kind: str = "as_is"
    """How the tensor stores the parameters:

    * ``as_is``: unchanged.
    * ``rows_out``: as a torch ``Linear``, ``[out, in]``.
    * ``rows_in``: as a ``Conv1D`` of ``transformers``, ``[in, out]``.
    * ``interleaved``: as a torch ``Linear`` in which q, k and v of each head are adjacent.
    """


class Family(NamedTuple):
    """Conversion rules of one model type."""

    trunk: str
    """Prefix of all tensor names except those of the output layers."""
    class_name: str
    tensors: Callable[[config.LMConfig], list[Tensor]]
    """Tensors of the trunk, without the prefix."""
    fields: Mapping[str, str]
    """Maps names of fields in ``config.json`` to their names in `LMConfig`."""
    fixed: Mapping[str, Any]
    """Fields of `LMConfig` that have the same value in all models of the family."""
    read: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda hf: {}
    """Returns the fields of `LMConfig` that must be computed from ``config.json``."""
    write: Callable[[config.LMConfig], dict[str, Any]] = lambda cfg: {}
    """Inverse of ``read``."""
    only: Mapping[str, Any] = {}
    """Fields of ``config.json`` for which only the given value is supported."""
    unembed: str = "lm_head.weight"
    lm_class: str = ""
    """Class of the language model if it is not ``class_name + "ForCausalLM"``."""

    @property
    def base(self) -> str:
        """Prefix that tensor names lack if a model was saved without an output layer."""
        return self.trunk.split(".")[0] + "."


# ---------------------------------------------------------------------------------------------------- config.json


def read_fields(hf: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Returns the fields of `LMConfig`; raises ValueError for a value that is not supported."""
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
    """Returns all fields of ``config.json`` that affect the computation; zeros in `LMConfig` become null."""
    found: dict[str, Any] = {}
    for theirs, ours in family.fields.items():
        value = getattr(cfg, ours)
        found[theirs] = None if value == 0 and value is not False else value
    for theirs in [theirs for theirs, ours in family.fields.items() if ours == "activation"]:
        found[theirs] = _ACTIVATION_NAMES[cfg.activation]
    return found | dict(family.only) | family.write(cfg)


def read_rope(rope: Mapping[str, Any], *, partial: bool = False) -> dict[str, Any]:
    """Returns the fields of `LMConfig` for ``rope_parameters``.

    ``partial`` states whether models of the family may rotate only a part of each head.
    """
    kind = rope.get("rope_type", "default")
    found = {"rope_theta": float(rope["rope_theta"]), "rope_fraction": float(rope.get("partial_rotary_factor", 1.0))}
    if found["rope_fraction"] != 1 and not partial:
        raise ValueError(f"partial_rotary_factor = {found['rope_fraction']} is not supported for this model (only 1)")
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
    """Returns ``rope_parameters``, the inverse of `read_rope`."""
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


def rope_fields(cfg: config.LMConfig) -> dict[str, Any]:
    """Returns ``rope_parameters`` and the fields that versions of ``transformers`` before 5 read instead."""
    rope = write_rope(cfg)
    fields: dict[str, Any] = {"rope_parameters": rope, "rope_theta": cfg.rope_theta}
    if cfg.rope_scaling is not None:
        separate = ("rope_theta", "partial_rotary_factor")
        fields["rope_scaling"] = {name: value for name, value in rope.items() if name not in separate}
    return fields


def read_window(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `LMConfig` for ``sliding_window`` and ``layer_types``."""
    kinds = hf.get("layer_types") or ["sliding_attention"] * hf["num_hidden_layers"]
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise ValueError(f"layer type {kind!r} is not supported (only 'sliding_attention' and 'full_attention')")
    local = tuple(kind == "sliding_attention" for kind in kinds)
    if not hf.get("sliding_window") or not any(local):
        return {}
    return {"sliding_window": hf["sliding_window"], "local_layers": () if all(local) else local}


def write_window(cfg: config.LMConfig) -> dict[str, Any]:
    """Returns ``sliding_window`` and ``layer_types``, the inverse of `read_window`."""
    names = ["sliding_attention" if cfg.is_local(i) else "full_attention" for i in range(cfg.n_layers)]
    return {"sliding_window": cfg.sliding_window or None, "layer_types": names}


# -------------------------------------------------------------------------------------------------------- tensors


def linear(ours: str, theirs: str, *, bias: bool, kind: str = "rows_out") -> list[Tensor]:
    """Returns the tensors of a dense layer, or of several dense layers that share tensors.

    Args:
        ours: Names of the layers in this library, separated by spaces.
        theirs: Name of the layer in the file.
        bias: Whether the layer has a bias.
        kind: As in `Tensor`.

    Returns:
        The tensor of the kernel and, if ``bias``, the tensor of the bias.
    """
    names = ours.split()
    kernels = Tensor(f"{theirs}.weight", tuple(f"layers/{name}/kernel" for name in names), kind)
    biases = Tensor(f"{theirs}.bias", tuple(f"layers/{name}/bias" for name in names), kind)
    return [kernels, biases] if bias else [kernels]


def norm(ours: str, theirs: str, *, bias: bool = False) -> list[Tensor]:
    """Returns the tensors of a norm, which are its scale and, if ``bias``, its bias."""
    scale, shift = Tensor(f"{theirs}.weight", (f"{ours}/scale",)), Tensor(f"{theirs}.bias", (f"{ours}/bias",))
    return [scale, shift] if bias else [scale]


def input_axes(part: str) -> int:
    """Returns the number of leading axes of a layer's kernel that a matmul contracts; 0 for other parameters."""
    if not part.endswith("/kernel"):
        return 0
    return 2 if part == "layers/out/kernel" else 1


def pack(parts: list[np.ndarray], kind: str, inputs: int) -> np.ndarray:
    """Returns the checkpoint tensor that stores ``parts``; ``inputs`` is the result of `input_axes`."""
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
    """Returns the parameters that a checkpoint tensor stores; the inverse of `pack`.

    Args:
        tensor: The checkpoint tensor.
        kind: As in `Tensor`.
        inputs: Result of `input_axes`.
        shapes: Shapes of the parameters.

    Returns:
        One array per shape.
    """
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
    """Returns the shape of the result of `pack`."""
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
