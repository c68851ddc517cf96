"""Measures claims with several seeds in parallel processes, each on one core."""

from __future__ import annotations

import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from claims.claim import Measured
from rlhf_jax import atomic


class Work(NamedTuple):
    """One claim and one seed."""

    claim: str
    seed: int

    def __str__(self) -> str:
        """Returns the claim and the seed."""
        return f"{self.claim} with seed {self.seed}"


class Done(NamedTuple):
    """What was measured, and how long it took."""

    measured: Measured
    seconds: float
    """Without the stages that claims share."""
    shared_seconds: float
    """Time for the shared stages that were not in the store."""
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

    Raises:
        RuntimeError: Measurements failed; it is raised after all others are done.
    """
    failed: list[str] = []
    context = multiprocessing.get_context("spawn")  # JAX does not support fork
    waiting, started = list(work)[::-1], []
    busy: dict[Any, Work] = {}  # by connection
    several = processes > 1 and hasattr(os, "sched_getaffinity")  # one process may use any core
    cores = sorted(os.sched_getaffinity(0)) if several else [None]
    try:
        for number in range(min(processes, len(work))):
            connection, other = context.Pipe()
            core = cores[number % len(cores)]
            process = context.Process(target=_serve, args=(other, core, store, quick), daemon=True)
            process.start()
            other.close()
            started.append(process)
            busy[connection] = waiting.pop()
            connection.send(busy[connection])
        while busy:
            ready: list[Any] = multiprocessing.connection.wait(list(busy))
            for connection in ready:
                finished = busy.pop(connection)
                try:
                    done = connection.recv()
                except EOFError:
                    raise RuntimeError(f"{finished} failed: its process ended, perhaps for lack of memory") from None
                if waiting:
                    busy[connection] = waiting.pop()
                    connection.send(busy[connection])
                if isinstance(done, str):
                    failed.append(f"{finished} failed: {done}")
                else:
                    on_done(finished, done)
    finally:
        for process in started:
            process.kill()  # stored results are written atomically
            process.join()
    if failed:
        raise RuntimeError("\n".join(sorted(failed)))


def _serve(connection: Any, core: int | None, store: pathlib.Path, quick: bool) -> None:
    """Measures what it is sent, on one core, so that processes do not disturb each other."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process stops this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if core is not None:
        os.sched_setaffinity(0, {core})
    import jax

    jax.config.update("jax_compilation_cache_dir", str(store / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    while True:
        try:
            each = connection.recv()
        except EOFError:
            return
        try:
            connection.send(measure(each, store=store, quick=quick))
        except Exception:
            connection.send(traceback.format_exc())


def _end_with_parent() -> None:
    """Ends this process when the first one ends, even if it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def measure(work: Work, *, store: pathlib.Path, quick: bool) -> Done:
    """Measures one claim with one seed."""
    from claims import catalogue

    claim = catalogue.CLAIMS[work.claim]
    changes = {} if quick else claim.changes
    trial = _trial(work.seed, store, quick, tuple((part, tuple(each.items())) for part, each in changes.items()))
    count, start, result = len(trial.store.made), time.perf_counter(), trial.result(claim.measure)
    measured = result.value
    made = trial.store.made[count:]
    shared = sum(each.seconds for each in made if each.function in SHARED)
    now = [time.perf_counter() - start - shared, shared] if made else [0.0, 0.0]
    path = store / "seconds" / f"{result.key}.json"  # of this process and of interrupted ones
    before = json.loads(path.read_text()) if path.exists() else [0.0, 0.0]
    own, others = (a + b for a, b in zip(now, before, strict=True))
    path.parent.mkdir(exist_ok=True)
    atomic.replace_file(path, json.dumps([own, others]).encode())
    return Done(measured, own, others, len(trial.task.eval_prompts))


SHARED = (
    *(f"claims.model_stages.{name}" for name in ("pretrain", "fine_tune", "compare", "train_reward_model")),
    "claims.reward_sizes.train",
    "claims.sample_pool.sample",
)
"""Stages whose duration does not count as that of a claim."""


@functools.lru_cache(maxsize=4)
def _trial(seed: int, store: pathlib.Path, quick: bool, changes: Any) -> Any:
    from claims import trial

    return trial.make_trial(seed, folder=store, quick=quick, changes={part: dict(each) for part, each in changes})
