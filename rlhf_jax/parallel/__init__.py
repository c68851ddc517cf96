"""Devices: the mesh, what lies where on it, and where steps are compiled.

A mesh has four axes. ``data`` and ``fsdp`` share the rows of a batch; over ``fsdp`` the parameters and the optimiser's
state are spread too, and gathered a layer at a time; ``tensor`` spreads heads, MLP and vocabulary; ``sequence`` the
columns of long rows. Nobody names a device: parameters and activations have *logical* axes (`lm.logical_axes`), and
``RULES`` says on which axes of the mesh each of them lies::

    mesh = parallel.make_mesh(data=2, fsdp=2, tensor=2)
    where = parallel.shardings(jax.eval_shape(make), mesh, lm.logical_axes(cfg))
    state = jax.jit(make, out_shardings=where)()             # born spread out, never whole on one device
    step = parallel.jit_step(sft.make_train_step(...), mesh=mesh)
    state, metrics = step(state, None, hyper, batch, rng)    # batch: NumPy arrays, this host's rows
"""

from rlhf_jax.parallel.placement import (
    AXES,
    ROWS,
    MeshError,
    batch_shardings,
    own_rows,
    put,
    put_batch,
    row_parts,
    whole,
)
from rlhf_jax.parallel.pmap import PmapStep
from rlhf_jax.parallel.sharding import (
    GATHERED,
    RULES,
    Rules,
    compiled_for,
    constrain,
    gathered,
    parts,
    shardings,
    spec,
    undivided,
)
from rlhf_jax.parallel.steps import JitStep, jit_step, make_mesh, pmap_step, shard_map_step

__all__ = [
    "AXES",
    "GATHERED",
    "ROWS",
    "RULES",
    "JitStep",
    "MeshError",
    "PmapStep",
    "Rules",
    "batch_shardings",
    "compiled_for",
    "constrain",
    "gathered",
    "jit_step",
    "make_mesh",
    "own_rows",
    "parts",
    "pmap_step",
    "put",
    "put_batch",
    "row_parts",
    "shard_map_step",
    "shardings",
    "spec",
    "undivided",
    "whole",
]
