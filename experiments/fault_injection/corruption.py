"""Corrupts the files of a checkpoint one at a time, and checks that each corruption is detected or harmless."""

from __future__ import annotations

import dataclasses
import pathlib
import random
import shutil
from collections import Counter
from collections.abc import Callable
from typing import Any

from fault_injection import interruptions, tiny_runs

Trial = tuple[str, str, int]
"""Kind of corruption, file, and position: the bit to flip or the length to truncate to; not used for a deletion."""


@dataclasses.dataclass
class Report:
    """The outcomes of all corruptions."""

    outcomes: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)
    """Counts of outcomes by kind of corruption: "seen" (the corruption was reported and an older checkpoint restored),
    "harmless" (the newest checkpoint was restored bit-identically) or "wrong"."""
    files: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)

    def asdict(self) -> dict[str, Any]:
        """Returns the report as a JSON-compatible dictionary."""
        return {**vars(self), "outcomes": {kind: dict(counts) for kind, counts in self.outcomes.items()}}


def draw_trials(newest: pathlib.Path, rng: random.Random, counts: dict[str, int]) -> list[Trial]:
    """Draws corruptions of the files of a checkpoint.

    Half of the bits to flip are drawn from all bits. Each of the others is drawn from a random file, because most files
    are small.
    """
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    trials: list[Trial] = []
    for kind, count in counts.items():
        for i in range(count):
            by_size = i % 2 == 0 and kind == "flip"
            j = rng.choices(range(len(files)), sizes if by_size else [size > 0 for size in sizes])[0]
            trials.append((kind, str(files[j]), rng.randrange(8 * sizes[j] if kind == "flip" else sizes[j])))
    return trials


def corrupt(
    reference: interruptions.Reference,
    folder: pathlib.Path,
    stage: str,
    settings: interruptions.RunSettings,
    counts: dict[str, int],
    *,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Report:
    """Corrupts a finished run's newest checkpoint ``counts[kind]`` times per kind, restoring a checkpoint each time."""
    shutil.copytree(reference.folder / "checkpoints", folder)
    steps = sorted(int(path.name.removeprefix("step_")) for path in folder.iterdir())
    newest = folder / f"step_{steps[-1]:09d}"
    report = Report(outcomes={kind: Counter() for kind in counts})
    report.files = sum(path.is_file() for path in newest.rglob("*"))
    trials = draw_trials(newest, random.Random(f"{settings.seed} damage"), counts)
    done = 0
    while done < len(trials):
        receiver, sender = interruptions.CONTEXT.Pipe(duplex=False)
        arguments = (str(folder), stage, settings.steps, settings.seed, trials[done:], sender)
        process = interruptions.CONTEXT.Process(target=tiny_runs.restore_corrupted, args=arguments, daemon=True)
        process.start()
        sender.close()
        try:
            while done < len(trials) and receiver.poll(interruptions.TIMEOUT):
                _record(report, trials[done], receiver.recv(), reference, steps)
                done += 1
                on_progress(done)
        except EOFError:
            pass
        process.kill()
        process.join()
        if done < len(trials):  # the process crashed or hung, so count a failure and repair the files
            report.failures.append(f"{trials[done]}: the restoring process ended with status {process.exitcode}")
            done += 1
            shutil.rmtree(folder)
            shutil.copytree(reference.folder / "checkpoints", folder)
    return report


def _record(
    report: Report, trial: Trial, restored: tuple[int, str, str], reference: interruptions.Reference, steps: list[int]
) -> None:
    step, digest, message = restored
    correct = step in steps and reference.process.states[step] == digest
    if correct and step == steps[-1] and not message:
        report.outcomes[trial[0]]["harmless"] += 1
    elif correct and step != steps[-1] and f"step {steps[-1]}" in message:
        report.outcomes[trial[0]]["seen"] += 1
    else:
        report.outcomes[trial[0]]["wrong"] += 1
        report.failures.append(f"{trial}: restored step {step} with state {digest} and the message {message!r}")
