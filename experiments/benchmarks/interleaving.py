"""Running the programs of a row: started one after the other, then measured in turn, repetition by repetition."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import peer_environments, timing
from benchmarks.rows import Program

EXPERIMENTS = pathlib.Path(__file__).parents[1]
NOT_INSTALLED = "not installed"


class How(NamedTuple):
    """The same for every program of a run."""

    peers: pathlib.Path
    """Where the peers' environments are."""
    logs: pathlib.Path
    """Where what programs write to standard error goes, a file each."""
    repeats: int
    quick: bool = False
    accelerator: bool = False
    together: bool = True
    """Whether the programs of a row are there at the same time, which costs the memory of all."""


Record = Mapping[str, Any]
"""What a program reported, or ``{"missing": why}``."""


def measure(
    programs: Sequence[Program], *, warm: int, how: How, tell: Callable[[str], None] = lambda _: None
) -> dict[str, Record]:
    """Records by the programs' keys. ``tell`` hears what is being done, ``1 + how.repeats`` times for each program."""
    there = [program for program in programs if installed(program, how)]
    found: dict[str, Record] = {}
    for group in [there] if how.together else [[program] for program in there]:
        with contextlib.ExitStack() as running:
            started: list[_Running] = []
            for program in group:
                tell(f"{program.key}: starting")
                one = running.enter_context(_Running(program, warm=warm, how=how))
                started += [one] if one.start() else []
            for i in range(how.repeats):
                for one in started:
                    tell(f"{one.program.key}: {i + 1}/{how.repeats}")
                    one.turn()
            found |= {one.program.key: one.record for one in started}
    return {program.key: found.get(program.key) or {"missing": _why(program, how)} for program in programs}


def has_accelerator() -> bool:
    """Whether JAX finds a GPU or a TPU; asked in a process of its own, which does not keep its memory."""
    asked = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    backend = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return backend not in ("", "cpu")


def installed(program: Program, how: How) -> bool:
    """Whether there is an interpreter for it."""
    return peer_environments.interpreter(how.peers, program.home) is not None


def _why(program: Program, how: How) -> str:
    return f"failed, see {how.logs / program.key}.log" if installed(program, how) else NOT_INSTALLED


class _Running:
    """One program: waits when it is told to, is ended when the block is."""

    def __init__(self, program: Program, *, warm: int, how: How) -> None:
        self.program = program
        self.record: dict[str, Any] = {}
        self._warm, self._how = warm, how
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> _Running:
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
        """Run it up to its first timed repetition; False where it does not come so far."""
        python = peer_environments.interpreter(self._how.peers, self.program.home)
        self._how.logs.mkdir(parents=True, exist_ok=True)
        with (self._how.logs / f"{self.program.key}.log").open("w") as log:
            self._process = subprocess.Popen(
                command(self.program, str(python), warm=self._warm, how=self._how),
                env=environment(self.program, how=self._how),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=EXPERIMENTS,
                text=True,
            )
        return self._heard() == timing.READY

    def turn(self) -> None:
        """Let it make one repetition; after the last, it reports."""
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        heard = self._heard()
        if heard.startswith("{"):
            self.record = json.loads(heard)

    def _heard(self) -> str:
        assert self._process is not None and self._process.stdout is not None
        return self._process.stdout.readline().strip()


def command(program: Program, python: str, *, warm: int, how: How) -> list[str]:
    """The command line of a program."""
    given = [program.work, "--paced", f"--repeats={how.repeats}", f"--warm={warm}"]
    given += [f"--variant={program.variant}"] if program.variant else []
    given += ["--quick"] if how.quick else []
    given += ["--accelerator"] if how.accelerator else []
    if program.home == "ours":
        return [python, "-m", "benchmarks.workload", *given]
    return [python, "-m", f"benchmarks.peers.{program.module}", *given]


def environment(program: Program, *, how: How) -> dict[str, str]:
    """The same memory settings and no network for all; peers find `benchmarks` and not the library."""
    made = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "GLIBC_TUNABLES")}
    if program.huge_pages:
        made["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    if program.home != "ours":
        made["PYTHONPATH"] = os.pathsep.join([*peer_environments.path(how.peers, program.home), str(EXPERIMENTS)])
    if not how.accelerator:
        made["JAX_PLATFORMS"] = "cpu"
    return made | {
        # Several programs share an accelerator's memory, so none may take most of it in advance.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
