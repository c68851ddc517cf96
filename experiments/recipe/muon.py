"""Optimisers with unit rate: the steps multiply by a traced one."""

from __future__ import annotations

from typing import Any

import jax
import optax
import optax.contrib

from rlhf_jax import types

Params = types.Params


def muon() -> optax.GradientTransformation:
    """Muon for the layers' kernels, Adam for the rest: half the steps of Adam alone from nothing."""
    contraction = {"q": ((1,), (2, 3)), "k": ((1,), (2, 3)), "v": ((1,), (2, 3)), "out": ((1, 2), (3,))}

    def dimensions(params: Params) -> Any:
        def of(path: Any, leaf: jax.Array) -> Any:
            names = [entry.key for entry in path]
            if names[0] != "layers" or names[-1] != "kernel":
                return None
            return optax.contrib.MuonDimensionNumbers(*contraction.get(names[1], ((1,), (2,))))

        return jax.tree_util.tree_map_with_path(of, params)

    return optax.contrib.muon(1.0, adam_b2=0.95, consistent_rms=0.2, muon_weight_dimension_numbers=dimensions)
