"""Compares the speed of this library with TRL, transformers, Tunix and the limits of the machine.

    python experiments/benchmark.py --install runs/peers   install TRL and Tunix once; 2 minutes, 3 GB
    python experiments/benchmark.py                        all rows; skips libraries that are not installed
    python experiments/benchmark.py --only sft-s,decode-m-1
    python experiments/benchmark.py --quick                tiny shapes, for a test run

There are two models. S is a GPT-2 with 4 layers, width 256, 4 heads and a vocabulary of 4096 (4.3M parameters). M has
12 layers, width 768, 12 heads and a vocabulary of 8192 (92M). The computation is in float32 on a CPU and in bfloat16 on
a GPU or TPU. Tunix has no GPT-2 and runs a Llama with about the same number of matmul parameters. TRL's trainers run
twice: in this library's dtype, for which the table has a required ratio, and with TRL's defaults, which use bfloat16 on
a CPU too. Bfloat16 halves the work on a CPU with bfloat16 instructions.

Every program runs in a separate process with glibc's huge pages. All programs of a table row first run, one after
another, up to their first timed repetition. Then their repetitions alternate, so that a temporary slowdown of the
machine affects all of them. A speed-up is a ratio of medians. Nothing else should run on the machine.

The workloads are as follows. Except for decode and the matmul rate, they are measured in tokens per second:

    sft, reward, dpo    One train step on 8 rows of 256 tokens, or on 8 pairs of such rows. In dpo, prompts have 64
                        tokens and the step includes the forward pass of the reference.
    ppo                 64 answers of 32 tokens to prompts of 32 tokens, scored by a reward model, and 4 epochs of 4
                        updates of policy and critic.
    generate            64 sampled tokens for each of 64 prompts (S) or 8 prompts (M) of 64 tokens.
    stream              512 prompts in 64 slots, each of which is refilled when its answer ends, compared with
                        consecutive batches of 64 prompts. One answer in eight has 256 tokens; the others have 32.
    decode              Time per token with 1 to 64 rows, compared with the minimum possible time. The minimum is the
                        larger of two times: the size of parameters and cache divided by the memory bandwidth, and the
                        FLOPs of the step divided by the measured rate of its matrix products.
    matmul rate         FLOPs per second of an SFT step of M, compared with the product of two 2048 x 2048 matrices.

The peers are TRL's SFTTrainer, RewardTrainer, DPOTrainer and PPOTrainer (the last in version 1.12), the ``generate`` of
transformers, and Tunix's PeftTrainer, DPOTrainer and Sampler. TRL's DPO is slower with huge pages, so it is also run
without them (programs whose names end in 4k).

The column "compile" is the time of the first repetition minus, except in decode, the median time of a repetition. The
column "memory" is the peak memory of the process or, on an accelerator, of the device. The output folder contains
results.json, results.md and logs/.

All rows with all peers take 35 minutes on a machine with 24 GB of memory and two cores of an AMD EPYC with AVX-512
(family 25). The expected speed-ups on this machine are:

    SFT                 1.3 (S) and 1.5 (M) over Tunix; 1.8 (S) and 1.3 (M) over TRL in float32
    DPO                 1.7 over Tunix, 2 to 2.6 over TRL
    reward model        1.2 over TRL
    generation          1.3 to 1.8 over Tunix, 2 over transformers
    PPO                 1.6 over TRL
    refilled slots      2.75 over consecutive batches

SFT of M reaches 74 % of the matmul rate. Decoding takes 1.2 to 2 times the minimum possible time. On newer cores, where
XLA's matrix products are faster than torch's, the speed-ups over TRL are larger.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
import platform
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from benchmarks import benchmark_tables, interleaved_runs, peer_environments, speed_ratios, suite
from launch import command_line, setting_checks
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of benchmark.py."""

    only: str = ""
    """Comma-separated names of rows. If empty, all rows are run."""
    repeats: int = 5
    """Number of timed repetitions of each program."""
    quick: bool = False
    """Use tiny shapes for a test run. The results are meaningless."""
    out: pathlib.Path = pathlib.Path("runs/benchmarks")
    """Output folder."""
    peers: pathlib.Path = pathlib.Path("runs/peers")
    """Folder in which --install has installed the peers."""
    ours_only: bool = False
    """Skip the peers even if they are installed."""
    together: bool = True
    """Keep all programs of a row in memory (15 GB for sft-m), so that their repetitions can alternate. If off, they
    run one after another."""
    cpu: bool = False
    """Use the CPU even if a GPU or TPU is available."""
    install: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Install the environments of the peers in DIR and exit."""
    tunix_python: str = ""
    """Python 3.12 interpreter for --install. If empty, the running Python or python3.12 on the path is used."""
    torch_index: str = ""
    """Additional package index for torch in --install, such as the index of its CPU builds."""
    tunix_extra: str = ""
    """Additional requirement for Tunix in --install, such as "jax[cuda13]" for a GPU."""


def parse(arguments: list[str]) -> Settings:
    """Parses the command line; raises SettingError for a setting without effect."""
    settings = command_line.parse_as(Settings, arguments, prog="benchmark.py", doc=__doc__)
    installing = ("tunix_python", "torch_index", "tunix_extra")
    unused: list[tuple[Sequence[str], str]]
    if settings.install is None:
        unused = [(installing, "without --install")]
    else:
        names = {field.name for field in dataclasses.fields(settings)} - {"install", *installing}
        unused = [(sorted(names), "with --install, which measures nothing")]
    if settings.ours_only:
        unused.append((("peers",), "with --ours-only"))
    setting_checks.refuse_changed(settings, Settings(), unused)
    return settings


def main(arguments: list[str]) -> int:
    """Runs the command. Returns 1 if a workload of this library failed, 2 for invalid input and 0 otherwise."""
    try:
        settings = parse(arguments)
        rows = suite.select(settings.only)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
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
    results = measure(settings, rows)
    for title, columns, lines in _tables(results):
        console.print(benchmark_tables.terminal_table(title, columns, lines))
    console.print(_machine_text(results["machine"]), style="dim", highlight=False)
    failed = [each for each in results["comparisons"] if isinstance(each["ours"], str)]
    for each in failed:
        print(f"error: {each['row']} {each['ours']}", file=sys.stderr)
    return 1 if failed else 0


def measure(settings: Settings, rows: tuple[suite.Row, ...]) -> dict[str, Any]:
    """Runs the programs of all rows and returns the results, which are also saved after each row."""
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
            # Saved after each row, so that an interruption does not lose finished rows.
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
    """Describes the hardware, the system and the package versions."""
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
    """Formats the description of the machine in two lines."""
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
    """Returns the title, columns and rows of two tables: the comparisons and the programs."""
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
