"""Starts the programs of a benchmark row one after another, then measures their repetitions in turn."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import measured_process, peer_environments
from benchmarks.suite import Program

EXPERIMENTS = pathlib.Path(__file__).parents[1]
NOT_INSTALLED = "not installed"


class RunOptions(NamedTuple):
    """Options that all programs of a run share."""

    peers: pathlib.Path
    """Folder of the peer libraries' virtual environments."""
    logs: pathlib.Path
    """Folder for the programs' standard error, one file per program."""
    repeats: int
    quick: bool = False
    accelerator: bool = False
    together: bool = True
    """Whether to keep all programs of a row in memory and measure them in turn. Otherwise, each runs alone."""


Record = Mapping[str, Any]
"""The report of a program, or ``{"missing": reason}`` if the program failed or is not installed."""


def measure(
    programs: Sequence[Program],
    *,
    warm: int,
    options: RunOptions,
    on_progress: Callable[[str], None] = lambda description: None,
) -> dict[str, Record]:
    """Runs programs and returns their records by key.

    Args:
        programs: The programs of a row.
        warm: Number of untimed repetitions after the first.
        options: Options that the programs share.
        on_progress: Called with a description up to ``1 + options.repeats`` times for each installed program.
    """
    available = [program for program in programs if installed(program, options)]
    records: dict[str, Record] = {}
    for group in [available] if options.together else [[program] for program in available]:
        with contextlib.ExitStack() as stack:
            started: list[_Process] = []
            for program in group:
                on_progress(f"{program.key}: starting")
                process = stack.enter_context(_Process(program, warm=warm, options=options))
                started += [process] if process.start() else []
            for i in range(options.repeats):
                for process in started:
                    on_progress(f"{process.program.key}: {i + 1}/{options.repeats}")
                    process.repeat()
            records |= {process.program.key: process.record for process in started}
    return {p.key: records.get(p.key) or {"missing": _missing_reason(p, options)} for p in programs}


def has_accelerator() -> bool:
    """Returns whether JAX finds a GPU or TPU. A separate process imports JAX, so that this process reserves no
    accelerator memory."""
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    backend = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return backend not in ("", "cpu")


def installed(program: Program, options: RunOptions) -> bool:
    """Returns whether the environment of a program is installed."""
    return peer_environments.interpreter(options.peers, program.home) is not None


def _missing_reason(program: Program, options: RunOptions) -> str:
    return f"failed, see {options.logs / program.key}.log" if installed(program, options) else NOT_INSTALLED


class _Process:
    """The process of a program, as a context manager that ends it on exit."""

    def __init__(self, program: Program, *, warm: int, options: RunOptions) -> None:
        self.program = program
        self.record: dict[str, Any] = {}
        self._warm, self._options = warm, options
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def start(self) -> bool:
        """Runs the program up to its first timed repetition. Returns False if the program fails before that."""
        python = peer_environments.interpreter(self._options.peers, self.program.home)
        self._options.logs.mkdir(parents=True, exist_ok=True)
        with (self._options.logs / f"{self.program.key}.log").open("w") as log:
            self._process = subprocess.Popen(
                _command(self.program, str(python), warm=self._warm, options=self._options),
                env=_environment(self.program, options=self._options),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=EXPERIMENTS,
                text=True,
            )
        return self._read_line() == measured_process.READY

    def repeat(self) -> None:
        """Makes the program run one repetition, and reads its record after the last one."""
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        line = self._read_line()
        if line.startswith("{"):
            self.record = json.loads(line)

    def _read_line(self) -> str:
        assert self._process is not None and self._process.stdout is not None
        return self._process.stdout.readline().strip()


def _command(program: Program, python: str, *, warm: int, options: RunOptions) -> list[str]:
    module = "benchmarks.workload" if program.home == "ours" else f"benchmarks.peers.{program.module}"
    command = [python, "-m", module, program.workload, "--paced", f"--repeats={options.repeats}", f"--warm={warm}"]
    command += [f"--variant={program.variant}"] if program.variant else []
    command += ["--quick"] if options.quick else []
    command += ["--accelerator"] if options.accelerator else []
    return command


def _environment(program: Program, *, options: RunOptions) -> dict[str, str]:
    """Returns a program's environment variables; peers can import `benchmarks` but not this library."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "GLIBC_TUNABLES")}
    if program.huge_pages:
        variables["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    if program.home != "ours":
        paths = [*peer_environments.extra_paths(options.peers, program.home), str(EXPERIMENTS)]
        variables["PYTHONPATH"] = os.pathsep.join(paths)
    if not options.accelerator:
        variables["JAX_PLATFORMS"] = "cpu"
    return variables | {
        # Several programs share the memory of an accelerator, so none may preallocate most of it.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
