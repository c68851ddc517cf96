"""A run of two stages on one or more hosts: a program, since a process meets the others before it has devices.

python hosts_cases.py '{"index": 0, "count": 2, "port": 12345, "out": "...", "stages": {"sft": 6}}'
"""

import json
import pathlib
import sys
import time

import jax

ASKED = {"index": 0, "count": 1, "devices": 2, "mesh": {"data": -1}, "pause": 0.0, "facts": {}, "silence": 30}
ASKED |= {"save_every": 2, "timeout": 60}


def status(error):
    from rlhf_jax.train import loop

    return 75 if isinstance(error, loop.Preempted) else 2


def train(group, mesh, asked):
    import mesh_cases
    import numpy as np

    from rlhf_jax import checkpoint, metrics, parallel
    from rlhf_jax.distributed import processes
    from rlhf_jax.train import loop

    out = pathlib.Path(asked["out"])
    for name, steps in asked["stages"].items():
        kind = mesh_cases.STAGES[name]

        def where(tree):
            return parallel.shardings(tree, mesh, mesh_cases.AXES)

        def pause(done, state, metrics, name=name):
            print(f"{name} {done}", flush=True)
            time.sleep(asked["pause"])

        log = metrics.MetricLog(out / name) if group.first else None
        with checkpoint.Checkpoints(out / name / "checkpoints") as checkpoints:
            state = loop.fit(
                parallel.jit_step(kind.step(), mesh=mesh),
                jax.jit(kind.make, out_shardings=where(jax.eval_shape(kind.make)))(),
                steps=steps,
                batch_at=lambda i, kind=kind: parallel.own_rows(kind.batch(i), mesh),
                hyper_at=lambda i, kind=kind: kind.hyper,
                rng=jax.random.key(1),
                frozen=parallel.put(kind.frozen, where(kind.frozen)),
                stage=name,
                log=log,
                checkpoints=checkpoints,
                save_every=asked["save_every"],
                callbacks=[pause],
                should_stop=group.stage(),
            )
        leaves = [processes.whole(x) for x in jax.tree.leaves((state.params, state.opt_state))]
        if group.first:
            np.savez(out / f"{name}.npz", *leaves)


def main(asked):
    from rlhf_jax import parallel
    from rlhf_jax.distributed import hosts

    jax.config.update("jax_num_cpu_devices", asked["devices"])
    who = {} if asked["count"] == 1 else {"count": asked["count"], "index": asked["index"]}
    where = None if asked["count"] == 1 else f"127.0.0.1:{asked['port']}"
    how = {"facts": asked["facts"], "timeout": asked["timeout"], "silence": asked["silence"], "status": status}
    with hosts.started(where, **who, **how) as group:
        train(group, parallel.make_mesh(**asked["mesh"]), asked)


if __name__ == "__main__":
    try:
        main(ASKED | json.loads(sys.argv[1]))
    except Exception as error:
        if status(error) != 75 and type(error).__name__ != "HostsError":
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(status(error))
