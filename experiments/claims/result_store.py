"""A cache of results on disk, under keys that contain everything on which a result depends."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import pathlib
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from claims import code_digest

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy")


class Entry(NamedTuple):
    """How a stored result was made."""

    function: str
    options: dict[str, Any]
    seconds: float


class Result:
    """The result of a function, which is computed or loaded when ``value`` is read."""

    def __init__(self, key: str, make: Callable[[], Any]) -> None:
        """Stores the key and the function that computes or loads the value."""
        self.key, self._make = key, make
        self._made: list[Any] = []

    @property
    def value(self) -> Any:
        """The result, with NumPy arrays."""
        if not self._made:
            self._made.append(self._make())
        return self._made[0]


class Store:
    """Results on disk, each computed once, also if several processes ask for it.

    A key is a digest of the function's name and code (`code_digest`), its options, the keys of its inputs, ``context``,
    and the versions of Python and of the packages.
    """

    def __init__(self, folder: pathlib.Path, *, context: Any, uses: tuple[Callable[..., Any], ...] = ()) -> None:
        """Stores the arguments.

        Args:
            folder: Folder of the results.
            context: JSON value on which every result depends, such as the settings and the seed.
            uses: Functions and classes whose code is part of every key.
        """
        self._folder, self._uses = folder, uses
        versions = [sys.version, *(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)]
        self._context = json.dumps([context, versions], sort_keys=True)
        self._results: dict[str, Result] = {}
        self.made: list[Entry] = []
        """The results that this object computed."""

    def result(self, function: Callable[..., Any], *args: Any, inputs: tuple[Any, ...], **options: Any) -> Result:
        """Returns the result of ``function(*args, *inputs, **options)``.

        Args:
            function: A function of a module, not a lambda or a local function.
            *args: Arguments on which the result depends only through ``context``.
            inputs: Other results, or values of JSON types; the function gets the values of results.
            **options: Values of JSON types.
        """
        name = f"{function.__module__}.{function.__qualname__}"
        if "<" in name:
            raise ValueError(f"{name} is not a function of a module, so its code cannot be found")
        parts = [each.key if isinstance(each, Result) else each for each in inputs]
        code = code_digest.digest(function, *self._uses)
        text = json.dumps([name, code, parts, options, self._context], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:40]

        def compute() -> tuple[Any, float]:
            values = [each.value if isinstance(each, Result) else each for each in inputs]
            start = time.perf_counter()  # without the time in which inputs are computed
            value = _on_host(function(*args, *values, **options))
            return value, time.perf_counter() - start

        entry = {"function": name, "options": options, "inputs": parts, "code": code}
        return self._results.setdefault(key, Result(key, lambda: self._load_or_save(key, compute, entry)))

    def _load_or_save(self, key: str, compute: Callable[[], tuple[Any, float]], entry: dict[str, Any]) -> Any:
        path = self._folder / entry["function"] / f"{key}.pickle"
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if path.exists():
                return pickle.loads(path.read_bytes())
            value, seconds = compute()
            path.with_suffix(".json").write_text(json.dumps(entry | {"seconds": seconds}, indent=2))
            unfinished = path.with_suffix(f".{os.getpid()}")
            unfinished.write_bytes(pickle.dumps(value, protocol=5))
            unfinished.replace(path)
        self.made.append(Entry(entry["function"], entry["options"], seconds))
        return value


def _on_host(value: Any) -> Any:
    """Converts arrays to NumPy. Unlike ``jax.device_get``, it keeps the order of a dictionary."""
    if type(value) is dict:
        return {name: _on_host(each) for name, each in value.items()}
    return jax.device_get(value)


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also if the process is killed
        yield
