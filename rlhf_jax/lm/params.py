"""Table of the model's parameters, with the shape, logical axes and initialiser of each.

A name such as ``layers/q/kernel`` is a path into the nested dict of parameters. Parameters under ``layers`` have a
leading layer axis, over which :mod:`rlhf_jax.lm.transformer` scans. `head_table` is the corresponding table for the
scalar heads of :mod:`rlhf_jax.lm.heads`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import types
from rlhf_jax.lm import config

Initialiser = Callable[[jax.Array, tuple[int, ...]], jax.Array]


class Spec(NamedTuple):
    """Shape, logical axes and initialiser of one parameter."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    """Logical name of each dimension: layers, vocab, length, embed, heads, kv_heads, head, mlp, score, rank."""
    init: Initialiser


def normal(std: float) -> Initialiser:
    """Returns an initialiser that draws from a Gaussian with mean 0 and standard deviation ``std``."""
    return lambda rng, shape: std * jax.random.normal(rng, shape, jnp.float32)


def constant(value: float) -> Initialiser:
    """Returns an initialiser that fills arrays with ``value``."""
    return lambda rng, shape: jnp.full(shape, value, jnp.float32)


def table(cfg: config.LMConfig) -> dict[str, Spec]:
    """Returns the `Spec` of every parameter of the model, keyed by its path.

    Kernels and embeddings are drawn from a Gaussian with variance 2 / (5 D), where D is ``d_model``. Kernels whose
    output is added to the residual stream are also divided by sqrt(2 N) for N layers, so that the variance of the
    stream does not grow with depth.
    """
    D, F, C = cfg.d_model, cfg.d_mlp, cfg.d_head
    H, G = cfg.n_heads, cfg.n_kv_heads
    inward = normal(math.sqrt(2 / (5 * D)))
    outward = normal(math.sqrt(2 / (5 * D)) / math.sqrt(2 * cfg.n_layers))
    zeros, ones = constant(0.0), constant(1.0)
    unit = zeros if cfg.norm_plus_one else ones

    layer = {
        "attn_norm/scale": Spec((D,), ("embed",), unit),
        "q/kernel": Spec((D, H, C), ("embed", "heads", "head"), inward),
        "k/kernel": Spec((D, G, C), ("embed", "kv_heads", "head"), inward),
        "v/kernel": Spec((D, G, C), ("embed", "kv_heads", "head"), inward),
        "out/kernel": Spec((H, C, D), ("heads", "head", "embed"), outward),
        "mlp_norm/scale": Spec((D,), ("embed",), unit),
        "up/kernel": Spec((D, F), ("embed", "mlp"), inward),
        "down/kernel": Spec((F, D), ("mlp", "embed"), outward),
    }
    if cfg.gated_mlp:
        layer["gate/kernel"] = Spec((D, F), ("embed", "mlp"), inward)
    if cfg.qk_norm:
        layer["q_norm/scale"] = Spec((C,), ("head",), unit)
        layer["k_norm/scale"] = Spec((C,), ("head",), unit)
    if cfg.post_norms:
        layer["attn_post_norm/scale"] = Spec((D,), ("embed",), unit)
        layer["mlp_post_norm/scale"] = Spec((D,), ("embed",), unit)
    if cfg.norm == "layernorm":
        layer["attn_norm/bias"] = Spec((D,), ("embed",), zeros)
        layer["mlp_norm/bias"] = Spec((D,), ("embed",), zeros)
    if cfg.qkv_bias:
        layer["q/bias"] = Spec((H, C), ("heads", "head"), zeros)
        layer["k/bias"] = Spec((G, C), ("kv_heads", "head"), zeros)
        layer["v/bias"] = Spec((G, C), ("kv_heads", "head"), zeros)
    if cfg.out_bias:
        layer["out/bias"] = Spec((D,), ("embed",), zeros)
    if cfg.mlp_bias:
        layer["up/bias"] = Spec((F,), ("mlp",), zeros)
        layer["down/bias"] = Spec((D,), ("embed",), zeros)
        if cfg.gated_mlp:
            layer["gate/bias"] = Spec((F,), ("mlp",), zeros)

    rows = {f"layers/{name}": _stacked(spec, cfg.n_layers) for name, spec in layer.items()}
    rows["embed/tokens"] = Spec((cfg.vocab_size, D), ("vocab", "embed"), inward)
    if cfg.positions == "learned":
        length = cfg.position_offset + cfg.max_length
        rows["embed/positions"] = Spec((length, D), ("length", "embed"), inward)
    rows["final_norm/scale"] = Spec((D,), ("embed",), unit)
    if cfg.norm == "layernorm":
        rows["final_norm/bias"] = Spec((D,), ("embed",), zeros)
    if not cfg.tie_embeddings:
        rows["unembed/kernel"] = Spec((D, cfg.vocab_size), ("embed", "vocab"), inward)
    return rows


def head_table(cfg: config.LMConfig, *, zero: bool = False, heads: int | None = None) -> dict[str, Spec]:
    """Returns the table of a single scalar head, or of ``heads`` heads (2 or more).

    The kernel is 0 if ``zero``; otherwise, it is Gaussian with standard deviation 1 / sqrt(``cfg.d_model`` + 1).
    """
    kernel = constant(0.0) if zero else normal(1 / math.sqrt(cfg.d_model + 1))
    if heads is None:
        named, many, axes = "head/kernel_D", (), ()
    elif heads >= 2:
        named, many, axes = "head/kernel_HD", (heads,), ("score",)
    else:
        raise ValueError(f"heads is {heads}; it must be 2 or more, or None for a single head")
    return {
        named: Spec((*many, cfg.d_model), (*axes, "embed"), kernel),
        "head/bias": Spec(many, axes, constant(0.0)),
        "head/gain": Spec(many, axes, constant(1.0)),
    }


def init(rng: jax.Array, cfg: config.LMConfig) -> types.Params:
    """Returns randomly initialised parameters as a nested dict of float32 arrays.

    The random key of each array is derived from its name, so adding or removing a parameter does not change the initial
    values of the others. ``rng`` is consumed. Under ``jax.jit(..., out_shardings=...)``, the parameters are created
    sharded.

    >>> import jax
    >>> from rlhf_jax import lm
    >>> params = lm.init(jax.random.key(0), lm.LMConfig.preset("tiny"))
    >>> sorted(params), params["embed"]["tokens"].shape
    (['embed', 'final_norm', 'layers', 'unembed'], (256, 64))
    """
    return draw(rng, table(cfg))


def draw(rng: jax.Array, rows: Mapping[str, Spec]) -> types.Params:
    """Returns a nested dict of initialised parameters, one for each `Spec` in ``rows``."""
    return nest({name: row.init(jax.random.fold_in(rng, _stable_hash(name)), row.shape) for name, row in rows.items()})


def abstract(cfg: config.LMConfig, *, head: bool = False) -> types.Params:
    """Returns the shapes and dtypes of the parameters that `init` returns, and of a scalar head if ``head``."""
    return nest({name: jax.ShapeDtypeStruct(row.shape, jnp.float32) for name, row in _rows(cfg, head).items()})


def logical_axes(cfg: config.LMConfig, *, head: bool = False) -> types.Params:
    """Returns the result of `abstract` with a tuple of logical axis names in place of each array."""
    return nest({name: row.axes for name, row in _rows(cfg, head).items()})


def layer_axes(cfg: config.LMConfig) -> types.Params:
    """Returns the logical axes of one layer's parameters, without the layer axis."""
    return jax.tree.map(lambda axes: axes[1:], logical_axes(cfg)["layers"], is_leaf=lambda x: isinstance(x, tuple))


def first_layers(params: types.Params, *, cfg: config.LMConfig, layers: int) -> tuple[types.Params, config.LMConfig]:
    """Returns the parameters and the configuration of a model with only the first layers, for their hidden states.

    The final norm, which applies to the hidden states of the last of these layers, is that of the whole model.

    >>> import jax
    >>> from rlhf_jax import lm
    >>> cfg = lm.LMConfig.preset("tiny")
    >>> half, half_cfg = lm.first_layers(lm.init(jax.random.key(0), cfg), cfg=cfg, layers=1)
    >>> lm.forward(half, jax.numpy.array([[5, 6, 7]]), cfg=half_cfg).hidden_BLD.shape
    (1, 3, 64)

    Raises:
        ValueError: ``layers`` is not in [1, cfg.n_layers].
    """
    if not 1 <= layers <= cfg.n_layers:
        raise ValueError(f"layers is {layers}; it must be in [1, {cfg.n_layers}]")
    first = dataclasses.replace(cfg, n_layers=layers, local_layers=cfg.local_layers[:layers])
    return params | {"layers": jax.tree.map(lambda x: x[:layers], params["layers"])}, first


def count(cfg: config.LMConfig) -> int:
    """Returns the number of parameters of the model, without a scalar head.

    >>> from rlhf_jax import lm
    >>> lm.count(lm.LMConfig.preset("gpt2"))
    124439808
    """
    return sum(math.prod(row.shape) for row in table(cfg).values())


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``{"a": {"b": x}}`` for ``{"a/b": x}``."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *path, last = name.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), path, tree)[last] = leaf
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns ``{"a/b": x}`` for ``{"a": {"b": x}}``, the inverse of `nest`."""
    flat: dict[str, Any] = {}
    for key, node in tree.items():
        flat.update(flatten(node, f"{prefix}{key}/") if isinstance(node, Mapping) else {prefix + key: node})
    return flat


def _rows(cfg: config.LMConfig, head: bool) -> dict[str, Spec]:
    return table(cfg) | (head_table(cfg) if head else {})


def _stacked(spec: Spec, n_layers: int) -> Spec:
    return Spec((n_layers, *spec.shape), ("layers", *spec.axes), spec.init)


def _stable_hash(name: str) -> int:
    # Python's hash of a string differs between processes.
    return zlib.crc32(name.encode())
