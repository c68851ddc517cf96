"""Interrupts a run with SIGKILL or SIGTERM at random times, resumes it, and compares it with an uninterrupted run."""

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

from fault_injection import tiny_runs
from rlhf_jax import metrics

PHASES = ("compile", "step", "save")
TIMEOUT = 600.0
"""Seconds without an event after which a run is considered hung."""
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fault_injection.tiny_runs"])
_PROCESS_LOCK = threading.Lock()
"""Held while a process is started or joined, because starting a process also polls, and may reap, the processes of
other threads."""


@dataclasses.dataclass
class ProcessResult:
    """The events of one process of a run."""

    exitcode: int
    phase: str
    """Phase in which the process was interrupted or ended: one of `PHASES`, or "start"."""
    states: dict[int, str]
    """Digests of the state after each iteration."""
    finished: bool
    stopped: tuple[int, str] | None
    """Step at which SIGTERM stopped the process, and whether that step was saved ("True" or "False")."""
    problems: list[str]
    seconds: dict[str, float]
    """Median seconds of "compile", "step" and "save"."""
    interrupted: bool


@dataclasses.dataclass
class Reference:
    """The uninterrupted run."""

    folder: pathlib.Path
    process: ProcessResult
    final: dict[str, str]
    """Digest of each leaf of the final state."""
    rows: bytes
    """Contents of metrics.jsonl."""


@dataclasses.dataclass
class Report:
    """The interruptions of a stage, and the failures."""

    stage: str
    kills: Counter[str] = dataclasses.field(default_factory=Counter)
    """Number of SIGKILLs by phase."""
    terms: Counter[str] = dataclasses.field(default_factory=Counter)
    resumed: int = 0
    """Number of interruptions after which all later states of the run equal those of the reference."""
    runs: int = 0
    """Number of runs that were compared with the reference or failed."""
    failures: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def interruptions(self) -> int:
        """The number of interruptions so far."""
        return self.kills.total() + self.terms.total()

    def asdict(self) -> dict[str, Any]:
        """Returns the report as a JSON-compatible dictionary."""
        return {**vars(self), "kills": dict(self.kills), "terms": dict(self.terms)}


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """The length of a run and its seed."""

    steps: int
    save_every: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Interruption:
    """A signal that is sent ``after`` seconds after the event ``event`` has occurred ``count`` times."""

    signal: int
    event: str
    count: int
    after: float


class _Events:
    """The events that a process has reported."""

    def __init__(self) -> None:
        self.text = b""
        self.phase, self.saving = "start", set[int]()
        self.states: dict[int, str] = {}
        self.counts: Counter[str] = Counter()
        self.at: dict[str, float] = {}
        self.took: dict[str, list[float]] = {}
        self.stopped: tuple[int, str] | None = None
        self.problems: list[str] = []

    def feed(self, text: bytes) -> None:
        *lines, self.text = (self.text + text).split(b"\n")
        for line in lines:
            event, step, when, detail = line.decode().split(" ", 3)
            self._add(event, int(step), float(when), detail)

    def _add(self, event: str, step: int, when: float, detail: str) -> None:
        self.counts[event] += 1
        self.at[event] = when
        if event == "compile":
            self.phase = "compile"
        elif event in ("compiled", "step"):
            self.phase = "step"
        elif event == "save":
            self.saving.add(step)
            self.at[f"save {step}"] = when
        elif event == "saved":
            self.saving.discard(step)
            self.took.setdefault("save", []).append(when - self.at[f"save {step}"])
        elif event == "state":
            self.states[step] = detail
            if self.counts["state"] > 1:
                self.took.setdefault("step", []).append(when - self.at["step"])
        elif event == "stopped":
            self.stopped = step, detail
        elif event == "problem":
            self.problems.append(detail)
        if event == "compiled":
            self.took.setdefault("compile", []).append(when - self.at["compile"])

    def current_phase(self) -> str:
        return "save" if self.saving and self.phase == "step" else self.phase


def run_process(
    stage: str, folder: pathlib.Path, settings: RunSettings, interruption: Interruption | None = None
) -> ProcessResult:
    """Starts or resumes a run in a new process, and waits until it ends or is interrupted."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    arguments = (stage, str(folder), settings.steps, settings.save_every, settings.seed, sender)
    process = CONTEXT.Process(target=tiny_runs.run, args=arguments, daemon=True)
    with _PROCESS_LOCK:
        process.start()
    sender.close()
    events, due, interrupted, phase = _Events(), None, False, ""
    last = time.monotonic()
    while True:
        ready = due is not None and not interrupted and time.monotonic() >= due
        # A step can run while a save is in progress. An interruption of a step waits until no save is in progress.
        if ready and interruption is not None and (interruption.event != "step" or events.current_phase() == "step"):
            phase = events.current_phase()
            process.kill() if interruption.signal == signal.SIGKILL else process.terminate()
            interrupted = True
        wait = 0.5 if due is None or interrupted or ready else max(0.0, due - time.monotonic())
        if receiver.poll(wait):
            text = os.read(receiver.fileno(), 65536)
            if not text:
                break
            events.feed(text)
            last = time.monotonic()
            if interruption is not None and due is None and events.counts[interruption.event] >= interruption.count:
                due = time.monotonic() + interruption.after
        elif time.monotonic() - last > TIMEOUT:
            events.problems.append(f"no event for {TIMEOUT:.0f} seconds")
            process.kill()
            last = time.monotonic()
    with _PROCESS_LOCK:
        process.join()
    receiver.close()
    return ProcessResult(
        exitcode=process.exitcode if process.exitcode is not None else 0,
        # After SIGKILL the last event shows the phase; after SIGTERM the process continues to report events.
        phase=phase if interruption is not None and interruption.signal == signal.SIGTERM else events.current_phase(),
        states=events.states,
        finished=events.counts["finished"] > 0,
        stopped=events.stopped,
        problems=events.problems,
        seconds={name: sorted(each)[len(each) // 2] for name, each in events.took.items()},
        interrupted=interrupted,
    )


def run_reference(stage: str, folder: pathlib.Path, settings: RunSettings) -> Reference:
    """Runs a stage without interruption. Raises RuntimeError if the run fails."""
    process = run_process(stage, folder, settings)
    if not process.finished:
        raise RuntimeError(f"the uninterrupted run of {stage} failed; see {folder / 'output.log'}")
    final = json.loads((folder / tiny_runs.FINAL).read_text())
    return Reference(folder, process, final, (folder / metrics.FILE_NAME).read_bytes())


def _draw(
    rng: random.Random, phase: str, number: int, seconds: dict[str, float], settings: RunSettings
) -> Interruption:
    """Draws an interruption by the signal ``number`` at a random moment within a phase."""
    if phase == "compile":
        return Interruption(number, "compile", 1, rng.uniform(0.0, seconds["compile"]))
    if phase == "save":
        return Interruption(number, "save", rng.choice((1, 1, 2)), rng.uniform(0.0, seconds["save"]))
    return Interruption(number, "step", rng.randint(1, 2 * settings.save_every), rng.uniform(0.0, seconds["step"]))


def interrupt(
    stage: str,
    folder: pathlib.Path,
    settings: RunSettings,
    reference: Reference,
    *,
    kills: int,
    terms: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Report:
    """Sends ``kills`` SIGKILLs and ``terms`` SIGTERMs to a run, and resumes it after each interruption.

    A finished run is compared with the reference. If interruptions remain, a new run is started.
    """
    rng, report, began = random.Random(f"{settings.seed} {stage}"), Report(stage), time.monotonic()
    numbers = [signal.SIGKILL] * kills + [signal.SIGTERM] * terms
    rng.shuffle(numbers)
    seconds = dict(reference.process.seconds)
    pending = 0  # interruptions of the current run, which has not yet been compared
    path = folder / "run-0"
    while numbers or path.exists():
        interruption, counts = None, report.kills
        if numbers:
            counts = report.kills if numbers[-1] == signal.SIGKILL else report.terms
            rarest = min(PHASES, key=lambda phase: counts[phase])
            phase = rarest if rng.random() < 0.7 else rng.choice(PHASES)
            interruption = _draw(rng, phase, numbers[-1], seconds, settings)
        process = run_process(stage, path, settings, interruption)
        failures = _state_differences(process, reference)
        if interruption is not None and process.interrupted and not process.finished:
            numbers.pop()
            counts[process.phase] += 1
            failures += _wrong_exit(process, interruption)
            pending += 1
            for name in PHASES:  # adapts to changes in the load of the machine
                seconds[name] = 0.5 * (seconds[name] + process.seconds.get(name, seconds[name]))
            on_progress(report.interruptions)
        elif not process.finished:
            failures.append(f"the run ended with status {process.exitcode}; see {path / 'output.log'}")
        if process.finished:
            failures += compare(path, reference) + _restart_finished(stage, path, settings, reference)
        report.failures += [f"{stage}, {path.name}: {text}" for text in failures]
        if failures:  # interruptions before a failure do not count as resumed
            pending = 0
        if process.finished or (failures and not process.interrupted):
            report.resumed += pending
            pending, report.runs = 0, report.runs + 1
            if not failures:
                shutil.rmtree(path)
            path = folder / f"run-{report.runs}"
            if not numbers:
                break
    report.seconds = time.monotonic() - began
    return report


def _state_differences(process: ProcessResult, reference: Reference) -> list[str]:
    """Returns the first difference from the states of the reference, and the problems that the process reported."""
    steps = [step for step, digest in process.states.items() if reference.process.states.get(step) != digest]
    return ([f"the state after step {steps[0]} differs"] if steps else []) + process.problems


def _wrong_exit(process: ProcessResult, interruption: Interruption) -> list[str]:
    """Returns the problems with the exit of an interrupted process."""
    if interruption.signal == signal.SIGKILL:
        if process.exitcode != -signal.SIGKILL:
            return [f"the process ended with status {process.exitcode} after SIGKILL"]
    elif process.exitcode != 75 or process.stopped is None or process.stopped[1] != "True":
        return [
            f"the process ended with status {process.exitcode} and (step, saved) {process.stopped} after SIGTERM "
            f"during {process.phase}; expected status 75 and a saved step"
        ]
    return []


def compare(path: pathlib.Path, reference: Reference) -> list[str]:
    """Returns the differences from the reference in the leaves of the final state and in metrics.jsonl."""
    final = json.loads((path / tiny_runs.FINAL).read_text())
    names = [name for name in {**final, **reference.final} if final.get(name) != reference.final.get(name)]
    differences = [f"the final {name} differs" for name in names]
    if (path / metrics.FILE_NAME).read_bytes() != reference.rows:
        differences.append(f"{metrics.FILE_NAME} differs")
    return differences


def _restart_finished(stage: str, path: pathlib.Path, settings: RunSettings, reference: Reference) -> list[str]:
    """Starts a finished run again, which must restore its final state without training; returns the problems."""
    (path / tiny_runs.FINAL).unlink()
    process = run_process(stage, path, settings)
    if not process.finished or process.states:
        return ["a finished run was not restored"]
    return compare(path, reference) + process.problems
