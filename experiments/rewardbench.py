"""Measures the accuracy, calibration and length bias of a reward model on comparisons in RewardBench's format.

    python experiments/rewardbench.py --model runs/NAME/reward_model --data.path FILE.jsonl
    python experiments/rewardbench.py --model DIR --data.path FILE.parquet --out runs/rewardbench

The model folder must contain a model with a scalar head, its tokenizer and its chat template, as saved by
instructgpt.py. A record consists of a prompt (text or messages), a chosen answer, a rejected answer and, optionally, a
subset. A tie counts as half correct in the accuracy, and as wrong in the strict accuracy, which RewardBench reports.
The scores include the saved model's gain, which scales them for RL. To obtain log odds, divide the difference of two
scores by the calibration temperature in results.json.

The output folder contains results.json, report.html, config.json and scores.jsonl, which has the scores of all records
that were not dropped.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from launch import command_line, process_setup, setting_checks
from launch.setting_checks import require
from launch.settings import Compute, SettingError


@dataclasses.dataclass(frozen=True)
class Data:
    """Comparisons to score."""

    path: str
    """JSONL (also compressed) or Parquet file. Each record has prompt, chosen, rejected and, optionally, subset, or
    ranks two answers in any other format of docs/data.md."""
    max_dropped: float = 0.01
    """Maximum share of dropped records, such as those that are empty, tied, not pairs or rejected by the chat
    template. A file with a larger share is refused."""


@dataclasses.dataclass(frozen=True)
class RewardBenchSettings:
    """Settings of rewardbench.py."""

    model: str
    """Folder of a reward model in Hugging Face format, with its tokenizer."""
    data: Data
    compute: Compute = dataclasses.field(default_factory=Compute)
    out: str | None = None
    """Output folder. None uses runs/rewardbench-TIME."""
    batch: int = 16
    """Number of answers scored together."""
    max_length: int | None = None
    """Maximum number of tokens in a prompt with its answer. Longer prompts lose their oldest turns, then the end of
    the answers is cut off. Both are counted in results.json. None uses the model's maximum length."""
    bins: int = 10
    """Maximum number of bins in the calibration curve. All bins have about the same number of pairs."""


def parse(arguments: list[str]) -> RewardBenchSettings:
    """Parses the command line; raises SettingError for invalid settings."""
    settings = command_line.parse_as(RewardBenchSettings, arguments, prog="rewardbench.py", doc=__doc__)
    for name, least in (("batch", 1), ("max_length", 2), ("bins", 1)):
        value = getattr(settings, name)
        require(value is None or value >= least, settings, name, f"at least {least}")
    require(0 <= settings.data.max_dropped <= 1, settings, "data.max_dropped", "between 0 and 1")
    return settings


if __name__ == "__main__":
    command_line.answer_help(parse)
    process_setup.use_huge_pages()

import json
import time
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from judging import reward_scores
from launch import entry_point, initial_model, run_folder
from recipe import human_comparisons, reward_diagnosis, run_setup
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf_jax import atomic, diagnostics, parallel, report
from rlhf_jax.data import chat, dialogues, errors, readers
from rlhf_jax.report import console
from rlhf_jax.report import results as results_lib


class Pair(NamedTuple):
    """A record: a prompt, two answers and the subset, if any."""

    prompt: tuple[dialogues.Turn, ...]
    chosen: dialogues.Answer
    rejected: dialogues.Answer
    subset: str | None
    where: str
    """File and line of the record."""
    tools: Sequence[Mapping[str, Any]] = ()
    """Descriptions of the tools that the assistant may call."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """N records with the scores and lengths of their answers. Lengths are in tokens and include the stop token."""

    records: list[Pair]
    chosen_N: np.ndarray
    rejected_N: np.ndarray
    chosen_lengths_N: np.ndarray
    rejected_lengths_N: np.ndarray


def run(settings: RewardBenchSettings) -> dict[str, Any]:
    """Scores the comparisons, saves all files and returns the contents of results.json."""
    out = Console()
    path = run_folder.free_folder(settings.out, kind="rewardbench")
    model = initial_model.load(settings.model, kind=initial_model.REWARD_MODEL)
    cfg = dataclasses.replace(model.cfg, dtype=settings.compute.dtype or model.cfg.dtype)
    max_length = min(settings.max_length or cfg.max_length, cfg.max_length)
    counts = errors.DropCount(max_dropped=settings.data.max_dropped, flag="--data.max-dropped")
    records = read(settings.data.path, counts=counts)
    with console.StageProgress([("tokenise", 1.0), ("score", 20.0)]) as progress:
        progress.start("tokenise", len(records))
        try:
            records, rows, lengths = encode(model.fmt, records, max_length=max_length, counts=counts)
        except errors.DataError as error:
            raise errors.DataError(f"--data.path {settings.data.path}: {error}") from None
        progress.finish("tokenise")
        # Created after the data is read, so that unusable data leaves no folder, but before the slow scoring.
        run_folder.create_folder(path, dataclasses.asdict(settings) | {"command": "rewardbench"})
        progress.start("score", len(rows))
        step = parallel.JitStep(partial(reward_scores.score_batch, cfg=cfg), donate_argnums=())

        def score(tokens_BL: np.ndarray, mask_BL: np.ndarray) -> np.ndarray:
            return np.asarray(step(model.params, tokens_BL, mask_BL))

        update = partial(progress.update, "score", total=len(rows))
        scores = reward_scores.score_rows(
            rows, score, batch=settings.batch, max_length=max_length, pad_id=model.fmt.pad_id, on_progress=update
        )
        progress.finish("score")
    n = len(records)
    if not np.isfinite(scores).all():
        raise SettingError(f"--model {settings.model} computes scores that are not finite; use a different model")
    scored = Scored(records, scores[:n], scores[n:], lengths[:n], lengths[n:])
    results = {
        "seconds": time.time() - process_setup.START_TIME,
        "dropped": counts.dropped | counts.truncated,
        "reward_model": measure(scored, bins=settings.bins),
    }
    results = run_folder.finite(results)
    _write(path, settings, results, scored)
    out.print(accuracy_table(results["reward_model"]))
    for text in results_lib.rough_intervals(results):
        run_setup.print_line(out, text)
    run_setup.print_line(out, run_setup.describe_dtype(cfg))
    run_setup.print_line(out, f"data: {counts.report()}")
    run_setup.print_line(out, f"report: {path / 'report.html'}   results: {path / run_folder.RESULTS}")
    return results


def read(path: str, *, counts: errors.DropCount) -> list[Pair]:
    """Reads all pairs in a file. Dropped records, such as those with more than two answers, are counted by reason.

    Raises:
        DataError: The file cannot be read, or too many of its records are dropped.
    """
    rankings, _ = readers.read_rankings(path, counts=counts)
    stage, pairs = counts.stage(), []
    for ranking in rankings:
        if len(ranking.responses) != 2:
            stage.drop("not a pair")
            continue
        chosen, rejected = ranking.responses if ranking.ranks[0] < ranking.ranks[1] else ranking.responses[::-1]
        subset = ranking.metadata.get("subset")
        name = None if subset is None else str(subset)
        pairs.append(Pair(ranking.prompt, chosen, rejected, name, ranking.location, ranking.tools))
    counts.add(stage, records=len(rankings), source=path)
    return pairs


def encode(
    fmt: chat.ChatFormat, records: Sequence[Pair], *, max_length: int, counts: errors.DropCount
) -> tuple[list[Pair], list[list[int]], np.ndarray]:
    """Tokenises pairs as rows of at most ``max_length`` tokens; see `reward_scores.encode`.

    A pair whose two answers have the same tokens after truncation is dropped.

    Returns:
        ``(records, rows, lengths)``: the N remaining records, 2N rows of token ids and the lengths of the 2N answers in
        tokens. The first N rows are prompts with their chosen answers, the other N the same prompts with their rejected
        answers.

    Raises:
        DataError: Too many records are dropped, or no record is left.
    """
    encoded = reward_scores.encode(
        fmt,
        [record.prompt for record in records],
        [(record.chosen, record.rejected) for record in records],
        width=max_length,
        counts=counts,
        tools=[record.tools for record in records],
    )
    stage = counts.stage()
    differ = [n for n, (chosen, rejected) in enumerate(encoded.answers) if chosen != rejected]
    for _ in range(len(encoded.kept) - len(differ)):
        stage.drop("same answer within the width")
    counts.add(stage, records=len(encoded.kept), source="records")
    if not differ:
        raise errors.DataError(f"no record is left to score ({counts.report()})")
    sides = [[encoded.answers[n][side] for n in differ] for side in range(2)]
    rows = [encoded.prompts[n] + ids for side in sides for n, ids in zip(differ, side)]
    return [records[encoded.kept[n]] for n in differ], rows, np.array([len(ids) for side in sides for ids in side])


def measure(scored: Scored, *, bins: int = 10) -> dict[str, Any]:
    """Computes all metrics, in the format of the ``reward_model`` entry of results.json.

    Intervals are clustered by conversation, because the pairs of a prompt are not independent.
    """
    chosen, rejected = scored.chosen_N, scored.rejected_N
    prompts = human_comparisons.conversation_ids(scored.records).tolist()  # type: ignore[arg-type]
    by_stratum = partial(diagnostics.accuracy_by_stratum, chosen, rejected, prompts=prompts)
    accuracy = partial(diagnostics.clustered_mean, clusters=prompts, rate=True)
    outcomes = diagnostics.win_outcomes(chosen, rejected)
    subsets = by_stratum([record.subset for record in scored.records])
    longer = np.maximum(scored.chosen_lengths_N, scored.rejected_lengths_N)
    buckets = by_stratum(diagnostics.quantile_buckets(longer))
    curve = diagnostics.calibration_curve(chosen, rejected, bins=bins, prompts=prompts)
    thresholds = diagnostics.accuracy_above_threshold(chosen, rejected, prompts=prompts)
    differ = (chosen != rejected).any()
    return {
        "accuracy": list(accuracy(outcomes)),
        "strict_accuracy": list(accuracy(outcomes == 1)),
        "mean_subset_accuracy": list(diagnostics.average([each.accuracy for each in subsets])),
        "pairs": len(chosen),
        "held_out_asked": len(set(prompts)),
        "ties": int((chosen == rejected).sum()),
        "strata": {
            "subset": reward_diagnosis.strata_as_json(subsets),
            "tokens of the longer answer": reward_diagnosis.strata_as_json(buckets),
        },
        "calibration": {
            "bins": [dict(zip(curve._fields, map(float, each))) for each in zip(*curve)],
            "error": diagnostics.expected_calibration_error(chosen, rejected, bins=bins),
            "slope": list(diagnostics.calibration_slope(chosen, rejected, prompts=prompts)) if differ else None,
            "temperature": diagnostics.calibration_temperature(chosen, rejected) if differ else None,
        },
        "thresholds": reward_diagnosis.arrays_as_json(thresholds),
        "length_bias": diagnostics.length_bias(
            chosen, rejected, scored.chosen_lengths_N, scored.rejected_lengths_N, prompts=prompts
        )._asdict(),
    }


def accuracy_table(model: dict[str, Any]) -> Table:
    """Returns a table of the accuracy on each subset and on all pairs."""
    table = console.NumbersTable("subset", "pairs", "accuracy, %", "95 % interval")
    subsets = model["strata"]["subset"]
    for each in subsets:
        name = "not given" if each["name"] is None else escape(each["name"])
        if results_lib.is_rough(each):
            name, table.caption = name + results_lib.ROUGH_MARK, results_lib.ROUGH_NOTE
        table.add_row(name, str(each["count"]), *results_lib.format_parts(each["accuracy"], percent=True))
    table.add_section()
    table.add_row("all pairs", str(model["pairs"]), *results_lib.format_parts(model["accuracy"], percent=True))
    if model["ties"]:
        strict = results_lib.format_parts(model["strict_accuracy"], percent=True)
        table.add_row("ties counted as wrong", str(model["pairs"]), *strict)
    if len(subsets) > 1:
        mean = results_lib.format_parts(model["mean_subset_accuracy"], percent=True)
        table.add_row("mean of the subsets", "", *mean)
    return table


def _write(path: Any, settings: RewardBenchSettings, results: dict[str, Any], scored: Scored) -> None:
    scores = zip(scored.records, scored.chosen_N.tolist(), scored.rejected_N.tolist())
    rows = [{"record": r.where, "subset": r.subset, "chosen": a, "rejected": b} for r, a, b in scores]
    atomic.replace_file(path / "scores.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    report.write_report(
        path / "report.html", results, [], title="Reward model evaluation", settings=setting_checks.by_flag(settings)
    )
    run_folder.write_json(path / run_folder.RESULTS, results)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    entry_point.execute(run, parse, arguments)


if __name__ == "__main__":
    main()
