"""Device meshes, sharding rules and compiled train steps.

A mesh has four axes:

* ``data`` shards the rows of a batch;
* ``fsdp`` shards the rows of a batch, the optimiser state and the parameters, which are gathered one layer at a time;
* ``tensor`` shards attention heads, the MLP and the vocabulary;
* ``sequence`` shards the columns (token positions) of a batch.

Parameters and activations have *logical* axes (`lm.logical_axes`), and `RULES` maps each logical axis to axes of the
mesh. Model code therefore does not depend on the mesh. In this example, ``make()`` returns a new ``TrainState``::

    mesh = parallel.make_mesh(data=2, fsdp=2, tensor=2)
    shardings = parallel.shardings(jax.eval_shape(make), mesh, lm.logical_axes(cfg))
    state = jax.jit(make, out_shardings=shardings)()         # created directly in shards
    step = parallel.jit_step(sft.make_train_step(...), mesh=mesh)
    state, metrics = step(state, None, hyper, batch, rng)    # batch: this host's rows, as NumPy arrays
"""

from rlhf_jax.parallel.placement import (
    AXES,
    BATCH_AXES,
    MeshError,
    batch_shardings,
    local_rows,
    num_batch_shards,
    replicate,
    shard,
    shard_batch,
)
from rlhf_jax.parallel.pmap import PmapStep
from rlhf_jax.parallel.sharding import (
    GATHERED,
    RULES,
    Rules,
    active_mesh,
    constrain,
    gather_weight,
    indivisible,
    num_shards,
    shardings,
    spec,
)
from rlhf_jax.parallel.steps import JitStep, jit_step, make_mesh, pmap_step, shard_map_step

__all__ = [
    "AXES",
    "BATCH_AXES",
    "GATHERED",
    "RULES",
    "JitStep",
    "MeshError",
    "PmapStep",
    "Rules",
    "active_mesh",
    "batch_shardings",
    "constrain",
    "gather_weight",
    "indivisible",
    "jit_step",
    "local_rows",
    "make_mesh",
    "num_batch_shards",
    "num_shards",
    "pmap_step",
    "replicate",
    "shard",
    "shard_batch",
    "shard_map_step",
    "shardings",
    "spec",
]
