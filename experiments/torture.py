"""Kills runs and damages checkpoints at random, and checks that nothing is lost: every bit is compared.

    python experiments/torture.py                           100 kills, 12 stops, 140 damages, on two CPU cores
    python experiments/torture.py --kills 8 --flips 20      a short form
    python experiments/torture.py --stages ppo --seed 3     one stage, other moments

Four tiny runs (SFT, a reward model, DPO, PPO) use the library's own steps, loop, checkpoints and log. Each is run once
in peace. Then it is killed (SIGKILL) while it compiles, in a step and during a save, and asked to stop (SIGTERM) there,
in processes of its own, and started again each time. The state after every iteration, every leaf of the last one and
every line of metrics.jsonl have to be those of the run in peace. At last single bits of a checkpoint's files are
flipped, and files cut off and deleted: each damage has to be seen, and the older checkpoint restored, or the newest one
has to come back bit for bit.

To expect: everything right. The exit status is 1 if anything is not; OUT/torture.json says what, and the folder of that
run stays.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Before the processes are forked that read it: they compile small programs, a hundred times, and without a cache.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

import concurrent.futures
import dataclasses
import sys
import time
from typing import Any

import tyro
from fault_injection import damage, interruptions, tiny_runs
from launch import entry_point, run_folder, settings
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Torture:
    """What is done, and to what."""

    kills: int = 100
    """SIGKILLs in all, dealt out to the stages."""
    terms: int = 12
    """SIGTERMs in all, after each of which the run has to save and leave with status 75."""
    flips: int = 100
    """Flipped bits of a checkpoint's files, half at a place of all bytes, half in a file of all files."""
    truncations: int = 20
    """Files cut off at a random length."""
    deletions: int = 20
    """Files deleted."""
    stages: tuple[str, ...] = tiny_runs.STAGES
    """Which of them."""
    steps: int = 60
    """Iterations of a run."""
    save_every: int = 4
    """Iterations between two checkpoints."""
    jobs: int = 2
    """Stages under torture at a time."""
    seed: int = 0
    """Of the runs and of the moments; what a moment falls on depends on the machine as well."""
    out: str | None = None
    """Folder for all files; by default runs/torture-TIME."""


def check(asked: Torture) -> None:
    """Raise SettingError, naming it, for a setting that cannot be."""
    for name in ("kills", "terms", "flips", "truncations", "deletions"):
        if getattr(asked, name) < 0:
            raise settings.SettingError(f"--{name} is {getattr(asked, name)}; it must be at least 0")
    for name in ("steps", "save_every", "jobs"):
        if getattr(asked, name) < 1:
            raise settings.SettingError(f"--{name.replace('_', '-')} is {getattr(asked, name)}; it must be at least 1")
    if asked.steps < 2 * asked.save_every:
        raise settings.SettingError(
            f"--steps is {asked.steps}; it must be twice --save-every, or there is no older one"
        )
    unknown = [stage for stage in asked.stages if stage not in tiny_runs.STAGES]
    if unknown or not asked.stages:
        raise settings.SettingError(f"--stages are {asked.stages}; they must be of {', '.join(tiny_runs.STAGES)}")


def run(asked: Torture) -> dict[str, Any]:
    """All of it; returns what torture.json holds."""
    began, out = time.monotonic(), Console()
    folder = run_folder.free_folder(asked.out, kind="torture")
    folder.mkdir(parents=True, exist_ok=True)
    size = interruptions.Size(asked.steps, asked.save_every, asked.seed)
    shares = {"kills": _dealt(asked.kills, len(asked.stages)), "terms": _dealt(asked.terms, len(asked.stages))}
    damages = {"flip": asked.flips, "truncate": asked.truncations, "delete": asked.deletions}
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    with progress, concurrent.futures.ThreadPoolExecutor(asked.jobs) as threads:

        def one(i: int) -> tuple[interruptions.Reference, interruptions.Report]:
            stage, kills, terms = asked.stages[i], shares["kills"][i], shares["terms"][i]
            whole = interruptions.reference(stage, folder / stage / "peace", size)
            how: Any = {"kills": kills, "terms": terms}
            how["tell"] = lambda done: progress.update(bars[i], completed=done)
            return whole, interruptions.torture(stage, folder / stage, size, whole, **how)

        bars = [
            progress.add_task(stage, total=kills + terms) for stage, kills, terms in zip(asked.stages, *shares.values())
        ]
        bar = progress.add_task("damage", total=sum(damages.values()))
        both = [each.result() for each in [threads.submit(one, i) for i in range(len(asked.stages))]]
        last, whole = asked.stages[-1], both[-1][0]
        damaged = damage.damage(
            whole, folder / "damaged", last, size, damages, tell=lambda done: progress.update(bar, completed=done)
        )
    reports = [report for _, report in both]
    results = {
        "seconds": time.monotonic() - began,
        "settings": dataclasses.asdict(asked),
        "stages": [report.asdict() for report in reports],
        "damage": damaged.asdict(),
        "failures": [text for report in (*reports, damaged) for text in report.failures],
    }
    run_folder.write_json(folder / "torture.json", results)
    out.print(_kills_table(reports))
    out.print(_damage_table(damaged))
    for text in results["failures"]:
        out.print(f"wrong: {text}", markup=False, soft_wrap=True)
    struck = sum(sum(r.kills.values()) + sum(r.terms.values()) for r in reports)
    good = sum(r.resumed for r in reports)
    verdict = "nothing was lost" if not results["failures"] else f"{len(results['failures'])} failures"
    out.print(
        f"{good} of {struck} kills and stops resumed to the same bits; {verdict}; "
        f"{results['seconds']:.0f} s; {folder / 'torture.json'}",
        soft_wrap=True,
        highlight=False,
    )
    return results


def _dealt(count: int, among: int) -> list[int]:
    return [count // among + (i < count % among) for i in range(among)]


def _kills_table(reports: list[interruptions.Report]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="killed (SIGKILL) + stopped (SIGTERM), by where it fell")
    phases = ("start", *interruptions.PHASES)
    for name in ("stage", *phases, "same bits", "whole runs compared", "wrong", "s"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for r in reports:
        struck = sum(r.kills.values()) + sum(r.terms.values())
        fell = [f"{r.kills[phase]} + {r.terms[phase]}" for phase in phases]
        same = f"{r.resumed} of {struck}"
        table.add_row(r.stage, *fell, same, str(r.runs), str(len(r.failures)), f"{r.seconds:.0f}")
    return table


def _damage_table(report: damage.Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=f"damage to the {report.files} files of a checkpoint")
    for name in ("damage", "seen, older one restored", "harmless, same bits", "wrong"):
        table.add_column(name, justify="left" if name == "damage" else "right")
    for kind, found in report.outcomes.items():
        table.add_row(kind, *(str(found[name]) for name in ("seen", "harmless", "wrong")))
    return table


def parse(arguments: list[str]) -> Torture:
    """From the command line."""
    asked = tyro.cli(Torture, args=arguments, prog="torture.py", description=__doc__)
    check(asked)
    return asked


def main(arguments: list[str] | None = None) -> None:
    """The command line; exits 1 if anything was lost."""
    found: list[Any] = []
    entry_point.execute(lambda asked: found.append(run(asked)), parse, arguments)
    if any(each["failures"] for each in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
