"""The rows of the table: which work is measured beside which, and what is asked of it."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

Home = Literal["ours", "trl", "trl-ppo", "tunix"]
"""The environment that a program runs in."""

Kind = Literal["speed", "share", "times"]
"""``speed``: our rate over a peer's. ``share``: our operations a second over the machine's, and ``times``: our time
over the least there could be."""

BATCHES = (1, 4, 16, 64)


@dataclasses.dataclass(frozen=True)
class Program:
    """A process to be measured."""

    home: Home
    work: str
    module: str = ""
    """Of `peers`; our own are all run by `benchmarks.workload`."""
    variant: str = ""
    huge_pages: bool = True

    @property
    def key(self) -> str:
        """A name for files and messages."""
        parts = (self.home, self.work, self.variant, "" if self.huge_pages else "4k")
        return ".".join(part for part in parts if part)


class Against(NamedTuple):
    """What a row is compared with; of several programs the fastest counts."""

    label: str
    kind: Kind
    required: float | None
    """What is asked for; None for a comparison that is shown and not asked for."""
    programs: tuple[Program, ...]


class Row(NamedTuple):
    """One work of ours and what it is compared with; they are measured in turn."""

    key: str
    title: str
    ours: Program
    against: tuple[Against, ...]
    warm: int = 2

    @property
    def programs(self) -> tuple[Program, ...]:
        """Ours first."""
        return (self.ours, *(program for against in self.against for program in against.programs))


def _trl(
    label: str, required: float, work: str, module: str, home: Home = "trl", *, small: bool = False
) -> tuple[Against, ...]:
    """A trainer of TRL in float32, as ours is, and with its defaults; without huge pages too if they slow it down."""
    pages = (True, False)[: 1 + small]
    alike, defaults = (
        tuple(Program(home, work, module, variant, huge) for huge in pages) for variant in ("plain", "defaults")
    )
    return (
        Against(f"{label} f32", "speed", required, alike),
        Against(f"{label} bf16", "speed", None, defaults),
    )


def _one(label: str, required: float, work: str, home: Home, module: str) -> Against:
    return Against(label, "speed", required, (Program(home, work, module),))


def _row(work: str, title: str, *against: Against, warm: int = 2) -> Row:
    return Row(work, title, Program("ours", work), against, warm)


def _decoding(size: str, batch: int) -> Row:
    limit = Against("least time", "times", 2.5, (Program("ours", f"limit-{size}-{batch}"),))
    return _row(f"decode-{size}-{batch}", f"token {size.upper()}, batch {batch}", limit, warm=1)


ROWS: tuple[Row, ...] = (
    _row(
        "sft-s",
        "SFT step S",
        *_trl("TRL", 2.0, "sft-s", "trl_sft"),
        _one("Tunix", 1.1, "sft-s", "tunix", "tunix_sft"),
    ),
    _row(
        "sft-m",
        "SFT step M",
        *_trl("TRL", 2.0, "sft-m", "trl_sft"),
        _one("Tunix", 1.15, "sft-m", "tunix", "tunix_sft"),
        Against("matmul rate", "share", 0.6, (Program("ours", "matmul-m"),)),
        warm=1,
    ),
    _row("reward-s", "reward model S", *_trl("TRL", 1.4, "reward-s", "trl_reward")),
    _row(
        "dpo-s",
        "DPO step S",
        *_trl("TRL", 1.9, "dpo-s", "trl_dpo", small=True),
        _one("Tunix", 1.1, "dpo-s", "tunix", "tunix_dpo"),
    ),
    _row(
        "generate-s",
        "generation S",
        _one("transformers", 2.4, "generate-s", "trl", "hf_generate"),
        _one("Tunix", 1.7, "generate-s", "tunix", "tunix_generate"),
    ),
    _row(
        "generate-m",
        "generation M",
        _one("transformers", 2.4, "generate-m", "trl", "hf_generate"),
        _one("Tunix", 1.25, "generate-m", "tunix", "tunix_generate"),
    ),
    _row(
        "ppo-s",
        "PPO iteration S",
        *_trl("TRL 1.12", 1.8, "ppo-s", "trl_ppo", "trl-ppo"),
        warm=1,
    ),
    _row(
        "stream-s",
        "refilled slots S",
        Against("static", "speed", 2.5, (Program("ours", "static-s"),)),
        warm=0,
    ),
    *(_decoding(size, batch) for size in ("s", "m") for batch in BATCHES),
)


def choose(only: str) -> tuple[Row, ...]:
    """The rows that a comma-separated list names, all for an empty one; raises ``ValueError`` for an unknown name."""
    names = [name.strip() for name in only.split(",") if name.strip()]
    known = {row.key: row for row in ROWS}
    for name in names:
        if name not in known:
            raise ValueError(f"no row is called {name!r}; there are {', '.join(known)}")
    return tuple(known[name] for name in names) if names else ROWS
