"""Runs a command without training anything, and records what it would compile and compute.

`observe` calls the command's own ``run``. Compiled steps, the training loop and the sampler are replaced by stand-ins
that record their inputs and return pseudo-random results, which depend on these inputs. Two command lines that differ
in a setting can therefore be told apart if, and only if, the setting reaches a program, its inputs or the results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
import sys
import tempfile
import time
import types as python_types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.interpreters import partial_eval
from launch import command_line, initial_model, run_folder, settings
from preferences import cross_validation_results
from recipe import jobs, monitoring, policy_sampling, precompile
from rich.console import Console
from sweeps import frontier_plot

from rlhf_jax import lm, metrics, parallel, report
from rlhf_jax.report import console
from rlhf_jax.simulation import gold, prompts
from rlhf_jax.train import loop, monitor

ECHOED = ("seed", "preset", "published", "best_of", "seconds", "peak_rss_mb")
"""Entries of results.json that repeat a setting or differ in every run."""


# --------------------------------------------------------------------------------------------------------- fingerprints


def digest(*values: Any) -> str:
    """Returns a digest of nested data and functions. A function is identified by its name, defaults and closure.

    Raises TypeError for settings, whose digest would change with every field, whether it is used or not.
    """
    state = hashlib.sha256()
    _feed(state.update, values, ())
    return state.hexdigest()[:16]


def _feed(put: Callable[[bytes], None], value: Any, functions: tuple[Any, ...]) -> None:
    """Adds a value to a digest. ``functions`` has the functions that contain it, as a function may contain itself."""
    each = functools.partial(_feed, put, functions=functions)
    put(type(value).__name__.encode() + b"|")
    if type(value) is object:  # a default value that only its identity marks
        pass
    elif value is None or isinstance(value, str | bytes | int | float | complex | pathlib.Path | np.dtype):
        put(repr(value).encode())
    elif isinstance(value, list | tuple):
        for part in value:
            each(part)
        put(b")")
    elif isinstance(value, dict):
        for key, part in value.items():
            each(key)
            each(part)
        put(b"}")
    elif isinstance(value, np.ndarray | np.generic | jax.Array):
        is_key = isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)  # type: ignore
        array = np.asarray(jax.random.key_data(value) if is_key else value)  # type: ignore
        put(f"{array.dtype.str} {array.shape}".encode())
        put(array.tobytes())
    elif isinstance(value, jax.ShapeDtypeStruct):
        put(f"{value.dtype} {value.shape}".encode())
    elif isinstance(value, settings.Settings | settings.PPO | jobs.Job):
        raise TypeError(f"a program contains {type(value).__name__}, so its digest would prove nothing")
    elif isinstance(value, set | frozenset):
        each(sorted(value, key=repr))
    elif isinstance(value, functools.partial):
        each([value.func, value.args, value.keywords])
    elif isinstance(value, parallel.JitStep):
        if "digest" not in value.__dict__:  # computed once, since commands call the same step many times
            parts = (_function(value), value._jit.keywords, value._batch_args, value._replicated_args, str(value.mesh))  # pyright: ignore
            value.__dict__["digest"] = digest(*parts)
        put(value.__dict__["digest"].encode())
    elif isinstance(value, type | python_types.ModuleType | python_types.BuiltinFunctionType | np.ufunc):
        put(getattr(value, "__qualname__", value.__name__).encode())
    elif isinstance(value, python_types.MethodType):
        each([value.__func__, value.__self__])
    elif isinstance(value, python_types.FunctionType):
        put(f"{value.__module__}.{value.__qualname__}".encode())
        if not any(value is function for function in functions):
            inner = [value.__defaults__, value.__kwdefaults__, [cell.cell_contents for cell in value.__closure__ or ()]]
            _feed(put, inner, (*functions, value))
    elif hasattr(value, "__wrapped__"):  # a compiled function
        each(value.__wrapped__)
    elif dataclasses.is_dataclass(value):
        each([getattr(value, field.name) for field in dataclasses.fields(value)])
    elif hasattr(value, "get_vocab"):
        each(sorted(value.get_vocab().items()))
    else:
        raise TypeError(f"{type(value)} has no digest")


def _function(step: parallel.JitStep) -> Any:
    """Returns the function that a step compiles."""
    return step._jit.args[0].__wrapped__  # pyright: ignore


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    kind = jax.typeof(x)
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype, weak_type=kind.weak_type)  # pyright: ignore


class Fit:
    """A call of `loop.fit`: its inputs, and which hyperparameters its step reads."""

    def __init__(self, train_step: Any, state: Any, frozen: Any, hypers: list[Any], batch: Any, rng: Any) -> None:
        """Computes the digest of the step; the step is traced only if `used` is called."""
        self.step = digest(train_step, state.tx if hasattr(state, "tx") else None)
        shape = functools.partial(jax.tree.map, _shape)
        self._args = (train_step, *map(shape, (state, frozen, hypers[0], batch, rng)))
        named = [dict(_named(h)) for h in hypers]
        self.hypers = {name: [np.asarray(h[name], np.float64).tolist() for h in named] for name in named[0]}

    @functools.cached_property
    def used(self) -> frozenset[str]:
        """Names of the hyperparameters that the step reads, from its jaxpr without dead code."""
        step, *args = self._args
        function = _function(step) if isinstance(step, parallel.JitStep) else step

        def trace() -> Any:
            return jax.make_jaxpr(function)(*args), len(jax.tree.leaves(args[:2]))

        key = digest(self.step, args)
        return _cached_used(key, trace, tuple(self.hypers))


_USED: dict[str, frozenset[str]] = {}


def _cached_used(key: str, trace: Callable[[], Any], names: tuple[str, ...]) -> frozenset[str]:
    if key not in _USED:
        closed, first = trace()
        _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
        _USED[key] = frozenset(name for name, is_used in zip(names, used[first:]) if is_used)
    return _USED[key]


def _named(hyper: Any) -> list[tuple[str, Any]]:
    if isinstance(hyper, dict):
        return sorted(hyper.items())
    return [(field.name, getattr(hyper, field.name)) for field in dataclasses.fields(hyper)]


@dataclasses.dataclass
class Observed:
    """What a command would compile and compute, by place."""

    facts: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    fits: dict[str, Fit] = dataclasses.field(default_factory=dict)
    reads: set[str] = dataclasses.field(default_factory=set)
    """Settings that the command reads after it has checked them."""

    def add(self, place: str, *values: Any) -> None:
        """Records the digest of values at a place."""
        self.facts.setdefault(place, []).append(digest(*values))

    def differences(self, other: Observed) -> set[str]:
        """Returns the places at which two observations differ. Hyperparameters that no step reads do not count."""
        places = {name for name in {*self.facts, *other.facts} if self.facts.get(name) != other.facts.get(name)}
        for stage in self.fits.keys() & other.fits.keys():
            mine, others = self.fits[stage], other.fits[stage]
            if mine.step != others.step:
                places.add(f"{stage}: step")
                continue
            names = {*mine.hypers, *others.hypers}
            changed = {name for name in names if mine.hypers.get(name) != others.hypers.get(name)}
            places |= {f"{stage}: {name}" for name in (changed and changed & (mine.used | others.used))}
        return places


# ----------------------------------------------------------------------------------------------------------- stand-ins


def _random(*inputs: Any) -> np.random.Generator:
    return np.random.default_rng(int(digest(*inputs), 16))


def _fake_answers(record: Observed) -> Any:
    def call(self: Any, policy: Any, reference: Any, reward: Any, prompts: Any, rng: Any, *, temperature: Any = None):
        task, used = self._task, self._temperature if temperature is None else temperature
        inputs = (policy, reference, reward, prompts.tokens_BP, prompts.mask_BP, rng, float(used), self._measure)
        record.add("samples", *inputs, self._chunk)
        draw, n, T = _random(*inputs), len(prompts), task.response_width
        tokens_BT = draw.integers(4, len(task.tokenizer), (n, T)).astype(np.int32)
        lengths_B = draw.integers(1, T + 1, n)
        mask_BT = np.arange(T) < lengths_B[:, None]
        utility = None
        if task.world is not None:
            parts = {name: draw.random(n).astype(np.float32) for name in gold.Utility._fields}
            parts["components"] = {name: draw.random(n).astype(np.float32) for name in gold.COMPONENTS}  # type: ignore
            flags = {name: draw.random(n) < 0.5 for name in ("harm", "refused", "harmful_request", "known")}
            utility = gold.Utility(**parts | flags)  # pyright: ignore
        return policy_sampling.Answers(
            tokens_BL=np.concatenate([prompts.tokens_BP, tokens_BT], axis=1),
            mask_BL=np.concatenate([prompts.mask_BP, mask_BT], axis=1),
            response_mask_BT=mask_BT,
            lengths_B=lengths_B,
            stopped_B=draw.random(n) < 0.5,
            scores_B=np.zeros(n) if reward is None else draw.normal(size=n).astype(np.float32),
            kl_B=draw.random(n).astype(np.float32),
            gold=utility,  # pyright: ignore
        )

    return call


def _fake_score(record: Observed) -> Any:
    def score(self: Any, reward: Any, tokens_BL: Any, mask_BL: Any) -> np.ndarray:
        record.add("scores", reward, tokens_BL, mask_BL, self._score, self._chunk)
        heads = np.shape(reward["head"]["bias"])
        return _random(reward, tokens_BL, mask_BL).normal(size=(len(tokens_BL), *heads)).astype(np.float32)

    return score


def _fake_fit(record: Observed) -> Any:
    def fit(
        train_step: Any, state: Any, *, steps: int, batch_at: Any, hyper_at: Any, rng: Any, stage: str, **options: Any
    ) -> Any:
        log = options.pop("log", None)
        if isinstance(log, monitor.Watch):
            record.add(f"{stage}: alarms", log._stop, log._thresholds)  # pyright: ignore
        frozen, batches = options.get("frozen"), [batch_at(i) for i in range(steps)]
        arrays = jax.tree.map(np.asarray, (state.params, state.opt_state, getattr(state, "reference", None), frozen))
        record.add(f"{stage}: data", steps, arrays, batches, rng)
        record.add(f"{stage}: loop", options.get("save_every"), options.get("max_skipped"))
        record.fits[stage] = Fit(train_step, state, frozen, [hyper_at(i) for i in range(steps)], batches[0], rng)
        trained = {name: getattr(state, name) for name in ("params", "ema") if hasattr(state, name)}
        return state.replace(**jax.tree.map(lambda x: x + 0.01, trained))  # so that later stages get another model

    return fit


_SHAPES: dict[str, Any] = {}


def _fake_call(record: Observed) -> Any:
    def call(self: Any, *args: Any) -> Any:
        function, self.traces = _function(self), 1
        record.add(f"call of {getattr(function, 'func', function).__name__}", self, args)
        key = digest(self, jax.tree.map(_shape, args))
        if key not in _SHAPES:
            _SHAPES[key] = jax.eval_shape(function, *args)
        draw = _random(self, args)

        def fill(x: Any) -> np.ndarray:
            return (draw.random(x.shape) * (2 if x.dtype == bool else 1)).astype(x.dtype)

        return jax.tree.map(fill, _SHAPES[key])

    return call


class _Quiet:
    """A log, progress display or set of checkpoints that does nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def rows(self, stage: str) -> list[Any]:
        """Returns no rows."""
        return []


_JITTED: dict[str, Any] = {}
_JIT = jax.jit


def _shared_jit(function: Any = None, **options: Any) -> Any:
    """Returns the same compiled function for equal functions, which commands create anew in each run."""
    if function is None:
        return functools.partial(_shared_jit, **options)
    try:
        key = digest(function, options)
    except (TypeError, ValueError):
        return _JIT(function, **options)
    return _JITTED.setdefault(key, _JIT(function, **options))


_SPLITS: dict[str, Any] = {}
_SPLIT = prompts.split_prompts


def _shared_split(world: Any, seed: int) -> Any:
    """Returns the split of the world's prompts, which takes longer than the rest of a run without training."""
    key = digest(world, seed)
    if key not in _SPLITS:
        _SPLITS[key] = _SPLIT(world, seed)
    return _SPLITS[key]


@functools.cache
def _model(path: str) -> initial_model.InitialModel:
    return _LOAD(path)


_LOAD = initial_model.load


@contextlib.contextmanager
def without_training(record: Observed) -> Iterator[None]:
    """Replaces training, sampling and scoring while the block runs; files are written as usual."""
    replaced = [
        (loop, "fit", _fake_fit(record)),
        (policy_sampling.Sampler, "__call__", _fake_answers(record)),
        (policy_sampling.Sampler, "score", _fake_score(record)),
        (parallel.JitStep, "__call__", _fake_call(record)),
        (prompts, "split_prompts", _shared_split),
        (jax, "jit", _shared_jit),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


@contextlib.contextmanager
def stand_ins(record: Observed, folder: pathlib.Path) -> Iterator[None]:
    """Replaces everything that is slow or writes files while the block runs."""

    def create(path: Any, *_: Any, **__: Any) -> Any:
        record.add("folder", str(path))
        return _open(folder)

    def save(path: Any, cfg: Any, params: Any, tokenizer: Any = None, **options: Any) -> None:
        record.add(f"save {pathlib.Path(path).name}", cfg, params, options)

    replaced = [
        (precompile, "in_background", lambda *_, **__: contextlib.nullcontext()),
        (run_folder, "create", create),
        (run_folder.RunFolder, "write_json", lambda *_: None),
        (run_folder, "write_json", lambda *_: None),
        (run_folder.RunFolder, "checkpoints", lambda *_: _Quiet()),
        (initial_model, "load", lambda path, **_: _model(path)),
        (metrics, "read", lambda *_: []),
        (metrics, "MetricLog", lambda *_: _Quiet()),
        (monitoring, "ptx_coef", lambda *_: {}),
        (console, "StageProgress", lambda *_, **__: _Quiet()),
        (console, "results_table", lambda *_: ""),
        (Console, "print", lambda *_, **__: None),
        (report, "write_report", lambda *_, **__: None),
        (cross_validation_results, "write_page", lambda *_, **__: None),
        (frontier_plot, "write_page", lambda *_, **__: None),
        (frontier_plot, "write_sweep", lambda *_, **__: None),
        (frontier_plot, "write_methods", lambda *_, **__: None),
        (lm, "save", save),
        (time, "strftime", lambda *_: "TIME"),
    ]
    with without_training(record), contextlib.ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def _open(folder: pathlib.Path) -> run_folder.RunFolder:
    return run_folder.RunFolder(folder, _Quiet())  # pyright: ignore


@contextlib.contextmanager
def tracked(record: Observed, asked: Any) -> Iterator[None]:
    """Records which settings are read while the block runs, except by `dataclasses`, as in asdict and replace."""
    prefixes: dict[type, str] = {}

    def visit(group: Any, prefix: str) -> None:
        prefixes[type(group)] = prefix
        for field in dataclasses.fields(group):
            if dataclasses.is_dataclass(part := getattr(group, field.name)):
                visit(part, f"{prefix}{field.name}.")

    visit(asked, "")
    names = {kind: {field.name for field in dataclasses.fields(kind)} for kind in prefixes}

    def read(self: Any, name: str) -> Any:
        kind = type(self)
        if name in names.get(kind, ()) and sys._getframe(1).f_code.co_filename not in (
            dataclasses.__file__,
            "<string>",
        ):
            record.reads.add(prefixes[kind] + name)
        return object.__getattribute__(self, name)

    with contextlib.ExitStack() as stack:
        for kind in prefixes:
            stack.enter_context(mock.patch.object(kind, "__getattribute__", read))
        yield


# ------------------------------------------------------------------------------------------------------------- commands


def with_changes(settings_of: Any, changes: dict[str, Any]) -> Any:
    """Returns settings with other values of the fields that ``changes`` names, such as ppo.clip."""
    for name, value in changes.items():
        group, _, rest = name.partition(".")
        settings_of = dataclasses.replace(
            settings_of, **{group: with_changes(getattr(settings_of, group), {rest: value}) if rest else value}
        )
    return settings_of


def parse(module: Any, arguments: list[str], changes: dict[str, Any]) -> Any:
    """Returns ``module.parse(arguments)`` with the changes applied as if they were flags, which is fast."""

    def parse_as(kind: Any, arguments: list[str], *, default: Any = None, **_: Any) -> Any:
        return with_changes(kind() if default is None else default, changes)

    with mock.patch.object(command_line, "parse_as", parse_as):
        return module.parse(arguments)


def observe(module: Any, arguments: list[str], changes: dict[str, Any], folder: pathlib.Path) -> Observed:
    """Runs a command without training and returns what it would compile and compute.

    Raises:
        SettingError: The command refuses a setting.
    """
    record = Observed()
    asked = parse(module, arguments, changes)
    # A new folder, since files of an earlier run would replace calculations.
    new = pathlib.Path(tempfile.mkdtemp(dir=folder))
    with tracked(record, asked), stand_ins(record, new):
        results = module.run(asked)
    record.add("results", {name: value for name, value in results.items() if name not in ECHOED})
    return record
