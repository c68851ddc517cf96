"""Virtual environments for the peers, and the interpreters in them. Peers share none of this library's packages."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable

from benchmarks.rows import Home

TRL = ("torch==2.13.0", "trl==1.16.0", "transformers==5.23.0")
TRL_PPO = ("trl==1.12.0",)
"""The last with a PPOTrainer; put before the other on the path."""
TUNIX = ("google-tunix==0.1.7",)


def interpreter(folder: pathlib.Path, home: Home) -> pathlib.Path | None:
    """The Python of a peer, or None where it is not installed."""
    if home == "ours":
        return pathlib.Path(sys.executable)
    if not (folder / f"{home}.installed").exists():
        return None
    return folder / ("tunix" if home == "tunix" else "trl") / "bin" / "python"


def path(folder: pathlib.Path, home: Home) -> list[str]:
    """What a peer's modules are found in before its own packages."""
    return [str(folder / "trl-ppo")] if home == "trl-ppo" else []


def install(
    folder: pathlib.Path,
    *,
    say: Callable[[str], None],
    tunix_python: str = "",
    tunix_extra: str = "",
    torch_index: str = "",
) -> None:
    """Create what is not there yet. Tunix is left out, with a word on it, where no Python 3.12 is found."""
    folder.mkdir(parents=True, exist_ok=True)
    index = ["--extra-index-url", torch_index] if torch_index else []
    if not _done(folder, "trl"):
        say(f"TRL: {', '.join(TRL)}")
        _venv(sys.executable, folder / "trl")
        _pip(folder / "trl", *index, *TRL)
        _done(folder, "trl", now=True)
    if not _done(folder, "trl-ppo"):
        say(f"TRL with PPO: {', '.join(TRL_PPO)}")
        _pip(folder / "trl", "--no-deps", "--upgrade", "--target", str(folder / "trl-ppo"), *TRL_PPO)
        _done(folder, "trl-ppo", now=True)
    if not _done(folder, "tunix"):
        python = _python312(tunix_python)
        if python is None:
            say("Tunix: left out, it wants Python 3.12; give one with --tunix-python")
            return
        say(f"Tunix: {', '.join(TUNIX)}")
        _venv(python, folder / "tunix")
        _pip(folder / "tunix", *TUNIX, *([tunix_extra] if tunix_extra else []))
        _done(folder, "tunix", now=True)


def _python312(given: str) -> str | None:
    # Asked rather than believed: a python3.12 on the path can be a version manager's stand-in for nothing.
    for python in (given, sys.executable, shutil.which("python3.12") or ""):
        if not python:
            continue
        asked = [python, "-c", "import sys; print(sys.version_info[:2] == (3, 12))"]
        try:
            if subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() == "True":
                return python
        except OSError:
            continue
    return None


def _done(folder: pathlib.Path, home: str, *, now: bool = False) -> bool:
    marker = folder / f"{home}.installed"
    if now:
        marker.touch()
    return marker.exists()


def _venv(python: str, where: pathlib.Path) -> None:
    subprocess.run([python, "-m", "venv", "--clear", str(where)], check=True)


def _pip(where: pathlib.Path, *arguments: str) -> None:
    pip = [str(where / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, *arguments], check=True)
