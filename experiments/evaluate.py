"""Compares policies on the same prompts, judged by reward models or by functions of your own.

    python experiments/evaluate.py --policies BASELINE A B --prompts prompts.jsonl --reward-model RM
    python experiments/evaluate.py --policies BASELINE A --prompts FILE --reward rewards.py:score --n 4
    python experiments/evaluate.py --samples baseline.jsonl a.jsonl --reward-model RM

The first policy is the baseline. Each policy samples --n answers to each prompt. The table has the mean score of each
policy, its win rate against the baseline (a tie counts as one half), the win rate at equal length in characters, the KL
to the baseline or to --reference in nats per answer, the length in tokens of the policy's own tokenizer, the share of
answers that the policy ended itself, and their diversity: the share of distinct pairs among equally many pairs of words
of each policy, self-BLEU, and the entropy per token, also relative to the baseline's. Answers that sample.py --gate
refused are judged, but count neither in lengths nor among the answers that the policy ended; their share is reported.
Intervals are 95 % and clustered by what is asked. The policies and the judges may have different tokenizers; a KL needs
the same tokenizer and chat template.

The output folder contains results.json, report.html with the answers to some prompts side by side, config.json, and
samples/ with the answers of each policy, in the format of sample.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from finetune import sampling_settings
from launch import command_line, process_setup, setting_checks
from launch.run_settings import SettingError
from launch.setting_checks import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What evaluate.py compares, and how it judges."""

    policies: tuple[str, ...] = ()
    """The policies to compare, of which the first is the baseline: folders in Hugging Face format, or output folders of
    earlier commands."""
    prompts: str | None = None
    """JSONL, JSON (also compressed) or Parquet file with prompts in any of the forms in docs/data.md."""
    samples: tuple[str, ...] = ()
    """Files with the answers of the policies, as sample.py writes them, instead of --policies and --prompts. Only the
    prompts that all files have are used."""
    reward_model: tuple[str, ...] = ()
    """Reward models that judge the answers: folders in Hugging Face format, or output folders of earlier commands. A
    reward model on which a policy was trained is a poor judge of this policy."""
    reward: tuple[str, ...] = ()
    """Functions that judge the answers, as module:function or file.py:function. A function receives a list of prompts,
    each a list of messages, and a list of answers, and returns one number per answer. If it has a parameter
    `records`, it also receives the other columns of each prompt."""
    reference: str | None = None
    """The model to which the KL is measured. None is the baseline."""
    width: int | None = None
    """Maximum number of tokens of a prompt with an answer for the reward models. Longer prompts lose their oldest
    turns, then the end of the answer is cut off; both are counted. None uses the reward model's maximum length."""
    transcripts: int = 8
    """Number of prompts whose answers are shown side by side in the report."""
    out: str | None = None
    """Output folder. None uses runs/evaluate-TIME."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSettings(sampling_settings.Sampling, Comparison):
    """Settings of evaluate.py."""


def parse(arguments: list[str]) -> EvaluateSettings:
    """Parses the command line; raises SettingError for invalid settings."""
    settings = command_line.parse_as(EvaluateSettings, arguments, prog="evaluate.py", doc=__doc__)
    sampling_settings.check(settings)
    require(settings.transcripts >= 0, settings, "transcripts", "at least 0")
    require(settings.width is None or settings.width >= 2, settings, "width", "at least 2")
    if settings.samples:
        used = {"policies": settings.policies, "prompts": settings.prompts, "reference": settings.reference}
        if flags := [name for name, value in used.items() if value]:
            raise SettingError(f"--{flags[0]} has no effect with --samples; leave it out")
        require(
            len(settings.samples) >= 2, settings, "samples", "at least two files, the first of which is the baseline"
        )
    else:
        require(
            len(settings.policies) > 1, settings, "policies", "at least two models, of which the first is the baseline"
        )
        if settings.prompts is None:
            raise SettingError("--prompts is missing; give a file of prompts that the policies answer")
    if not settings.reward_model and not settings.reward:
        raise SettingError("there is no judge; set --reward-model FOLDER or --reward MODULE:FUNCTION")
    return settings


if __name__ == "__main__":
    command_line.answer_help(parse)
    process_setup.use_huge_pages()

import pathlib
import time

import numpy as np
from finetune import answers, reward_functions
from judging import compared_policies, judges
from launch import device_mesh, entry_point, initial_model, run_folder
from recipe import run_setup
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf_jax import atomic, diagnostics, report
from rlhf_jax.data import dialogues, errors
from rlhf_jax.report import console
from rlhf_jax.report import results as results_lib


def run(settings: EvaluateSettings) -> dict[str, Any]:
    """Compares the policies, saves all files and returns the contents of results.json."""
    out = Console()
    resolved = device_mesh.resolve(settings)
    mesh = device_mesh.make(resolved)
    path = run_folder.free_folder(settings.out, kind="evaluate")
    counts = errors.DropCount(max_dropped=settings.max_dropped, flag="--max-dropped")
    loaded = [reward_functions.load(text) for text in settings.reward]
    remark, dtypes = "", dict[str, list[str]]()
    functions = dict(zip(compared_policies.names(settings.reward), loaded))
    for flag, paths, kind in (
        ("--policies", settings.policies, initial_model.LANGUAGE_MODEL),
        ("--reference", [settings.reference] if settings.reference else [], initial_model.LANGUAGE_MODEL),
        ("--reward-model", settings.reward_model, initial_model.REWARD_MODEL),
    ):
        for each in paths:
            cfg = initial_model.check(each, kind=kind, flag=flag)
            dtypes.setdefault(settings.compute.dtype or cfg.dtype, []).append(each)
    names = compared_policies.names(settings.samples or settings.policies)
    sampled = settings.prompts is not None
    if sampled:
        found = answers.read_prompts(settings, settings.prompts, counts)  # pyright: ignore[reportArgumentType]
        remark = reward_functions.note_of_read_columns(loaded, counts, found)
        policies: list[compared_policies.Given] = []
    else:
        policies = [compared_policies.read(file, name=name) for file, name in zip(settings.samples, names)]
    models = dict(zip(compared_policies.names(settings.reward_model), settings.reward_model))
    measure = sampled and settings.temperature > 0 and settings.top_k is None and settings.top_p is None
    stages = [(f"sample {name}", 30.0) for name in names] if sampled else []
    stages += [("KL", 5.0)] if measure else []
    stages += [(f"judge {name}", 5.0) for name in (*models, *functions)]
    run_folder.create_folder(path, dataclasses.asdict(settings) | {"command": "evaluate"})
    run_setup.print_line(out, f"writing to {path}")
    if dtypes:
        parts = [f"{dtype} ({', '.join(paths)})" if len(dtypes) > 1 else dtype for dtype, paths in dtypes.items()]
        run_setup.print_line(out, f"computing in {' and '.join(parts)}, with parameters in float32 (--compute.dtype)")
    notes: list[str] = []
    with console.StageProgress(stages, elapsed=time.time() - process_setup.START_TIME) as progress:

        def note(text: str) -> None:
            notes.append(text)
            progress.message("note", text)

        def progress_of(stage: str) -> Any:
            return lambda done, total: progress.update(stage, done, total)

        for policy in settings.policies:
            for judge in settings.reward_model:
                if compared_policies.trained_on(policy, judge):
                    note(f"{policy} was trained on --reward-model {judge}, so its score is too high; use another judge")
        if sampled:
            for number, (name, folder) in enumerate(zip(names, settings.policies)):
                policies.append(
                    compared_policies.sample(
                        settings,
                        found,
                        name=name,
                        path=folder,
                        number=number,
                        mesh=mesh,
                        measure=measure,
                        counts=counts,
                        on_progress=progress_of(f"sample {name}"),
                    )
                )
                progress.finish(f"sample {name}")
        policies = compared_policies.join(policies, note=note)
        _write_samples(path / "samples", policies)
        reference_PNS: list[np.ndarray | None] = [None] * len(policies)
        reference = settings.reference or (settings.policies[0] if sampled else None)
        if measure:
            reference_PNS = compared_policies.reference_logprobs(
                settings,
                str(reference),
                policies if settings.reference else policies[1:],
                flag="--reference" if settings.reference else "--policies",
                mesh=mesh,
                note=note,
                on_progress=progress_of("KL"),
            )
            reference_PNS = reference_PNS if settings.reference else [None, *reference_PNS]
            progress.finish("KL")
        else:
            why = "temperature 0, top-k or top-p" if sampled else "files of samples"
            note(f"the KL is left out, because it is unknown with {why}")
        scores: dict[str, np.ndarray] = {}
        for name, folder in models.items():
            scores[name] = judges.score_with_model(
                settings,
                folder,
                policies,
                width=settings.width,
                mesh=mesh,
                counts=counts,
                on_progress=progress_of(f"judge {name}"),
            )
            progress.finish(f"judge {name}")
        for name, function in functions.items():
            scores[name] = judges.score_with_function(
                function, policies, batch=settings.batch, on_progress=progress_of(f"judge {name}")
            )
            progress.finish(f"judge {name}")
        results = measure_all(policies, scores, reference_PNS, note=note)
    results = run_folder.finite(
        {
            "seconds": time.time() - process_setup.START_TIME,
            "peak_rss_mb": process_setup.peak_memory_mb(),
            "seed": settings.seed,
            "reference": names[0] if settings.reference is None else settings.reference,
            "dropped": counts.dropped | counts.truncated,
            "incidents": [{"stage": "evaluation", "text": text} for text in notes],
            **results,
            "transcripts": transcripts(policies, scores, settings.transcripts),
        }
    )
    report.write_report(
        path / "report.html", results, [], title="Comparison of policies", settings=setting_checks.by_flag(settings)
    )
    run_folder.write_json(path / run_folder.RESULTS, results)
    for text in results_lib.headlines(results):
        run_setup.print_line(out, text)
    out.print(results_table(results))
    for text in results_lib.rough_intervals(results):
        run_setup.print_line(out, text)
    if remark:
        run_setup.print_line(out, remark)
    run_setup.print_line(out, f"data: {counts.report()}")
    run_setup.print_line(out, f"report: {path / 'report.html'}   results: {path / run_folder.RESULTS}")
    return results


def measure_all(
    policies: list[compared_policies.Given],
    scores: dict[str, np.ndarray],
    reference_PNS: list[np.ndarray | None],
    *,
    note: Any = lambda text: None,
) -> dict[str, Any]:
    """Returns the numbers of all policies, in the format of results.json.

    Prompts that a judge cannot score are left out for all policies and judges.

    Args:
        policies: The policies with the same prompts; the first is the baseline.
        scores: Scores of each judge, ``[policies, N, S]``.
        reference_PNS: Log-probabilities of each policy's answers under the reference; None for no KL.
        note: Called with messages.
    """
    usable_N = np.isfinite(np.concatenate(list(scores.values()), axis=2)).all(axis=(0, 2))
    rows = np.flatnonzero(usable_N).tolist()
    if not rows:
        raise errors.DataError("no prompt is left: the judges cannot score any")
    if len(rows) < len(usable_N):  # pyright: ignore[reportArgumentType]
        left = errors.counted(len(usable_N) - len(rows), "prompts")  # pyright: ignore[reportArgumentType]
        note(f"leaving out {left} with answers that a judge cannot score")
    n = len(policies[0].lines[0])
    used = [given.at(rows, n) for given in policies]
    asked = judges.clusters(used, note=note)
    diversity, pairs = judges.describe_diversity(used, asked)
    table = [{"path": given.path, **judges.describe(given, asked), **each} for given, each in zip(used, diversity)]
    for given, row, reference_NS in zip(used, table, reference_PNS):
        if given.logprobs_NS is not None and reference_NS is not None:
            log_ratios = given.logprobs_NS - reference_NS[rows]
            row["kl"] = list(diagnostics.clustered_mean(log_ratios.ravel(), asked))
    for number, (judge, scores_PNS) in enumerate(scores.items()):
        for row, compared in zip(table, judges.compare(scores_PNS[:, rows], used, asked)):
            row.setdefault("judges", {})[judge] = compared
            row.update(compared if number == 0 else {f"{name} ({judge})": value for name, value in compared.items()})
    return {
        "baseline": used[0].name,
        "judges": list(scores),
        "held_out": {"prompts": len(rows)},
        "clusters": {"comparison": len(set(asked))},
        "samples": n,
        "diversity_pairs": pairs,
        "policies": {given.name: row for given, row in zip(used, table)},
    }


def transcripts(
    policies: list[compared_policies.Given], scores: dict[str, np.ndarray], most: int
) -> list[dict[str, Any]]:
    """Returns the first answers of all policies to ``most`` prompts, spread over the file, with their scores."""
    n = len(policies[0].records)
    first = next(iter(scores.values()))
    return [
        {
            "prompt": "\n\n".join(
                f"{turn.role}: {dialogues.answer_text(turn)}" for turn in policies[0].records[i].prompt
            ),
            "answers": {given.name: given.lines[i][0]["response"] for given in policies},
            "scores": {given.name: float(first[number, i, 0]) for number, given in enumerate(policies)},
        }
        for i in np.unique(np.linspace(0, n - 1, min(most, n)).astype(int)).tolist()
    ]


def results_table(results: dict[str, Any]) -> Table:
    """Returns a table with one column per policy and one row per number, with 95 % intervals."""
    names = list(results["policies"])
    table = console.NumbersTable("", *map(escape, names))

    def add(title: str, key: str, *, percent: bool = False, judge: str | None = None, digits: int = 3) -> None:
        rows = [results["policies"][name] for name in names]
        found = [(row if judge is None else row["judges"][judge]).get(key) for row in rows]
        parts = [results_lib.format_parts(each, percent=percent, digits=digits) for each in found]
        if any(mean != results_lib.MISSING for mean, _ in parts):
            table.add_row(escape(title), *(f"{mean} [dim]{bounds}[/]" if bounds else mean for mean, bounds in parts))

    for judge in results["judges"]:
        add(f"score, {judge}", "score", judge=judge)
        add("  wins vs baseline, %", "win_rate", percent=True, judge=judge)
        add("  wins at equal length, %", "length_controlled_win_rate", percent=True, judge=judge)
    add("KL, nats per answer", "kl")
    add("length, tokens", "length", digits=1)
    add("length, characters", "characters", digits=1)
    add("stopped, %", "stopped", percent=True)
    add("refused by a gate, %", "refused", percent=True)
    add("distinct pairs of words", "diversity")
    add("self-BLEU", "self_bleu")
    add("entropy, nats per token", "entropy")
    add("  relative to the baseline", "entropy_ratio")
    return table


def _write_samples(folder: pathlib.Path, policies: list[compared_policies.Given]) -> None:
    folder.mkdir()
    for number, given in enumerate(policies):
        plain = "".join(c if c.isalnum() or c in "-_." else "-" for c in given.name)
        atomic.replace_file(folder / f"{number}-{plain}.jsonl", answers.as_lines(judges.flat(given)))


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    entry_point.execute(run, parse, arguments)


if __name__ == "__main__":
    main()
