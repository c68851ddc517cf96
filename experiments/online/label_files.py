"""Files of pairs that people label: one JSON object a line, whose empty `preference` they fill in."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from rlhf_jax.checkpoint import atomic
from rlhf_jax.data import errors

Label = float | Literal["tie", "skip"]
"""The probability that the first answer of a pair is better, or that people find both equal or give no label."""
_VALUES = '"A", "B", "tie", "skip" or a probability from 0 to 1 that A is better'


class Pair(NamedTuple):
    """Two answers to a prompt, of which people see one as A and the other as B."""

    id: str
    domain: str
    prompt: tuple[tuple[str, str], ...]
    """The turns of the conversation as ``(role, text)``."""
    first: str
    second: str
    swapped: bool
    """Whether the second answer is A."""


def write_pairs(path: pathlib.Path, pairs: Sequence[Pair]) -> None:
    """Writes pairs without labels."""
    lines = [json.dumps(_row(each) | {"preference": None}, ensure_ascii=False) + "\n" for each in pairs]
    atomic.replace_file(path, "".join(lines).encode())


def _row(pair: Pair) -> dict[str, Any]:
    a, b = (pair.second, pair.first) if pair.swapped else (pair.first, pair.second)
    return {
        "id": pair.id,
        "domain": pair.domain,
        "prompt": [{"role": role, "content": text} for role, text in pair.prompt],
        "response_a": a,
        "response_b": b,
        "swapped": pair.swapped,
    }


def read_labels(path: pathlib.Path, pairs: Sequence[Pair]) -> dict[str, Label]:
    """Returns the labels of the pairs that have one, by id.

    Raises:
        DataError: A line is not a row of one of the pairs, repeats another, or has a label that is none; the message
            names the line.
    """
    known = {each.id: each for each in pairs}
    lines: dict[str, int] = {}
    labels: dict[str, Label] = {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise errors.DataError(f"{path} is not in UTF-8 ({error}); save it in UTF-8") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise errors.DataError(f"{where}: not valid JSON ({error})") from None
        pair = known.get(str(row.get("id"))) if isinstance(row, dict) else None
        if pair is None:
            raise errors.DataError(f"{where}: the line has no id of a pair of this round; restore it")
        if pair.id in lines:
            raise errors.DataError(
                f"{where}: the pair {pair.id} is already in line {lines[pair.id]}; remove one of the lines"
            )
        lines[pair.id] = number
        for name, value in _row(pair).items():
            if row.get(name) != value:
                raise errors.DataError(f"{where}: {name} has changed; only preference may; restore it")
        if (value := row.get("preference")) not in (None, ""):
            labels[pair.id] = _label(value, pair, where)
    return labels


def _label(value: Any, pair: Pair, where: str) -> Label:
    if value in ("tie", "skip"):
        return value
    p = {"A": 1.0, "B": 0.0}.get(value) if isinstance(value, str) else value
    if isinstance(p, bool) or not isinstance(p, int | float) or not math.isfinite(p) or not 0 <= p <= 1:
        raise errors.DataError(f"{where}: preference is {json.dumps(value)}; it must be {_VALUES}")
    return 1.0 - p if pair.swapped else float(p)


INSTRUCTION = f"set preference in each line to {_VALUES}"
