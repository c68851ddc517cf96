"""From records to ratios: what a row says, met or not."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.interleaving import Record
from benchmarks.rows import Against, Kind, Row


def compare(row: Row, records: Mapping[str, Record]) -> list[dict[str, Any]]:
    """One comparison for each thing that a row is compared with; ``ratio`` is None where one of the two is missing."""
    ours = records[row.ours.key]
    return [_comparison(row, against, ours, records) for against in row.against]


def _comparison(row: Row, against: Against, ours: Record, records: Mapping[str, Record]) -> dict[str, Any]:
    found = [{**records[program.key], "key": program.key} for program in against.programs]
    there = [record for record in found if "missing" not in record]
    theirs = min(there, key=_seconds) if there else found[0]
    made: dict[str, Any] = {
        "row": row.key,
        "title": row.title,
        "against": against.label,
        "kind": against.kind,
        "required": against.required,
        "ours": _amount(ours, against.kind),
        "theirs": _amount(theirs, against.kind),
        "theirs_program": theirs["key"],
    }
    if isinstance(made["ours"], str) or isinstance(made["theirs"], str):
        return made | {"ratio": None, "met": None}
    ratio = made["ours"] / made["theirs"]
    if against.required is None:
        return made | {"ratio": ratio, "met": None}
    met = ratio <= against.required if against.kind == "times" else ratio >= against.required
    return made | {"ratio": ratio, "met": met}


def _amount(record: Record, kind: Kind) -> float | str:
    """Tokens a second, operations a second or seconds, by what is compared; or why there is no number."""
    if "missing" in record:
        return record["missing"]
    if kind == "times":
        return _seconds(record)
    return record["tokens" if kind == "speed" else "operations"] / _seconds(record)


def _seconds(record: Record) -> float:
    return statistics.median(record["seconds"])


def programs(records: Mapping[str, Record]) -> list[dict[str, Any]]:
    """What each measured program took, the first repetition and its surplus (compiling, mostly) among it."""
    table = []
    for key, record in records.items():
        if "missing" in record:
            continue
        median = _seconds(record)
        table.append(
            {
                "program": key,
                "median_s": median,
                "min_s": min(record["seconds"]),
                "max_s": max(record["seconds"]),
                "tokens_per_s": record["tokens"] / median if record.get("tokens") else None,
                "compile_s": max(record["first_s"] - median, 0.0) if _whole(record) else record["first_s"],
                "peak_mb": record["peak_mb"],
                "device_mb": record.get("device_mb"),
            }
        )
    return table


def _whole(record: Record) -> bool:
    """Whether ``seconds`` are those of whole repetitions, as ``first_s`` is."""
    return not record["name"].startswith(("decode", "limit"))
