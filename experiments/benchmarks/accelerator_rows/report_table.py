"""The table of a run of accelerator.py, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

COLUMNS = ("measurement", "value", "share", "aim", "met", "note")
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def markdown(records: Iterable[dict[str, Any]]) -> str:
    """Returns a table with a row for each measurement, below a line with the device and the package versions."""
    records = list(records)
    devices = [each for each in records if each.get("measure") == "device"]
    lines = [each["note"] for each in devices]
    if any(not each["shapes"]["aims"] for each in devices):
        lines.append("Test run with tiny shapes: the numbers are meaningless.")
    rows = [_row(each) for each in records if "measure" in each and each["measure"] != "device"]
    rows += [(each["row"], "failed", "", "", "", each["error"]) for each in records if each.get("error")]
    table = ["| " + " | ".join(row) + " |" for row in (COLUMNS, ("---", "---:", "---", "---", "---", "---"), *rows)]
    return "\n".join([*lines, "", *table])


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    share, value = record.get("share"), record["value"]
    share_text = "" if share is None else f"{100 * share:.0f} % of the {record['share_of']}"
    compared = value if share is None else share
    aim, met = "", ""
    for key, sign in (("at_least", "≥"), ("at_most", "≤")):
        if key in record:
            bound = record[key]
            aim = f"{sign} {bound:g}" if share is None else f"{sign} {100 * bound:.0f} %"
            aim = "yes" if bound is True else aim
            met = "yes" if (compared >= bound if key == "at_least" else compared <= bound) else "no"
    return record["measure"], amount(value, record["unit"]), share_text, aim, met, record.get("note", "")


def amount(value: float | bool | None, unit: str) -> str:
    """Formats a number with its unit, such as ``790 TFLOP/s``, ``35.2 ms`` or ``1.52x``."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if unit == "x":
        return f"{value:.2f}x"
    if unit == "s" and value < 1:
        return f"{1e3 * value:.3g} ms"
    if unit in ("FLOP/s", "B/s"):
        size, prefix = next(((s, p) for s, p in _PREFIXES if value >= s), (1, ""))
        return f"{value / size:.3g} {prefix}{unit}"
    if unit == "tokens/s":
        return f"{value:,.0f} {unit}"
    return f"{value:.3g} {unit}".strip()
