"""Trains stages on one or more hosts. This is a script, because hosts must connect before JAX creates devices.

python hosts_cases.py '{"index": 0, "count": 2, "port": 12345, "out": "...", "stages": {"sft": 6}}'
"""

import json
import pathlib
import sys
import time

import jax

DEFAULTS = {"index": 0, "count": 1, "devices": 2, "mesh": {"data": -1}, "pause": 0.0, "facts": {}, "save_every": 2}


def exit_status(error):
    from rlhf_jax.train import loop

    return 75 if isinstance(error, loop.Preempted) else 2


def train(group, mesh, options):
    import mesh_cases
    import numpy as np

    from rlhf_jax import checkpoint, metrics, parallel
    from rlhf_jax.distributed import processes
    from rlhf_jax.train import loop

    out = pathlib.Path(options["out"])
    for name, steps in options["stages"].items():
        stage = mesh_cases.STAGES[name]

        def shardings(tree):
            return parallel.shardings(tree, mesh, mesh_cases.AXES)

        def pause(done, state, metrics, name=name):
            print(f"{name} {done}", flush=True)
            time.sleep(options["pause"])

        log = metrics.MetricLog(out / name) if group.first else None
        with checkpoint.Checkpoints(out / name / "checkpoints") as checkpoints:
            state = loop.fit(
                parallel.jit_step(stage.step(), mesh=mesh),
                jax.jit(stage.make, out_shardings=shardings(jax.eval_shape(stage.make)))(),
                steps=steps,
                batch_at=lambda i, stage=stage: parallel.local_rows(stage.batch(i), mesh),
                hyper_at=lambda i, stage=stage: stage.hyper,
                rng=jax.random.key(1),
                frozen=parallel.shard(stage.frozen, shardings(stage.frozen)),
                stage=name,
                log=log,
                checkpoints=checkpoints,
                save_every=options["save_every"],
                callbacks=[pause],
                should_stop=group.stop_agreement(),
            )
        leaves = [processes.gather(x) for x in jax.tree.leaves((state.params, state.opt_state))]
        if group.first:
            np.savez(out / f"{name}.npz", *leaves)


def main(options):
    from rlhf_jax import parallel
    from rlhf_jax.distributed import hosts

    jax.config.update("jax_num_cpu_devices", options["devices"])
    address = {}
    if options["count"] > 1:
        address = {"coordinator": f"127.0.0.1:{options['port']}", "count": options["count"], "index": options["index"]}
    with hosts.connect(**address, facts=options["facts"], timeout=60, exit_status=exit_status) as group:
        train(group, parallel.make_mesh(**options["mesh"]), options)


if __name__ == "__main__":
    try:
        main(DEFAULTS | json.loads(sys.argv[1]))
    except Exception as error:
        if exit_status(error) != 75 and type(error).__name__ != "HostsError":
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(exit_status(error))
