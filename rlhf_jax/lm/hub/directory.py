"""Reading and writing of Hugging Face model directories, without torch.

A model with a scalar head is written as the ``...ForSequenceClassification`` class of its family (see
:mod:`rlhf_jax.lm.hub.families`), with one label per head. These classes have two limitations:

* They have no bias. The tensor ``score.weight`` is the kernel of the head times its gain, and the bias is written to
  ``config.json`` as ``reward_bias``, a number or a list. `load` restores the bias; other libraries ignore it, so it
  must be added to their scores.
* They have no output layer over the vocabulary, so the ``unembed`` parameters of a model with a head are not written.

The field ``reward_normalisation`` of ``config.json`` records how the scores were normalised; `load_normalisation`
returns this record. Settings without a counterpart in ``transformers`` (compute dtype, remat and attention
implementation) are written to ``config.json`` under ``rlhf_jax``. Without them, a model computes in the dtype that
``config.json`` names, and in float32 if that is float16 or float64: float16 is for files only.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import types
from rlhf_jax.lm import config
from rlhf_jax.lm import heads as lm_heads
from rlhf_jax.lm import params as lm_params
from rlhf_jax.lm.hub import families, layouts, score_heads, special_ids, tensor_files, tokenizer_files

Shard = Callable[[tuple[str, ...]], jax.sharding.Sharding]
"""Maps the logical axes of an array (`rlhf_jax.lm.params.Spec.axes`) to its sharding."""

_SCORE = "score.weight"
_OURS = ("dtype", "remat", "attention")
_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_BUFFERS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias")
"""Name suffixes of tensors in older files; they are ignored because they can be computed from the config."""


def load_config(path: str | os.PathLike[str]) -> config.LMConfig:
    """Returns the architecture that the ``config.json`` of a model directory describes.

    Raises:
        FileNotFoundError: The directory or the file is missing.
        ValueError: The model type or the value of a field is not supported.
    """
    return _config(*_read_config(_folder(path)))


def has_head(path: str | os.PathLike[str]) -> bool:
    """Returns whether a model directory contains a reward model; reads the names of the tensors but no weights.

    Raises FileNotFoundError or ValueError if the directory has no readable safetensors files.
    """
    return _SCORE in tensor_files.stored(_folder(path))


def load(
    path: str | os.PathLike[str], *, dtype: Any = jnp.float32, shard: Shard | None = None
) -> tuple[config.LMConfig, types.Params]:
    """Returns the architecture and the parameters in a model directory.

    The directory must contain ``config.json`` and safetensors files. Tensors are read one at a time, so that host
    memory holds at most one tensor in addition to the result.

    If ``tie_word_embeddings`` is true and the files contain an output layer that differs from the embeddings, a warning
    says so and ``cfg.tie_embeddings`` is False, unlike in `load_config`; `save` then writes both.

    Args:
        path: A local directory.
        dtype: Dtype of the parameters, regardless of the dtype of the files; a head is always float32.
        shard: Maps logical axes to a sharding; by default, parameters are placed on the default device.

    Returns:
        ``(cfg, params)``; ``params`` include a head if the directory contains a reward model.

    Raises:
        FileNotFoundError: The directory or a file is missing.
        ValueError: The model type, activation or rope type is not supported, a file is truncated, a value is not
            finite, or a tensor is missing, unexpected or of a different shape than ``config.json`` implies.
    """
    folder = _folder(path)
    hf, source = _read_config(folder)
    cfg = _config(hf, source)
    family = families.FAMILIES[hf["model_type"]]
    stored = _with_trunk(tensor_files.stored(folder), family)
    cfg, stored = _untied(folder, cfg, family, stored)
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
    stop_ids: Iterable[int] | None = None,
    pad_id: int | None = None,
    normalisation: lm_heads.Normalisation | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a model directory that ``transformers`` can load.

    ``AutoModelForCausalLM`` loads language models, and ``AutoModelForSequenceClassification`` loads models with a head.
    The directory is written under a temporary name and then renamed, so that it is never incomplete. An existing model
    directory is replaced. Tensors are copied to the host one at a time.

    ``transformers`` finds the last token of each row that a reward model scores by the pad id. Therefore, the pad token
    of a reward model is never one of ``stop_ids``: if the tokenizer's pad token is, or if it has none, another control
    token becomes the pad token in the saved files. If there is none, no pad token is saved, and ``transformers`` scores
    rows one at a time.

    Args:
        path: Directory to write.
        cfg: Architecture. If ``cfg.model_type`` is empty, the first model type that can represent ``cfg`` is used.
        params: Parameters of the model.
        tokenizer: Tokenizer with a ``save_pretrained`` method, saved in the same directory; None saves none.
        dtype: Dtype of the files, to which values are rounded.
        stop_ids: Ids that end an answer, such as `rlhf_jax.data.chat.ChatFormat.stop_ids`, written to ``config.json``
            and, for a language model, ``generation_config.json``. By default, those of the tokenizer if it is the
            tokenizer of a ``ChatFormat``, otherwise its EOS token.
        pad_id: ``pad_token_id`` if no tokenizer is given; by default, there is none.
        normalisation: Record of how the scores of a reward model were normalised, saved in ``config.json``.
        max_shard_bytes: Maximum size of each file; a larger tensor is written to a separate file.

    Raises:
        ValueError: ``cfg`` cannot be written as ``cfg.model_type`` or, if that is empty, as any known type, the
            tokenizer is larger than the model's vocabulary, an id is outside it, or a parameter is missing, unknown, of
            the wrong shape or not finite.
        FileExistsError: ``path`` exists and is not a model directory.
    """
    model_type = model_type_of(cfg)
    family = families.FAMILIES[model_type]
    flat = lm_params.flatten(params)
    _check_leaves(flat, cfg)
    has_head = "head/gain" in flat
    ids = tokenizer.get_vocab().values() if hasattr(tokenizer, "get_vocab") else ()
    if (n := 1 + max(ids, default=-1)) > cfg.vocab_size:
        raise ValueError(
            f"the tokenizer has {n} ids, more than cfg.vocab_size = {cfg.vocab_size}; add rows for the new tokens with "
            f"lm.resize(params, cfg, {n})"
        )
    stop_ids = getattr(tokenizer, "stop_ids", None) if stop_ids is None else stop_ids
    special = special_ids.fields(tokenizer, stop_ids, pad_id=pad_id, reward=has_head, vocab_size=cfg.vocab_size)
    hf = _config_json(model_type, family, cfg, flat, jnp.dtype(dtype).name) | special
    if normalisation is not None:
        hf["reward_normalisation"] = dataclasses.asdict(normalisation)
    plan = list(_plan(cfg, family, head=has_head, unembed=not has_head))

    with tensor_files.atomic_folder(pathlib.Path(path), marker="config.json") as temporary:
        if tokenizer is not None:
            tokenizer_files.write(temporary, tokenizer, pad_id=special["pad_token_id"])
        if not has_head:
            special_ids.write_generation(temporary, special)
        tensor_files.write_json(temporary / "config.json", hf)
        tensor_files.write(
            temporary,
            _shapes(cfg, plan, score_heads.count(flat)),
            _packed(plan, flat, has_head),
            dtype=jnp.dtype(dtype),
            max_shard_bytes=max_shard_bytes,
        )


def load_normalisation(path: str | os.PathLike[str]) -> lm_heads.Normalisation | None:
    """Returns the record of how a saved reward model's scores were normalised, or None if there is none.

    The scores of a loaded model remain normalised, since its kernel includes the gain. The record contains the gain and
    bias that are needed to compute raw scores.
    """
    hf, source = _read_config(_folder(path))
    return score_heads.read_normalisation(hf, source)


def load_stop_ids(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """Returns the ids that end an answer according to a model directory, in ascending order.

    They are the ids that ``config.json`` and, if it exists, ``generation_config.json`` list as ``eos_token_id``.

    Raises:
        FileNotFoundError: The directory or ``config.json`` is missing.
        ValueError: ``eos_token_id`` is neither null, an id in the vocabulary nor a list of such ids.
    """
    folder = _folder(path)
    hf, source = _read_config(folder)
    cfg = _config({**hf, **_NO_TOKENS}, source)
    return special_ids.read_stop_ids(folder, vocab_size=cfg.vocab_size)


def model_type_of(cfg: config.LMConfig) -> str:
    """Returns ``cfg.model_type`` or, if it is empty, the first model type that can represent ``cfg``.

    Raises:
        ValueError: ``cfg`` cannot be written as ``cfg.model_type`` or, if that is empty, as any known type. The message
            says why.
    """
    reasons = []
    for name in [cfg.model_type] if cfg.model_type else families.FAMILIES:
        try:
            wrong = _lost(cfg, name)
        except ValueError as error:
            reasons.append(f"{name}: {error}")
            continue
        if not wrong:
            return name
        reasons.append(f"{name} needs " + ", ".join(f"{field}={want!r}" for field, want in wrong.items()))
    failed = f"model type {cfg.model_type!r} cannot" if cfg.model_type else "no known Hugging Face model type can"
    raise ValueError(f"{failed} represent this LMConfig: " + "; ".join(reasons))


def _lost(cfg: config.LMConfig, model_type: str) -> dict[str, Any]:
    """Returns the fields that writing and reading ``cfg`` as ``model_type`` would change, with their new values.

    Raises ValueError if ``cfg`` cannot be written or read as ``model_type``.
    """
    if model_type not in families.FAMILIES:
        raise ValueError(f"this model type is not supported (only {', '.join(families.FAMILIES)})")
    family = families.FAMILIES[model_type]
    written = {"model_type": model_type, **_NO_TOKENS, **layouts.write_fields(cfg, family)}
    back = config.LMConfig(**layouts.read_fields(_normalised_config(written), family))
    same = {"model_type", *_OURS}
    fields = [field.name for field in dataclasses.fields(cfg) if field.name not in same]
    return {name: getattr(back, name) for name in fields if getattr(back, name) != getattr(cfg, name)}


def _folder(path: str | os.PathLike[str]) -> pathlib.Path:
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no model directory at {folder}; models are read only from local directories and never downloaded"
        )
    tensor_files.refuse_adapters(folder)
    return folder


def _read_config(folder: pathlib.Path) -> tuple[dict[str, Any], pathlib.Path]:
    source = folder / "config.json"
    hf = tensor_files.read_json(source)
    model_type = hf.get("model_type")
    if model_type not in families.FAMILIES:
        known = ", ".join(families.FAMILIES)
        raise ValueError(f"{source}: model type {model_type!r} is not supported; known types: {known}")
    if hf.get("quantization_config"):
        raise ValueError(f"{source}: quantized weights (quantization_config) are not supported")
    return hf, source


def _config(hf: Mapping[str, Any], source: pathlib.Path) -> config.LMConfig:
    family = families.FAMILIES[hf["model_type"]]
    # The dtype of the files is the default compute dtype; "torch_dtype" is the older spelling.
    ours: dict[str, Any] = hf.get("rlhf_jax") or {"dtype": hf.get("dtype") or hf.get("torch_dtype") or "float32"}
    ours = {field: ours[field] for field in _OURS if field in ours}
    # Gradients in float16 would need loss scaling. float32 represents every float16 number; bfloat16 would round it.
    ours |= {"dtype": "float32"} if ours.get("dtype") in ("float16", "float64") else {}
    try:
        return config.LMConfig(
            **layouts.read_fields(_normalised_config(hf), family), **ours, model_type=hf["model_type"]
        )
    except KeyError as error:
        raise ValueError(f"{source} lacks the field {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def _normalised_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``config.json`` as ``transformers`` reads it, with defaults filled in and older field names replaced."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Imported here because importing transformers takes most of a second.
    import transformers

    kind = transformers.CONFIG_MAPPING[hf["model_type"]]
    # The dtype is omitted because it would become a torch dtype if torch is installed.
    given = {name: value for name, value in hf.items() if name not in ("dtype", "torch_dtype")}
    try:
        return vars(kind.from_dict(given))
    except ValueError:
        raise
    except Exception as error:  # transformers raises exceptions of many kinds
        raise ValueError(str(error).replace("\n", " ").strip()) from error


def _with_trunk(stored: dict[str, tensor_files.Stored], family: layouts.Family) -> dict[str, tensor_files.Stored]:
    """Adds ``family.base`` to tensor names if all lack this prefix, as in models saved without an output layer."""
    if any(name.startswith(family.base) for name in stored):
        return stored
    return {name if name in (_SCORE, family.unembed) else family.base + name: x for name, x in stored.items()}


def _untied(
    folder: pathlib.Path, cfg: config.LMConfig, family: layouts.Family, stored: dict[str, tensor_files.Stored]
) -> tuple[config.LMConfig, dict[str, tensor_files.Stored]]:
    """Returns the config and the tensors, untied if the embeddings and the output layer in the files differ."""
    (name,) = (family.trunk + tensor.name for tensor in family.tensors(cfg) if tensor.parts == ("embed/tokens",))
    embed, unembed = stored.get(name), stored.get(family.unembed)
    if not cfg.tie_embeddings or unembed is None:
        return cfg, stored
    if embed is None:
        return cfg, {**stored, name: unembed}  # some writers keep either of the two names of a shared tensor
    if tensor_files.equal(embed, unembed):
        return cfg, stored
    warnings.warn(
        f"{folder}: tie_word_embeddings is true in config.json, but {family.unembed} differs from {name}; the model is "
        "loaded with both (tie_embeddings=False)",
        stacklevel=3,
    )
    return dataclasses.replace(cfg, tie_embeddings=False), stored


def _plan(
    cfg: config.LMConfig, family: layouts.Family, *, head: bool, unembed: bool
) -> Iterator[tuple[layouts.Tensor, int | None]]:
    """Yields every tensor of a checkpoint except ``score.weight``, with its layer index (None outside the layers)."""
    for tensor in family.tensors(cfg):
        layers = range(cfg.n_layers) if "{i}" in tensor.name else [None]
        for layer in layers:
            yield tensor._replace(name=family.trunk + tensor.name), layer
    if not cfg.tie_embeddings and (unembed or not head):
        yield layouts.Tensor(family.unembed, ("unembed/kernel",), "rows_out"), None


def _shapes(
    cfg: config.LMConfig, plan: Iterable[tuple[layouts.Tensor, int | None]], heads: int
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors in the files; ``heads`` is 0 for a language model."""
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
    """Raises ValueError if the names or shapes of stored tensors do not match the config; reads no tensor."""
    wanted = _shapes(cfg, plan, (score_heads.stored_heads(stored.get(_SCORE)) or 1) if _SCORE in stored else 0)
    ignored = (*_BUFFERS, family.unembed) if cfg.tie_embeddings else _BUFFERS
    missing = [name for name in wanted if name not in stored]
    unexpected = [name for name in stored if name not in wanted and not name.endswith(ignored)]
    misshapen = [
        f"{name} {list(stored[name].shape)} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in stored and stored[name].shape != shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of the wrong shape": misshapen}
    if any(problems.values()):
        listed = [f"{problem}: {_listed(names)}" for problem, names in problems.items() if names]
        raise ValueError(f"the tensors of {folder} do not match its config.json; {'; '.join(listed)}")


def _listed(names: list[str], most: int = 8) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _finite(tensor: tensor_files.Stored) -> np.ndarray:
    array = tensor.read()
    if not np.isfinite(array).all():
        raise ValueError(f"{tensor.file}: the tensor {tensor.name} contains a value that is not finite")
    return array


def _place(piece: np.ndarray, axes: tuple[str, ...], dtype: Any, shard: Shard | None) -> jax.Array:
    piece = piece.astype(jnp.dtype(dtype))
    if shard is None:
        # A view would keep the whole tensor in memory.
        return jnp.array(piece, copy=True)
    return jax.make_array_from_callback(piece.shape, shard(axes), lambda index: piece[index])


def _zeros(row: lm_params.Spec, dtype: Any, shard: Shard | None) -> jax.Array:
    if shard is None:
        return jnp.zeros(row.shape, dtype)
    return jax.jit(functools.partial(jnp.zeros, row.shape, dtype), out_shardings=shard(row.axes))()


@functools.cache
def _filler(sharding: jax.sharding.Sharding | None) -> Callable[..., jax.Array]:
    """Returns a function that writes one layer into a stacked array, which is donated and updated in place."""

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
            raise ValueError(f"params lack {name}, which this LMConfig requires")
        if name in flat and flat[name].shape != row.shape:
            raise ValueError(f"params[{name}] has shape {flat[name].shape}; this LMConfig requires {row.shape}")
    unknown = sorted(flat.keys() - rows.keys())
    if any(name.endswith(("/lora_a", "/lora_b")) for name in unknown):
        raise ValueError(
            "params have adapters attached, which a model directory cannot contain: save lm.lora.merge(base, adapters, "
            "scale=...) instead, or the adapters alone with lm.peft.save"
        )
    if unknown:
        raise ValueError(f"params contain entries that this LMConfig lacks: {', '.join(unknown[:5])}")


def _config_json(
    model_type: str,
    family: layouts.Family,
    cfg: config.LMConfig,
    flat: Mapping[str, Any],
    dtype: str,
) -> dict[str, Any]:
    has_head = score_heads.count(flat) > 0
    lm_class = family.lm_class or family.class_name + "ForCausalLM"
    hf = {
        "architectures": [family.class_name + "ForSequenceClassification" if has_head else lm_class],
        "model_type": model_type,
        # The dtype of the files, also under the older name; the compute dtype is under "rlhf_jax".
        "dtype": dtype,
        "torch_dtype": dtype,
        **layouts.write_fields(cfg, family),
        "rlhf_jax": {field: getattr(cfg, field) for field in _OURS},
    }
    return hf | score_heads.fields(flat) if has_head else hf
