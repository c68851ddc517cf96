"""Estimates memory, minimum time and communication of a train step without access to the accelerators.

    python experiments/plan.py --stage ppo --model llama-3-8b --topology v5e:16x16 --mesh.fsdp 32 --mesh.tensor 8
    python experiments/plan.py --stage dpo --model path/to/config.json --topology v5e:2x4 --mesh.fsdp 8
    python experiments/plan.py --stage sft --model tiny --topology cpu --length 64 --batch 8

For a TPU topology, the step is compiled with the TPU compiler, which does not require a TPU. The command prints:

    memory        Bytes per chip by kind. Parameters, optimiser state, frozen models and KV cache are computed exactly;
                  the compiler reports the rest.
    FLOPs         FLOPs of the matrix products, with the body of a loop counted once per iteration, and 6 x parameters x
                  tokens for comparison.
    collectives   Collectives by kind and size, with a warning for each one that the sharding should make unnecessary.
    times         For a TPU topology, the minimum time of the step at the chip's peak rates.

If the step does not fit in memory, up to --tries similar plans are compiled until one fits. By default, computation and
gradient communication are in bfloat16, and parameters and optimiser state are in float32. A decoding loop, which ends
when all answers have stopped, is assumed to run for --response iterations.

For TPU topologies, run pip install -e '.[tpu]' on Linux. The exit status is 0 if the step fits, 1 if it does not
and 2 for invalid input.

A plan takes one to five minutes and 6 GB on two CPU cores. experiments/README.md lists the expected results.
"""

from __future__ import annotations

import itertools
import os
import sys

from launch import command_line
from planning import plan_settings


def parse(arguments: list[str]) -> plan_settings.Plan:
    """Parses the command line; raises SettingError for a setting without effect."""
    plan = command_line.parse_as(plan_settings.Plan, arguments, prog="plan.py", doc=__doc__)
    plan_settings.check_used(plan)
    return plan


def _before_jax(arguments: list[str]) -> None:
    """Restricts JAX to the CPU unless --topology selects a GPU or, by default, the devices of this machine."""
    values = [a.split("=", 1)[1] for a in arguments if a.startswith("--topology=")]
    values += [b for a, b in itertools.pairwise(arguments) if a == "--topology"]
    topology = values[-1] if values else ""
    if topology in ("", "None", "gpu"):
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")


if __name__ == "__main__":
    command_line.answer_help(parse)
    _before_jax(sys.argv[1:])

import json

from launch.settings import SettingError
from planning import chips, planner, roofline
from rich.console import Console

from rlhf_jax import atomic


def run(plan: plan_settings.Plan, out: Console, progress: Console) -> int:
    """Estimates the planned step, prints the numbers, writes them to --json if given, and returns the exit status."""
    chips.prepare()
    estimate = planner.measure(plan, out=progress)
    if not estimate.fits and plan.tries:
        estimate.suggestions.extend(planner.suggest(plan, estimate, out=progress))
    roofline.show(estimate, out)
    if plan.json is not None:
        atomic.replace_file(plan.json, (json.dumps(estimate.as_dict(), indent=1) + "\n").encode())
    return 0 if estimate.fits else 1


def main(arguments: list[str] | None = None) -> None:
    """Runs the command. The exit status is 0 if the step fits, 1 if it does not and 2 for invalid input."""
    try:
        plan = parse(sys.argv[1:] if arguments is None else arguments)
        status = run(plan, Console(), Console(stderr=True))
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(status)


if __name__ == "__main__":
    main()
