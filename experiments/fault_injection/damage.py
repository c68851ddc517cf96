"""Damaging the files of a checkpoint one at a time: each damage is seen, or what is restored is right all the same."""

from __future__ import annotations

import dataclasses
import pathlib
import random
import shutil
from collections import Counter
from collections.abc import Callable
from typing import Any

from fault_injection import interruptions
from fault_injection import tiny_runs as child

Trial = tuple[str, str, int]
"""Kind, file, place (a bit, or the bytes that are left)."""


@dataclasses.dataclass
class Report:
    """What came of each kind of damage."""

    outcomes: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)
    """By kind: "seen" (told, and the older checkpoint restored) or "harmless" (the newest restored, bit for bit)."""
    files: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)

    def asdict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**vars(self), "outcomes": {kind: dict(found) for kind, found in self.outcomes.items()}}


def trials(newest: pathlib.Path, rng: random.Random, counts: dict[str, int]) -> list[Trial]:
    """Half of them at a random place of all bytes, half in a random file, for most files are small beside the data."""
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    drawn: list[Trial] = []
    for kind, count in counts.items():
        for i in range(count):
            by_size = i % 2 == 0 and kind == "flip"
            j = rng.choices(range(len(files)), sizes if by_size else [size > 0 for size in sizes])[0]
            drawn.append((kind, str(files[j]), rng.randrange(8 * sizes[j] if kind == "flip" else sizes[j])))
    return drawn


def damage(
    whole: interruptions.Reference,
    folder: pathlib.Path,
    stage: str,
    size: interruptions.Size,
    counts: dict[str, int],
    *,
    tell: Callable[[int], None] = lambda done: None,
) -> Report:
    """Damage the newest of a finished run's checkpoints in every way that was asked for, and restore each time."""
    shutil.copytree(whole.folder / "checkpoints", folder)
    steps = sorted(int(path.name.removeprefix("step_")) for path in folder.iterdir())
    newest = folder / f"step_{steps[-1]:09d}"
    rng, report = random.Random(f"{size.seed} damage"), Report()
    todo = trials(newest, rng, counts)
    report.files = sum(path.is_file() for path in newest.rglob("*"))
    report.outcomes = {kind: Counter() for kind in counts}
    done = 0
    while done < len(todo):
        ours, theirs = interruptions.CONTEXT.Pipe(duplex=False)
        arguments = (str(folder), stage, size.steps, size.seed, todo[done:], theirs)
        process = interruptions.CONTEXT.Process(target=child.endure, args=arguments, daemon=True)
        process.start()
        theirs.close()
        try:
            while done < len(todo) and ours.poll(interruptions.SILENT):
                _judge(report, todo[done], ours.recv(), whole, steps)
                done += 1
                tell(done)
        except EOFError:
            pass
        process.kill()
        process.join()
        if done < len(todo):  # it crashed or hangs over this one: count it, mend the file, and go on with the next
            report.failures.append(f"{todo[done]}: the process that restored ended with status {process.exitcode}")
            done += 1
            shutil.rmtree(folder)
            shutil.copytree(whole.folder / "checkpoints", folder)
    return report


def _judge(report: Report, trial: Trial, answer: Any, whole: interruptions.Reference, steps: list[int]) -> None:
    step, digest, told = answer
    right = step in steps and whole.life.states[step] == digest
    if right and step == steps[-1] and not told:
        report.outcomes[trial[0]]["harmless"] += 1
    elif right and step != steps[-1] and f"step {steps[-1]}" in told:
        report.outcomes[trial[0]]["seen"] += 1
    else:
        report.outcomes[trial[0]]["wrong"] += 1
        report.failures.append(f"{trial}: restored step {step} with state {digest}, and said {told!r}")
