"""Installs virtual environments for the peer libraries and finds their interpreters. The environments do not contain
this library."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable

from benchmarks.suite import Home

TRL = ("torch==2.13.0", "trl==1.16.0", "transformers==5.23.0")
TRL_PPO = ("trl==1.12.0",)
"""The last version with a PPOTrainer. It is installed in a separate folder, which comes first on the import path."""
TUNIX = ("google-tunix==0.1.7",)


def interpreter(folder: pathlib.Path, home: Home) -> pathlib.Path | None:
    """Returns the Python interpreter of an environment, or None if it is not installed."""
    if home == "ours":
        return pathlib.Path(sys.executable)
    if not _marker(folder, home).exists():
        return None
    return folder / ("tunix" if home == "tunix" else "trl") / "bin" / "python"


def extra_paths(folder: pathlib.Path, home: Home) -> list[str]:
    """Returns the folders that precede an environment's packages on the import path."""
    return [str(folder / "trl-ppo")] if home == "trl-ppo" else []


def install(
    folder: pathlib.Path,
    *,
    say: Callable[[str], None],
    tunix_python: str = "",
    tunix_extra: str = "",
    torch_index: str = "",
) -> None:
    """Installs the missing environments. Without Python 3.12, skips Tunix and prints a message."""
    folder.mkdir(parents=True, exist_ok=True)
    index = ["--extra-index-url", torch_index] if torch_index else []
    if not _marker(folder, "trl").exists():
        say(f"TRL: {', '.join(TRL)}")
        _venv(sys.executable, folder / "trl")
        _pip(folder / "trl", *index, *TRL)
        _marker(folder, "trl").touch()
    if not _marker(folder, "trl-ppo").exists():
        say(f"TRL with PPO: {', '.join(TRL_PPO)}")
        _pip(folder / "trl", "--no-deps", "--upgrade", "--target", str(folder / "trl-ppo"), *TRL_PPO)
        _marker(folder, "trl-ppo").touch()
    if not _marker(folder, "tunix").exists():
        python = _python312(tunix_python)
        if python is None:
            say("Skipping Tunix, which needs Python 3.12; pass an interpreter with --tunix-python")
            return
        say(f"Tunix: {', '.join(TUNIX)}")
        _venv(python, folder / "tunix")
        _pip(folder / "tunix", *TUNIX, *([tunix_extra] if tunix_extra else []))
        _marker(folder, "tunix").touch()


def _python312(preferred: str) -> str | None:
    for python in (preferred, sys.executable, shutil.which("python3.12") or ""):
        # A python3.12 on the path may be a version manager's shim for a missing version, so run it to check.
        command = [python, "-c", "import sys; print(sys.version_info[:2] == (3, 12))"]
        try:
            if python and subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() == "True":
                return python
        except OSError:
            continue
    return None


def _marker(folder: pathlib.Path, home: str) -> pathlib.Path:
    return folder / f"{home}.installed"


def _venv(python: str, folder: pathlib.Path) -> None:
    subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)


def _pip(folder: pathlib.Path, *arguments: str) -> None:
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, *arguments], check=True)
