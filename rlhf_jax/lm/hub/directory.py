"""A Hugging Face model directory to ``(cfg, params)`` and back, without torch.

The families are in :mod:`rlhf_jax.lm.hub.families`. A model with a scalar head is written as the family's
``...ForSequenceClassification`` with one label, or with H for several heads: ``score.weight`` holds the head's kernel
times its gain. Those classes have no bias, so the head's bias (a number, or a list of H) stands in ``config.json`` as
``reward_bias``: :func:`load` applies it again, and whoever reads the directory with another library adds it to the
scores. Such a model has no output over the vocabulary there, so an ``unembed`` beside a head is left out. What scores
were normalised on stands beside it as ``reward_normalisation``; see :func:`load_normalisation`.

What ``config.json`` has no field for (compute dtype, remat, attention kernel) is kept under its key ``rlhf_jax``.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import types
from rlhf_jax.lm import config
from rlhf_jax.lm import heads as lm_heads
from rlhf_jax.lm import params as lm_params
from rlhf_jax.lm.hub import families, layouts, score_heads, tensor_files

Shard = Callable[[tuple[str, ...]], jax.sharding.Sharding]
"""The sharding of an array by the logical names of its axes (``lm.params.Spec.axes``)."""

_SCORE = "score.weight"
_OURS = ("dtype", "remat", "attention")
_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_BUFFERS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias")
"""Ends of names that older files hold beside the weights; models make these from the config."""


def load_config(path: str | os.PathLike[str]) -> config.LMConfig:
    """Read the architecture of a model directory from its ``config.json`` alone; see :func:`load`."""
    return _config(*_read_config(_folder(path)))


def load(
    path: str | os.PathLike[str], *, dtype: Any = jnp.float32, shard: Shard | None = None
) -> tuple[config.LMConfig, types.Params]:
    """Read a model directory: ``config.json`` and safetensors, in one file or sharded.

    One tensor at a time goes from the file into the arrays, which are made in place: beyond the result, the host holds
    one tensor. Parameters are ``dtype`` whatever the file's is, and live where ``shard`` says, on the default device
    without it.

    Raises ``FileNotFoundError`` for a missing directory or file, and ``ValueError`` for a model type, activation or
    rope type that is not supported, for a file that is cut off, for a value that is not finite, and, listing them, for
    tensors that are missing, unexpected or of another shape than ``config.json`` says.
    """
    folder = _folder(path)
    hf, source = _read_config(folder)
    cfg = _config(hf, source)
    family = families.FAMILIES[hf["model_type"]]
    stored = _with_trunk(tensor_files.stored(folder), family)
    head = _SCORE in stored
    heads = score_heads.stored_heads(stored.get(_SCORE))
    plan = list(_plan(cfg, family, head=head, unembed=family.unembed in stored))
    _check_tensors(folder, cfg, family, plan, stored)

    rows = lm_params.table(cfg) | (lm_params.head_table(cfg, heads=heads) if head else {})
    leaves: dict[str, jax.Array] = {}
    for tensor, layer in plan:
        name = tensor.name.format(i=layer)
        array = _finite(stored[name])
        shapes = [rows[part].shape[0 if layer is None else 1 :] for part in tensor.parts]
        pieces = layouts.unpack(array, tensor.kind, layouts.input_axes(tensor.parts[0]), shapes)
        for part, piece in zip(tensor.parts, pieces, strict=True):
            if layer is None:
                leaves[part] = _place(piece, rows[part].axes, dtype, shard)
            else:
                leaf = leaves[part] if part in leaves else _zeros(rows[part], dtype, shard)
                new = _place(piece, rows[part].axes[1:], dtype, shard)
                leaves[part] = _filler(leaf.sharding if shard else None)(leaf, new, layer)
    if head:
        numbers = score_heads.numbers(_finite(stored[_SCORE]), heads, hf.get("reward_bias", 0.0), source)
        for name, number in numbers.items():
            row = rows[f"head/{name}"]
            leaves[f"head/{name}"] = _place(np.asarray(number), row.axes, jnp.float32, shard)
    return cfg, lm_params.nest(leaves)


def save(
    path: str | os.PathLike[str],
    cfg: config.LMConfig,
    params: types.Params,
    tokenizer: Any = None,
    *,
    dtype: Any = jnp.float32,
    pad_id: int = 0,
    normalisation: lm_heads.Normalisation | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a directory that ``transformers`` reads with ``AutoModelForCausalLM``, values rounded to ``dtype``.

    With a scalar head it is for ``AutoModelForSequenceClassification`` (see above); those classes find the last real
    token by ``pad_token_id``: the tokenizer's where one is given, ``pad_id`` where not. ``normalisation`` is written
    down with it. ``tokenizer`` is anything with ``save_pretrained``. The model type is ``cfg.model_type``, or the first
    that can hold ``cfg``. One tensor at a time is brought to the host. Everything is written beside ``path`` first and
    then renamed, so that no half of a model is ever found there; an older model is replaced.

    Raises ``ValueError`` where no layout holds ``cfg``, where a parameter is missing, has the wrong shape or is not
    finite, and ``FileExistsError`` where ``path`` is there and is not a model directory.
    """
    folder = pathlib.Path(path)
    if folder.exists() and not (folder.is_dir() and ((folder / "config.json").exists() or not any(folder.iterdir()))):
        raise FileExistsError(f"{folder} is there and holds no config.json; it is not replaced by a model")
    model_type = model_type_of(cfg)
    family = families.FAMILIES[model_type]
    flat = lm_params.flatten(params)
    _check_leaves(flat, cfg)
    has_head = "head/gain" in flat
    hf = _config_json(model_type, family, cfg, flat, tokenizer, pad_id, jnp.dtype(dtype).name)
    if normalisation is not None:
        hf["reward_normalisation"] = dataclasses.asdict(normalisation)
    plan = list(_plan(cfg, family, head=has_head, unembed=not has_head))

    temporary = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        tensor_files.write_json(temporary / "config.json", hf)
        tensor_files.write(
            temporary,
            _shapes(cfg, plan, score_heads.count(flat)),
            _packed(plan, flat, has_head),
            dtype=jnp.dtype(dtype),
            max_shard_bytes=max_shard_bytes,
        )
        _replace(folder, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_normalisation(path: str | os.PathLike[str]) -> lm_heads.Normalisation | None:
    """What the scores of a saved reward model were normalised on; None where :func:`save` was not told.

    :func:`load` gives scores as they were normalised, the gain inside the kernel; this undoes it.
    """
    hf, source = _read_config(_folder(path))
    return score_heads.read_normalisation(hf, source)


def model_type_of(cfg: config.LMConfig) -> str:
    """The model type that can hold ``cfg``: its own, or the first of all; ``ValueError`` says what each one lacks."""
    reasons = []
    for name in [cfg.model_type] if cfg.model_type else families.FAMILIES:
        wrong = _lost(cfg, name)
        if not wrong:
            return name
        reasons.append(f"{name} needs " + ", ".join(f"{field}={want!r}" for field, want in wrong.items()))
    raise ValueError("no known Hugging Face layout holds this LMConfig: " + "; ".join(reasons))


def _lost(cfg: config.LMConfig, model_type: str) -> dict[str, Any]:
    """Fields that would be others after being written and read as ``model_type``, and what they would be."""
    if model_type not in families.FAMILIES:
        return {"model_type": f"one of {', '.join(families.FAMILIES)}"}
    family = families.FAMILIES[model_type]
    try:
        written = {"model_type": model_type, **_NO_TOKENS, **layouts.write_fields(cfg, family)}
        back = config.LMConfig(**layouts.read_fields(_understood(written), family))
    except ValueError as error:
        return {"other fields": str(error)}
    same = {"model_type", *_OURS}
    fields = [field.name for field in dataclasses.fields(cfg) if field.name not in same]
    return {name: getattr(back, name) for name in fields if getattr(back, name) != getattr(cfg, name)}


def _folder(path: str | os.PathLike[str]) -> pathlib.Path:
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no model directory at {folder}")
    return folder


def _read_config(folder: pathlib.Path) -> tuple[dict[str, Any], pathlib.Path]:
    source = folder / "config.json"
    hf = tensor_files.read_json(source)
    model_type = hf.get("model_type")
    if model_type not in families.FAMILIES:
        known = ", ".join(families.FAMILIES)
        raise ValueError(f"{source}: model type {model_type!r} is not supported; known: {known}")
    if hf.get("quantization_config"):
        raise ValueError(f"{source}: quantized weights (quantization_config) are not supported")
    return hf, source


def _config(hf: Mapping[str, Any], source: pathlib.Path) -> config.LMConfig:
    family = families.FAMILIES[hf["model_type"]]
    # What the files are kept in is a good guess at what to compute in; "torch_dtype" is the older spelling.
    ours: dict[str, Any] = hf.get("rlhf_jax") or {"dtype": hf.get("dtype") or hf.get("torch_dtype") or "float32"}
    ours = {field: ours[field] for field in _OURS if field in ours}
    try:
        return config.LMConfig(**layouts.read_fields(_understood(hf), family), **ours, model_type=hf["model_type"])
    except KeyError as error:
        raise ValueError(f"{source} lacks the field {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def _understood(hf: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` as ``transformers`` reads it: defaults filled in, older spellings replaced."""
    # Imported here: it takes most of a second, and torch, which it looks for, is not needed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    kind = transformers.CONFIG_MAPPING[hf["model_type"]]
    # Without the dtype, which would be turned into one of torch's where torch is there.
    given = {name: value for name, value in hf.items() if name not in ("dtype", "torch_dtype")}
    try:
        return vars(kind.from_dict(given))
    except ValueError:
        raise
    except Exception as error:  # its checks raise exceptions of many kinds
        raise ValueError(str(error).replace("\n", " ").strip()) from error


def _with_trunk(stored: dict[str, tensor_files.Stored], family: layouts.Family) -> dict[str, tensor_files.Stored]:
    """Names with the prefix that files of the bare model lack, as GPT-2's first one does."""
    if any(name.startswith(family.base) for name in stored):
        return stored
    return {name if name in (_SCORE, family.unembed) else family.base + name: x for name, x in stored.items()}


def _plan(
    cfg: config.LMConfig, family: layouts.Family, *, head: bool, unembed: bool
) -> Iterator[tuple[layouts.Tensor, int | None]]:
    """Every tensor of a checkpoint with the layer it belongs to, the score's left out."""
    for tensor in family.tensors(cfg):
        layers = range(cfg.n_layers) if "{i}" in tensor.name else [None]
        for layer in layers:
            yield tensor._replace(name=family.trunk + tensor.name), layer
    if not cfg.tie_embeddings and (unembed or not head):
        yield layouts.Tensor(family.unembed, ("unembed/kernel",), "rows_out"), None


def _shapes(
    cfg: config.LMConfig, plan: Iterable[tuple[layouts.Tensor, int | None]], heads: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors as they stand in files; ``heads`` is 0 for a language model."""
    rows = lm_params.table(cfg)
    shapes = {}
    for tensor, layer in plan:
        parts = [rows[part].shape[0 if layer is None else 1 :] for part in tensor.parts]
        inputs = layouts.input_axes(tensor.parts[0])
        shapes[tensor.name.format(i=layer)] = layouts.packed_shape(parts, tensor.kind, inputs)
    return shapes | ({_SCORE: (heads, cfg.d_model)} if heads else {})


def _check_tensors(
    folder: pathlib.Path,
    cfg: config.LMConfig,
    family: layouts.Family,
    plan: Iterable[tuple[layouts.Tensor, int | None]],
    stored: Mapping[str, tensor_files.Stored],
) -> None:
    """Compare names and shapes before anything is read, and name whatever does not fit."""
    wanted = _shapes(cfg, plan, (score_heads.stored_heads(stored.get(_SCORE)) or 1) if _SCORE in stored else 0)
    ignored = (*_BUFFERS, family.unembed) if cfg.tie_embeddings else _BUFFERS
    missing = [name for name in wanted if name not in stored]
    unexpected = [name for name in stored if name not in wanted and not name.endswith(ignored)]
    misshapen = [
        f"{name} {list(stored[name].shape)} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in stored and stored[name].shape != shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    told = [f"{what}: {_listed(names)}" for what, names in found.items() if names]
    if told:
        raise ValueError(f"{folder} holds other tensors than its config.json says; {'; '.join(told)}")


def _listed(names: list[str], most: int = 8) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _finite(tensor: tensor_files.Stored) -> np.ndarray:
    array = tensor.read()
    if not np.isfinite(array).all():
        raise ValueError(f"{tensor.file}: the tensor {tensor.name} holds a value that is not finite")
    return array


def _place(piece: np.ndarray, axes: tuple[str, ...], dtype: Any, shard: Shard | None) -> jax.Array:
    piece = piece.astype(jnp.dtype(dtype))
    if shard is None:
        # Copied: a view of the tensor in memory would keep all of it.
        return jnp.array(piece, copy=True)
    return jax.make_array_from_callback(piece.shape, shard(axes), lambda index: piece[index])


def _zeros(row: lm_params.Spec, dtype: Any, shard: Shard | None) -> jax.Array:
    if shard is None:
        return jnp.zeros(row.shape, dtype)
    return jax.jit(functools.partial(jnp.zeros, row.shape, dtype), out_shardings=shard(row.axes))()


@functools.cache
def _filler(sharding: jax.sharding.Sharding | None) -> Callable[..., jax.Array]:
    """Write one layer into a stacked array, in place: the array is donated, so no second one ever exists."""

    def fill(leaf: jax.Array, piece: jax.Array, layer: Any) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(leaf, piece, layer, axis=0)

    return jax.jit(fill, donate_argnums=0, out_shardings=sharding)


def _packed(
    plan: Iterable[tuple[layouts.Tensor, int | None]], flat: Mapping[str, Any], head: bool
) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    def make(tensor: layouts.Tensor, layer: int | None) -> np.ndarray:
        parts = [np.asarray(flat[part] if layer is None else flat[part][layer], np.float32) for part in tensor.parts]
        return layouts.pack(parts, tensor.kind, layouts.input_axes(tensor.parts[0]))

    for tensor, layer in plan:
        yield tensor.name.format(i=layer), functools.partial(make, tensor, layer)
    if head:
        yield _SCORE, functools.partial(score_heads.weight, flat)


def _check_leaves(flat: Mapping[str, Any], cfg: config.LMConfig) -> None:
    has_head = any(name.startswith("head/") for name in flat)
    heads = len(flat["head/kernel_HD"]) if "head/kernel_HD" in flat else None
    rows = lm_params.table(cfg) | (lm_params.head_table(cfg, heads=heads) if has_head else {})
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
    family: layouts.Family,
    cfg: config.LMConfig,
    flat: Mapping[str, Any],
    tokenizer: Any,
    pad_id: int,
    dtype: str,
) -> dict[str, Any]:
    has_head = score_heads.count(flat) > 0
    lm_class = family.lm_class or family.class_name + "ForCausalLM"
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    hf = {
        "architectures": [family.class_name + "ForSequenceClassification" if has_head else lm_class],
        "model_type": model_type,
        # The files' dtype: what is computed in stands under "rlhf_jax".
        "dtype": dtype,
        **layouts.write_fields(cfg, family),
        **special,
        "rlhf_jax": {field: getattr(cfg, field) for field in _OURS},
    }
    if not has_head:
        return hf
    if hf["pad_token_id"] is None:
        hf["pad_token_id"] = pad_id
    return hf | score_heads.fields(flat)


def _replace(folder: pathlib.Path, temporary: pathlib.Path) -> None:
    if not folder.exists():
        temporary.rename(folder)
        return
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old)
