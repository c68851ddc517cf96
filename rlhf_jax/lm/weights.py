"""Parameters as a forward pass uses them: gathered on a mesh, a layer each for decoding."""

from __future__ import annotations

from typing import Any

import jax

from rlhf_jax import parallel, types
from rlhf_jax.lm import config
from rlhf_jax.lm import params as lm_params


def gathered(weights: Any, axes: Any, cfg: config.LMConfig) -> Any:
    """Weights whole over ``fsdp``, and in the compute dtype those that are cast to it before they are used.

    ``axes`` is as `params.logical_axes` gives it; what it does not name, such as adapters, stays as it is.
    """
    if parallel.num_shards("embed") == 1:
        return weights

    def of(path: Any, x: jax.Array) -> jax.Array:
        names = axes
        for entry in path:
            names = names.get(entry.key) if isinstance(names, dict) else None
        if names is None:
            return x
        # Norms work in float32, and positions are added to embeddings before the sum is cast.
        kept = path[-1].key == "scale" or (path[0].key == "embed" and cfg.positions == "learned")
        return parallel.gather_weight(x, *names, dtype=None if kept else cfg.compute_dtype)

    return jax.tree_util.tree_map_with_path(of, weights)


def whole(params: types.Params, *names: str, cfg: config.LMConfig) -> types.Params:
    """Those of the parameters outside of the layers, :func:`gathered`; as they are where :func:`unstack` did that."""
    named = {name: params[name] for name in names if name in params}
    return named if ready(params) else gathered(named, lm_params.logical_axes(cfg), cfg)


def unstack(params: types.Params, cfg: config.LMConfig) -> types.Params:
    """Return ``params`` with ``layers`` as a tuple of layers, which a cached `transformer.forward` takes as well.

    A decoding loop then finds each layer's weights as arrays of their own instead of slicing them at every token. On a
    mesh it finds them gathered, too, and in the compute dtype: sending them at every token would take many times as
    long as reading them. A chip then holds the whole model while it decodes, or its part of ``tensor``.
    """
    if ready(params):
        return params
    axes = lm_params.layer_axes(cfg)
    layers = (jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(cfg.n_layers))
    dense = whole(params, "embed", "unembed", "final_norm", cfg=cfg)
    return {**params, **dense, "layers": tuple(gathered(layer, axes, cfg) for layer in layers)}


def ready(params: types.Params) -> bool:
    """Whether they come from :func:`unstack`."""
    return isinstance(params["layers"], tuple)
