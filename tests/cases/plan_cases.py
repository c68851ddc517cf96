"""Writes the results that test_plan.py checks. This is a script, because it needs eight devices."""

import contextlib
import io
import json
import pathlib
import sys

import jax
import jax.numpy as jnp

jax.config.update("jax_num_cpu_devices", 8)

import plan  # noqa: E402
from jax.sharding import PartitionSpec  # noqa: E402
from planning import hlo  # noqa: E402

from rlhf_jax import parallel  # noqa: E402


def collectives():
    """Runs a loop of five all-gathers, a loop of three all-reduces, and an all-to-all."""
    mesh = parallel.make_mesh(data=1, fsdp=4, tensor=2)

    def body(x):
        def gather(carry, _):
            whole = jax.lax.all_gather(carry, "fsdp", axis=0, tiled=True)
            return jnp.sin(whole.reshape(4, 16, 32).max(axis=0) - carry), None

        def add(carry, _):
            return jnp.cos(jax.lax.psum(carry, "tensor")), None

        x, _ = jax.lax.scan(gather, x, None, length=5)
        x, _ = jax.lax.scan(add, x, None, length=3)
        return jax.lax.all_to_all(x, "fsdp", split_axis=1, concat_axis=0, tiled=True)

    spec = PartitionSpec("fsdp", "tensor")
    fn = jax.jit(
        jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=PartitionSpec("fsdp", "tensor"), check_vma=False)
    )
    text = fn.lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile().as_text()
    return hlo.read(text or "", mesh=dict(mesh.shape))


def run_plan(folder, *more):
    """Runs plan.py for a tiny model; returns its exit status, its output and its numbers."""
    flags = ["--model", "tiny", "--topology", "cpu:8", "--mesh.fsdp", "4", "--mesh.tensor", "2"]
    flags += ["--length", "32", "--batch", "8", "--dtype", "float32", "--json", str(folder / "plan.json"), *more]
    printed, status = io.StringIO(), None
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            plan.main(flags)
        except SystemExit as exit:
            status = exit.code
    return {"status": status, "printed": printed.getvalue(), "numbers": json.loads((folder / "plan.json").read_text())}


def main(out):
    """Writes all results to ``out``."""
    program = collectives()
    fits = run_plan(out.parent)
    rows = [
        {"kind": c.kind, "axes": c.axes, "bytes": c.bytes, "times": c.times, "received": c.received}
        for c in program.collectives
    ]
    too_large = run_plan(out.parent, "--memory", "0.0001", "--tries", "1")
    results = {"collectives": rows, "open_loops": program.open_loops, "fits": fits, "too_large": too_large}
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
