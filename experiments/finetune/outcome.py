"""What a command prints and saves: its data and model, the trained model, results.json, a table and a report."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from launch import device_mesh, host_agreement, initial_model, process_setup, run_folder, setting_checks
from launch.run_settings import RunSettings
from recipe import run_setup
from rich.console import Console
from rich.table import Table

from rlhf_jax import lm, metrics, parallel, report, types
from rlhf_jax.data import chat, errors
from rlhf_jax.report import console
from rlhf_jax.report import results as results_lib

MODEL = "model"
"""Name of the folder of the trained model in the run folder."""
Rows = Callable[[dict[str, Any]], list[tuple[str, Any]]]
"""Returns the rows of the table, ``(name, number or [mean, low, high] or None)``, from results.json."""


def show_finished(settings: RunSettings, out: Console, rows: Rows) -> dict[str, Any] | None:
    """Prints and returns the results of the run to resume if it is finished; otherwise returns None."""
    finished = run_folder.finished_results(settings.resume) if settings.resume else None
    if finished:
        run_setup.print_line(out, f"{settings.resume} is already finished; there is nothing to run")
        show(out, finished, rows)
    return finished


def describe_data(out: Console, counts: errors.DropCount, sizes: Mapping[str, int]) -> None:
    """Prints the sizes of the data and the records that are not used or are shortened."""
    text = ", ".join(errors.counted(n, name) for name, n in sizes.items())
    run_setup.print_line(out, f"data: {text}; {counts.report()}")


def describe_model(
    opened: run_setup.OpenRun, out: Console, model: initial_model.InitialModel, cfg: lm.LMConfig
) -> None:
    """Prints the model, its chat template, number format and mesh."""
    n = sum(x.size for x in jax.tree.leaves(model.params))
    kind = f"{cfg.model_type}, " if cfg.model_type else ""
    run_setup.print_line(
        out, f"model: {model.path} ({kind}{n / 1e6:.3g} M parameters); chat template: {model.fmt.origin}"
    )
    run_setup.describe(opened, cfg, out)


def chunk_rows(size: int, mesh: Any) -> int:
    """Returns ``size``, rounded up to a number of rows that the devices of the mesh can share evenly."""
    return device_mesh.round_rows_up(size, mesh)


def in_chunks(function: Callable[[Any], Any], rows: Any, *, size: int, mesh: Any) -> Any:
    """Calls a function of a batch on all rows, ``size`` at a time, and returns the results as NumPy arrays.

    The last chunk is filled up with its last row, so that the function compiles once.
    """
    n, size = len(jax.tree.leaves(rows)[0]), chunk_rows(size, mesh)
    parts = []
    for start in range(0, n, size):
        indices = np.minimum(np.arange(start, start + size), n - 1)
        chunk = jax.tree.map(lambda x, indices=indices: x[indices], rows)
        parts.append(function(chunk if mesh is None else parallel.local_rows(chunk, mesh)))
    return jax.tree.map(lambda *x: np.concatenate(x)[:n], *host_agreement.to_numpy(parts))


def save_model(
    folder: run_folder.RunFolder,
    cfg: lm.LMConfig,
    params: types.Params,
    fmt: chat.ChatFormat,
    *,
    name: str = MODEL,
    **options: Any,
) -> None:
    """Saves a model in Hugging Face format in the run folder; ``options`` are those of `lm.save`."""
    lm.save(folder.path / name, cfg, params, tokenizer=fmt.tokenizer, stop_ids=fmt.stop_ids, **options)


def finish(
    folder: run_folder.RunFolder,
    settings: RunSettings,
    results: dict[str, Any],
    out: Console,
    *,
    title: str,
    rows: Rows,
) -> dict[str, Any]:
    """Writes report.html and, last, results.json; prints the table and returns the results with general facts."""
    facts = {
        "seconds": folder.elapsed.total,
        "peak_rss_mb": process_setup.peak_memory_mb(),
        "seed": settings.seed,
        "incidents": folder.incidents(),
    }
    results = run_folder.finite(facts | results)
    report.write_report(
        folder.path / "report.html",
        results,
        metrics.read(folder.path),
        title=title,
        settings=setting_checks.by_flag(settings),
    )
    folder.write_json(run_folder.RESULTS, results)
    show(out, results, rows)
    saved: pathlib.Path = folder.path / MODEL
    where = f"model: {saved}   " if saved.exists() else ""
    run_setup.print_line(
        out, f"{where}report: {folder.path / 'report.html'}   results: {folder.path / run_folder.RESULTS}"
    )
    return results


def show(out: Console, results: dict[str, Any], rows: Rows) -> None:
    """Prints the table of the results, and which of its intervals are rough."""
    shown = rows(results)
    out.print(table(shown))
    marked = any(name.endswith(results_lib.ROUGH_MARK) for name, _ in shown)
    for text in [*results_lib.rough_intervals(results), *([results_lib.ROUGH_NOTE] if marked else [])]:
        run_setup.print_line(out, text)


def table(rows: list[tuple[str, Any]]) -> Table:
    """Returns a table of names, numbers and 95 % intervals."""
    made = console.NumbersTable("", "value", "95 % interval")
    for name, value in rows:
        if isinstance(value, list):
            made.add_row(name, *results_lib.format_parts(value, digits=3))
        else:
            made.add_row(
                name,
                "–" if value is None else results_lib.number_text(value) if isinstance(value, float) else f"{value:,}",
            )
    return made
