"""Benchmarks this library against TRL, transformers and Tunix, and against the limits of the machine, in one table.

    python experiments/benchmark.py --install runs/peers   install TRL and Tunix once; 2 minutes, 3 GB
    python experiments/benchmark.py                        all rows; skips peers that are not installed
    python experiments/benchmark.py --only sft-s,decode-m-1
    python experiments/benchmark.py --quick                tiny shapes, for a test run

Models: S is a GPT-2 with 4 layers, width 256, 4 heads and a vocabulary of 4096 (4.3M parameters); M has 12 layers,
width 768, 12 heads and a vocabulary of 8192 (92M). On a CPU everything is in float32, on a GPU or TPU in bfloat16.
Tunix has no GPT-2, so it runs a Llama with as many matmul parameters. TRL's trainers run in float32, for which a ratio
is required, and with TRL's defaults. The defaults use bfloat16 on a CPU too, which is half the work for a CPU with
bfloat16 instructions.

Every program runs in a separate process with glibc's huge pages. The programs of a row are started one after the other,
each up to its first timed repetition, and then repeat in turn, so that a temporary slowdown of the machine affects all
of them. Ratios are ratios of medians. Nothing else should run on the machine.

One repetition of each workload, and the measurement:

    sft, reward, dpo    one step on 8 rows of 256 tokens, or on 8 pairs of them; DPO has prompts of 64 tokens and
                        includes the reference's forward pass. Tokens per second
    ppo                 64 answers of 32 tokens to prompts of 32 tokens, scored by a reward model, then 4 epochs of 4
                        updates of policy and critic. Tokens per second
    generate            64 prompts (S) or 8 (M) of 64 tokens, 64 sampled tokens each. Tokens per second
    stream              512 prompts in 64 slots, where one answer in eight has 256 tokens and the others 32: refilled
                        slots, compared with consecutive batches of 64. Tokens per second
    decode              the time of a token for each of 1 to 64 rows, compared with the minimum possible time: the
                        larger of (parameters and cache) / bandwidth and FLOPs / rate of the step's own products
    "matmul rate"       FLOPs per second, compared with those of products of two 2048 x 2048 matrices

Peers: TRL's SFTTrainer, RewardTrainer, DPOTrainer and, in version 1.12, PPOTrainer; the generate of transformers;
Tunix's PeftTrainer, DPOTrainer and Sampler. TRL's DPO is slower with huge pages, so it also runs without them (4k).

The column "compile" is the time of the first repetition minus the median. "memory" is the peak of the process or, on an
accelerator, of the device. The output folder holds results.json, results.md and logs/.

On two cores of an AMD EPYC with AVX-512 (family 25), 24 GB: 35 minutes for all rows with all peers. Expected results:
SFT is 1.3 (S) and 1.5 (M, at 74 % of the matmul rate) times as fast as Tunix, and 1.8 and 1.3 times as fast as TRL in
float32; DPO 1.7 times Tunix and 2 to 2.6 times TRL; the reward model 1.2 times TRL; generation 1.3 to 1.8 times Tunix
and 2 times transformers; PPO 1.6 times TRL; refilled slots 2.75 times consecutive batches; a token takes 1.2 to 2 times
the minimum possible time. On newer cores, where XLA's products are faster than torch's, the ratios to TRL are larger.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
import platform
import sys
from typing import Annotated, Any

import tyro
from benchmarks import benchmark_tables, interleaved_runs, peer_environments, speed_ratios, suite
from launch import command_line
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of benchmark.py."""

    only: str = ""
    """Comma-separated rows; empty for all."""
    repeats: int = 5
    """Timed repetitions of each program."""
    quick: bool = False
    """Use tiny shapes for a test run; the numbers are meaningless."""
    out: pathlib.Path = pathlib.Path("runs/benchmarks")
    """Output folder."""
    peers: pathlib.Path = pathlib.Path("runs/peers")
    """Folder of the peers' environments."""
    ours_only: bool = False
    """Skip the peers even if they are installed."""
    together: bool = True
    """Keep all programs of a row in memory, so that they can repeat in turn (15 GB for sft-m). If off, they run one
    after another."""
    cpu: bool = False
    """Use the CPU even if there is a GPU or TPU."""
    install: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Install the peers' environments in DIR and exit."""
    tunix_python: str = ""
    """Python 3.12 interpreter for Tunix. Default: this Python or python3.12 on the path."""
    torch_index: str = ""
    """Additional package index for torch, such as the index of its CPU builds."""
    tunix_extra: str = ""
    """Additional requirement for Tunix, such as "jax[cuda13]" for a GPU."""


def parse(arguments: list[str]) -> Settings:
    """Returns the settings of a command line."""
    return command_line.parse_as(Settings, arguments, prog="benchmark.py", doc=__doc__)


def main(arguments: list[str]) -> int:
    """Runs the command line; returns 1 if one of our own workloads failed, 2 for invalid input."""
    settings = parse(arguments)
    console = Console()
    if settings.install is not None:
        peer_environments.install(
            settings.install,
            tunix_python=settings.tunix_python,
            tunix_extra=settings.tunix_extra,
            torch_index=settings.torch_index,
            say=lambda text: console.print(text, highlight=False),
        )
        return 0
    try:
        rows = suite.select(settings.only)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = measure(settings, rows)
    for title, columns, lines in _tables(results):
        console.print(benchmark_tables.terminal_table(title, columns, lines))
    console.print(_machine_text(results["machine"]), style="dim", highlight=False)
    failed = [each for each in results["comparisons"] if isinstance(each["ours"], str)]
    for each in failed:
        print(f"error: {each['row']} {each['ours']}", file=sys.stderr)
    return 1 if failed else 0


def measure(settings: Settings, rows: tuple[suite.Row, ...]) -> dict[str, Any]:
    """Runs the programs of all rows, writes results.json and results.md after each row and returns the results."""
    options = interleaved_runs.RunOptions(
        peers=settings.out / "no-peers" if settings.ours_only else settings.peers.absolute(),
        logs=settings.out.absolute() / "logs",
        repeats=settings.repeats,
        quick=settings.quick,
        accelerator=not settings.cpu and interleaved_runs.has_accelerator(),
        together=settings.together,
    )
    records: dict[str, interleaved_runs.Record] = {}
    comparisons: list[dict[str, Any]] = []
    results: dict[str, Any] = {}
    steps = [
        (1 + options.repeats) * sum(interleaved_runs.installed(program, options) for program in row.programs)
        for row in rows
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=sum(steps))
        for i, row in enumerate(rows):
            row_records = interleaved_runs.measure(
                row.programs,
                warm=row.warm,
                options=options,
                on_progress=lambda description: progress.update(task, description=description, advance=1),
            )
            records |= row_records
            comparisons += speed_ratios.compare(row, row_records)
            progress.update(task, completed=sum(steps[: i + 1]))
            # Written after each row, so that an interruption loses no measured row.
            results = {
                "machine": _machine(records),
                "settings": {"repeats": settings.repeats, "quick": settings.quick, "together": settings.together},
                "comparisons": comparisons,
                "programs": speed_ratios.programs(records),
                "records": records,
            }
            _write(settings.out, results)
    return results


def _machine(records: dict[str, interleaved_runs.Record]) -> dict[str, Any]:
    """Returns the hardware, the system and the versions that the programs ran on."""
    versions: dict[str, set[str]] = {}
    for record in records.values():
        for name, version in record.get("versions", {}).items():
            versions.setdefault(name, set()).add(version)
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": platform.platform(),
        "devices": sorted({record["device"] for record in records.values() if "device" in record}),
        "versions": {name: sorted(each) for name, each in versions.items()},
        "date": datetime.date.today().isoformat(),
    }


def _machine_text(machine: dict[str, Any]) -> str:
    """Formats the machine as two lines."""
    versions = ", ".join(f"{name} {'/'.join(each)}" for name, each in machine["versions"].items())
    devices = "" if machine["devices"] in ([], ["cpu"]) else f" · {', '.join(machine['devices'])}"
    hardware = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB{devices}"
    return f"{hardware} · {machine['system']}\n{versions}"


def _cpu_model() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    family = f" (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"
    return fields.get("model name", platform.machine()) + family


def _tables(results: dict[str, Any]) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    """Returns the title, the columns and the rows of the tables of comparisons and of programs."""
    comparisons = benchmark_tables.comparison_rows(results["comparisons"])
    programs = benchmark_tables.program_rows(results["programs"])
    return [
        ("Comparison with peers and limits", benchmark_tables.COMPARISON_COLUMNS, comparisons),
        ("Programs", benchmark_tables.PROGRAM_COLUMNS, programs),
    ]


def _write(out: pathlib.Path, results: dict[str, Any]) -> None:
    """Writes results.json and results.md."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    parts = [
        f"## {title}\n\n{benchmark_tables.markdown_table(columns, rows)}" for title, columns, rows in _tables(results)
    ]
    (out / "results.md").write_text("\n".join([*parts, _machine_text(results["machine"]) + "\n"]))


if __name__ == "__main__":
    command_line.answer_help(parse)
    sys.exit(main(sys.argv[1:]))
