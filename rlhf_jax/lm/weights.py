"""Transformations of parameters before a forward pass: gathering on a mesh, and unstacking layers for decoding."""

from __future__ import annotations

from typing import Any

import jax

from rlhf_jax import parallel, types
from rlhf_jax.lm import config
from rlhf_jax.lm import params as lm_params


def gathered(weights: Any, axes: Any, cfg: config.LMConfig) -> Any:
    """Returns weights gathered over the mesh axis ``fsdp`` and cast to the compute dtype, unless float32 is required.

    ``axes`` is a tree like the result of `params.logical_axes`. Leaves that are missing from it, such as adapters, are
    returned unchanged.
    """
    if parallel.num_shards("embed") == 1:
        return weights

    def of(path: Any, x: jax.Array) -> jax.Array:
        names = axes
        for entry in path:
            names = names.get(entry.key) if isinstance(names, dict) else None
        if names is None:
            return x
        # Norms are computed in float32, and learned positions are added to embeddings before the sum is cast.
        kept = path[-1].key == "scale" or (path[0].key == "embed" and cfg.positions == "learned")
        return parallel.gather_weight(x, *names, dtype=None if kept else cfg.compute_dtype)

    return jax.tree_util.tree_map_with_path(of, weights)


def whole(params: types.Params, *names: str, cfg: config.LMConfig) -> types.Params:
    """Returns the named parameters outside the layers, gathered unless `unstack` has already done so."""
    named = {name: params[name] for name in names if name in params}
    return named if is_unstacked(params) else gathered(named, lm_params.logical_axes(cfg), cfg)


def unstack(params: types.Params, cfg: config.LMConfig) -> types.Params:
    """Returns ``params`` with ``layers`` as a tuple of layers, which `transformer.forward` accepts with a cache.

    A decoding loop can then use each layer's weights without slicing them at every token. On a mesh, the weights are
    also gathered and cast to the compute dtype, because communicating them at every token would take far longer than
    reading them. During decoding, each device therefore holds the whole model, or its shard along the ``tensor`` axis.
    """
    if is_unstacked(params):
        return params
    axes = lm_params.layer_axes(cfg)
    layers = (jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(cfg.n_layers))
    dense = whole(params, "embed", "unembed", "final_norm", cfg=cfg)
    return {**params, **dense, "layers": tuple(gathered(layer, axes, cfg) for layer in layers)}


def is_unstacked(params: types.Params) -> bool:
    """Returns whether ``params`` are a result of `unstack`."""
    return isinstance(params["layers"], tuple)
