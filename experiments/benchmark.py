"""How fast it is: every work beside its peers, or beside what the machine can do, in one table.

    python experiments/benchmark.py --install runs/peers   environments for TRL and Tunix, once; 2 minutes, 3 GB
    python experiments/benchmark.py                        all rows; a peer that is not installed is left out
    python experiments/benchmark.py --only sft-s,decode-m-1
    python experiments/benchmark.py --quick                tiny shapes, to see that it all runs

Models: S is a GPT-2 of 4 layers, 256 wide, 4 heads, 4096 words (4.3M); M of 12 layers, 768 wide, 12 heads, 8192 words
(92M). On a CPU all is float32, on a GPU or TPU bfloat16. Tunix, which has no GPT-2, gets a Llama with as many
parameters in its products. TRL's trainers run in float32, which is what is asked for here, and beside it with TRL's own
defaults, bfloat16 on a CPU too: where a CPU has instructions for that, they do half the work.

Every program is a process of its own, under glibc's huge pages. Those of one row are started one after the other, each
up to its first timed repetition, and then repeat in turn, so that whatever slows the machine down slows all of them.
Ratios are of medians. Nothing else should run on the machine meanwhile.

What a repetition is, and what is read off it:

    sft, reward, dpo    one step on 8 rows of 256 tokens, or 8 pairs of them; DPO with its reference's pass, 64 tokens
                        of a row being the prompt. Tokens a second
    ppo                 64 answers of 32 tokens to 32, scored by a reward model, then 4 x 4 updates of policy and critic
    generate            64 prompts (S) or 8 (M) of 64 tokens, 64 sampled tokens each
    stream              512 prompts in 64 slots, one answer in eight having 256 tokens and the others 32: slots that are
                        refilled, beside one batch of 64 after the other
    decode              the time of one token of each of 1 to 64 rows, beside the least it could be: the larger of
                        (parameters and cache) / bandwidth, and operations / rate of the step's own products
    "matmul rate"       operations a second beside those of a product of two 2048-cubes

Peers: TRL's SFTTrainer, RewardTrainer, DPOTrainer and, of 1.12, PPOTrainer; transformers' generate; Tunix's
PeftTrainer, DPOTrainer and Sampler. TRL's DPO is slower with huge pages, so it runs without them too (4k).

"compile" is what the first repetition took beyond the median one. "memory" is the peak of the whole process, or of the
device where there is one.

Writes results.json and results.md below --out, and logs/.

Hardware: two cores of an AMD EPYC with AVX-512 (family 25), 24 GB.
Time: 35 minutes for all rows with all peers.
To expect there: SFT 1.3 times Tunix (S) and 1.5 times (M, at 74 % of the matmul rate), and 1.8 and 1.3 times TRL in
float32; DPO 1.7 times Tunix and 2 to 2.6 times TRL; the reward model 1.2 times TRL's; generation 1.3 to 1.8 times Tunix
and twice transformers; PPO 1.6 times TRL; refilled slots 2.75 times one batch after the other; a token within 1.2 to 2
times the least it could be. Where XLA's products are faster than torch's, as on newer cores, the ratios to TRL are
larger.
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
from benchmarks import interleaving, peer_environments, ratios, rows
from benchmarks import tables as showing
from launch import command_line
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure."""

    only: str = ""
    """Rows, with commas between them; empty for all."""
    repeats: int = 5
    """Timed repetitions of each program."""
    quick: bool = False
    """Tiny shapes: to see that it runs. The numbers mean nothing."""
    out: pathlib.Path = pathlib.Path("runs/benchmarks")
    """Where results.json, results.md and the logs go."""
    peers: pathlib.Path = pathlib.Path("runs/peers")
    """Where the peers' environments are."""
    ours_only: bool = False
    """Leave the peers out, installed or not."""
    together: bool = True
    """Have all programs of a row in memory, so that they can repeat in turn (15 GB for sft-m); else one by one."""
    cpu: bool = False
    """Stay on the CPU where there is a GPU or a TPU."""
    install: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Create the peers' environments in DIR, and stop."""
    tunix_python: str = ""
    """A Python 3.12 for Tunix, where python3.12 on the path is none."""
    torch_index: str = ""
    """An additional package index for torch, such as that of its CPU builds."""
    tunix_extra: str = ""
    """A further requirement for Tunix, such as the jax of this machine's GPU: "jax[cuda13]"."""


def parse(arguments: list[str]) -> Settings:
    """Returns the settings of a command line."""
    return command_line.parse_as(Settings, arguments, prog="benchmark.py", doc=__doc__)


def main(arguments: list[str]) -> int:
    """Measure, show and write; 1 where a work of ours failed."""
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
        chosen = rows.choose(settings.only)
    except ValueError as problem:
        print(f"benchmark.py: {problem}", file=sys.stderr)
        return 2
    results = measure(settings, chosen)
    for title, heads, lines in tables(results):
        console.print(showing.terminal(title, heads, lines))
    console.print(machine_text(results["machine"]), style="dim", highlight=False)
    failed = [found for found in results["comparisons"] if isinstance(found["ours"], str)]
    for found in failed:
        print(f"benchmark.py: {found['row']} {found['ours']}", file=sys.stderr)
    return 1 if failed else 0


def measure(settings: Settings, chosen: tuple[rows.Row, ...]) -> dict[str, Any]:
    """Run all programs of the chosen rows and write results.json and results.md after each; the former's content."""
    how = interleaving.How(
        peers=settings.out / "no-peers" if settings.ours_only else settings.peers.absolute(),
        logs=settings.out.absolute() / "logs",
        repeats=settings.repeats,
        quick=settings.quick,
        accelerator=not settings.cpu and interleaving.has_accelerator(),
        together=settings.together,
    )
    records: dict[str, interleaving.Record] = {}
    comparisons: list[dict[str, Any]] = []
    results: dict[str, Any] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        there = {row.key: sum(interleaving.installed(program, how) for program in row.programs) for row in chosen}
        task = progress.add_task("", total=sum(there.values()) * (1 + how.repeats))
        done = 0
        for row in chosen:
            found = interleaving.measure(
                row.programs,
                warm=row.warm,
                how=how,
                tell=lambda text: progress.update(task, description=text, advance=1),
            )
            records |= found
            comparisons += ratios.compare(row, found)
            done += there[row.key] * (1 + how.repeats)
            progress.update(task, completed=done)
            # Row by row, so that what has been measured is there whatever happens to the rest.
            results = {
                "machine": machine(records),
                "settings": {"repeats": settings.repeats, "quick": settings.quick, "together": settings.together},
                "comparisons": comparisons,
                "programs": ratios.programs(records),
                "records": records,
            }
            write(settings.out, results)
    return results


def machine(records: dict[str, interleaving.Record]) -> dict[str, Any]:
    """What it all ran on, as far as it decides how fast it is."""
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
        "versions": {name: sorted(found) for name, found in versions.items()},
        "date": datetime.date.today().isoformat(),
    }


def machine_text(found: dict[str, Any]) -> str:
    """The same in two lines."""
    versions = ", ".join(f"{name} {'/'.join(versions)}" for name, versions in found["versions"].items())
    devices = "" if found["devices"] in ([], ["cpu"]) else f" · {', '.join(found['devices'])}"
    return f"{found['cpu']}, {found['cores']} cores, {found['memory_gb']} GB{devices} · {found['system']}\n{versions}"


def _cpu_model() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    family = f" (family {named.get('cpu family', '?')}, model {named.get('model', '?')})"
    return named.get("model name", platform.machine()) + family


def tables(results: dict[str, Any]) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    """The two tables: what is compared, and every program."""
    return [
        ("Ours beside peers and limits", showing.COMPARED, showing.compared(results["comparisons"])),
        ("Every program", showing.MEASURED, showing.measured(results["programs"])),
    ]


def write(out: pathlib.Path, results: dict[str, Any]) -> None:
    """Write results.json and results.md."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    parts = [f"## {title}\n\n{showing.markdown(heads, lines)}" for title, heads, lines in tables(results)]
    (out / "results.md").write_text("\n".join([*parts, machine_text(results["machine"]) + "\n"]))


if __name__ == "__main__":
    command_line.answer_help(parse)
    sys.exit(main(sys.argv[1:]))
