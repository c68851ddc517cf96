"""Measures claims with several seeds in parallel processes, each on one core."""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import os
import pathlib
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from claims.claim import Measured


class Work(NamedTuple):
    """One claim and one seed."""

    claim: str
    seed: int


class Done(NamedTuple):
    """What was measured, and how long it took, including shared stages that were not in the store."""

    measured: Measured
    seconds: float
    stages_seconds: float
    """The part of the seconds that went into stages that claims share."""
    prompts: int


def measure_all(
    work: Sequence[Work],
    *,
    store: pathlib.Path,
    quick: bool,
    processes: int,
    on_done: Callable[[Work, Done], None],
) -> None:
    """Measures claims, of which ``processes`` run at a time, and calls ``on_done`` as each finishes.

    What is in the store is not computed again. The results do not depend on the number of processes.
    """
    context = multiprocessing.get_context("spawn")  # JAX does not support fork
    with context.Manager() as manager:
        cores = manager.Queue()
        for core in (sorted(os.sched_getaffinity(0)) * processes)[:processes]:
            cores.put(core)
        executor = concurrent.futures.ProcessPoolExecutor(
            processes, mp_context=context, initializer=_start, initargs=(cores, str(store / "programs"))
        )
        try:
            futures = {executor.submit(measure, each, store=store, quick=quick): each for each in work}
            for future in concurrent.futures.as_completed(futures):
                on_done(futures[future], future.result())
        except BaseException:
            for process in list(executor._processes.values()):
                process.terminate()
            raise
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def _start(cores: Any, programs: str) -> None:
    """Confines a process to one core, so that processes do not disturb each other, and shares compiled programs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process stops the others
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores.get()})
    import jax

    jax.config.update("jax_compilation_cache_dir", programs)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def measure(work: Work, *, store: pathlib.Path, quick: bool) -> Done:
    """Measures one claim with one seed."""
    from claims import catalogue

    claim = catalogue.CLAIMS[work.claim]
    trial = _trial(work.seed, store, quick, tuple((part, tuple(each.items())) for part, each in claim.changes.items()))
    before, start = len(trial.store.made), time.perf_counter()
    measured = trial.result(claim.measure).value
    seconds = time.perf_counter() - start
    shared = [each.seconds for each in trial.store.made[before:] if each.function in SHARED]
    return Done(measured, seconds, sum(shared), len(trial.task.eval_prompts))


SHARED = tuple(f"claims.model_stages.{name}" for name in ("pretrain", "fine_tune", "compare", "train_reward_model"))
"""Stages whose duration does not count as that of a claim."""


@functools.lru_cache(maxsize=4)
def _trial(seed: int, store: pathlib.Path, quick: bool, changes: Any) -> Any:
    from claims import trial

    return trial.make_trial(seed, folder=store, quick=quick, changes={part: dict(each) for part, each in changes})
