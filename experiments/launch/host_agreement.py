"""Connects the hosts of a run, checks that their settings, data and code are equal, and gathers arrays from them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

import rlhf_jax
from launch import config_file, run_folder, setting_checks
from launch.settings import SettingError, Settings
from rlhf_jax import metrics
from rlhf_jax.distributed import hosts, processes

_VISIBLE_WITHIN = 60.0
"""Seconds within which the other hosts must see a file that the first host has written."""


@contextlib.contextmanager
def join_hosts(settings: Any, status: Callable[[BaseException], int]) -> Iterator[None]:
    """Connects to the other hosts of the run, if any; raises an error if their settings, data or code differ.

    ``status`` maps an exception raised in the block to the exit status of all processes.
    """
    if not isinstance(settings, Settings):
        yield
        return
    options = settings.hosts
    with hosts.connect(
        options.coordinator,
        count=options.count,
        index=options.index,
        timeout=options.timeout,
        heartbeat_timeout=options.silence,
        facts=functools.partial(host_facts, settings),
        exit_status=status,
    ) as group:
        if group.count > 1 and type(settings) is not Settings:
            raise SettingError(f"--hosts.count is {group.count}; only instructgpt.py runs on several hosts")
        yield


def host_facts(settings: Settings) -> dict[str, Any]:
    """Returns the values that must be equal on all hosts, by name: settings, data, model, code and versions."""
    facts: dict[str, Any] = {}
    for name, value in dataclasses.asdict(settings).items():
        if isinstance(value, dict) and name != "hosts":
            facts |= {f"--{name}.{part}": each for part, each in value.items()}
        elif name != "hosts":
            facts[f"--{name}"] = value
    for name, digest in run_folder.input_digests(settings).items():
        facts[f"the contents of {setting_checks.flag_name(name)}"] = digest
    facts["the code"] = _code_digest()
    return facts | {f"the version of {name}": importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}


def _code_digest() -> str:
    digest = hashlib.sha256()
    for folder in (pathlib.Path(rlhf_jax.__file__).parent, pathlib.Path(__file__).parents[1]):
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def check_shared(path: pathlib.Path) -> None:
    """Raises SettingError if this host cannot see the run folder that the first host has created."""
    deadline = time.monotonic() + _VISIBLE_WITHIN
    while not (path / config_file.NAME).exists():
        if time.monotonic() > deadline:
            raise SettingError(
                f"host {hosts.current().index} cannot see {path}, to which the first host writes; --out must be a "
                "folder on a file system that all hosts share"
            )
        time.sleep(0.5)


class ReadOnlyLog(metrics.MetricLog):
    """The log on all hosts except the first. It reads the rows that the first host writes, and writes nothing."""

    def __init__(self, directory: pathlib.Path) -> None:
        """Opens no file."""
        self._directory = directory

    def write(self, stage: str, step: int, values: Any) -> None:
        """Does nothing."""

    def rewind(self, stage: str, step: int, **options: Any) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def gather(tree: Any) -> Any:
    """Gathers sharded arrays from all hosts, which must all call this; returns them unchanged on a single host."""
    return tree if jax.process_count() == 1 else jax.tree.map(processes.gather, tree)


def to_numpy(tree: Any) -> Any:
    """Converts arrays to NumPy, gathering them if there are several hosts."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda x: np.asarray(processes.gather(x)), tree)
