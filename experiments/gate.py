"""Fits a gate that refuses unusual prompts of a model before it answers (Bai et al. 2022, 5.4 and B.9).

    python experiments/gate.py --model MODEL --prompts usual.jsonl --out GATE
    python experiments/gate.py --model MODEL --prompts usual.jsonl --unusual harmful.jsonl --examples 10 --out GATE
    python experiments/sample.py --model MODEL --prompts FILE --gate GATE

The gate scores the hidden state of a prompt at a middle layer, averaged over its tokens, by its relative Mahalanobis
distance from half of the usual prompts or, with --examples, by a linear classifier that has also seen a few unusual
prompts. A quarter of the usual prompts sets the limit, so that a new usual prompt is refused with a probability of at
most --refusals (split conformal prediction). The last quarter measures the share of usual prompts that are refused.
With --unusual, half of these prompts measure the share of them that are refused, and the area under the ROC curve of
each detector, also of classifiers that have seen 1, 10 and 100 unusual prompts. Prompts of one conversation, which
begin with the same question, are in the same part. Intervals are 95 %; those of the shares are clustered by
conversation.

The output folder contains gate.npz, which is valid only for this model, chat template and --compute.dtype,
results.json, report.html with the scores, and config.json.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from launch import command_line, mesh_settings, process_setup
from launch.run_settings import Compute, Mesh, SettingError, Template
from launch.setting_checks import check_finite, require, template_options


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateSettings:
    """Settings of gate.py."""

    model: str
    """The model: a folder in Hugging Face format, or the output folder of an earlier command."""
    prompts: str
    """JSONL, JSON (also compressed) or Parquet file with usual prompts, at least 8 different ones from 4 conversations,
    in any of the forms in docs/data.md. A pattern with * selects several files."""
    unusual: str | None = None
    """File with prompts that the gate should refuse, such as harmful requests. None fits a gate without any."""
    examples: int = 0
    """Number of prompts of --unusual on which the gate is trained. 0 trains on none, and uses them only to measure."""
    refusals: float = 0.05
    """Maximum share of usual prompts that are refused."""
    layer: int | None = None
    """Layer whose output is scored, counted from 1. None uses the middle one."""
    pooling: Literal["mean", "last"] = "mean"
    """Hidden state of a prompt: `mean` is the mean over its tokens, `last` that of its last token."""
    prompt_width: int | None = None
    """Maximum number of tokens in a prompt. Longer prompts lose their oldest turns or, with a single turn, are dropped;
    both are counted. None shortens only prompts that exceed the model's maximum length."""
    batch: int = 16
    """Number of prompts that are computed together."""
    limit: int | None = None
    """Number of prompts to use of each file, from its start. None uses all."""
    max_dropped: float = 0.01
    """Maximum share of unusable prompts. A file with a larger share is refused."""
    seed: int = 0
    """Seed of the division of the prompts."""
    out: str | None = None
    """Output folder. None uses runs/gate-TIME."""
    template: Template = dataclasses.field(default_factory=Template)
    compute: Compute = dataclasses.field(default_factory=Compute)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)

    def batches(self) -> dict[str, int]:
        """Returns the number of rows that must be a multiple of --mesh.data x --mesh.fsdp, by flag."""
        return {"--batch": self.batch}


def parse(arguments: list[str]) -> GateSettings:
    """Parses the command line; raises SettingError for invalid settings."""
    settings = command_line.parse_as(GateSettings, arguments, prog="gate.py", doc=__doc__)
    check_finite(settings)
    for name, least in (("examples", 0), ("layer", 1), ("prompt_width", 1), ("batch", 1), ("limit", 1), ("seed", 0)):
        value = getattr(settings, name)
        require(value is None or value >= least, settings, name, f"at least {least}")
    require(0 < settings.refusals < 1, settings, "refusals", "above 0 and below 1")
    require(0 <= settings.max_dropped <= 1, settings, "max_dropped", "between 0 and 1")
    if settings.examples and settings.unusual is None:
        raise SettingError(f"--examples is {settings.examples}, but has no effect without --unusual; give that file")
    template_options(settings.template.options)
    mesh_settings.check(settings)
    return settings


if __name__ == "__main__":
    command_line.answer_help(parse)
    process_setup.use_huge_pages()

import time

import numpy as np
from finetune import answers
from judging import gate_measures, prompt_gate
from launch import device_mesh, entry_point, initial_model, run_folder
from recipe import run_setup
from rich.console import Console

from rlhf_jax.data import errors, readers
from rlhf_jax.report import console
from rlhf_jax.report import results as results_lib


def run(settings: GateSettings) -> dict[str, Any]:
    """Fits and measures the gate, saves all files and returns the contents of results.json."""
    out = Console()
    resolved = device_mesh.resolve(settings)
    mesh = device_mesh.make(resolved)
    path = run_folder.free_folder(settings.out, kind="gate")
    counts = errors.DropCount(max_dropped=settings.max_dropped, flag="--max-dropped")
    files = {"--prompts": settings.prompts} | ({} if settings.unusual is None else {"--unusual": settings.unusual})
    cfg = initial_model.check(settings.model)
    layer = (cfg.n_layers + 1) // 2 if settings.layer is None else settings.layer
    if layer > cfg.n_layers:
        raise SettingError(f"--layer is {layer}; it must be at most {cfg.n_layers}, the number of layers of the model")
    read = {flag: _read(file, flag, settings, counts) for flag, file in files.items()}
    model = initial_model.load(settings.model, mesh=mesh, template=settings.template)
    initial_model.with_date(settings, model)
    dtype = settings.compute.dtype or model.cfg.dtype
    model = dataclasses.replace(model, cfg=dataclasses.replace(model.cfg, dtype=dtype))
    prompts = {
        flag: answers.encode_prompts(model, found, width=settings.prompt_width, max_new_tokens=1, counts=counts)
        for flag, found in read.items()
    }
    warnings: list[str] = []
    parts = gate_measures.divide(
        prompts["--prompts"], prompts.get("--unusual"), seed=settings.seed, warn=warnings.append
    )
    if settings.examples > len(parts.known):
        raise SettingError(
            f"--examples is {settings.examples}; it must be at most {len(parts.known)}, half of the different prompts "
            f"of --unusual that --prompts does not have"
        )
    run_folder.create_folder(path, dataclasses.asdict(settings) | {"command": "gate"})
    run_setup.print_line(out, f"writing to {path}")
    run_setup.print_line(out, f"model: {model.path} ({cfg.model_type}), layer {layer} of {cfg.n_layers}")
    run_setup.print_line(out, run_setup.describe_dtype(model.cfg))
    for text in warnings:
        run_setup.print_line(out, text)
    with console.StageProgress([("hidden states", 60.0)], elapsed=time.time() - process_setup.START_TIME) as progress:
        hidden_ND = prompt_gate.hidden_states(
            model,
            parts.ids,
            layer=layer,
            pooling=settings.pooling,
            batch=settings.batch,
            mesh=mesh,
            on_progress=lambda done, total: progress.update("hidden states", done, total),
        )
        progress.finish("hidden states")
    fitted = gate_measures.fit(hidden_ND, parts, examples=settings.examples, refusals=settings.refusals)
    identity = answers.model_identity(model, settings.template)
    gate = prompt_gate.Gate(fitted.kind, fitted.detector, layer, settings.pooling, fitted.limit, identity)
    prompt_gate.save(path / prompt_gate.FILE, gate)
    results = run_folder.finite(
        {
            "seconds": time.time() - process_setup.START_TIME,
            "peak_rss_mb": process_setup.peak_memory_mb(),
            "seed": settings.seed,
            "dropped": counts.dropped | counts.truncated,
            "layer": layer,
            "pooling": settings.pooling,
            "detector": gate.kind,
            "refusals": settings.refusals,
            **gate_measures.measure(gate, hidden_ND, parts),
        }
    )
    gate_measures.write_page(path / "report.html", results, gate, hidden_ND, parts)
    run_folder.write_json(path / run_folder.RESULTS, results)
    out.print(gate_measures.table(results))
    for text in results_lib.rough_intervals(results):
        run_setup.print_line(out, text)
    if not np.isfinite(gate.limit):
        least = int(np.ceil(1 / settings.refusals)) - 1
        run_setup.print_line(
            out,
            f"the gate refuses nothing: --refusals {settings.refusals:g} needs at least {least} prompts to set the "
            f"limit, and there are {len(parts.limit)}; give more --prompts or raise --refusals",
        )
    run_setup.print_line(out, f"data: {counts.report()}")
    run_setup.print_line(
        out, f"gate: {path / prompt_gate.FILE}   report: {path / 'report.html'}   results: {path / run_folder.RESULTS}"
    )
    return results


def _read(path: str, flag: str, settings: GateSettings, counts: errors.DropCount) -> list[Any]:
    found = readers.read_prompts(path, counts=counts)[0][: settings.limit]
    if not found:
        raise errors.DataError(f"{flag} {path} has no usable record ({counts.report()})")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    entry_point.execute(run, parse, arguments)


if __name__ == "__main__":
    main()
