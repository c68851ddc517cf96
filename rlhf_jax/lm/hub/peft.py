"""Reading and writing of PEFT adapter directories, without PEFT or torch.

An adapter directory contains ``adapter_config.json`` and ``adapter_model.safetensors``. In some families, one tensor of
the checkpoint stores several kernels, such as the query, key and value kernels of GPT-2. PEFT has one A and one B for
such a tensor, while :mod:`rlhf_jax.lm.lora` has an A and a B for each kernel. The conversion is exact:

* If all kernels have the same A, `save` writes A once and the B matrices side by side.
* Otherwise, `save` concatenates the A matrices and writes a block-diagonal B. The rank is the sum of the ranks.
* `load` returns, for each kernel, the ranks of A and the part of B that belong to the kernel.

`save` writes a single rank ``r``, so adapters of lower rank are padded with zeros. The safetensors header records which
ranks belong to each kernel, so that `load` returns exactly the saved adapters. The scale is ``lora_alpha / r``, or
``lora_alpha / sqrt(r)`` in a loaded directory with ``use_rslora``. In a directory whose modules have different ranks or
scales (``rank_pattern``, ``alpha_pattern``), or in which only some layers are adapted, `load` pads the adapters of each
kernel with zeros to the same rank in all layers, and multiplies B by the ratio of the module's scale to the scale that
it returns.

A reward model that is trained as adapters plus head is written as PEFT writes a sequence classifier (``SEQ_CLS``): the
file contains ``score.weight``, which is the kernel of the head times its gain. PEFT has no bias. It is written to the
safetensors header as ``reward_bias``, from which `load` restores it; it must be added to the scores that PEFT computes.
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
from rlhf_jax.lm.hub import adapter_config, directory, families, layouts, score_heads, tensor_files

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_A, _B = "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"

_HEAD = "base_model.model.score.weight"

Spans = Mapping[str, tuple[int, int]]
"""Range (start, stop) of the ranks that belong to each kernel."""


class _File(NamedTuple):
    """Content of a tensor file; tensors that have been used are removed."""

    path: pathlib.Path
    tensors: dict[str, np.ndarray]
    spans: Spans | None
    bias: Any

    def has(self, name: str) -> bool:
        return _A.format(name) in self.tensors or _B.format(name) in self.tensors

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in self.tensors:
            raise ValueError(f"{self.path} lacks the tensor {name}")
        array = self.tensors.pop(name)
        if array.shape != shape:
            raise ValueError(
                f"{self.path}: the tensor {name} has shape {array.shape}; {_CONFIG} and this LMConfig require {shape}"
            )
        if not np.isfinite(array).all():
            raise ValueError(f"{self.path}: the tensor {name} contains a value that is not finite")
        return array


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
        adapters: Adapters, as returned by `lora.init`. For a reward model, they contain ``"head"`` as well, or are
            ``{"lora": adapters, "head": head}``.
        scale: Ratio alpha / r, as in `lora.attach`; above 0.
        base_model_name: Value of ``base_model_name_or_path`` in ``adapter_config.json``.

    Raises:
        ValueError: ``cfg`` cannot be written (see `lm.save`), the scale is not a number above 0, or the adapters or the
            head are empty, not finite or do not fit ``cfg``.
        FileExistsError: ``path`` exists and is not an adapter directory.
    """
    if not 0 < float(scale) < math.inf:
        raise ValueError(f"scale is {scale!r}; it must be a number above 0")
    adapters = {**{name: node for name, node in adapters.items() if name != "lora"}, **adapters.get("lora", {})}
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

    tensors, header = {}, {"format": "pt"}
    for module in modules:
        for i in range(cfg.n_layers):
            name = module.name.format(i=i)
            a_RI, b_OR = _pack_layer(module, spans[module], ours, i, rank)
            # safetensors writes the memory of a transposed view in the wrong order.
            tensors[_A.format(name)] = np.ascontiguousarray(a_RI)
            tensors[_B.format(name)] = np.ascontiguousarray(b_OR)
    header["rlhf_jax"] = json.dumps({node: span for of_module in spans.values() for node, span in of_module.items()})
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
    if "head" in adapters:
        flat = lm_params.flatten({"head": adapters["head"]})
        score_heads.check(flat, cfg)
        tensors[_HEAD] = score_heads.weight(flat)
        header["reward_bias"] = json.dumps(score_heads.fields(flat)["reward_bias"])
        fields |= {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise ValueError(f"{name} contains a value that is not finite")

    with tensor_files.atomic_folder(pathlib.Path(path), marker=_CONFIG) as temporary:
        tensor_files.write_json(temporary / _CONFIG, fields)
        safetensors.numpy.save_file(tensors, temporary / _TENSORS, metadata=header)


def load(path: str | os.PathLike[str], cfg: config.LMConfig) -> tuple[types.Params, float]:
    """Returns ``(adapters, scale)`` for a base model with architecture ``cfg``; adapters are float32.

    If the directory contains the head of a sequence classifier, the adapters contain ``"head"``. The base model is not
    read. Dropout is ignored, since PEFT applies it only during training.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: ``adapter_config.json`` lacks a field, has a senseless value or requests more than W + scale A B and
            a head (DoRA, trained biases, other fully saved modules or an unknown feature), the tensor file is
            truncated, or a tensor is missing, unexpected, of the wrong shape or not finite.
    """
    folder, modules = pathlib.Path(path), _modules(cfg)
    settings = adapter_config.read(folder / _CONFIG, fan_in_fan_out=_fan_in_fan_out(modules))
    file = _read_file(folder / _TENSORS)

    leaves: dict[str, np.ndarray] = {}
    for module in modules:
        names = [module.name.format(i=i) for i in range(cfg.n_layers)]
        if not any(file.has(name) for name in names):
            continue
        layers = [_unpack_layer(module, settings, file, name, i) for i, name in enumerate(names)]
        for node in layers[0]:
            leaves[f"{node}/lora_a"] = _stacked([layer[node][0] for layer in layers], axis=1)
            leaves[f"{node}/lora_b"] = _stacked([layer[node][1] for layer in layers], axis=0)
    if not leaves:
        raise ValueError(f"{file.path} has no adapters for this LMConfig")
    leaves |= _read_head(settings, file, cfg)
    if file.tensors:
        raise ValueError(
            f"{file.path} contains tensors without a kernel in this LMConfig: {', '.join(sorted(file.tensors)[:5])}; "
            f"{adapter_config.MERGE}"
        )
    return lm_params.nest({name: jnp.asarray(leaf) for name, leaf in leaves.items()}), settings.scale


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
    module: _Module, settings: adapter_config.Settings, file: _File, name: str, layer: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rank, out = settings.rank(name), sum(math.prod(shape) for shape in module.outputs)
    if settings.adapts(name, layer):
        a_RI = file.take(_A.format(name), (rank, module.inputs))
        b_OR = file.take(_B.format(name), (out, rank)) * np.float32(settings.scale_of(name) / settings.scale)
    elif file.has(name):
        raise ValueError(
            f"{file.path} contains an adapter for {name}, which PEFT ignores because {settings.source} excludes it "
            "(target_modules, exclude_modules or layers_to_transform): correct one of the two files"
        )
    else:
        rank = 1
        a_RI, b_OR = np.zeros((rank, module.inputs), np.float32), np.zeros((out, rank), np.float32)
    spans = {node: (0, rank) for node in module.nodes} if file.spans is None else file.spans
    adapters = {}
    for node, part in zip(module.nodes, module.unpack(b_OR, rank), strict=True):
        start, stop = spans.get(node, (0, 0))
        if part[:start].any() or part[stop:].any():
            raise ValueError(
                f"{file.path}: {_B.format(name)} contradicts the header of its file: {node} must be 0 outside the "
                f"ranks [{start}, {stop})"
            )
        if node in spans:
            adapters[node] = a_RI[start:stop].T, part[start:stop]
    return adapters


def _stacked(layers: Sequence[np.ndarray], *, axis: int) -> np.ndarray:
    """Returns the matrices of all layers in one array, with the axis of the ranks padded with zeros."""
    rank = max(layer.shape[axis] for layer in layers)
    pads = [[(0, rank - layer.shape[axis] if i == axis else 0) for i in range(2)] for layer in layers]
    return np.stack([np.pad(layer, pad) for layer, pad in zip(layers, pads, strict=True)])


def _read_head(settings: adapter_config.Settings, file: _File, cfg: config.LMConfig) -> dict[str, np.ndarray]:
    if _HEAD not in file.tensors:
        if settings.has_head:
            raise ValueError(
                f"{file.path} lacks the tensor {_HEAD}, but {settings.source} describes a model with a head (task_type "
                "or modules_to_save): set task_type to CAUSAL_LM and modules_to_save to null to load only the adapters"
            )
        return {}
    kernel_HD = file.take(_HEAD, (len(file.tensors[_HEAD]), cfg.d_model))
    heads = len(kernel_HD) if len(kernel_HD) > 1 else None
    numbers = score_heads.numbers(kernel_HD, heads, file.bias, file.path)
    return {f"head/{name}": np.asarray(number) for name, number in numbers.items()}


def _read_file(path: pathlib.Path) -> _File:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no {path.name}; pickled adapters (.bin) are not supported")
    try:
        with safetensors.safe_open(path, framework="np") as opened:
            header = opened.metadata() or {}
    except safetensors.SafetensorError as error:
        raise tensor_files.unreadable(path, error) from error
    tensors = {tensor.name: tensor.read().astype(np.float32) for tensor in tensor_files.tensors_in(path)}
    try:
        spans, bias = (json.loads(header.get(*field)) for field in (("rlhf_jax", "null"), ("reward_bias", "0")))
    except ValueError as error:
        raise ValueError(f"{path}: the field rlhf_jax or reward_bias of the header is not JSON: {error}") from error
    return _File(path, tensors, spans, bias)


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
