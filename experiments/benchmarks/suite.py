"""The rows of the benchmark table: our workloads, the programs to compare them with, and the required ratios."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

Home = Literal["ours", "trl", "trl-ppo", "tunix"]
"""The environments that a program can run in."""

Kind = Literal["speed", "share", "times"]
"""``speed``: our tokens per second divided by the other program's. ``share``: our FLOPs per second divided by the
machine's matmul rate. ``times``: our time divided by the minimum possible time."""

BATCHES = (1, 4, 16, 64)


@dataclasses.dataclass(frozen=True)
class Program:
    """A process to measure."""

    home: Home
    workload: str
    module: str = ""
    """Module of `benchmarks.peers`; empty for our own workloads, which `benchmarks.workload` runs."""
    variant: str = ""
    huge_pages: bool = True

    @property
    def key(self) -> str:
        """A unique name, used for files and messages."""
        parts = (self.home, self.workload, self.variant, "" if self.huge_pages else "4k")
        return ".".join(part for part in parts if part)


class Against(NamedTuple):
    """A comparison with the fastest of several programs."""

    label: str
    kind: Kind
    required: float | None
    """The required ratio; None if there is no requirement."""
    programs: tuple[Program, ...]


class Row(NamedTuple):
    """One of our workloads and the comparisons with it. All programs of a row are measured in turn."""

    key: str
    title: str
    ours: Program
    against: tuple[Against, ...]
    warm: int = 2

    @property
    def programs(self) -> tuple[Program, ...]:
        """All programs of the row, ours first."""
        return (self.ours, *(program for against in self.against for program in against.programs))


def _row(workload: str, title: str, *against: Against, warm: int = 2) -> Row:
    return Row(workload, title, Program("ours", workload), against, warm)


def _trl(
    workload: str, required: float, *, home: Home = "trl", label: str = "TRL", small_pages: bool = False
) -> tuple[Against, ...]:
    """Returns comparisons with a TRL trainer: one in our dtype (float32 on a CPU), one with the trainer's defaults.

    With ``small_pages``, the trainer also runs without huge pages.
    """
    module = "trl_ppo" if home == "trl-ppo" else "trl_trainers"
    float32, defaults = (
        tuple(Program(home, workload, module, variant, huge) for huge in (True, False)[: 1 + small_pages])
        for variant in ("plain", "defaults")
    )
    return Against(f"{label} f32", "speed", required, float32), Against(f"{label} bf16", "speed", None, defaults)


def _tunix(workload: str, required: float, module: str) -> Against:
    return Against("Tunix", "speed", required, (Program("tunix", workload, module),))


def _generation(size: str, *, transformers: float, tunix: float) -> Row:
    workload = f"generate-{size}"
    hf = Against("transformers", "speed", transformers, (Program("trl", workload, "hf_generate"),))
    return _row(workload, f"generation {size.upper()}", hf, _tunix(workload, tunix, "tunix_generate"))


def _decoding(size: str, batch: int) -> Row:
    limit = Against("least time", "times", 2.5, (Program("ours", f"limit-{size}-{batch}"),))
    return _row(f"decode-{size}-{batch}", f"token {size.upper()}, batch {batch}", limit, warm=1)


MATMUL = Against("matmul rate", "share", 0.6, (Program("ours", "matmul-m"),))
STATIC = Against("static", "speed", 2.5, (Program("ours", "static-s"),))

ROWS: tuple[Row, ...] = (
    _row("sft-s", "SFT step S", *_trl("sft-s", 2.0), _tunix("sft-s", 1.1, "tunix_sft")),
    _row("sft-m", "SFT step M", *_trl("sft-m", 2.0), _tunix("sft-m", 1.15, "tunix_sft"), MATMUL, warm=1),
    _row("reward-s", "reward model S", *_trl("reward-s", 1.4)),
    _row("dpo-s", "DPO step S", *_trl("dpo-s", 1.9, small_pages=True), _tunix("dpo-s", 1.1, "tunix_dpo")),
    _generation("s", transformers=2.4, tunix=1.7),
    _generation("m", transformers=2.4, tunix=1.25),
    _row("ppo-s", "PPO iteration S", *_trl("ppo-s", 1.8, home="trl-ppo", label="TRL 1.12"), warm=1),
    _row("stream-s", "refilled slots S", STATIC, warm=0),
    *(_decoding(size, batch) for size in ("s", "m") for batch in BATCHES),
)


def select(only: str) -> tuple[Row, ...]:
    """Returns the rows named in a comma-separated list, or all rows if the list is empty.

    Raises:
        ValueError: The list names an unknown row.
    """
    names = [name.strip() for name in only.split(",") if name.strip()]
    rows = {row.key: row for row in ROWS}
    for name in names:
        if name not in rows:
            raise ValueError(f"--only names the unknown row {name!r}; the rows are {', '.join(rows)}")
    return tuple(rows[name] for name in names) if names else ROWS
