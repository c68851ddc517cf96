"""Computes ratios from the programs' records and checks whether they meet the requirements."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.interleaved_runs import Record
from benchmarks.suite import Against, Kind, Row


def compare(row: Row, records: Mapping[str, Record]) -> list[dict[str, Any]]:
    """Returns the comparisons of a row; ``ratio`` is None if either program has no measurement."""
    ours = records[row.ours.key]
    return [_comparison(row, against, ours, records) for against in row.against]


def _comparison(row: Row, against: Against, ours: Record, records: Mapping[str, Record]) -> dict[str, Any]:
    others = [{**records[program.key], "key": program.key} for program in against.programs]
    measured = [record for record in others if "missing" not in record]
    theirs = min(measured, key=_seconds) if measured else others[0]
    comparison: dict[str, Any] = {
        "row": row.key,
        "title": row.title,
        "against": against.label,
        "kind": against.kind,
        "required": against.required,
        "ours": _amount(ours, against.kind),
        "theirs": _amount(theirs, against.kind),
        "theirs_program": theirs["key"],
    }
    if isinstance(comparison["ours"], str) or isinstance(comparison["theirs"], str):
        return comparison | {"ratio": None, "met": None}
    ratio, met = comparison["ours"] / comparison["theirs"], None
    if against.required is not None:
        met = ratio <= against.required if against.kind == "times" else ratio >= against.required
    return comparison | {"ratio": ratio, "met": met}


def _amount(record: Record, kind: Kind) -> float | str:
    """Returns tokens/s, FLOPs/s or seconds, depending on ``kind``, or the reason for a missing record."""
    if "missing" in record:
        return record["missing"]
    if kind == "times":
        return _seconds(record)
    return record["tokens" if kind == "speed" else "operations"] / _seconds(record)


def _seconds(record: Record) -> float:
    return statistics.median(record["seconds"])


def programs(records: Mapping[str, Record]) -> list[dict[str, Any]]:
    """Returns the times and the peak memory of each measured program."""
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
                "compile_s": max(record["first_s"] - (median if _times_repetitions(record) else 0.0), 0.0),
                "peak_mb": record["peak_mb"],
                "device_mb": record.get("device_mb"),
            }
        )
    return table


def _times_repetitions(record: Record) -> bool:
    """Returns whether ``seconds`` contains the times of whole repetitions, like ``first_s``."""
    return not record["name"].startswith(("decode", "limit"))
