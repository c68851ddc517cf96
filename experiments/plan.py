"""Before paying for a machine: would the step fit, how fast could it be, and what do the chips say to each other?

    python experiments/plan.py --stage ppo --model llama-3-8b --topology v5e:16x16 --mesh.fsdp 32 --mesh.tensor 8
    python experiments/plan.py --stage dpo --model path/to/config.json --topology v5e:2x4 --mesh.fsdp 8
    python experiments/plan.py --stage sft --model tiny --topology cpu --length 64 --batch 8

Compiles the step that a run would take, with the compiler of the chips that are asked about and without a chip, and
says: whether it fits; bytes a chip by kind, those of parameters, optimiser, frozen models and KV cache from shapes and
shardings, exact, the rest from the compiler; operations, loops counted as often as they go round, beside 6 x parameters
x tokens; collectives by kind and size, with a warning for each that the sharding should not need; and the time that the
chip's peaks allow. Where it does not fit, nearby settings are compiled until one does, or --tries are used up.

Compute is bfloat16, parameters and optimiser are float32, gradients go between chips in bfloat16. A loop that goes on
until every answer has ended is taken to go round for --response tokens.

For TPUs: pip install 'rlhf_jax[tpu]', on Linux; no TPU is needed. Exit status: 0 fits, 1 does not fit, 2 bad input.

Hardware: two CPU cores, 6 GB. Time: one to five minutes a program.
To expect there: the table in experiments/README.md.
"""

from __future__ import annotations

import itertools
import os
import sys

from launch import command_line
from planning import plan_settings


def parse(arguments: list[str]) -> plan_settings.Plan:
    """Returns the settings of a command line."""
    return command_line.parse_as(plan_settings.Plan, arguments, prog="plan.py", doc=__doc__)


def _before_jax(arguments: list[str]) -> None:
    """Plans for chips that are not here need no device but the CPU, as many of it as are asked for."""
    given = [a.split("=", 1)[1] for a in arguments if a.startswith("--topology=")]
    given += [b for a, b in itertools.pairwise(arguments) if a == "--topology"]
    topology = given[-1] if given else ""
    if topology in ("", "None", "gpu"):
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")


if __name__ == "__main__":
    command_line.answer_help(parse)
    _before_jax(sys.argv[1:])

import json

from launch.settings import SettingError
from planning import chips, fit, roofline
from rich.console import Console

from rlhf_jax.checkpoint import atomic


def run(plan: plan_settings.Plan, out: Console, progress: Console) -> int:
    """Find, show and write; returns the exit status."""
    chips.prepare()
    found = fit.find(plan, out=progress)
    if not found.fits and plan.tries:
        found.suggestions.extend(fit.suggest(plan, found, out=progress))
    roofline.show(found, plan, out)
    if plan.json is not None:
        atomic.replace_file(plan.json, (json.dumps(found.as_dict(), indent=1) + "\n").encode())
    return 0 if found.fits else 1


def main(arguments: list[str] | None = None) -> None:
    """The command line; exits with the status that the module names."""
    plan = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        status = run(plan, Console(), Console(stderr=True))
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(status)


if __name__ == "__main__":
    main()
