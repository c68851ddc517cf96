"""Tests published claims at a small scale, each with several seeds, and decides them by an interval.

    python experiments/claims.py --list                the claims
    python experiments/claims.py C07 C09               two claims with five seeds
    python experiments/claims.py --all                 all claims
    python experiments/claims.py --all --quick         all claims with tiny models, to see that they run
    python experiments/claims.py --report              the page and the table of the claims that have been run

Each claim is one module in experiments/claims/. A claim trains its arms on the built-in world, whose gold utility is
known, and computes one statistic per seed. It is "shown" if the 95 % interval over the seeds is within the range that
the claim states, "refuted" if it is outside, and "not shown" otherwise. Results are kept in --store under keys that
include the code and the settings that make them: starting the command again continues, and a change of the code or of
a setting computes again what depends on it, and nothing else.

The output folder contains ID.json and ID.svg for each claim and report.html. docs/claims.md explains the verdicts.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated

from launch import command_line, process_setup
from launch.run_settings import SettingError
from tyro.conf import Positional, arg


@dataclasses.dataclass(frozen=True)
class ClaimsSettings:
    """Settings of claims.py."""

    claims: Annotated[Positional[tuple[str, ...]], arg(metavar="ID [ID ...]")] = ()
    """Claims to run, such as C09."""
    all: bool = False
    """Run all claims."""
    list: bool = False
    """Print the claims and exit."""
    report: bool = False
    """Write the report and print the table of the claims that have been run, without running any."""
    quick: bool = False
    """Use tiny models and few steps, to see that the claims run. The verdicts mean nothing."""
    seeds: int = 5
    """Number of seeds. An interval needs at least 2."""
    first_seed: int = 0
    """First seed. Settings were chosen with seeds of 100 and more."""
    processes: int = 2
    """Number of processes, each of which uses one core."""
    null: bool = False
    """Also count how often each claim is shown with its arms exchanged at random, which should be at most 5 %."""
    out: str = "runs/claims"
    """Output folder."""
    store: str | None = None
    """Folder of stored models and measurements. None uses the folder `store` in --out."""


def parse(arguments: list[str]) -> ClaimsSettings:
    """Parses the command line; raises SettingError for invalid settings."""
    settings = command_line.parse_as(ClaimsSettings, arguments, prog="claims.py", doc=__doc__)
    if sum([bool(settings.claims), settings.all, settings.list, settings.report]) != 1:
        raise SettingError("give the ids of claims, or one of --all, --list and --report")
    for name in ("seeds", "processes"):
        if getattr(settings, name) < 1:
            raise SettingError(f"--{name} is {getattr(settings, name)}; it must be at least 1")
    if settings.first_seed < 0:
        raise SettingError(f"--first-seed is {settings.first_seed}; it must be at least 0")
    return settings


if __name__ == "__main__":
    command_line.answer_help(parse)
    process_setup.use_huge_pages()

import json
from typing import Any

from claims import catalogue, claim_report, claim_results, runner
from launch import entry_point
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from rlhf_jax.report import plots


def run(settings: ClaimsSettings) -> list[dict[str, Any]]:
    """Runs the claims and returns the contents of their JSON files."""
    out = Console()
    if settings.list:
        out.print(_list_table())
        return []
    folder = pathlib.Path(settings.out)
    if not settings.report:
        _run_claims(settings, folder, out)
    results = claim_results.read(folder)
    if not results:
        raise SettingError(f"--out {folder} has no results of claims; run some first, such as claims.py C09")
    page = claim_report.write(folder, results)
    out.print(claim_report.table(results))
    out.print(f"report: {page}", soft_wrap=True, highlight=False)
    return results


def _run_claims(settings: ClaimsSettings, folder: pathlib.Path, out: Console) -> None:
    ids = list(catalogue.CLAIMS) if settings.all else [each.capitalize() for each in settings.claims]
    if unknown := [each for each in ids if each not in catalogue.CLAIMS]:
        raise SettingError(f"there is no claim {unknown[0]}; the claims are {', '.join(catalogue.CLAIMS)}")
    folder.mkdir(parents=True, exist_ok=True)
    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    work = [runner.Work(claim, seed) for claim in dict.fromkeys(ids) for seed in seeds]
    done: dict[runner.Work, runner.Done] = {}
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("claims x seeds", total=len(work))

        def on_done(each: runner.Work, result: runner.Done) -> None:
            done[each] = result
            progress.advance(bar)
            if not progress.console.is_terminal:  # which shows no bar
                took = f"{result.seconds:.0f} s, and {result.shared_seconds:.0f} s for shared stages"
                progress.console.print(f"{len(done)} of {len(work)}: {each}, {took}", soft_wrap=True)
            own = [runner.Work(each.claim, seed) for seed in seeds]
            if all(other in done for other in own):
                claim = catalogue.CLAIMS[each.claim]
                results = claim_results.decide(
                    claim, [done[other] for other in own], seeds=seeds, settings={"quick": settings.quick}
                )
                measured_S = [done[other].measured for other in own]
                if settings.null:
                    results["null_rate"] = claim_results.null_rate(claim, measured_S, shuffles=400)
                (folder / f"{claim.id}.svg").write_text(plots.standalone(claim.plot(measured_S)))
                (folder / f"{claim.id}.json").write_text(json.dumps(results, indent=2) + "\n")
                progress.console.print(f"{claim.id} {results['verdict']}: {claim.claim}", soft_wrap=True)

        runner.measure_all(
            work,
            store=pathlib.Path(settings.store or folder / "store"),
            quick=settings.quick,
            processes=settings.processes,
            on_done=on_done,
        )


def _list_table() -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("id", "claim", "paper"):
        table.add_column(name)
    for claim in catalogue.CLAIMS.values():
        table.add_row(claim.id, claim.claim, claim.paper)
    return table


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    entry_point.execute(run, parse, arguments, stopped="stopped; run the same command again to continue")


if __name__ == "__main__":
    main()
