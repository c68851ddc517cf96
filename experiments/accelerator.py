"""Measures this library on one GPU or TPU and prints one table. It stops after 8 minutes, compilation included.

    python experiments/accelerator.py                      all rows
    python experiments/accelerator.py --rows sft,dpo       only these rows and "limits", which always runs
    python experiments/accelerator.py --show               the table of the last run, without measuring
    python experiments/accelerator.py --quick              tiny shapes on a CPU, for a test run

The most important rows run first. With JAX_COMPILATION_CACHE_DIR set, a second run compiles less and reaches more rows.

Most rows use a pythia-1b with random float32 parameters and compute in bfloat16. 80 GB of device memory suffice.
The command requires jax, flax, optax, numpy, transformers and this library. If torch is installed, it is compared too.

Each measurement is appended to the file given by --out as soon as it is complete.
If a row fails, its error is printed and the next row starts. Two columns of the table require an explanation:

    share   The measurement as a share of a quantity that the cell names. Training steps are compared with the measured
            rate of matrix products. Their FLOPs are those of the model's matrix products, without recomputation and
            with only the causal half of the attention scores (MFU). Decoding steps are compared with the measured
            memory bandwidth. Their bytes are those of the parameters and the KV cache in bfloat16. The parts of a PPO
            iteration are compared with the time of the iteration.
    aim     The bound that the share or, in rows without a share, the value must satisfy.

Rows:
"""

from __future__ import annotations

import argparse
import datetime
import math
import pathlib
import signal
import sys
from typing import Any

from benchmarks.accelerator_rows import report_table, row_context, row_runner

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))  # the library need not be installed

__doc__ = f"{__doc__}" + "\n".join(f"    {name:<20}{row.title}" for name, row in row_runner.ROWS.items())


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the settings of a command line."""
    parser = argparse.ArgumentParser(
        prog="accelerator.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="", metavar="NAMES", help="Comma-separated names of rows. Default: all rows.")
    parser.add_argument("--quick", action="store_true", help="Use tiny shapes on the CPU; the numbers are meaningless.")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("runs/accelerator.jsonl"),
        metavar="FILE",
        help="File to which measurements are appended. Default: %(default)s.",
    )
    parser.add_argument("--show", action="store_true", help="Print the table of the last run in --out and exit.")
    parser.add_argument(
        "--minutes",
        type=float,
        default=8.0,
        help="Time limit in minutes, after which the current row is stopped and later rows are not run. "
        "Default: %(default)s.",
    )
    settings = parser.parse_args(arguments)
    for name in ("rows", "quick", "minutes") if settings.show else ():
        if getattr(settings, name) != parser.get_default(name):
            parser.error(f"--{name} has no effect with --show, which measures nothing; leave it out")
    settings.rows = [name.strip() for name in settings.rows.split(",") if name.strip()] or list(row_runner.ROWS)
    unknown = [name for name in settings.rows if name not in row_runner.ROWS]
    if unknown:
        parser.error(f"--rows: unknown row {', '.join(unknown)}; the rows are {', '.join(row_runner.ROWS)}")
    if not 0 < settings.minutes < math.inf:
        parser.error(f"--minutes is {settings.minutes}; it must be a positive number")
    if settings.show and not settings.out.is_file():
        parser.error(f"--show: there is no file {settings.out}; measure first")
    try:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.open("a").close()
    except OSError as error:
        parser.error(f"--out: cannot write to {settings.out}: {error.strerror or error}")
    return settings


def main(arguments: list[str]) -> int:
    """Measures the rows and prints the table; returns the exit status.

    The exit status is 1 if a row failed or was not run, 2 without an accelerator and 130 if the run was interrupted.
    """
    settings = parse(arguments)
    run = None if settings.show else datetime.datetime.now(datetime.UTC).isoformat()
    interrupted = False
    if run is not None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the child and print the table, as for Ctrl-C
        try:
            row_runner.measure(
                [name for name in row_runner.ROWS if name in {"limits", *settings.rows}],
                settings.out.absolute(),
                quick=settings.quick,
                run=run,
                minutes=settings.minutes,
                on_row=lambda text: print(text, file=sys.stderr, flush=True),
            )
        except row_runner.NoAcceleratorError:
            print("error: JAX finds neither a GPU nor a TPU; --quick makes a test run on the CPU", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            interrupted = True
    records = row_context.read(settings.out, run)
    print(report_table.markdown(records))
    failed: list[dict[str, Any]] = [each for each in records if each.get("error")]
    for each in failed:
        print(f"error: row {each['row']}: {each['error']}", file=sys.stderr)
    if interrupted:
        print("error: interrupted; the table has the measurements so far", file=sys.stderr)
        return 130
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
