"""Reading and writing of PEFT adapter directories, without PEFT or torch.

An adapter directory contains ``adapter_config.json`` and ``adapter_model.safetensors``. In some families, one tensor of
the checkpoint stores several kernels, such as the query, key and value kernels of GPT-2. PEFT has one A and one B for
such a tensor, while :mod:`rlhf_jax.lm.lora` has an A and a B for each kernel. The conversion is exact:

* If all kernels have the same A, `save` writes A once and the B matrices side by side.
* Otherwise, `save` concatenates the A matrices and writes a block-diagonal B. The rank is the sum of the ranks.
* `load` returns, for each kernel, the ranks of A and the part of B that belong to the kernel.

A directory has a single rank ``r``, so adapters of lower rank are padded with zeros. The scale is ``lora_alpha / r``,
or ``lora_alpha / sqrt(r)`` in a loaded directory with ``use_rslora``. The safetensors header records which ranks belong
to each kernel, so that `load` returns exactly the saved adapters.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from rlhf_jax import types
from rlhf_jax.lm import config, lora
from rlhf_jax.lm import params as lm_params
from rlhf_jax.lm.hub import directory, families, layouts, tensor_files

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_A, _B = "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"

_READ = ("peft_type", "r", "lora_alpha", "use_rslora", "fan_in_fan_out", "init_lora_weights")
_WITHOUT_EFFECT = (
    *("auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "inference_mode", "lora_dropout"),
    *("megatron_core", "peft_version", "qalora_group_size", "revision", "target_modules", "task_type"),
)
"""Fields that do not affect the computation. Tensor names, not ``target_modules``, show which layers are adapted."""
_BASE_KEPT = (True, False, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the weights of the base model unchanged."""

Spans = Mapping[str, tuple[int, int]]
"""Range (start, stop) of the ranks that belong to each kernel."""


class _Module(NamedTuple):
    """A linear module of the Hugging Face model; its name contains ``{i}`` for the layer."""

    name: str
    nodes: tuple[str, ...]
    """Paths of its kernels in this library, in the order in which the tensor stores them."""
    kind: str
    inputs: int
    """Number of input features."""
    outputs: tuple[tuple[int, ...], ...]
    """Output shape of each kernel."""

    def pack(self, parts: Sequence[np.ndarray], rank: int) -> np.ndarray:
        """Combines the B matrices of one layer, ``[rank, out]`` for each kernel, into one matrix ``[out, rank]``."""
        shaped = [part.reshape(rank, *shape) for part, shape in zip(parts, self.outputs, strict=True)]
        packed = layouts.pack(shaped, self.kind, 1)
        return packed.T if self.kind == "rows_in" else packed

    def unpack(self, array: np.ndarray, rank: int) -> list[np.ndarray]:
        """Returns the B matrix of each kernel; the inverse of `pack`."""
        packed = array.T if self.kind == "rows_in" else array
        pieces = layouts.unpack(packed, self.kind, 1, [(rank, *shape) for shape in self.outputs])
        return [piece.reshape(rank, -1) for piece in pieces]


def save(
    path: str | os.PathLike[str],
    cfg: config.LMConfig,
    adapters: types.Params,
    *,
    scale: float,
    base_model_name: str | None = None,
) -> None:
    """Writes a directory of float32 adapters that ``PeftModel.from_pretrained`` can load.

    The directory is written under a temporary name and then renamed. An existing adapter directory is replaced.

    Args:
        path: Directory to write.
        cfg: Architecture of the base model.
        adapters: Adapters, as returned by `lora.init`.
        scale: Ratio alpha / r, as in `lora.attach`.
        base_model_name: Value of ``base_model_name_or_path`` in ``adapter_config.json``.

    Raises:
        ValueError: ``cfg`` cannot be written (see `lm.save`), or the adapters are empty or do not fit ``cfg``.
        FileExistsError: ``path`` exists and is not an adapter directory.
    """
    ours = {
        pair.node: (np.asarray(pair.a, np.float32), np.asarray(pair.b, np.float32))
        for pair in lora.pairs(lm_params.abstract(cfg), adapters)
    }
    every = _modules(cfg)
    modules = [module for module in every if not ours.keys().isdisjoint(module.nodes)]
    spans = {module: _spans(module, ours) for module in modules}
    rank = max((stop for of_module in spans.values() for _, stop in of_module.values()), default=0)
    if rank == 0:
        raise ValueError("adapters is empty: there is nothing to write")

    tensors = {}
    for module in modules:
        for i in range(cfg.n_layers):
            name = module.name.format(i=i)
            a_RI, b_OR = _pack_layer(module, spans[module], ours, i, rank)
            # safetensors writes the memory of a transposed view in the wrong order.
            tensors[_A.format(name)] = np.ascontiguousarray(a_RI)
            tensors[_B.format(name)] = np.ascontiguousarray(b_OR)
    record = {node: span for of_module in spans.values() for node, span in of_module.items()}
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _alpha(scale, rank),
        "lora_dropout": 0.0,
        "target_modules": _targets(modules, every),
        "fan_in_fan_out": _fan_in_fan_out(every),
        "bias": "none",
    }

    with tensor_files.atomic_folder(pathlib.Path(path), marker=_CONFIG) as temporary:
        tensor_files.write_json(temporary / _CONFIG, fields)
        header = {"format": "pt", "rlhf_jax": json.dumps(record)}
        safetensors.numpy.save_file(tensors, temporary / _TENSORS, metadata=header)


def load(path: str | os.PathLike[str], cfg: config.LMConfig) -> tuple[types.Params, float]:
    """Returns ``(adapters, scale)`` for a base model with architecture ``cfg``; adapters are float32.

    The base model is not read. Dropout is ignored, since PEFT applies it only during training.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: ``adapter_config.json`` lacks a field or requests more than W + scale A B (DoRA, rank patterns,
            trained biases, fully saved modules or an unknown feature), the tensor file is truncated, or a tensor is
            missing, unexpected, of the wrong shape or not finite.
    """
    folder = pathlib.Path(path)
    fields, modules = tensor_files.read_json(folder / _CONFIG), _modules(cfg)
    _refuse(fields, fan_in_fan_out=_fan_in_fan_out(modules))
    rank: int = fields["r"]
    scale = fields["lora_alpha"] / (math.sqrt(rank) if fields.get("use_rslora") else rank)
    tensors, record = _read_tensors(folder / _TENSORS)

    leaves: dict[str, np.ndarray] = {}
    for module in modules:
        names = [module.name.format(i=i) for i in range(cfg.n_layers)]
        if not any(_A.format(name) in tensors for name in names):
            continue
        spans = {node: (0, rank) for node in module.nodes} if record is None else record
        layers = [_unpack_layer(module, spans, tensors, name, rank) for name in names]
        for node in layers[0]:
            leaves[f"{node}/lora_a"] = np.stack([layer[node][0] for layer in layers])
            leaves[f"{node}/lora_b"] = np.stack([layer[node][1] for layer in layers])
    if tensors:
        raise ValueError(
            f"{folder} contains tensors without a kernel in this LMConfig: {', '.join(sorted(tensors)[:5])}"
        )
    if not leaves:
        raise ValueError(f"{folder} has no adapters")
    return lm_params.nest({name: jnp.asarray(leaf) for name, leaf in leaves.items()}), scale


def _modules(cfg: config.LMConfig) -> list[_Module]:
    family, rows = families.FAMILIES[directory.model_type_of(cfg)], lm_params.table(cfg)
    return [
        _Module(
            name=family.trunk + tensor.name.removesuffix(".weight"),
            nodes=tuple(part.removesuffix("/kernel") for part in tensor.parts),
            kind=tensor.kind,
            inputs=math.prod(lora.sides(rows[tensor.parts[0]])[0]),
            outputs=tuple(lora.sides(rows[part])[1] for part in tensor.parts),
        )
        for tensor in family.tensors(cfg)
        if tensor.parts[0].startswith("layers/") and tensor.parts[0].endswith("/kernel")
    ]


def _spans(module: _Module, ours: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Spans:
    adapted = {node: ours[node][0] for node in module.nodes if node in ours}
    first, *others = adapted.values()
    if all(first.tobytes() == other.tobytes() for other in others):
        return {node: (0, first.shape[-1]) for node in adapted}
    stops = np.cumsum([a.shape[-1] for a in adapted.values()])
    return {node: (int(stop) - a.shape[-1], int(stop)) for (node, a), stop in zip(adapted.items(), stops, strict=True)}


def _pack_layer(
    module: _Module, spans: Spans, ours: Mapping[str, tuple[np.ndarray, np.ndarray]], layer: int, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    a_RI = np.zeros((rank, module.inputs), np.float32)
    parts = [np.zeros((rank, math.prod(shape)), np.float32) for shape in module.outputs]
    for part, node in zip(parts, module.nodes, strict=True):
        if node in spans:
            span = slice(*spans[node])
            a_RI[span], part[span] = ours[node][0][layer].T, ours[node][1][layer]
    return a_RI, module.pack(parts, rank)


def _unpack_layer(
    module: _Module, spans: Spans, tensors: dict[str, np.ndarray], name: str, rank: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    out = sum(math.prod(shape) for shape in module.outputs)
    a_RI = _take(tensors, _A.format(name), (rank, module.inputs))
    b_OR = _take(tensors, _B.format(name), (out, rank))
    adapters = {}
    for node, part in zip(module.nodes, module.unpack(b_OR, rank), strict=True):
        start, stop = spans.get(node, (0, 0))
        if part[:start].any() or part[stop:].any():
            raise ValueError(
                f"{_B.format(name)} contradicts the header of its file: {node} must be 0 outside the ranks "
                f"[{start}, {stop})"
            )
        if node in spans:
            adapters[node] = a_RI[start:stop].T, part[start:stop]
    return adapters


def _read_tensors(file: pathlib.Path) -> tuple[dict[str, np.ndarray], Spans | None]:
    if not file.exists():
        raise FileNotFoundError(f"{file.parent} has no {file.name}; pickled adapters (.bin) are not supported")
    try:
        with safetensors.safe_open(file, framework="np") as opened:
            record = json.loads((opened.metadata() or {}).get("rlhf_jax", "null"))
            return {name: opened.get_tensor(name).astype(np.float32) for name in opened.keys()}, record  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file: {error}") from error


def _take(tensors: dict[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in tensors:
        raise ValueError(f"the adapter file lacks the tensor {name}")
    array = tensors.pop(name)
    if array.shape != shape:
        raise ValueError(f"the tensor {name} has shape {array.shape}; r and this LMConfig require {shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"the tensor {name} contains a value that is not finite")
    return array


def _refuse(fields: Mapping[str, Any], *, fan_in_fan_out: bool) -> None:
    known = {"peft_type": ("LORA",), "init_lora_weights": _BASE_KEPT, "fan_in_fan_out": (fan_in_fan_out,)}
    for field in ("peft_type", "r", "lora_alpha"):
        if field not in fields:
            raise ValueError(f"{_CONFIG} lacks the field {field}")
    for field, value in fields.items():
        if field in known:
            refused = value not in known[field]
        else:
            # Unknown fields of newer PEFT versions are accepted only if they are switched off.
            refused = field not in _READ + _WITHOUT_EFFECT and value not in (None, False, 0, "", "none", [], {})
        if refused:
            raise ValueError(f"{_CONFIG} has {field} = {value!r}, which is not supported for this model")


def _fan_in_fan_out(modules: Sequence[_Module]) -> bool:
    return any(module.kind == "rows_in" for module in modules)


def _alpha(scale: float, rank: int) -> float:
    # PEFT expects an integer. A float is written only if no integer yields exactly the same scale.
    alpha = float(scale) * rank
    return round(alpha) if round(alpha) / rank == float(scale) else alpha


def _targets(modules: Sequence[_Module], every: Sequence[_Module]) -> list[str]:
    """Returns short suffixes of module names that match these modules and no others."""
    targets = []
    for module in modules:
        last = module.name.rpartition(".")[2]
        shared = any(other not in modules and other.name.rpartition(".")[2] == last for other in every)
        targets.append(module.name.rpartition("{i}.")[2] if shared else last)
    return sorted(set(targets))
