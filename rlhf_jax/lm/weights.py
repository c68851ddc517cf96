"""Transformations of parameters before a forward pass: gathering on a mesh, and unstacking layers for decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from rlhf_jax import parallel, types
from rlhf_jax.lm import config
from rlhf_jax.lm import params as lm_params


def gathered(weights: Any, axes: Any, cfg: config.LMConfig) -> Any:
    """Returns weights gathered over the mesh axis ``fsdp``; without such an axis, all weights are returned unchanged.

    Weights are cast to the compute dtype before they are gathered, except norms and, in models with learned positions,
    embeddings. ``axes`` is a tree like the result of `params.logical_axes`. Weights without an entry in ``axes``, such
    as adapters, are returned unchanged.
    """
    return weights if parallel.num_shards("embed") == 1 else _cast(weights, axes, cfg, parallel.gather_weight)


def _cast(weights: Any, axes: Any, cfg: config.LMConfig, cast: Callable[..., jax.Array]) -> Any:
    """Applies ``cast(x, *names, dtype=...)`` to leaves that have axis names in ``axes``; dtype None keeps the dtype."""

    def of(path: Any, x: jax.Array) -> jax.Array:
        names = axes
        for entry in path:
            names = names.get(entry.key) if isinstance(names, dict) else None
        if names is None:
            return x
        # Norms are computed in float32, and learned positions are added to embeddings before the sum is cast.
        kept = path[0].key.endswith("norm") or (path[0].key == "embed" and cfg.positions == "learned")
        return cast(x, *names, dtype=None if kept else cfg.compute_dtype)

    return jax.tree_util.tree_map_with_path(of, weights)


def whole(params: types.Params, *names: str, cfg: config.LMConfig) -> types.Params:
    """Returns the named parameters outside the layers, gathered unless `unstack` has already gathered them."""
    named = {name: params[name] for name in names if name in params}
    return named if is_unstacked(params) else gathered(named, lm_params.logical_axes(cfg), cfg)


def unstack(params: types.Params, cfg: config.LMConfig) -> types.Params:
    """Returns ``params`` with ``layers`` as a tuple of layers; `transformer.forward` accepts it only with a cache.

    A decoding loop can then use each layer's weights without slicing them at every token. The weights are also cast to
    the compute dtype, because every token reads all of them, and gathered on a mesh, because communicating them at
    every token would take far longer than reading them. During decoding, each device therefore holds the whole model,
    or its shard along the ``tensor`` axis.
    """
    if is_unstacked(params):
        return params

    def ready(weights: Any, axes: Any) -> Any:
        return _cast(gathered(weights, axes, cfg), axes, cfg, _as_dtype)

    axes = lm_params.layer_axes(cfg)
    layers = (jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(cfg.n_layers))
    dense = ready(whole(params, "embed", "unembed", "final_norm", cfg=cfg), lm_params.logical_axes(cfg))
    return {**params, **dense, "layers": tuple(ready(layer, axes) for layer in layers)}


def _as_dtype(x: jax.Array, *names: str | None, dtype: Any) -> jax.Array:
    del names
    return x if dtype is None else x.astype(dtype)


def is_unstacked(params: types.Params) -> bool:
    """Returns whether ``params`` are a result of `unstack`."""
    return isinstance(params["layers"], tuple)
