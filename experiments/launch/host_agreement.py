"""What the hosts of a run have to have in common, and what each of them does alone."""

from __future__ import annotations

import contextlib
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
from launch import initial_model, run_folder
from launch import settings as settings_lib
from launch.settings import SettingError, Settings
from rlhf_jax import metrics
from rlhf_jax.distributed import hosts, processes

_SEEN_WITHIN = 60.0
"""Seconds in which a file that the first host has written must be seen by the others."""


@contextlib.contextmanager
def joined(asked: Any, status: Callable[[BaseException], int]) -> Iterator[None]:
    """Meet the other hosts, if there are any, and refuse settings, data or code that differ between them."""
    if not isinstance(asked, Settings):
        yield
        return
    where = asked.hosts
    with hosts.connect(
        where.coordinator,
        count=where.count,
        index=where.index,
        timeout=where.timeout,
        heartbeat_timeout=where.silence,
        facts=functools.partial(facts, asked),
        exit_status=status,
    ) as group:
        if group.count > 1 and type(asked) is not Settings:
            raise SettingError(f"--hosts.count is {group.count}; on several hosts there is instructgpt.py alone")
        yield


def facts(asked: Settings) -> dict[str, Any]:
    """By name, what has to be the same on all hosts: every setting, the data, the model, and the code."""
    found = {}
    for name, value in settings_lib.as_dict(asked).items():
        if name != "hosts":
            inner = {f"--{name}.{part}": each for part, each in value.items()} if isinstance(value, dict) else None
            found |= inner if inner is not None else {f"--{name}": value}
    if asked.data.path is not None:
        found["the contents of --data.path"] = run_folder.data_digest(asked)
    if asked.model is not None:
        found["the files of --model"] = initial_model.fingerprint(asked.model)
    found["the code"] = _code()
    return found | {f"the version of {name}": importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}


def _code() -> str:
    digest = hashlib.sha256()
    for folder in (pathlib.Path(rlhf_jax.__file__).parent, pathlib.Path(__file__).parents[1]):
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def shared(path: pathlib.Path) -> None:
    """Raise SettingError where this host does not see the folder that the first one has made."""
    until = time.monotonic() + _SEEN_WITHIN
    while not (path / run_folder.CONFIG).exists():
        if time.monotonic() > until:
            raise SettingError(
                f"host {hosts.current().index} does not see {path}, where the first host writes; --out must be in a "
                "folder that all hosts share"
            )
        time.sleep(0.5)


class ReadLog(metrics.MetricLog):
    """The log of a host that is not the first: it reads what the first one has written, and writes nothing."""

    def __init__(self, directory: pathlib.Path) -> None:
        """Open nothing."""
        self._directory = directory

    def write(self, stage: str, step: int, values: Any) -> None:
        """Write nothing."""

    def rewind(self, stage: str, step: int, **how: Any) -> None:
        """Change nothing."""

    def close(self) -> None:
        """Close nothing."""


def whole(tree: Any) -> Any:
    """Arrays on this host, gathered where hosts share them; to be called on all of them. As they are, on one."""
    return tree if jax.process_count() == 1 else jax.tree.map(processes.gather, tree)


def on_host(tree: Any) -> Any:
    """The same as NumPy arrays on any number of hosts."""
    return (
        jax.device_get(tree)
        if jax.process_count() == 1
        else jax.tree.map(lambda x: np.asarray(processes.gather(x)), tree)
    )
