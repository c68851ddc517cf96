"""The estimate of a plan's memory, FLOPs, collectives and minimum time at peak rates, and the tables that show it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from planning.chips import Chip
from planning.hlo import Collective
from rlhf_jax import lm
from rlhf_jax.lm import params as lm_params
from rlhf_jax.report import console

MIN_BYTES = 2**20
"""Collectives by which a chip receives fewer bytes per step share one row of the table. Collectives of smaller arrays
raise no warning."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The estimated costs of one step of a plan. Bytes, FLOPs and seconds are per chip and per step."""

    program: str
    model: str
    parameters: int
    chip: str
    chips: int
    mesh: dict[str, int]
    capacity: float | None
    """Memory of a chip in bytes; None if unknown."""
    kept: dict[str, int]
    """Size in bytes, by kind, of the arrays kept between calls, of the KV cache, and of the batch and the results."""
    temporaries: int | None
    """Peak memory of all other arrays; None if the compiler rejected the program for lack of memory."""
    code: int | None
    """Size of the compiled program in bytes; None if unknown."""
    needed: float | None
    """Sum of ``kept``, ``temporaries`` and ``code``. If the compiler rejected the program, the size according to its
    error message; None if the message contains none."""
    fits: bool
    flops: float
    """FLOPs of the matrix products."""
    model_flops: float
    """FLOPs of the model without rematerialisation."""
    six_nt: float
    """6 x parameters x training tokens, divided by the number of chips."""
    compiler_flops: float | None
    """The compiler's FLOP count, which counts the body of a loop once."""
    bytes_moved: float | None
    """Approximate number of bytes read from and written to memory."""
    collectives: list[Collective]
    warnings: list[str]
    seconds: dict[str, float]
    """Seconds of compute, memory and interconnect at the chip's peak rates; empty for an unknown chip."""
    compile_seconds: float
    suggestions: list[str] = dataclasses.field(default_factory=list)
    error: str = ""

    @property
    def step_seconds(self) -> float | None:
        """The minimum time of a step in seconds, if compute, memory and interconnect overlap."""
        return max(self.seconds.values()) if self.seconds else None

    @property
    def utilisation(self) -> float | None:
        """Model FLOPs utilisation of a step that takes `step_seconds`."""
        if not self.seconds or not self.seconds["compute"]:
            return None
        return self.seconds["compute"] * (self.model_flops / self.flops) / max(self.seconds.values())

    def as_dict(self) -> dict[str, Any]:
        """Returns all numbers as a JSON-compatible dictionary."""
        values = dataclasses.asdict(self)
        values["collectives"] = [
            {
                "kind": c.kind,
                "array": c.array.text,
                "bytes": c.bytes,
                "chips": c.group,
                "axes": list(c.axes),
                "times": c.times,
                "received": c.received,
                "from": c.source,
            }
            for c in self.collectives
        ]
        return values | {"step_seconds": self.step_seconds, "utilisation": self.utilisation}


def roofline(
    chip: Chip | None, flops: float, moved: float | None, collectives: Sequence[Collective]
) -> dict[str, float]:
    """Returns the seconds of compute, memory and interconnect at a chip's peak rates; empty for an unknown chip."""
    if chip is None:
        return {}
    return {
        "compute": flops / chip.flops,
        "memory": (moved or 0.0) / chip.bandwidth,
        "interconnect": _received(collectives) / (2 * chip.link),
    }


def _received(collectives: Sequence[Collective]) -> float:
    return sum(c.received for c in collectives)


def unneeded(collectives: Sequence[Collective], cfg: lm.LMConfig, mesh: dict[str, int]) -> list[str]:
    """Returns a sentence for each collective that the sharding should make unnecessary."""
    layer, stacked = _kernel_shapes(cfg)
    warnings = []
    for c in collectives:
        dims = _shape(c.array.dims)
        if c.bytes < MIN_BYTES:
            continue
        if c.kind == "all-to-all":
            reason = f"it moves rows or features between chips ({c.source})"
        elif c.kind == "all-gather" and dims in stacked:
            reason = "it gathers a weight of all layers at once"
        elif c.kind == "all-gather" and dims in layer and mesh["tensor"] > 1 and "tensor" in c.axes:
            reason = "it gathers a weight over the tensor axis, although each chip should use only its own shard"
        elif c.kind == "all-reduce" and dims in layer and mesh["fsdp"] > 1 and "fsdp" in c.axes:
            reason = "it sums whole weights instead of gathering or scattering their shards"
            if (shard := cfg.d_model // mesh["fsdp"]) % 128:
                reason += f"; fsdp splits d_model into shards of {shard}, which is not a multiple of 128"
        else:
            continue
        received = size(c.received)
        warnings.append(f"{c.kind} of {c.array.text}, {c.times} times per step, {received} received per chip: {reason}")
    return warnings


def _kernel_shapes(cfg: lm.LMConfig) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    """Returns the shapes of the unsharded kernels of one layer, and the shapes with all layers stacked.

    Dimensions are sorted. Attention kernels are included both with separate and with merged head dimensions.
    """
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
    """Formats a number of bytes."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(n) >= scale:
            return f"{n / scale:.2f} {unit}" if n < 10 * scale else f"{n / scale:.1f} {unit}"
    return f"{n:.0f} B"


def operations(n: float) -> str:
    """Formats a number of FLOPs."""
    unit, scale = next(
        ((u, s) for u, s in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)) if n >= s), ("MFLOP", 1e6)
    )
    return f"{n / scale:.3g} {unit}"


def seconds(t: float) -> str:
    """Formats a time."""
    return f"{t:.2f} s" if t >= 1 else f"{1e3 * t:.1f} ms" if t >= 1e-3 else f"{1e6 * t:.0f} µs"


def show(estimate: Estimate, out: Console) -> None:
    """Prints an estimate."""
    axes = " x ".join(f"{name} {n}" for name, n in estimate.mesh.items() if n > 1) or "one device"
    model = f"{estimate.model} ({estimate.parameters:,} parameters)"
    out.print(f"[bold]{estimate.program}[/bold] of {model}", highlight=False)
    machine = f"{estimate.chips} x {estimate.chip}: {axes}"
    out.print(f"{machine}; compiled in {estimate.compile_seconds:.0f} s", highlight=False)
    out.print(_memory_table(estimate))
    verdict = "[bold green]fits[/bold green]" if estimate.fits else "[bold red]does not fit[/bold red]"
    capacity = f" of {size(estimate.capacity)}" if estimate.capacity else ""
    needed = "" if estimate.needed is None else f": {size(estimate.needed)}{capacity} per chip"
    out.print(verdict + needed, highlight=False)
    for text in estimate.suggestions:
        out.print(f"  alternative: {text}", highlight=False, markup=False)
    if estimate.error:
        out.print(f"  compiler error: {estimate.error}", highlight=False, markup=False, soft_wrap=True)
        return
    out.print(_time_table(estimate))
    if estimate.collectives:
        out.print(_collectives_table(estimate.collectives))
    for text in estimate.warnings:
        out.print("[yellow]unneeded collective:[/yellow] ", end="")
        out.print(text, highlight=False, markup=False, soft_wrap=True)
    if not estimate.warnings:
        out.print("no unneeded collectives", highlight=False)


def _new_table(title: str, *columns: str) -> Table:
    return console.NumbersTable(*columns, title=title, title_style="bold")


def _memory_table(estimate: Estimate) -> Table:
    table = _new_table("memory per chip", "kind", "size", "source")
    for kind, n in estimate.kept.items():
        table.add_row(kind, size(n), "exact")
    if estimate.temporaries is not None:
        table.add_row("activations, other temporaries", size(estimate.temporaries), "compiler")
    if estimate.code is not None:
        table.add_row("code", size(estimate.code), "compiler")
    return table


def _time_table(estimate: Estimate) -> Table:
    table = _new_table("one step, per chip", "quantity", "amount", "time at peak")
    at = {name: seconds(t) for name, t in estimate.seconds.items()}
    table.add_row("matrix products", operations(estimate.flops), at.get("compute", ""))
    table.add_row("  rematerialised", f"{max(0.0, 1 - estimate.model_flops / estimate.flops):.0%}", "")
    table.add_row("  6 x parameters x tokens", operations(estimate.six_nt), "")
    if estimate.compiler_flops is not None:
        table.add_row("  compiler's count (loop bodies once)", operations(estimate.compiler_flops), "")
    if estimate.bytes_moved is not None:
        table.add_row("memory read and written (approx.)", size(estimate.bytes_moved), at.get("memory", ""))
    table.add_row("received from other chips", size(_received(estimate.collectives)), at.get("interconnect", ""))
    if estimate.step_seconds is not None and estimate.utilisation is not None:
        table.add_row("upper bound on MFU", f"{estimate.utilisation:.0%}", seconds(estimate.step_seconds))
    return table


def _collectives_table(collectives: Sequence[Collective]) -> Table:
    table = _new_table("collectives", "kind", "array", "over", "times", "received")
    for c in (c for c in collectives if c.received >= MIN_BYTES):
        over = " ".join(c.axes) or f"{c.group} chips" if c.kind != "collective-permute" else "neighbour"
        table.add_row(c.kind, c.array.text, over, f"{c.times}", size(c.received))
    if small := [c for c in collectives if c.received < MIN_BYTES]:
        table.add_row("smaller collectives", "", "", f"{sum(c.times for c in small)}", size(_received(small)))
    return table
