"""Interrupts runs and corrupts checkpoints at random, and checks that resumed runs give bit-identical results.

    python experiments/torture.py                           100 kills, 12 stops, 140 corruptions
    python experiments/torture.py --kills 8 --flips 20      a shorter run
    python experiments/torture.py --stages ppo --seed 3     one stage, interrupted at different moments

The command uses four tiny runs (SFT, reward model, DPO, PPO) with the train steps, loop, checkpoints and log of the
library. Each is run once without interruption. Then it is repeatedly interrupted and resumed in a new process: it is
killed (SIGKILL) or stopped (SIGTERM) while it compiles, during a step or during a save. The state after each iteration,
the final state and metrics.jsonl must be identical to those of the uninterrupted run.

Next, the files of a checkpoint are corrupted: bits are flipped, and files are truncated or deleted. Either the
corruption must be reported and an older checkpoint restored, or the newest one must be restored bit-identically.

No failures are expected. If any occur, the exit status is 1, torture.json in the output folder lists them, and the
folders of the failed runs are kept.
"""

from __future__ import annotations

import os
from typing import Any

from fault_injection.torture_settings import TortureSettings, check
from launch import command_line


def parse(arguments: list[str]) -> TortureSettings:
    """Parses the command line; raises SettingError for invalid settings."""
    settings = command_line.parse_as(TortureSettings, arguments, prog="torture.py", doc=__doc__)
    check(settings)
    return settings


if __name__ == "__main__":
    command_line.answer_help(parse)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Shortens compilation in the forked processes, which compile small programs many times and without a cache.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

import concurrent.futures
import dataclasses
import sys
import time
from collections.abc import Sequence

from fault_injection import corruption, interruptions
from launch import entry_point, run_folder
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from rlhf_jax.report import console


def run(settings: TortureSettings) -> dict[str, Any]:
    """Runs all tests and returns the contents of torture.json."""
    began, out = time.monotonic(), Console()
    folder = run_folder.free_folder(settings.out, kind="torture")
    run_folder.create_folder(folder, dataclasses.asdict(settings))
    size = interruptions.RunSettings(settings.steps, settings.save_every, settings.seed)
    stages = settings.stages
    kills, terms = (_shares(count, len(stages)) for count in (settings.kills, settings.terms))
    counts = {"flip": settings.flips, "truncate": settings.truncations, "delete": settings.deletions}
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    with progress, concurrent.futures.ThreadPoolExecutor(settings.jobs) as threads:
        bars = [progress.add_task(stage, total=k + t) for stage, k, t in zip(stages, kills, terms)]
        bar = progress.add_task("corruption", total=sum(counts.values()))

        def interrupt(i: int) -> tuple[interruptions.Reference, interruptions.Report]:
            stage = stages[i]
            reference = interruptions.run_reference(stage, folder / stage / "reference", size)
            report = interruptions.interrupt(
                stage,
                folder / stage,
                size,
                reference,
                kills=kills[i],
                terms=terms[i],
                on_progress=lambda done: progress.update(bars[i], completed=done),
            )
            return reference, report

        references, reports = zip(*threads.map(interrupt, range(len(stages))), strict=True)
        corrupted = corruption.corrupt(
            references[-1],
            folder / "corrupted",
            stages[-1],
            size,
            counts,
            on_progress=lambda done: progress.update(bar, completed=done),
        )
    failures = [text for report in (*reports, corrupted) for text in report.failures]
    results = {
        "seconds": time.monotonic() - began,
        "settings": dataclasses.asdict(settings),
        "stages": [report.asdict() for report in reports],
        "damage": corrupted.asdict(),
        "failures": failures,
    }
    run_folder.write_json(folder / "torture.json", results)
    out.print(_interruptions_table(reports))
    out.print(_corruption_table(corrupted))
    for text in failures:
        out.print(f"failure: {text}", markup=False, soft_wrap=True)
    out.print(
        f"{sum(r.resumed for r in reports)} of {sum(r.interruptions for r in reports)} interrupted runs resumed "
        f"bit-identically; {len(failures) or 'no'} failures; {results['seconds']:.0f} s; "
        f"results: {folder / 'torture.json'}",
        soft_wrap=True,
        highlight=False,
    )
    return results


def _shares(count: int, parts: int) -> list[int]:
    return [count // parts + (i < count % parts) for i in range(parts)]


def _interruptions_table(reports: Sequence[interruptions.Report]) -> Table:
    phases = ("start", *interruptions.PHASES)
    columns = ("stage", *phases, "resumed bit-identically", "runs compared", "failures", "seconds")
    table = console.NumbersTable(*columns, title="kills (SIGKILL) + stops (SIGTERM) in each phase of the run")
    for r in reports:
        by_phase = [f"{r.kills[phase]} + {r.terms[phase]}" for phase in phases]
        resumed = f"{r.resumed} of {r.interruptions}"
        table.add_row(r.stage, *by_phase, resumed, str(r.runs), str(len(r.failures)), f"{r.seconds:.0f}")
    return table


def _corruption_table(report: corruption.Report) -> Table:
    columns = ("corruption", "reported, older restored", "harmless, newest restored", "failures")
    table = console.NumbersTable(*columns, title=f"corruption of the {report.files} files of a checkpoint")
    for kind, outcomes in report.outcomes.items():
        table.add_row(kind, *(str(outcomes[name]) for name in ("seen", "harmless", "wrong")))
    return table


def main(arguments: list[str] | None = None) -> None:
    """Runs the command. The exit status is 1 if there are failures."""
    results: list[Any] = []
    entry_point.execute(lambda settings: results.append(run(settings)), parse, arguments)
    if any(each["failures"] for each in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
