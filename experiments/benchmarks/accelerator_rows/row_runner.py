"""Measures rows in child processes, so that the failure of one row does not affect the others.

A child, ``python -m benchmarks.accelerator_rows.row_runner``, measures the rows named on its command line. If a row
raises an error, the row is recorded as failed and the next one starts. If the child dies, the parent starts another one
for the remaining rows.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks.accelerator_rows import row_context


class Row(NamedTuple):
    """A group of measurements that the flag ``--rows`` can select."""

    title: str
    function: str
    """``module.function`` in this package, imported when the row starts."""
    flags: str = ""
    """XLA flags of the process that measures the row. Consecutive rows with equal ``flags`` and ``alone`` share it."""
    alone: bool = False
    """Whether the row needs a process in which JAX does not use the device."""


ROWS = {
    "limits": Row("rate of matrix products and memory bandwidth, to which shares refer", "limit_rows.limits"),
    "sft": Row("SFT step", "training_rows.sft"),
    "dpo": Row("DPO step, including the reference", "training_rows.dpo"),
    "reward": Row("reward model step", "training_rows.reward"),
    "decode": Row("generation and its decoding step at several batch sizes", "decoding_rows.decode"),
    "ppo": Row("PPO iteration and its parts", "ppo_rows.iteration"),
    "torch": Row("SFT, DPO and generation with transformers and torch", "torch_rows.peer", alone=True),
    "stream": Row("generation with continuous and with static batching", "decoding_rows.stream"),
    "attention": Row("fused attention compared with plain XLA", "attention_rows.fused_attention"),
    "numerics": Row("PPO metrics that should be 0, and whether PPO is deterministic", "numeric_rows.numerics"),
    "seeds": Row("PPO on a small model with eight seeds, in one program", "ppo_rows.seeds"),
    "deterministic": Row(
        "whether PPO is deterministic with XLA's deterministic operations",
        "numeric_rows.bits",
        flags="--xla_gpu_deterministic_ops=true",
    ),
}
"""Rows by name, in the order in which they run; the most important rows come first."""


NO_ACCELERATOR = 3
"""Exit status of a child that finds only a CPU."""


class NoAcceleratorError(RuntimeError):
    """JAX finds neither a GPU nor a TPU."""


def measure(
    names: Sequence[str], path: pathlib.Path, *, quick: bool, run: str, minutes: float, on_row: Callable[[str], None]
) -> None:
    """Measures rows in child processes and appends their records to a file.

    Args:
        names: Keys of `ROWS`.
        path: The JSON-lines file.
        quick: Whether to use tiny shapes on the CPU.
        run: Name of the run; part of every record.
        minutes: Time limit of the whole run. The row that reaches it is stopped, and later rows are not run.
        on_row: Called with a line of text when a row ends.

    Raises:
        NoAcceleratorError: There is only a CPU, and ``quick`` is False.
    """
    deadline = time.monotonic() + 60 * minutes
    path.parent.mkdir(parents=True, exist_ok=True)
    pending = list(names)
    while pending:
        _, (*group,) = next(itertools.groupby(pending, key=lambda name: (ROWS[name].flags, ROWS[name].alone)))
        status = _run_child(group, path, quick=quick, run=run, deadline=deadline, flags=ROWS[group[0]].flags)
        ended = {each["row"]: each for each in row_context.read(path, run) if "row_seconds" in each}
        for name in group:
            if name not in ended and status is not None:
                record = {"run": run, "row": name, "error": status, "row_seconds": 0.0}
                row_context.append(path, record)
                ended[name] = record
                status = None if time.monotonic() < deadline else "not run: the time limit was reached"
            if name in ended:
                pending.remove(name)
                on_row(_text(name, ended[name]))


def _text(name: str, ended: dict[str, Any]) -> str:
    error = ended.get("error")
    memory = f", peak memory so far {ended['peak_bytes'] / 1e9:.1f} GB" if "peak_bytes" in ended else ""
    return f"{name}: {error}" if error else f"{name}: {ended['row_seconds']:.0f} s{memory}"


def _run_child(
    names: Sequence[str], path: pathlib.Path, *, quick: bool, run: str, deadline: float, flags: str
) -> str | None:
    """Runs a child process and returns why it ended early, if it did."""
    if time.monotonic() >= deadline:
        return "not run: the time limit was reached"
    command = [sys.executable, "-m", "benchmarks.accelerator_rows.row_runner", "--run", run, "--out", str(path)]
    command += ["--quick"] * quick + list(names)
    root = pathlib.Path(__file__).resolve().parents[3]
    environment = {"CUDA_VISIBLE_DEVICES": "0"} | os.environ
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in environment:
        environment.setdefault("XLA_CLIENT_MEM_FRACTION", "0.92")
    environment["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    if quick:
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiling takes most time
        flags = ""  # the flags are for a GPU
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    child = subprocess.Popen(command, cwd=root / "experiments", env=environment)
    try:
        status = child.wait(deadline - time.monotonic())
    except subprocess.TimeoutExpired:
        return "stopped: the time limit was reached"
    finally:
        child.kill()  # also after an interrupt, because a surviving child would keep the device's memory
        child.wait()
    if status == NO_ACCELERATOR:
        raise NoAcceleratorError
    return None if status == 0 else f"the process ended with status {status}"


def main() -> None:
    """Measures the rows named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=list(ROWS))
    parser.add_argument("--run", required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if not options.quick and not ROWS[options.names[0]].alone:
        import jax

        if jax.default_backend() == "cpu":
            sys.exit(NO_ACCELERATOR)
    for name in options.names:
        measure_row(name, options.out, quick=options.quick, run=options.run)


def measure_row(name: str, path: pathlib.Path, *, quick: bool, run: str) -> None:
    """Measures one row in this process and records how long it took, or why it failed."""
    import importlib

    began = time.monotonic()
    shapes = row_context.QUICK if quick else row_context.Shapes()
    context = row_context.Context(path, run, name, shapes, row_context.read(path, run))
    ended: dict[str, object] = {"run": run, "row": name}
    try:
        module, function = ROWS[name].function.split(".")
        getattr(importlib.import_module(f"benchmarks.accelerator_rows.{module}"), function)(context)
    except Exception as error:
        import traceback

        traceback.print_exc()
        ended["error"] = row_context.first_line(error)
    row_context.append(path, ended | {"row_seconds": time.monotonic() - began} | _peak_memory(name))
    gc.collect()  # free the arrays of the row before the next one starts


def _peak_memory(name: str) -> dict[str, int]:
    """Returns the field ``peak_bytes``, the peak memory of the device in this process so far, if it is known."""
    if ROWS[name].alone:
        return {}
    import jax

    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {} if peak is None else {"peak_bytes": peak}


if __name__ == "__main__":
    main()
