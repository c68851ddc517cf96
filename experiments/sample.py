"""Samples answers of a model to the prompts of a file.

    python experiments/sample.py --model runs/NAME --prompts prompts.jsonl --out samples.jsonl
    python experiments/sample.py --model path/to/Qwen2.5-0.5B --prompts FILE --n 4 --temperature 0.7 --top-p 0.9
    python experiments/sample.py --model runs/NAME --prompts FILE --gate GATE     refuses unusual prompts; see gate.py

The output has one JSON object per answer: prompt (messages), response (text without special tokens), tokens (number of
tokens with the stop token), stopped (whether the model ended the answer itself), logprob (sum of the tokens'
log-probabilities under the distribution from which they were drawn), index (number of the prompt), sample (number of
the answer to this prompt) and metadata (the other fields of the prompt's record). It can be used as a file of prompts
or of demonstrations. With --gate, the answers to refused prompts have refused, the text of --refusal and no tokens.

An interrupted run leaves its answers in OUT.partial; the same command continues it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from finetune import sampling_settings
from launch import command_line, process_setup
from launch.run_settings import SettingError


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
    gate: str | None = None
    """Output folder of gate.py. Prompts that it refuses are not answered. None answers all."""
    refusal: str = "I cannot help with that."
    """Answer to the prompts that --gate refuses."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleSettings(sampling_settings.Sampling, Files):
    """Settings of sample.py."""


def parse(arguments: list[str]) -> SampleSettings:
    """Parses the command line; raises SettingError for invalid settings."""
    settings = command_line.parse_as(SampleSettings, arguments, prog="sample.py", doc=__doc__)
    sampling_settings.check(settings)
    if settings.gate is None and settings.refusal != Files.refusal:
        raise SettingError("--refusal has no effect without --gate; leave it out")
    return settings


if __name__ == "__main__":
    command_line.answer_help(parse)
    process_setup.use_huge_pages()

import time

from finetune import answers
from judging import prompt_gate
from launch import device_mesh, entry_point, initial_model, run_folder
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
    identity = answers.identity(settings, model, settings.prompts)
    gate = None if settings.gate is None else prompt_gate.load(settings.gate, model, template=settings.template)
    if settings.gate is not None:
        digest = run_folder.data_digest(str(prompt_gate.file_of(settings.gate)))
        identity |= {"the file of --gate": digest, "--refusal": settings.refusal}
    file = answers.SampleFile(settings.out, identity)
    if file.lines:
        run_setup.print_line(out, f"continuing {settings.out}, which has {errors.counted(len(file.lines), 'answers')}")
    run_setup.print_line(out, f"data: {errors.counted(len(prompts.ids), 'prompts')}; {counts.report()}")
    run_setup.print_line(out, f"model: {model.path} ({cfg.model_type}); chat template: {model.fmt.origin}")
    run_setup.print_line(out, run_setup.describe_dtype(cfg))
    sampler = answers.sampler(settings, model, mesh)
    stages = [*([] if gate is None else [("gate", 5.0)]), ("sample", 60.0)]
    with console.StageProgress(stages, elapsed=time.time() - process_setup.START_TIME) as progress:
        if gate is not None:
            hidden_ND = prompt_gate.hidden_states(
                model,
                prompts.ids,
                layer=gate.layer,
                pooling=gate.pooling,
                batch=settings.batch,
                mesh=mesh,
                on_progress=lambda done, total: progress.update("gate", done, total),
            )
            refused_N, done = gate.refuses(hidden_ND), file.done
            refused = prompt_gate.refusals(model.fmt, prompts, refused_N, n=settings.n, text=settings.refusal)
            file.append([line for line in refused if (line["index"], line["sample"]) not in done])
            progress.finish("gate")
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
    if gate is not None:
        number = len({line["index"] for line in lines if line.get("refused")})
        text = f"refused by --gate: {number} of {errors.counted(len(prompts.ids), 'prompts')}"
        run_setup.print_line(out, text)
    answered = [line for line in lines if not line.get("refused")]
    if not answered:
        run_setup.print_line(out, f"all prompts were refused by --gate {settings.gate}: {settings.out}")
        return lines
    stopped = sum(line["stopped"] for line in answered) / len(answered)
    tokens = sum(line["tokens"] for line in answered) / len(answered)
    run_setup.print_line(
        out,
        f"{errors.counted(len(answered), 'answers')}, {tokens:.1f} tokens on average, {stopped:.1%} stopped: "
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
