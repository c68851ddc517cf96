"""A reward model on a file of comparisons in RewardBench's form: accuracy by subset, calibration, length bias.

    python experiments/rewardbench.py --model runs/NAME/reward_model --data.path FILE.jsonl
    python experiments/rewardbench.py --model DIR --data.path FILE.parquet --out runs/judged

``--model`` is a directory with a scalar head, its tokenizer and its chat template, such as the main job writes. A
record has a prompt (text or messages), a chosen and a rejected answer, and, if there are several, a subset. Ties of the
two scores count a half; the strict accuracy, which RewardBench reports, counts them as wrong. Scores are as saved:
where a gain scales them for RL, the temperature says what to divide by.

Writes below ``--out``: results.json, report.html, scores.jsonl with the scores of every record, config.json.
"""

from __future__ import annotations

from launch import process_setup

if __name__ == "__main__":
    process_setup.use_huge_pages()

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import tyro
from launch import command_line, initial_model, run_folder, settings
from recipe import reward_diagnosis
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf_jax import diagnostics, lm, parallel, report, types
from rlhf_jax.checkpoint import atomic
from rlhf_jax.data import chat, dialogues, errors, readers
from rlhf_jax.report import console, results


@dataclasses.dataclass(frozen=True)
class Data:
    """What the reward model judges."""

    path: str
    """JSONL (.gz too) or Parquet with prompt, chosen, rejected and subset; any form of two compared answers."""
    max_dropped: float = 0.01
    """Share of records that may be dropped (empty, not a pair, refused by the chat template, too long) before it is an
    error."""


@dataclasses.dataclass(frozen=True)
class RewardBench:
    """A reward model on a file of comparisons."""

    model: str
    """Folder of a reward model in Hugging Face form, with its tokenizer."""
    data: Data
    out: str | None = None
    """Folder for all files; by default runs/rewardbench-TIME."""
    batch: int = 16
    """Answers scored at a time."""
    max_length: int | None = None
    """Tokens of a prompt with an answer; longer ones are dropped, and counted; by default what the model reads."""
    bins: int = 10
    """Of the calibration curve, at most, and with equally many pairs each."""


class Pair(NamedTuple):
    """Two answers to one prompt, the first preferred."""

    prompt: tuple[dialogues.Turn, ...]
    chosen: str
    rejected: str
    subset: str | None
    where: str
    """File and line."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """Records with scores and answer lengths in tokens (the stop token counts); N of each."""

    records: list[Pair]
    chosen_N: np.ndarray
    rejected_N: np.ndarray
    chosen_lengths_N: np.ndarray
    rejected_lengths_N: np.ndarray


def run(asked: RewardBench) -> dict[str, Any]:
    """Reads, scores, writes; returns what results.json holds."""
    out = Console()
    path = run_folder.free_folder(asked.out, kind="rewardbench")
    model = initial_model.load_reward_model(asked.model)
    most = min(asked.max_length or model.cfg.max_length, model.cfg.max_length)
    counts = errors.DropCount(max_dropped=asked.data.max_dropped)
    records = read(asked.data.path, counts=counts)
    with console.StageProgress([("tokenise", 1.0), ("score", 20.0)]) as progress:
        progress.start("tokenise", len(records))
        try:
            records, rows, lengths = encode(model.fmt, records, max_length=most, counts=counts)
        except errors.DataError as error:
            raise errors.DataError(f"--data.path {asked.data.path}: {error}") from None
        progress.finish("tokenise")
        _begin(
            path, asked
        )  # Here, so that data of no use leaves no folder, and a folder of no use is told before the work.
        progress.start("score", len(rows))

        def compiled(params: types.Params, tokens_BL: Any, mask_BL: Any) -> Any:
            return lm.score(params, tokens_BL, cfg=model.cfg, mask_BL=mask_BL)

        step = parallel.JitStep(compiled, donate_argnums=())

        def score(tokens_BL: np.ndarray, mask_BL: np.ndarray) -> np.ndarray:
            return np.asarray(step(model.params, tokens_BL, mask_BL))

        tell = partial(progress.update, "score", total=len(rows))
        scores = score_rows(rows, score, batch=asked.batch, most=most, pad_id=model.fmt.pad_id, tell=tell)
        progress.finish("score")
    n = len(records)
    if not np.isfinite(scores).all():
        raise settings.SettingError(f"--model {asked.model} gives scores that are not finite")
    found = {
        "seconds": time.time() - process_setup.BEGAN,
        "dropped": counts.dropped | counts.truncated,
        "reward_model": facts(Scored(records, scores[:n], scores[n:], lengths[:n], lengths[n:]), bins=asked.bins),
    }
    found = run_folder.finite(found)
    _write(path, asked, found, records, scores)
    out.print(table(found["reward_model"]))
    for line in (f"data: {counts.report()}", f"report: {path / 'report.html'}   numbers: {path / run_folder.RESULTS}"):
        out.print(line, soft_wrap=True, markup=False, highlight=False)
    return found


def read(path: str, *, counts: errors.DropCount) -> list[Pair]:
    """All pairs of a file; what `readers.read_rankings` drops is counted, and so is what is ``"not a pair"``.

    Raises:
        DataError: as of `readers.read_rankings`.
    """
    found, _ = readers.read_rankings(path, counts=counts)
    stage, pairs = counts.stage(), []
    for each in found:
        if len(each.responses) != 2:
            stage.drop("not a pair")
            continue
        chosen, rejected = each.responses if each.ranks[0] < each.ranks[1] else each.responses[::-1]
        subset = each.metadata.get("subset")
        # A name may hold half a character, which no terminal prints.
        named = None if subset is None else str(subset).encode("utf-8", "replace").decode()
        pairs.append(Pair(each.prompt, chosen, rejected, named, each.location))
    counts.add(stage, records=len(found), source=path)
    return pairs


def encode(
    fmt: chat.ChatFormat, records: Sequence[Pair], *, max_length: int, counts: errors.DropCount
) -> tuple[list[Pair], list[list[int]], np.ndarray]:
    """Token ids of all chosen, then of all rejected answers with their prompts, and the answers' lengths.

    A pair with more than ``max_length`` tokens in either row is left out whole, and counted.

    Returns:
        ``(records, rows, lengths)``: the N records that remain, 2N rows, 2N lengths in tokens.

    Raises:
        DataError: too large a share is left out, or nothing is left.
    """
    stage = counts.stage()
    prompts, kept = chat.encode_prompts(fmt, [record.prompt for record in records], width=max_length, counts=counts)
    left = [records[i] for i in kept]
    sides = [chat.encode_answers(fmt, [getattr(record, side) for record in left]) for side in ("chosen", "rejected")]
    fits = []
    for i, prompt in enumerate(prompts):
        if len(prompt) + max(len(side[i]) for side in sides) <= max_length:
            fits.append(i)
        else:
            stage.drop("too long")
    counts.add(stage, records=len(records), source="records")
    if not fits:
        raise errors.DataError("no record is left to score")
    rows = [prompts[i] + side[i] for side in sides for i in fits]
    return [left[i] for i in fits], rows, np.array([len(side[i]) for side in sides for i in fits])


def score_rows(
    rows: Sequence[Sequence[int]],
    score: Callable[[np.ndarray, np.ndarray], np.ndarray],
    *,
    batch: int,
    most: int,
    pad_id: int,
    tell: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Scores of rows of any length, those of about one length together; few widths, so few programs are compiled."""
    order = np.argsort([len(row) for row in rows], kind="stable")
    scores = np.zeros(len(rows))
    for first in range(0, len(rows), batch):
        mine = order[first : first + batch]
        longest = len(rows[mine[-1]])
        width = min(max(32, 1 << (longest - 1).bit_length()), max(most, longest))
        tokens_BL, mask_BL = np.full((batch, width), pad_id, np.int32), np.zeros((batch, width), bool)
        # The last batch is filled up with its first row.
        for b, row in enumerate([rows[i] for i in mine] + [rows[mine[0]]] * (batch - len(mine))):
            tokens_BL[b, : len(row)], mask_BL[b, : len(row)] = row, True
        scores[mine] = score(tokens_BL, mask_BL)[: len(mine)]
        tell(first + len(mine))
    return scores


def facts(scored: Scored, *, bins: int = 10) -> dict[str, Any]:
    """Everything measured, as results.json and the report hold it."""
    chosen, rejected = scored.chosen_N, scored.rejected_N
    subsets = diagnostics.accuracy_by_stratum(chosen, rejected, [record.subset for record in scored.records])
    longer = np.maximum(scored.chosen_lengths_N, scored.rejected_lengths_N)
    buckets = diagnostics.accuracy_by_stratum(chosen, rejected, diagnostics.quantile_buckets(longer))
    curve = diagnostics.calibration_curve(chosen, rejected, bins=bins)
    known = (chosen != rejected).any()
    return {
        "accuracy": list(diagnostics.win_rate(chosen, rejected)),
        "strict_accuracy": list(diagnostics.pairwise_accuracy(chosen, rejected)),
        "mean_subset_accuracy": list(diagnostics.average([each.accuracy for each in subsets])),
        "pairs": len(chosen),
        "ties": int((chosen == rejected).sum()),
        "strata": {
            "subset": reward_diagnosis.strata(subsets),
            "tokens of the longer answer": reward_diagnosis.strata(buckets),
        },
        "calibration": {
            "bins": [dict(zip(curve._fields, map(float, each))) for each in zip(*curve)],
            "error": diagnostics.expected_calibration_error(chosen, rejected, bins=bins),
            "slope": list(diagnostics.calibration_slope(chosen, rejected)) if known else None,
            "temperature": diagnostics.calibration_temperature(chosen, rejected) if known else None,
        },
        "thresholds": reward_diagnosis.lists(diagnostics.accuracy_above_threshold(chosen, rejected)),
        "length_bias": diagnostics.length_bias(
            chosen, rejected, scored.chosen_lengths_N, scored.rejected_lengths_N
        )._asdict(),
    }


def table(model: dict[str, Any]) -> Table:
    """Accuracy by subset, then over all pairs, strict where there are ties, and the mean of the subsets."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for name, side in (("subset", "left"), ("pairs", "right"), ("accuracy, %", "right"), ("95 % interval", "right")):
        made.add_column(name, justify=side)  # type: ignore[arg-type]
    subsets = model["strata"]["subset"]
    for each in subsets:
        name = "not given" if each["name"] is None else escape(each["name"])
        made.add_row(name, str(each["count"]), *results.format_parts(each["accuracy"], percent=True))
    made.add_section()
    made.add_row("all pairs", str(model["pairs"]), *results.format_parts(model["accuracy"], percent=True))
    if model["ties"]:
        strict = results.format_parts(model["strict_accuracy"], percent=True)
        made.add_row("ties counted as wrong", str(model["pairs"]), *strict)
    if len(subsets) > 1:
        mean = results.format_parts(model["mean_subset_accuracy"], percent=True)
        made.add_row("mean of the subsets", str(len(subsets)), *mean)
    return made


def _begin(path: Any, asked: RewardBench) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        run_folder.write_json(path / run_folder.CONFIG, dataclasses.asdict(asked))
    except OSError as error:
        raise settings.SettingError(f"--out {path} cannot be written: {error.strerror}") from error


def _write(path: Any, asked: RewardBench, found: dict[str, Any], records: list[Pair], scores: np.ndarray) -> None:
    sides = zip(records, scores[: len(records)].tolist(), scores[len(records) :].tolist())
    rows = [{"record": r.where, "subset": r.subset, "chosen": a, "rejected": b} for r, a, b in sides]
    atomic.replace_file(path / "scores.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    report.write_report(
        path / "report.html", found, [], title="A reward model's judgement", settings=dataclasses.asdict(asked)
    )
    run_folder.write_json(path / run_folder.RESULTS, found)


def parse(arguments: list[str]) -> RewardBench:
    """Settings from the command line; raises SettingError for what cannot be."""
    asked = tyro.cli(RewardBench, args=arguments, prog="rewardbench.py", description=__doc__)
    for name, least in (("batch", 1), ("max_length", 2), ("bins", 1)):
        value = getattr(asked, name)
        if value is not None and value < least:
            raise settings.SettingError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    if not 0 <= asked.data.max_dropped <= 1:
        raise settings.SettingError(f"--data.max-dropped is {asked.data.max_dropped}; it must be a share from 0 to 1")
    return asked


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    command_line.enter(run, parse, arguments)


if __name__ == "__main__":
    main()
