"""Samples answers of a model to the prompts of a file.

    python experiments/sample.py --model runs/NAME --prompts prompts.jsonl --out samples.jsonl
    python experiments/sample.py --model path/to/Qwen2.5-0.5B --prompts FILE --n 4 --temperature 0.7 --top-p 0.9

The output has one JSON object per answer: prompt (messages), response (text without special tokens), tokens (number of
tokens with the stop token), stopped (whether the model ended the answer itself), logprob (sum of the tokens'
log-probabilities under the distribution from which they were drawn), index (number of the prompt), sample (number of
the answer to this prompt) and metadata (the other fields of the prompt's record). It can be used as a file of prompts
or of demonstrations.

An interrupted run leaves its answers in OUT.partial; the same command continues it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from finetune import sampling_settings
from launch import command_line, process_setup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """What sample.py reads and writes."""

    model: str
    """The model: a folder in Hugging Face format, or the output folder of an earlier command."""
    prompts: str
    """JSONL, JSON (also compressed) or Parquet file with prompts in any of the forms in docs/data.md. A pattern with *
    selects several files."""
    out: str = "samples.jsonl"
    """JSONL file to write."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleSettings(sampling_settings.Sampling, Files):
    """Settings of sample.py."""


def parse(arguments: list[str]) -> SampleSettings:
    """Parses the command line; raises SettingError for invalid settings."""
    settings = command_line.parse_as(SampleSettings, arguments, prog="sample.py", doc=__doc__)
    sampling_settings.check(settings)
    return settings


if __name__ == "__main__":
    command_line.answer_help(parse)
    process_setup.use_huge_pages()

import time

from finetune import answers
from launch import device_mesh, entry_point, initial_model
from recipe import run_setup
from rich.console import Console
from rich.text import Text

from rlhf_jax.data import errors
from rlhf_jax.report import console

EXAMPLES = 3
"""Number of answers that are printed."""


def run(settings: SampleSettings) -> list[dict[str, Any]]:
    """Samples the answers and returns the lines of the file."""
    out = Console()
    resolved = device_mesh.resolve(settings)
    mesh = device_mesh.make(resolved)
    counts = errors.DropCount(max_dropped=settings.max_dropped, flag="--max-dropped")
    initial_model.check(settings.model)
    found = answers.read_prompts(settings, settings.prompts, counts)
    model = initial_model.load(settings.model, mesh=mesh, template=settings.template)
    initial_model.with_date(settings, model)
    cfg = dataclasses.replace(model.cfg, dtype=settings.compute.dtype or model.cfg.dtype)
    model = dataclasses.replace(model, cfg=cfg)
    prompts = answers.encode_prompts(
        model, found, width=settings.prompt_width, max_new_tokens=settings.max_new_tokens, counts=counts
    )
    file = answers.SampleFile(settings.out, answers.identity(settings, model, settings.prompts))
    if file.lines:
        run_setup.print_line(out, f"continuing {settings.out}, which has {errors.counted(len(file.lines), 'answers')}")
    run_setup.print_line(out, f"data: {errors.counted(len(prompts.ids), 'prompts')}; {counts.report()}")
    run_setup.print_line(out, f"model: {model.path} ({cfg.model_type}); chat template: {model.fmt.origin}")
    run_setup.print_line(out, run_setup.describe_dtype(cfg))
    sampler = answers.sampler(settings, model, mesh)
    with console.StageProgress([("sample", 60.0)], elapsed=time.time() - process_setup.START_TIME) as progress:
        lines = answers.sample_file(
            sampler,
            model,
            prompts,
            file,
            n=settings.n,
            seed=settings.seed,
            on_progress=lambda done, total: progress.update("sample", done, total),
        )
        progress.finish("sample")
    print_examples(out, lines)
    stopped = sum(line["stopped"] for line in lines) / len(lines)
    tokens = sum(line["tokens"] for line in lines) / len(lines)
    run_setup.print_line(
        out,
        f"{errors.counted(len(lines), 'answers')}, {tokens:.1f} tokens on average, {stopped:.1%} stopped: "
        f"{settings.out}",
    )
    return lines


def print_examples(out: Console, lines: list[dict[str, Any]], *, most: int = 400) -> None:
    """Prints the first answers, each with the last turn of its prompt, cut after ``most`` characters."""
    for line in lines[:EXAMPLES]:
        for name, text, style in (("prompt", line["prompt"][-1]["content"], "dim"), ("answer", line["response"], "")):
            shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text[:most])
            shown += " …" if len(text) > most else ""
            heading = Text(f"{name} {line['index']}: ", style="bold")
            out.print(heading.append(shown, style=f"not bold {style}".strip()), soft_wrap=True)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    entry_point.execute(run, parse, arguments, stopped="stopped; the same command continues the run")


if __name__ == "__main__":
    main()
