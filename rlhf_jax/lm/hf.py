"""A Hugging Face model directory to ``(cfg, params)`` and back, without torch.

Llama, GPT-2 and GPT-NeoX (Pythia) layouts. A model with a scalar head is written as the family's
``...ForSequenceClassification`` with one label: ``score.weight`` holds the head's kernel times its gain. Those classes
have no bias, so the head's bias stands in ``config.json`` as ``reward_bias``: :func:`load` applies it again, and
whoever reads the directory with another library adds it to the scores. Such a model has no output over the vocabulary
there, so an ``unembed`` beside a head is left out.

What ``config.json`` has no field for (compute dtype, remat, attention kernel) is kept under its key ``rlhf_jax``.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from rlhf_jax import types
from rlhf_jax.lm import config, hf_layouts
from rlhf_jax.lm import params as lm_params

_SCORE = "score.weight"
_OURS = ("dtype", "remat", "attention")
_BUFFERS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias")
"""Ends of names that older files hold beside the weights; models make these from the config."""

_Read = Callable[[], np.ndarray]


def load(path: str | os.PathLike[str]) -> tuple[config.LMConfig, types.Params]:
    """Read a model directory: ``config.json`` and safetensors, in one file or sharded. Parameters are float32.

    Raises ``FileNotFoundError`` for a missing directory or file, and ``ValueError`` for a model, activation or rope
    type that is not supported and for a tensor that is missing, unexpected or of the wrong shape.
    """
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no model directory at {folder}")
    hf = _read_json(folder / "config.json")
    family = _family(hf)
    cfg = _config(hf, family)
    tensors = _open(folder)
    if not any(name.startswith(family.trunk) for name in tensors):
        # GPT-2 as first published has no prefix.
        tensors = {name if name in (_SCORE, family.unembed) else family.trunk + name: t for name, t in tensors.items()}

    leaves: dict[str, np.ndarray] = {}
    rows = lm_params.table(cfg)
    for tensor, layer in _plan(cfg, family, head=_SCORE in tensors, unembed=family.unembed in tensors):
        name = tensor.name.format(i=layer)
        shapes = [rows[part].shape[0 if layer is None else 1 :] for part in tensor.parts]
        inputs = _input_axes(tensor.parts[0])
        array = _take(tensors, name, hf_layouts.packed_shape(shapes, tensor.kind, inputs))
        for part, piece in zip(tensor.parts, hf_layouts.unpack(array, tensor.kind, inputs, shapes), strict=True):
            if layer is None:
                leaves[part] = piece.astype(np.float32)
            else:
                leaves.setdefault(part, np.empty(rows[part].shape, np.float32))[layer] = piece
    if _SCORE in tensors:
        leaves["head/kernel_D"] = _take(tensors, _SCORE, (1, cfg.d_model))[0].astype(np.float32)
        leaves["head/bias"] = np.array(hf.get("reward_bias", 0.0), np.float32)
        leaves["head/gain"] = np.array(1.0, np.float32)
    if cfg.tie_embeddings:
        tensors.pop(family.unembed, None)
    left = sorted(name for name in tensors if not name.endswith(_BUFFERS))
    if left:
        raise ValueError(f"{folder} holds tensors that {hf['model_type']} has no place for: {', '.join(left[:5])}")
    return cfg, lm_params.nest({name: jnp.asarray(leaf) for name, leaf in leaves.items()})


def save(
    path: str | os.PathLike[str],
    cfg: config.LMConfig,
    params: types.Params,
    tokenizer: Any = None,
    *,
    pad_id: int = 0,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a directory that ``transformers`` reads with ``AutoModelForCausalLM``, in float32.

    With a scalar head it is for ``AutoModelForSequenceClassification`` (see above); those classes find the last real
    token by ``pad_token_id``: the tokenizer's where one is given, ``pad_id`` where not. ``tokenizer`` is anything with
    ``save_pretrained``. Everything is written beside ``path`` first and then renamed; an older model there is replaced.

    Raises ``ValueError`` where no layout holds ``cfg``, where a parameter is missing or has the wrong shape, and
    ``FileExistsError`` where ``path`` is there and is not a model directory.
    """
    folder = pathlib.Path(path)
    if folder.exists() and not (folder.is_dir() and ((folder / "config.json").exists() or not any(folder.iterdir()))):
        raise FileExistsError(f"{folder} is there and holds no config.json; it is not replaced by a model")
    model_type = hf_layouts.family_of(cfg)
    family = hf_layouts.FAMILIES[model_type]
    flat = lm_params.flatten(params)
    _check_leaves(flat, cfg)
    has_head = "head/kernel_D" in flat
    hf = _config_json(model_type, family, cfg, flat, tokenizer, pad_id)

    temporary = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    _write_json(temporary / "config.json", hf)
    _write_shards(temporary, _packed(cfg, family, flat, has_head), max_shard_bytes)
    _replace(folder, temporary)


def _plan(
    cfg: config.LMConfig, family: hf_layouts.Family, *, head: bool, unembed: bool
) -> Iterator[tuple[hf_layouts.Tensor, int | None]]:
    """Every tensor of a checkpoint with the layer it belongs to, the score's left out."""
    for tensor in family.tensors(cfg):
        layers = range(cfg.n_layers) if "{i}" in tensor.name else [None]
        for layer in layers:
            yield tensor._replace(name=family.trunk + tensor.name), layer
    if not cfg.tie_embeddings and (unembed or not head):
        yield hf_layouts.Tensor(family.unembed, ("unembed/kernel",), "rows_out"), None


def _input_axes(part: str) -> int:
    if not part.endswith("/kernel"):
        return 0
    return 2 if part == "layers/out/kernel" else 1


def _packed(
    cfg: config.LMConfig, family: hf_layouts.Family, flat: Mapping[str, Any], has_head: bool
) -> Iterator[tuple[str, np.ndarray]]:
    for tensor, layer in _plan(cfg, family, head=has_head, unembed=not has_head):
        parts = [np.asarray(flat[part] if layer is None else flat[part][layer], np.float32) for part in tensor.parts]
        yield tensor.name.format(i=layer), hf_layouts.pack(parts, tensor.kind, _input_axes(tensor.parts[0]))
    if has_head:
        gain, kernel_D = np.float32(flat["head/gain"]), np.asarray(flat["head/kernel_D"], np.float32)
        yield _SCORE, gain * kernel_D[None, :]


def _check_leaves(flat: Mapping[str, Any], cfg: config.LMConfig) -> None:
    has_head = any(name.startswith("head/") for name in flat)
    rows = lm_params.table(cfg) | (lm_params.head_table(cfg) if has_head else {})
    for name, row in rows.items():
        if name not in flat and not (has_head and name == "unembed/kernel"):
            raise ValueError(f"params lack {name}, which this LMConfig has")
        if name in flat and flat[name].shape != row.shape:
            raise ValueError(f"params[{name}] has shape {flat[name].shape}; this LMConfig says {row.shape}")
    unknown = sorted(flat.keys() - rows.keys())
    if unknown:
        raise ValueError(f"params hold what this LMConfig does not have: {', '.join(unknown[:5])}")


def _config_json(
    model_type: str,
    family: hf_layouts.Family,
    cfg: config.LMConfig,
    flat: Mapping[str, Any],
    tokenizer: Any,
    pad_id: int,
) -> dict[str, Any]:
    has_head = "head/kernel_D" in flat
    purpose = "ForSequenceClassification" if has_head else _lm_class_suffix(model_type)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    hf = {
        "architectures": [family.class_name + purpose],
        "model_type": model_type,
        # The files' dtype: what is computed in stands under "rlhf_jax".
        "dtype": "float32",
        **family.to_json(cfg),
        **special,
        "rlhf_jax": {field: getattr(cfg, field) for field in _OURS},
    }
    if not has_head:
        return hf
    if hf["pad_token_id"] is None:
        hf["pad_token_id"] = pad_id
    labels = {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return hf | labels | {"reward_bias": float(flat["head/bias"])}


def _lm_class_suffix(model_type: str) -> str:
    return "LMHeadModel" if model_type == "gpt2" else "ForCausalLM"


def _family(hf: Mapping[str, Any]) -> hf_layouts.Family:
    model_type = hf.get("model_type")
    if model_type not in hf_layouts.FAMILIES:
        raise ValueError(f"model type {model_type!r} is not supported; known: {', '.join(hf_layouts.FAMILIES)}")
    return hf_layouts.FAMILIES[model_type]


def _config(hf: Mapping[str, Any], family: hf_layouts.Family) -> config.LMConfig:
    # What the files are kept in is a good guess at what to compute in; "torch_dtype" is the older spelling.
    fields: dict[str, Any] = {"dtype": hf.get("dtype") or hf.get("torch_dtype") or "float32"}
    if "rlhf_jax" in hf:
        fields = {field: hf["rlhf_jax"][field] for field in _OURS}
    try:
        return config.LMConfig(**(family.from_json(hf) | fields))
    except KeyError as error:
        raise ValueError(f"config.json lacks the field {error}") from error


def _open(folder: pathlib.Path) -> dict[str, _Read]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(_read_json(index)["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    tensors: dict[str, _Read] = {}
    for name in names:
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder} has no {name}")
        handle = safetensors.safe_open(folder / name, framework="np")
        tensors |= {tensor: functools.partial(handle.get_tensor, tensor) for tensor in handle.keys()}  # noqa: SIM118
    return tensors


def _take(tensors: dict[str, _Read], name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in tensors:
        raise ValueError(f"the model files lack the tensor {name}")
    array = tensors.pop(name)()
    if array.shape != shape:
        raise ValueError(f"the tensor {name} has shape {array.shape}; config.json says {shape}")
    return array


def _write_shards(folder: pathlib.Path, arrays: Iterator[tuple[str, np.ndarray]], max_bytes: int) -> None:
    shards: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    size = total = 0

    def flush() -> None:
        safetensors.numpy.save_file(shard, folder / _shard_name(len(shards)), metadata={"format": "pt"})
        shards.append(list(shard))

    for name, array in arrays:
        if shard and size + array.nbytes > max_bytes:
            flush()
            shard, size = {}, 0
        # safetensors writes the memory as it lies: of a transposed view, the wrong numbers.
        shard[name] = np.ascontiguousarray(array)
        size, total = size + array.nbytes, total + array.nbytes
    flush()
    if len(shards) == 1:
        (folder / _shard_name(0)).rename(folder / "model.safetensors")
        return
    final = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(final):
        (folder / _shard_name(i)).rename(folder / name)
    places = {tensor: name for name, tensors in zip(final, shards, strict=True) for tensor in tensors}
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def _replace(folder: pathlib.Path, temporary: pathlib.Path) -> None:
    if not folder.exists():
        temporary.rename(folder)
        return
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    return json.loads(path.read_text())


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
