"""What a plan found: the numbers, the time that they allow at best, and how they are shown."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from planning.chips import Chip
from planning.hlo import Collective
from planning.plan_settings import Plan
from rlhf_jax import lm
from rlhf_jax.lm import params as lm_params

SHOWN = 2**20
"""Collectives that move fewer bytes a step are told of together."""


@dataclasses.dataclass(frozen=True)
class Found:
    """Everything that was found out, in bytes, operations and seconds, of one chip and one call of the step."""

    program: str
    model: str
    parameters: int
    chip: str
    chips: int
    mesh: dict[str, int]
    capacity: float | None
    """Memory of a chip."""
    kept: dict[str, int]
    """By kind, exact."""
    temporaries: int | None
    """All else that is there at the worst moment, less the KV cache; None where the compiler gave up."""
    code: int | None
    needed: float | None
    """The sum; what the compiler asked for where it gave up."""
    fits: bool
    flops: float
    """Of the products, a chip's share."""
    model_flops: float
    """What the mathematics needs, without what is computed again."""
    six_nt: float
    """6 x parameters x tokens trained on, a chip's share."""
    compiler_flops: float | None
    """As the compiler counts, a loop's body once."""
    bytes_moved: float | None
    collectives: list[Collective]
    warnings: list[str]
    seconds: dict[str, float]
    """At the chip's peaks: compute, memory, interconnect."""
    compile_seconds: float
    suggestions: list[str] = dataclasses.field(default_factory=list)
    error: str = ""

    @property
    def step_seconds(self) -> float | None:
        """The least that a step can take if all three overlap."""
        return max(self.seconds.values()) if self.seconds else None

    @property
    def utilisation(self) -> float | None:
        """Model operations a second of that, as a share of the peak."""
        if not self.seconds or not self.seconds["compute"]:
            return None
        return self.seconds["compute"] * (self.model_flops / self.flops) / max(self.seconds.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for a JSON file."""
        plain = dataclasses.asdict(self)
        plain["collectives"] = [
            {
                "kind": c.kind,
                "array": c.array.text,
                "bytes": c.bytes,
                "chips": c.group,
                "axes": list(c.axes),
                "times": c.times,
                "received": c.sent,
                "from": c.where,
            }
            for c in self.collectives
        ]
        return plain | {"step_seconds": self.step_seconds, "utilisation": self.utilisation}


def roofline(
    chip: Chip | None, flops: float, moved: float | None, collectives: Sequence[Collective]
) -> dict[str, float]:
    """Seconds that a chip's peaks allow for each of what it does; nothing for a chip that is not known."""
    if chip is None:
        return {}
    wire = sum(c.sent for c in collectives)
    return {
        "compute": flops / chip.flops,
        "memory": (moved or 0.0) / chip.bandwidth,
        "interconnect": wire / (2 * chip.link),
    }


def unneeded(collectives: Sequence[Collective], cfg: lm.LMConfig, mesh: dict[str, int]) -> list[str]:
    """One sentence for each collective that the sharding should not need."""
    layer, stacked = _weights(cfg)
    told = []
    for c in collectives:
        said = f"{c.kind} of {c.array.text}, {c.times} a step, {size(c.sent)} received by a chip"
        dims = _shape(c.array.dims)
        if c.bytes < SHOWN:
            continue
        if c.kind == "all-to-all":
            told.append(f"{said}: rows or features change places ({c.where})")
        elif c.kind == "all-gather" and dims in stacked:
            told.append(f"{said}: a weight of all layers at once")
        elif c.kind == "all-gather" and dims in layer and mesh["tensor"] > 1 and "tensor" in c.axes:
            told.append(f"{said}: a weight over the axis tensor, which each chip has its part of")
        elif c.kind == "all-reduce" and dims in layer and mesh["fsdp"] > 1 and "fsdp" in c.axes:
            piece = cfg.d_model // mesh["fsdp"]
            why = f"; fsdp cuts d_model into pieces of {piece}, no multiple of 128" if piece % 128 else ""
            told.append(f"{said}: a weight is added up where its parts should be gathered or scattered{why}")
    return told


def _weights(cfg: lm.LMConfig) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    """The shapes of kernels, of one layer and of all layers, whole."""
    layer, stacked = set(), set()
    for name, row in lm_params.table(cfg).items():
        if not name.endswith("kernel") or not name.startswith("layers/"):
            continue
        heads = [i for i, axis in enumerate(row.axes) if axis in ("heads", "kv_heads")]
        forms = [row.shape[1:]]
        if heads:
            i = heads[0] - 1
            forms.append((*forms[0][:i], forms[0][i] * forms[0][i + 1], *forms[0][i + 2 :]))
        layer |= {_shape(form) for form in forms}
        if cfg.n_layers > 1:
            stacked |= {_shape((cfg.n_layers, *form)) for form in forms}
    return layer, stacked


def _shape(dims: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(n for n in dims if n > 1))


def size(n: float) -> str:
    """Bytes to read."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(n) >= scale:
            return f"{n / scale:.2f} {unit}" if n < 10 * scale else f"{n / scale:.1f} {unit}"
    return f"{n:.0f} B"


def operations(n: float) -> str:
    """A count of operations to read."""
    unit, scale = next(
        ((u, s) for u, s in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)) if n >= s), ("MFLOP", 1e6)
    )
    return f"{n / scale:.3g} {unit}"


def seconds(t: float) -> str:
    """A time to read."""
    return f"{t:.2f} s" if t >= 1 else f"{1e3 * t:.1f} ms" if t >= 1e-3 else f"{1e6 * t:.0f} µs"


def show(found: Found, plan: Plan, out: Console) -> None:
    """All of it, as tables."""
    axes = " x ".join(f"{name} {n}" for name, n in found.mesh.items() if n > 1) or "one device"
    out.print(f"[bold]{found.program}[/bold] of {found.model} ({found.parameters:,} parameters)", highlight=False)
    out.print(f"{found.chips} x {found.chip}: {axes}; compiled in {found.compile_seconds:.0f} s", highlight=False)
    out.print(_memory(found))
    verdict = "[bold green]fits[/bold green]" if found.fits else "[bold red]does not fit[/bold red]"
    beside = f" of {size(found.capacity)}" if found.capacity else ""
    needed = "" if found.needed is None else f": {size(found.needed)}{beside} a chip"
    out.print(verdict + needed, highlight=False)
    for text in found.suggestions:
        out.print(f"  try {text}", highlight=False, markup=False)
    if found.error:
        out.print(f"  the compiler: {found.error}", highlight=False, markup=False, soft_wrap=True)
        return
    out.print(_time(found))
    if found.collectives:
        out.print(_collectives(found.collectives))
    for text in found.warnings:
        out.print("[yellow]unneeded:[/yellow] ", end="")
        out.print(text, highlight=False, markup=False, soft_wrap=True)
    if not found.warnings:
        out.print("no collective that the sharding should not need", highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right")
    return table


def _memory(found: Found) -> Table:
    table = _table("bytes a chip", "kind", "size", "")
    for kind, n in found.kept.items():
        table.add_row(kind, size(n), "exact")
    if found.temporaries is not None:
        table.add_row("activations, other temporaries", size(found.temporaries), "compiler")
    if found.code is not None:
        table.add_row("code", size(found.code), "compiler")
    return table


def _time(found: Found) -> Table:
    table = _table("a step, of a chip", "what", "amount", "at its peak")
    at = {name: seconds(t) for name, t in found.seconds.items()}
    table.add_row("products", operations(found.flops), at.get("compute", ""))
    table.add_row("  of them recomputed", f"{max(0.0, 1 - found.model_flops / found.flops):.0%}", "")
    table.add_row("  6 x parameters x tokens", operations(found.six_nt), "")
    if found.compiler_flops is not None:
        table.add_row("  compiler's count, loops once", operations(found.compiler_flops), "")
    if found.bytes_moved is not None:
        table.add_row("memory read and written, about", size(found.bytes_moved), at.get("memory", ""))
    wire = sum(c.sent for c in found.collectives)
    table.add_row("received from other chips", size(wire), at.get("interconnect", ""))
    if found.step_seconds is not None and found.utilisation is not None:
        table.add_row("at best", f"{found.utilisation:.0%} of peak", seconds(found.step_seconds))
    return table


def _collectives(collectives: Sequence[Collective]) -> Table:
    table = _table("collectives", "kind", "array", "over", "times", "received")
    large = [c for c in collectives if c.sent >= SHOWN]
    for c in large:
        over = " ".join(c.axes) or f"{c.group} chips" if c.kind != "collective-permute" else "neighbour"
        table.add_row(c.kind, c.array.text, over, f"{c.times}", size(c.sent))
    rest = [c for c in collectives if c.sent < SHOWN]
    if rest:
        total = sum(c.sent for c in rest)
        table.add_row("smaller ones", "", "", f"{sum(c.times for c in rest)}", size(total) if total else "0 B")
    return table


def rounded_up(n: float, step: float = 2**30) -> float:
    """To whole steps."""
    return math.ceil(n / step) * step
