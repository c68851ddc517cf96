"""Runs of a command in processes of their own, which can be killed when the run has reached a certain point."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"COLUMNS": "200", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'experiments'}"}


def _command(script: str, *arguments: Any) -> list[str]:
    return [sys.executable, str(ROOT / "experiments" / script), *map(str, arguments)]


def run(script: str, *arguments: Any) -> str:
    """Runs a command to its end and returns what it prints."""
    done = subprocess.run(
        _command(script, *arguments), capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_and_kill(script: str, *arguments: Any, folder: pathlib.Path, when: Callable[[pathlib.Path], bool]) -> None:
    """Runs a command with ``--out folder`` and kills it (SIGKILL) as soon as ``when(folder)`` is true."""
    job = subprocess.Popen(
        _command(script, "--out", folder, *arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )
    deadline = time.time() + 900
    while time.time() < deadline and job.poll() is None and not when(folder):
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    assert job.wait(timeout=60) == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (folder / "results.json").exists()


def in_stage(stage: str) -> Callable[[pathlib.Path], bool]:
    """Returns whether a stage has logged its first step or saved its first checkpoint."""

    def reached(folder: pathlib.Path) -> bool:
        log, saved = folder / "metrics.jsonl", folder / "checkpoints" / stage
        return (log.exists() and f'"stage": "{stage}"' in log.read_text()) or (saved.exists() and any(saved.iterdir()))

    return reached


def results_of(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the results that are the same for each run of the same settings."""
    results = json.loads((folder / "results.json").read_text())
    return {name: value for name, value in results.items() if name not in ("seconds", "peak_rss_mb")}
