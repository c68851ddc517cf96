"""Killing a run at random moments, and comparing what becomes of it with one that was left alone."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from fault_injection import tiny_runs as child
from rlhf_jax import metrics

PHASES = ("compile", "step", "save")
SILENT = 600.0
"""Seconds without a word after which a run counts as hanging."""
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fault_injection.tiny_runs"])
_TURN = threading.Lock()
"""Starting a process asks after those of other threads, and would take their exit status from them."""


@dataclasses.dataclass
class Life:
    """One process, from its first mark to its end."""

    exitcode: int
    phase: str
    """Where it was when it ended: one of `PHASES`, or "start"."""
    states: dict[int, str]
    """Digest of the state after each iteration that it did."""
    finished: bool
    stopped: tuple[int, str] | None
    """Where SIGTERM stopped it, and whether that was saved."""
    trouble: list[str]
    seconds: dict[str, float]
    """What compiling, a step and a save took."""
    killed: bool


@dataclasses.dataclass
class Reference:
    """What a run comes to that nobody kills."""

    folder: pathlib.Path
    life: Life
    final: dict[str, str]
    rows: bytes


@dataclasses.dataclass
class Report:
    """What was done to a stage, and what was wrong afterwards."""

    stage: str
    kills: Counter[str] = dataclasses.field(default_factory=Counter)
    terms: Counter[str] = dataclasses.field(default_factory=Counter)
    resumed: int = 0
    """Kills and stops after which the next process's every state, to the end, was that of the reference."""
    runs: int = 0
    """Runs that went to their end and were compared leaf by leaf and row by row."""
    failures: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def asdict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**vars(self), "kills": dict(self.kills), "terms": dict(self.terms)}


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a run."""

    steps: int
    save_every: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Blow:
    """When to strike: so many seconds after the mark ``mark`` has come ``count`` times."""

    signal: int
    mark: str
    count: int
    after: float


class _Marks:
    """What a process has said so far."""

    def __init__(self) -> None:
        self.text = b""
        self.phase, self.saving = "start", set[int]()
        self.states: dict[int, str] = {}
        self.counts: Counter[str] = Counter()
        self.at: dict[str, float] = {}
        self.took: dict[str, list[float]] = {}
        self.stopped: tuple[int, str] | None = None
        self.trouble: list[str] = []

    def feed(self, text: bytes) -> None:
        *lines, self.text = (self.text + text).split(b"\n")
        for line in lines:
            mark, step, when, detail = line.decode().split(" ", 3)
            self._take(mark, int(step), float(when), detail)

    def _take(self, mark: str, step: int, when: float, detail: str) -> None:
        self.counts[mark] += 1
        self.at[mark] = when
        if mark == "compile":
            self.phase = "compile"
        elif mark in ("compiled", "step"):
            self.phase = "step"
        elif mark == "save":
            self.saving.add(step)
            self.at[f"save {step}"] = when
        elif mark == "saved":
            self.saving.discard(step)
            self.took.setdefault("save", []).append(when - self.at[f"save {step}"])
        elif mark == "state":
            self.states[step] = detail
            if self.counts["state"] > 1:
                self.took.setdefault("step", []).append(when - self.at["step"])
        elif mark == "stopped":
            self.stopped = step, detail
        elif mark == "trouble":
            self.trouble.append(detail)
        if mark == "compiled":
            self.took.setdefault("compile", []).append(when - self.at["compile"])

    def where(self) -> str:
        return "save" if self.saving and self.phase == "step" else self.phase


def live(stage: str, folder: pathlib.Path, size: Size, blow: Blow | None = None) -> Life:
    """Run a process to its end, or strike it down at a moment."""
    ours, theirs = CONTEXT.Pipe(duplex=False)
    arguments = (stage, str(folder), size.steps, size.save_every, size.seed, theirs)
    process = CONTEXT.Process(target=child.live, args=arguments, daemon=True)
    with _TURN:
        process.start()
    theirs.close()
    marks, due, killed, phase = _Marks(), None, False, ""
    last = time.monotonic()
    while True:
        ready = due is not None and not killed and time.monotonic() >= due
        # A step may be computed while a save is under way: there, wait for one that is alone.
        if ready and blow is not None and (blow.mark != "step" or marks.where() == "step"):
            phase = marks.where()
            process.kill() if blow.signal == signal.SIGKILL else process.terminate()
            killed = True
        wait = 0.5 if due is None or killed or ready else max(0.0, due - time.monotonic())
        if ours.poll(wait):
            text = _read(ours)
            if not text:
                break
            marks.feed(text)
            last = time.monotonic()
            if blow is not None and due is None and marks.counts[blow.mark] >= blow.count:
                due = time.monotonic() + blow.after
        elif time.monotonic() - last > SILENT:
            marks.trouble.append(f"it said nothing for {SILENT:.0f} seconds")
            process.kill()
            last = time.monotonic()
    with _TURN:
        process.join()
    ours.close()
    return Life(
        exitcode=process.exitcode if process.exitcode is not None else 0,
        # What SIGKILL cut off is known afterwards; after SIGTERM the process goes on.
        phase=phase if blow is not None and blow.signal == signal.SIGTERM else marks.where(),
        states=marks.states,
        finished=marks.counts["finished"] > 0,
        stopped=marks.stopped,
        trouble=marks.trouble,
        seconds={name: sorted(each)[len(each) // 2] for name, each in marks.took.items()},
        killed=killed,
    )


def _read(connection: Any) -> bytes:
    return os.read(connection.fileno(), 65536)


def reference(stage: str, folder: pathlib.Path, size: Size) -> Reference:
    """The run that nobody kills; raises RuntimeError if it does not even reach its end."""
    life = live(stage, folder, size)
    if not life.finished:
        raise RuntimeError(f"the uninterrupted run of {stage} failed; see {folder / 'output.log'}")
    return Reference(
        folder,
        life,
        json.loads((folder / child.FINAL).read_text()),
        (folder / metrics.FILE_NAME).read_bytes(),
    )


def draw(rng: random.Random, phase: str, number: int, seconds: dict[str, float], size: Size) -> Blow:
    """A random moment within a phase of a process that has just been started."""
    if phase == "compile":
        return Blow(number, "compile", 1, rng.uniform(0.0, seconds["compile"]))
    if phase == "save":
        return Blow(number, "save", rng.choice((1, 1, 2)), rng.uniform(0.0, seconds["save"]))
    return Blow(number, "step", rng.randint(1, 2 * size.save_every), rng.uniform(0.0, seconds["step"]))


def torture(
    stage: str,
    folder: pathlib.Path,
    size: Size,
    whole: Reference,
    *,
    kills: int,
    terms: int,
    tell: Callable[[int], None] = lambda done: None,
) -> Report:
    """Kill a run ``kills`` times and stop it ``terms`` times, resuming it each time; then let it finish and compare.

    A run that reaches its end before is compared, and another one is begun.
    """
    rng, report, began = random.Random(f"{size.seed} {stage}"), Report(stage), time.monotonic()
    numbers = [signal.SIGKILL] * kills + [signal.SIGTERM] * terms
    rng.shuffle(numbers)
    seconds = dict(whole.life.seconds)
    waiting = 0  # blows whose aftermath has not been seen to its end
    path = folder / "run-0"
    while numbers or path.exists():
        blow = None
        if numbers:
            struck = report.kills if numbers[-1] == signal.SIGKILL else report.terms
            fewest = min(PHASES, key=lambda phase: struck[phase])
            phase = fewest if rng.random() < 0.7 else rng.choice(PHASES)
            blow = draw(rng, phase, numbers[-1], seconds, size)
        life = live(stage, path, size, blow)
        found = _wrong(life, whole)
        if blow is not None and life.killed and not life.finished:
            numbers.pop()
            (report.kills if blow.signal == signal.SIGKILL else report.terms)[life.phase] += 1
            found += _struck(life, blow)
            waiting += 1
            for name in PHASES:  # the machine may be busier than it was
                seconds[name] = 0.5 * (seconds[name] + life.seconds.get(name, seconds[name]))
            tell(sum(report.kills.values()) + sum(report.terms.values()))
        elif not life.finished:
            found.append(f"it ended with status {life.exitcode}; see {path / 'output.log'}")
        if life.finished:
            found += compare(path, whole) + _again(stage, path, size, whole)
        report.failures += [f"{stage}, {path.name}: {text}" for text in found]
        if found:  # what follows in this folder would only tell of it again
            waiting = 0
        if life.finished or (found and not life.killed):
            report.resumed += waiting
            waiting, report.runs = 0, report.runs + 1
            if not found:
                shutil.rmtree(path)
            path = folder / f"run-{report.runs}"
            if not numbers:
                break
    report.seconds = time.monotonic() - began
    return report


def _wrong(life: Life, whole: Reference) -> list[str]:
    """States that are not those of the run that nobody killed, and damage that was met."""
    other = [step for step, digest in life.states.items() if whole.life.states.get(step) != digest]
    return ([f"another state after step {other[0]}"] if other else []) + life.trouble


def _struck(life: Life, blow: Blow) -> list[str]:
    """What is wrong with how a process ended that was struck."""
    if blow.signal == signal.SIGKILL:
        return [] if life.exitcode == -signal.SIGKILL else [f"killed, it ended with status {life.exitcode}"]
    if life.exitcode != 75 or life.stopped is None or life.stopped[1] != "True":
        return [f"stopped during {life.phase}, it ended with status {life.exitcode} and {life.stopped}"]
    return []


def compare(path: pathlib.Path, whole: Reference) -> list[str]:
    """Where a run that has ended differs from the one that nobody killed: leaf by leaf, and the metrics' bytes."""
    final = json.loads((path / child.FINAL).read_text())
    names = [name for name in {**final, **whole.final} if final.get(name) != whole.final.get(name)]
    found = [f"the final {name} is another" for name in names]
    if (path / metrics.FILE_NAME).read_bytes() != whole.rows:
        found.append(f"{metrics.FILE_NAME} is another")
    return found


def _again(stage: str, path: pathlib.Path, size: Size, whole: Reference) -> list[str]:
    """The end is on disk as well: whoever starts a finished run again is given it, and nothing is trained."""
    (path / child.FINAL).unlink()
    life = live(stage, path, size)
    if not life.finished or life.states:
        return ["a finished run was not restored"]
    return compare(path, whole) + life.trouble
