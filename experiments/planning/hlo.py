"""What a compiled program does, read from its HLO text: collectives and bytes, each as often as its loop goes round.

A compiler's own cost analysis counts the body of a loop once, and the layers of a model are a loop.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

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
_TINY = 2**20
"""Collectives of fewer bytes are not looked at one by one."""


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape; its place is outside of the main memory where its layout says so."""

    dtype: str
    dims: tuple[int, ...]
    near: bool
    more: int = 0
    """How many other arrays go with it, in one."""

    @property
    def bytes(self) -> int:
        """How large it is."""
        bits = _BITS.get(self.dtype) or int(re.sub(r"\D", " ", self.dtype).split()[0])
        return math.prod(self.dims) * bits // 8

    @property
    def text(self) -> str:
        """As HLO writes it, without the layout."""
        return f"{self.dtype}[{','.join(map(str, self.dims))}]" + f" and {self.more} more" * bool(self.more)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        branches = _BRANCHES.search(self.rest)
        listed = re.findall(r"[\w.\-]+", branches.group(1)) if branches else []
        return _CALLED.findall(self.rest) + listed


@dataclasses.dataclass(frozen=True)
class Collective:
    """One that chips do together, with how often in a call of the program."""

    kind: str
    array: Array
    """The larger of what goes in and what comes out, of one chip."""
    group: int
    """Chips that take part in one."""
    axes: tuple[str, ...]
    """Of the mesh, over which they are; empty where that cannot be told."""
    times: int
    where: str
    """The operation in the source that it comes from."""

    bytes: int
    """Of that array, and of those that go with it."""

    @property
    def sent(self) -> float:
        """Bytes that a chip receives in all of them, by ring algorithms."""
        share = (self.group - 1) / self.group if self.group > 1 else 0.0
        factor = {"all-reduce": 2.0 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.times * factor * self.bytes


@dataclasses.dataclass(frozen=True)
class Program:
    """What `read` finds."""

    collectives: list[Collective]
    bytes_moved: float
    """To and from the main memory of a chip, about: what every operation reads and writes."""
    open_loops: int
    """Loops whose length the program does not know; each was taken to go round as often as `read` was told."""


def arrays_in(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape, of a tuple's one after the other."""
    return tuple(
        Array(dtype, tuple(int(n) for n in dims.split(",") if n), "S(" in (layout or ""))
        for dtype, dims, layout in _ARRAY.findall(shape)
    )


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of a module by name, and the name of the first to run."""
    computations: dict[str, list[Instruction]] = {}
    entry, now = "", None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            now = computations.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
        elif now is not None and line.startswith(" ") and (found := _instruction(line)):  # else: a kernel's own text
            now.append(found)
    return computations, entry


def read(text: str, *, open_loops: int = 1, mesh: dict[str, int] | None = None) -> Program:
    """Collectives and bytes of a compiled module's text.

    Args:
        text: As ``compiled.as_text()`` gives it.
        open_loops: How often a loop goes round that goes on until something in the data says stop.
        mesh: The sizes of the mesh's axes, in its order, to say over which of them a collective is.
    """
    computations, entry = parse(text)
    by_name = {name: {i.name: i for i in lines} for name, lines in computations.items()}
    found: list[Collective] = []
    moved, unknown = 0.0, 0
    for name, times, seen in _visits(computations, entry, open_loops):
        unknown += sum(_trips(i, computations) is None for i in computations[name] if i.opcode == "while")
        for outer in computations[name]:
            moved += times * _moved(outer, by_name[name], computations)
            for i, inside in _collectives(outer, computations):
                # One that goes on beside fusions is written down in each of them, and in loops within.
                channel = re.search(r"channel_id=\d+", i.rest)
                mark = f"{channel.group(0)} {i.opcode} {i.arrays}" if channel and inside else i.name
                if mark not in seen:
                    seen.add(mark)
                    found.append(_collective(i, inside or name, times, mesh))
    return Program(_merged(found), moved, unknown)


def _instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if not match:
        return None
    body = _OPCODE.match(_without_index_comments(match.group(3)))
    if not body:
        return None
    shape, opcode, rest = body.groups()
    depth, end = 1, len(rest)
    for at, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            end = at
            break
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
    if opcode == "constant":
        return Instruction(match.group(2), opcode, arrays_in(shape), (), rest[:end], bool(match.group(1)))
    return Instruction(match.group(2), opcode, arrays_in(shape), operands, rest[end:], bool(match.group(1)))


def _without_index_comments(text: str) -> str:
    return re.sub(r"/\*index=\d+\*/", "", text)


def _visits(
    computations: dict[str, list[Instruction]], entry: str, open_loops: int
) -> Iterator[tuple[str, int, set[str]]]:
    """Every computation that runs by itself, as often as it does, not those inside of a fusion.

    With a set that starts as its caller's, which it may add to.
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
    """How often a loop goes round; None where that is not a number in the program."""
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
    """The collectives of an instruction, those inside of its fusion with the name of that."""
    if i.opcode.removesuffix("-start") in KINDS:
        yield i, None
    if i.opcode in ("fusion", "async-start", "custom-call"):
        for called in i.called:
            for inner in computations.get(called, []):
                for found, inside in _collectives(inner, computations):
                    yield found, inside or called


def _collective(i: Instruction, inside: str, times: int, mesh: dict[str, int] | None) -> Collective:
    kind = i.opcode.removesuffix("-start")
    ring = re.search(r"windowed_dot_general_body_(ag|rs)", inside)
    if kind == "all-reduce" and "all-reduce-scatter" in inside:
        kind = "reduce-scatter"  # how a TPU's compiler writes one that it has fused
    groups = _first_group(i.rest)
    source = re.search(r'op_name="([^"]*)"', i.rest)
    where = source.group(1) if source else ""
    if ring:
        where = f"{'gather' if ring.group(1) == 'ag' else 'scatter'} in steps beside a product; {where}"
    axes = _axes(groups, mesh) if mesh and kind != "collective-permute" else ()
    # A start gives what goes in and what comes out; an all-reduce of several arrays, all of them.
    sizes = sorted(i.arrays, key=lambda a: a.bytes)
    array, together = sizes[-1], sizes[-1].bytes
    if len(sizes) > 1 and i.opcode in KINDS:
        array = dataclasses.replace(array, more=len(sizes) - 1)
        together = sum(a.bytes for a in sizes)
    if i.opcode == "reduce-scatter":
        together *= len(groups) or 1  # what comes out is a part
    return Collective(kind, array, len(groups) or 2, axes, times, where, together)


def _first_group(rest: str) -> list[int]:
    """The partitions that are in one group with the first."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if listed:
        return [int(n) for n in listed.group(1).split(",")]
    spread = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if spread:
        return _turned(spread.group(2), spread.group(3)).reshape(_numbers(spread.group(1)))[0].tolist()
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\)\s)?[^{]*\{([^}]*)\}", rest)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named.group(1))}
        taken = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named.group(3))
        group = _named_group(sizes, taken)
        order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", named.group(2) or "")
        if not order:
            return group
        return _turned(*order.groups()).ravel()[group].tolist()
    return []


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _turned(dims: str, order: str | None) -> np.ndarray:
    """Partitions counted through, in a box of these sizes whose axes are then put in another order."""
    ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return ids if order is None else ids.transpose(_numbers(order))


def _named_group(sizes: dict[str, int], taken: list[tuple[str, str, str]]) -> list[int]:
    """Partitions that differ from 0 in the named axes alone, or in a part of one: its size, after those before."""
    steps: list[list[int]] = []
    for name, before, size in taken:
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


def _merged(found: list[Collective]) -> list[Collective]:
    """Those of one kind, shape and axes as one, the largest traffic first."""
    same: dict[tuple, list[Collective]] = {}
    for c in found:
        same.setdefault((c.kind, c.array.text, c.bytes, c.group, c.axes), []).append(c)
    merged = [dataclasses.replace(of[0], times=sum(c.times for c in of)) for of in same.values()]
    return sorted(merged, key=lambda c: -c.sent)


def _moved(i: Instruction, names: dict[str, Instruction], computations: dict[str, list[Instruction]]) -> float:
    """Bytes that one instruction reads from the main memory and writes to it."""
    if i.opcode in _FREE or i.opcode.endswith("-done") or (i.opcode == "custom-call" and "tpu_custom" not in i.rest):
        return 0.0
    if i.opcode == "fusion":
        return _fusion_moved(i, names, computations)
    far = [sum(a.bytes for a in names[o].arrays if not a.near) for o in i.operands if o in names]
    made = sum(a.bytes for a in i.arrays if not a.near)
    if i.opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * made
    if i.opcode == "dynamic-update-slice":
        return 2.0 * (far[1] if len(far) > 1 else 0)
    if i.opcode.endswith("-start"):
        return float(made)
    return float(sum(far) + made)


def _fusion_moved(i: Instruction, names: dict[str, Instruction], computations: dict[str, list[Instruction]]) -> float:
    """A fusion reads what it slices out of an array, not the array, and writes the part that it updates."""
    inner = next((computations[called] for called in i.called if called in computations), [])
    users: dict[str, list[Instruction]] = {}
    for line in inner:
        for operand in line.operands:
            users.setdefault(operand, []).append(line)
    parameters = [line for line in inner if line.opcode == "parameter"]
    by_name = {line.name: line for line in inner}
    total = 0.0
    for line in parameters:
        if any(a.near for a in line.arrays):
            continue
        uses = users.get(line.name, [])
        if uses and all(u.opcode in ("dynamic-slice", "slice", "gather") for u in uses):
            total += sum(a.bytes for u in uses for a in u.arrays)
        elif uses and all(u.opcode == "dynamic-update-slice" and u.operands[0] == line.name for u in uses):
            continue
        else:
            total += sum(a.bytes for a in line.arrays)
    root = next((line for line in inner if line.root), None)
    ends = [root] if root is not None else []
    if root is not None and root.opcode == "tuple":
        ends = [by_name[o] for o in root.operands if o in by_name]
    for end in ends:
        if end.opcode == "dynamic-update-slice":
            update = by_name.get(end.operands[1]) if len(end.operands) > 1 else None
            total += sum(a.bytes for a in update.arrays) if update else 0
        elif end.opcode != "parameter":
            total += sum(a.bytes for a in end.arrays if not a.near)
    return total
