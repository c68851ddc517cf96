"""The plot of a distillation: the KL from the teacher to the student, before and after training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_jax.report import plots
from rlhf_jax.report import results as results_lib


def kl_before_and_after(distillation: Mapping[str, Any] | None) -> str | None:
    """Plots ``kl_before`` and ``kl_after`` of a distillation.

    Args:
        distillation: ``distillation`` of results.json; None for a run without one.

    Returns:
        Inline SVG, or None if neither number is known.
    """
    names = {"kl_before": "before", "kl_after": "after"}
    rows = [
        (label, found)
        for key, label in names.items()
        if (found := results_lib.finite((distillation or {}).get(key))) is not None
    ]
    if not rows:
        return None
    with plots.axes(height=0.75 + 0.27 * len(rows)) as (svg, (ax,)):
        for row, (label, found) in enumerate(rows):
            plots.point(ax, found, row, "sft" if label == "before" else "ppo_ptx")
        ax.set_xlim(left=0)
        ax.margins(x=0.08)
        plots.label_rows(ax, [label for label, _ in rows])
        ax.set_xlabel("KL from the teacher to the student (nats per token)")
    return svg[0]


def rows(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the share of the KL that is removed and the differences in gold utility as (name, text)."""
    share = (results.get("distillation") or {}).get("share_removed")
    named = {"share of the KL removed (%)": (share, True)}
    named |= {f"gold utility, {name}": (each, False) for name, each in (results.get("gold_differences") or {}).items()}
    found = []
    for name, (value, percent) in named.items():
        mean, bounds = results_lib.format_parts(value, percent=percent, digits=3)
        if mean != results_lib.MISSING:
            found.append((name[0].upper() + name[1:], f"{mean} ({bounds})" if bounds else mean))
    return found
