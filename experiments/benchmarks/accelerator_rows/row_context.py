"""The sizes of models and arrays, the file of measurements and the timer that the rows of accelerator.py share.

A row is one benchmark, such as ``decode`` or ``numerics``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

MATMUL = "matrix products"
BANDWIDTH = "memory bandwidth"
"""Names of the measured hardware limits. `Context.share` expresses a rate as a share of one of them."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sizes of the models and arrays in all rows."""

    model: tuple[tuple[str, Any], ...] = ()
    """Fields that override the preset ``pythia-1b``."""
    matmul: int = 8192
    copied_bytes: int = 4 * 2**30
    sft_rows: int = 8
    sft_length: int = 2048
    pairs: int = 16
    """Pairs per step of the reward model. DPO uses half as many pairs of twice the length."""
    pair_length: int = 512
    prompt: int = 512
    """Tokens per prompt in the rows ``decode``, ``stream`` and ``torch``."""
    answer: int = 256
    batches: tuple[int, ...] = (1, 16, 64, 256)
    stream_prompts: int = 256
    stream_slots: int = 64
    stream_short: int = 32
    ppo_samples: int = 64
    ppo_prompt: int = 256
    ppo_answer: int = 256
    ppo_minibatches: int = 16
    """With 8, an update takes nearly all of 80 GB if the four models have 1B parameters each."""
    seeds: int = 8
    seed_layers: int = 3
    seed_samples: int = 128
    attention_rows: int = 8
    attention_heads: int = 16
    attention_length: int = 2048
    head_widths: tuple[int, ...] = (128, 256)
    window: int = 512
    small: tuple[tuple[str, Any], ...] = (
        ("n_layers", 4),
        ("d_model", 512),
        ("n_heads", 8),
        ("d_mlp", 2048),
        ("vocab_size", 8192),
    )
    """Further fields of the model in the rows ``numerics`` and ``deterministic``; its checkpoints take 0.6 GB."""
    repeats: int = 5
    aims: bool = True
    """Whether the table compares measurements with aims, the bounds that they should satisfy."""


QUICK = Shapes(
    model=(("vocab_size", 64), ("n_layers", 1), ("d_model", 32), ("n_heads", 2), ("d_mlp", 64), ("max_length", 64)),
    matmul=64,
    copied_bytes=2**20,
    sft_rows=2,
    sft_length=16,
    pairs=4,
    pair_length=8,
    prompt=8,
    answer=8,
    batches=(1, 4),
    stream_prompts=8,
    stream_slots=4,
    stream_short=2,
    ppo_samples=4,
    ppo_prompt=8,
    ppo_answer=8,
    ppo_minibatches=2,
    seeds=2,
    seed_layers=1,
    seed_samples=4,
    attention_rows=2,
    attention_heads=2,
    attention_length=32,
    head_widths=(8,),
    window=8,
    small=(),
    repeats=2,
    aims=False,
)
"""Tiny shapes for a test run; the numbers are meaningless."""


@dataclasses.dataclass(frozen=True)
class Context:
    """The inputs of a row, and the file for its measurements."""

    path: pathlib.Path
    """The JSON-lines file."""
    run: str
    """Name of the run; part of every record."""
    row: str
    shapes: Shapes
    earlier: tuple[dict[str, Any], ...] = ()
    """Records that the run has written so far."""

    def record(self, measure: str, value: float | bool | None = None, unit: str = "", **fields: Any) -> None:
        """Appends a measurement.

        Args:
            measure: What was measured.
            value: The measured value; None if there is only a note.
            unit: Unit of the value.
            **fields: Further entries. ``share`` is the achieved fraction of the quantity named by ``share_of``.
                ``at_least`` or ``at_most`` is the aim for ``share`` if it is given, else for ``value``.
        """
        aims = () if self.shapes.aims else ("at_least", "at_most")
        fields = {name: field for name, field in fields.items() if name not in aims}
        append(
            self.path, {"run": self.run, "row": self.row, "measure": measure, "value": value, "unit": unit, **fields}
        )

    def value(self, row: str, measure: str) -> float | None:
        """Returns the last value of a measurement in this run, or None if there is none."""
        found = [each["value"] for each in self.earlier if (each["row"], each.get("measure")) == (row, measure)]
        return found[-1] if found else None

    def share(self, amount_per_second: float, limit: str, **aim: float) -> dict[str, Any]:
        """Returns ``share``, ``share_of`` and the aim of a rate, as fields for `record`.

        The dict is empty if the limit was not measured.
        """
        most = self.value("limits", limit)
        return {} if most is None else {"share": amount_per_second / most, "share_of": limit, **aim}


def append(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Appends a record to the file of measurements."""
    from rlhf_jax import atomic  # imports JAX, which --help and --show do not need

    atomic.append_line(path, record)


def read(path: pathlib.Path, run: str | None = None) -> tuple[dict[str, Any], ...]:
    """Returns the records of a run, by default of the last one. Incomplete lines are skipped."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            records += [record] if isinstance(record, dict) and {"run", "row"} <= record.keys() else []
    run = run or (records[-1]["run"] if records else None)
    return tuple(each for each in records if each["run"] == run)


def first_line(error: BaseException) -> str:
    """Returns the type and the first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def seconds(function: Callable[[], Any], *, repeats: int, calls: int = 1) -> tuple[float, dict[str, Any]]:
    """Returns the median seconds per call, and two fields for a record.

    The fields are ``seconds``, the seconds per call in each repetition, and ``first_s``, the time of the first
    repetition, including compilation.

    Args:
        function: Runs one repetition and returns when its results are ready.
        repeats: Number of timed repetitions, after the first one and one for warmup.
        calls: Number of calls per repetition.
    """
    began = time.perf_counter()
    function()
    first = time.perf_counter() - began
    function()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append((time.perf_counter() - began) / calls)
    return statistics.median(times), {"seconds": times, "first_s": first}
