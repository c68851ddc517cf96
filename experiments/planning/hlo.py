"""Reads the collectives and the memory traffic of a compiled program from its HLO text.

The body of a loop is counted once per iteration. The compiler's cost analysis counts it only once, which is wrong for
models that scan over their layers.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"(pred|bf16|f16|f32|f64|c64|c128|[su]\d+|f8\w+)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"^(\(.*?\)|\S+) ([a-z][a-z0-9\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}
_FREE |= {"after-all", "partition-id", "copy-done", "slice-done", "iota", "broadcast", "opt-barrier"}
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Array:
    """The shape and the dtype of an array in HLO."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool
    """Whether the layout places the array outside main memory."""
    more: int = 0
    """Number of other arrays in the same collective."""

    @property
    def bytes(self) -> int:
        """The size of the array in bytes."""
        bits = _BITS.get(self.dtype) or int(re.sub(r"\D", " ", self.dtype).split()[0])
        return math.prod(self.dims) * bits // 8

    @property
    def text(self) -> str:
        """The array in HLO notation, without its layout."""
        return f"{self.dtype}[{','.join(map(str, self.dims))}]" + f" and {self.more} more" * bool(self.more)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    """Attributes after the operands or, for a constant, its value."""
    root: bool

    @property
    def called(self) -> list[str]:
        """Names of the computations that the instruction calls."""
        branches = _BRANCHES.search(self.rest)
        listed = re.findall(r"[\w.\-]+", branches.group(1)) if branches else []
        return _CALLED.findall(self.rest) + listed


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation and the number of times that it runs in one call of the program."""

    kind: str
    array: Array
    """The largest array in the result on one chip; the result of a ``-start`` instruction includes its input."""
    group: int
    """Number of chips in each group that exchanges data."""
    axes: tuple[str, ...]
    """Mesh axes that a group spans; empty if they are unknown."""
    times: int
    source: str
    """The operation in the source code that the collective belongs to."""
    bytes: int
    """Approximate size of the input or the output on one chip, whichever is larger, in bytes."""

    @property
    def received(self) -> float:
        """Bytes that a chip receives in one call of the program, assuming ring algorithms."""
        share = (self.group - 1) / self.group if self.group > 1 else 0.0
        factor = {"all-reduce": 2.0 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.times * factor * self.bytes


@dataclasses.dataclass(frozen=True)
class Program:
    """Collectives and memory traffic of a compiled program."""

    collectives: list[Collective]
    bytes_moved: float
    """Approximate memory traffic of one chip: the sum of the bytes that each operation reads and writes."""
    open_loops: int
    """Number of loops for which the number of iterations is unknown."""


def _arrays_in(shape: str) -> tuple[Array, ...]:
    """Returns the arrays of a shape, which may be a tuple."""
    return tuple(
        Array(dtype, tuple(int(n) for n in dims.split(",") if n), "S(" in (layout or ""))
        for dtype, dims, layout in _ARRAY.findall(shape)
    )


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the computations of a module by name, and the name of the entry computation."""
    computations: dict[str, list[Instruction]] = {}
    entry, instructions = "", None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            instructions = computations.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
        # Lines that are not instructions, such as the text of an embedded kernel, are ignored.
        elif instructions is not None and line.startswith(" ") and (instruction := _instruction(line)):
            instructions.append(instruction)
    return computations, entry


def read(text: str, *, open_loops: int = 1, mesh: dict[str, int] | None = None) -> Program:
    """Returns the collectives and the memory traffic of a compiled module.

    Args:
        text: The result of ``compiled.as_text()``.
        open_loops: Assumed number of iterations of a loop if the number is unknown at compile time.
        mesh: Sizes of the mesh axes, in order. If None, the axes of the collectives are left empty.
    """
    computations, entry = _parse(text)
    by_name = {name: {i.name: i for i in lines} for name, lines in computations.items()}
    collectives: list[Collective] = []
    moved, unknown = 0.0, 0
    for name, times, seen in _visits(computations, entry, open_loops):
        unknown += sum(_trips(i, computations) is None for i in computations[name] if i.opcode == "while")
        for outer in computations[name]:
            moved += times * _bytes_moved(outer, by_name[name], computations)
            for i, inside in _collectives(outer, computations):
                # A collective that overlaps with several fusions appears in each of them, and in the loops that run
                # meanwhile. It is counted once.
                channel = re.search(r"channel_id=\d+", i.rest)
                key = f"{channel.group(0)} {i.opcode} {i.arrays}" if channel and inside else i.name
                if key not in seen:
                    seen.add(key)
                    collectives.append(_collective(i, inside or name, times, mesh))
    return Program(_merged(collectives), moved, unknown)


def _instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if not match:
        return None
    body = _OPCODE.match(re.sub(r"/\*index=\d+\*/", "", match.group(3)))
    if not body:
        return None
    shape, opcode, rest = body.groups()
    depth, end = 1, len(rest)
    for at, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            end = at
            break
    operands, rest = tuple(re.findall(r"%([\w.\-]+)", rest[:end])), rest[end:]
    if opcode == "constant":
        operands, rest = (), body.group(3)[:end]
    return Instruction(match.group(2), opcode, _arrays_in(shape), operands, rest, bool(match.group(1)))


def _visits(
    computations: dict[str, list[Instruction]], entry: str, open_loops: int
) -> Iterator[tuple[str, int, set[str]]]:
    """Yields the name of each computation outside fusions, how often it runs, and the set of collectives already seen.

    The set starts as a copy of the calling computation's set; the consumer adds to it.
    """
    waiting: list[tuple[str, int, set[str]]] = [(entry, 1, set())]
    while waiting:
        name, times, before = waiting.pop()
        seen = set(before)
        yield name, times, seen
        for i in computations[name]:
            if i.opcode == "while":
                body = re.search(r"body=%?([\w.\-]+)", i.rest)
                trips = _trips(i, computations)
                if body:
                    waiting.append((body.group(1), times * (open_loops if trips is None else trips), seen))
            elif i.opcode in ("call", "conditional", "async-start"):
                waiting += [(called, times, seen) for called in i.called if called in computations]


def _trips(loop: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
    """Returns the number of iterations of a loop, or None if it is unknown at compile time."""
    known = re.search(r'known_trip_count["\\:={ ]+n["\\: =]+(\d+)', loop.rest)
    if known:
        return int(known.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    lines = computations.get(condition.group(1), []) if condition else []
    compares = [i for i in lines if i.root and (i.opcode == "compare" or "compare" in i.name)]
    numbers = [i for i in lines if i.opcode == "constant" and i.rest.isdigit()]
    return int(numbers[0].rest) if len(compares) == 1 and len(numbers) == 1 else None


def _collectives(
    i: Instruction, computations: dict[str, list[Instruction]]
) -> Iterator[tuple[Instruction, str | None]]:
    """Yields the collectives of an instruction, each with the name of the fused computation around it, if any."""
    if i.opcode.removesuffix("-start") in KINDS:
        yield i, None
    if i.opcode in ("fusion", "async-start", "custom-call"):
        for called in i.called:
            for inner in computations.get(called, []):
                for collective, inside in _collectives(inner, computations):
                    yield collective, inside or called


def _collective(i: Instruction, inside: str, times: int, mesh: dict[str, int] | None) -> Collective:
    kind = i.opcode.removesuffix("-start")
    ring = re.search(r"windowed_dot_general_body_(ag|rs)", inside)
    if kind == "all-reduce" and "all-reduce-scatter" in inside:
        kind = "reduce-scatter"  # the TPU compiler's notation for a fused reduce-scatter
    groups = _first_group(i.rest)
    op_name = re.search(r'op_name="([^"]*)"', i.rest)
    source = op_name.group(1) if op_name else ""
    if ring:
        kind_of_ring = "all-gather" if ring.group(1) == "ag" else "reduce-scatter"
        source = f"{kind_of_ring} in steps that overlap with a matmul; {source}"
    axes = _axes(groups, mesh) if mesh and kind != "collective-permute" else ()
    # A -start instruction returns its input and its output. A combined collective returns several arrays.
    arrays = sorted(i.arrays, key=lambda a: a.bytes)
    array, total = arrays[-1], arrays[-1].bytes
    if len(arrays) > 1 and i.opcode in KINDS:
        array = dataclasses.replace(array, more=len(arrays) - 1)
        total = sum(a.bytes for a in arrays)
    if i.opcode == "reduce-scatter":
        total *= len(groups) or 1  # the output is a shard
    return Collective(kind, array, len(groups) or 2, axes, times, source, total)


def _first_group(rest: str) -> list[int]:
    """Returns the partition ids of the first replica group."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if listed:
        return _integers(listed.group(1))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        return _iota(iota.group(2), iota.group(3)).reshape(_integers(iota.group(1)))[0].tolist()
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\)\s)?[^{]*\{([^}]*)\}", rest)
    if not named:
        return []
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named.group(1))}
    group = _named_group(sizes, re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named.group(3)))
    order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", named.group(2) or "")
    return _iota(*order.groups()).ravel()[group].tolist() if order else group


def _integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _iota(dims: str, order: str | None) -> np.ndarray:
    """Returns the partition ids in an array of shape ``dims``, transposed by ``order``."""
    ids = np.arange(math.prod(_integers(dims))).reshape(_integers(dims))
    return ids if order is None else ids.transpose(_integers(order))


def _named_group(sizes: dict[str, int], axes: list[tuple[str, str, str]]) -> list[int]:
    """Returns the ids of the partitions that form a group with partition 0 over named axes.

    Each axis is ``(name, "", "")``, or ``(name, before, size)`` for a sub-axis of ``size`` elements; ``before`` is the
    product of the sizes of the sub-axes before it.
    """
    steps: list[list[int]] = []
    for name, before, size in axes:
        stride = math.prod(list(sizes.values())[list(sizes).index(name) + 1 :])
        count = int(size) if size else sizes[name]
        if size:
            stride *= sizes[name] // (int(before) * count)
        steps.append([k * stride for k in range(count)])
    return [sum(step) for step in itertools.product(*steps)]


def _axes(group: list[int], mesh: dict[str, int]) -> tuple[str, ...]:
    if not group or max(group) >= math.prod(mesh.values()):
        return ()
    places = np.stack(np.unravel_index(np.array(group), tuple(mesh.values())))
    return tuple(name for name, row in zip(mesh, places, strict=True) if len(set(row.tolist())) > 1)


def _merged(collectives: list[Collective]) -> list[Collective]:
    """Merges collectives of the same kind, shape and axes, and sorts them by decreasing traffic."""
    groups: dict[tuple, list[Collective]] = {}
    for c in collectives:
        groups.setdefault((c.kind, c.array.text, c.bytes, c.group, c.axes), []).append(c)
    merged = [dataclasses.replace(group[0], times=sum(c.times for c in group)) for group in groups.values()]
    return sorted(merged, key=lambda c: -c.received)


def _in_memory(arrays: Iterable[Array]) -> int:
    """Returns the total size in bytes of the arrays in main memory."""
    return sum(a.bytes for a in arrays if not a.on_chip)


def _bytes_moved(i: Instruction, names: dict[str, Instruction], computations: dict[str, list[Instruction]]) -> float:
    """Returns the number of bytes that an instruction reads from and writes to main memory."""
    if i.opcode in _FREE or i.opcode.endswith("-done") or (i.opcode == "custom-call" and "tpu_custom" not in i.rest):
        return 0.0
    if i.opcode == "fusion":
        return _fusion_bytes_moved(i, computations)
    read = [_in_memory(names[o].arrays) for o in i.operands if o in names]
    written = _in_memory(i.arrays)
    if i.opcode in _SLICES:
        return 2.0 * written
    if i.opcode == "dynamic-update-slice":
        return 2.0 * (read[1] if len(read) > 1 else 0)
    if i.opcode.endswith("-start"):
        return float(written)
    return float(sum(read) + written)


def _fusion_bytes_moved(i: Instruction, computations: dict[str, list[Instruction]]) -> float:
    """Returns the bytes moved by a fusion, which reads only the slices it uses and writes only those it updates."""
    lines = next((computations[called] for called in i.called if called in computations), [])
    by_name = {line.name: line for line in lines}
    total = 0.0
    for parameter in lines:
        if parameter.opcode != "parameter" or any(a.on_chip for a in parameter.arrays):
            continue
        users = [line for line in lines if parameter.name in line.operands]
        if users and all(u.opcode in _SLICES for u in users):
            total += sum(a.bytes for u in users for a in u.arrays)
        elif not users or any(u.opcode != "dynamic-update-slice" or u.operands[0] != parameter.name for u in users):
            total += sum(a.bytes for a in parameter.arrays)
    outputs = [line for line in lines if line.root]
    if outputs and outputs[0].opcode == "tuple":
        outputs = [by_name[o] for o in outputs[0].operands if o in by_name]
    for output in outputs:
        if output.opcode == "dynamic-update-slice":
            update = by_name.get(output.operands[1]) if len(output.operands) > 1 else None
            total += sum(a.bytes for a in update.arrays) if update else 0
        elif output.opcode != "parameter":
            total += _in_memory(output.arrays)
    return total
