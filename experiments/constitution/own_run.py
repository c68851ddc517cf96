"""Runs constitutional.py with a model and prompts of one's own: answers, revisions and comparisons."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
from finetune import answers, outcome
from launch import initial_model, run_folder, setting_checks
from recipe import human_comparisons, run_setup
from rich.console import Console

from constitution import judge_settings, own_models, own_settings
from rlhf_jax import atomic, feedback, report
from rlhf_jax.data import chat, dialogues, errors, readers
from rlhf_jax.feedback import few_shot
from rlhf_jax.report import page, plots

SAMPLES, DEMONSTRATIONS, COMPARISONS = "samples.jsonl", "demonstrations.jsonl", "comparisons.jsonl"
TRANSCRIPTS = 8
_ANSWERS = 2
"""Number of answers to each prompt, which are compared; the first is revised."""
_ASKED = 16
"""Number of batches of requests that a model receives at a time, of which it makes batches of equal width."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The models and the data of a run."""

    model: initial_model.InitialModel
    prompts: answers.Prompts
    editor: initial_model.InitialModel | None
    judge: initial_model.InitialModel | None
    held_out: list[feedback.Pair]
    """Pairs with the labels of people, of which the first answer is preferred."""
    conversations: list[int]
    """The conversation of each of these pairs, by which the interval of the agreement is clustered."""


def run(settings: own_settings.OwnConstitutionalSettings) -> dict[str, Any]:
    """Runs the command, or resumes its run, and returns the contents of results.json."""
    out = Console()
    if settings.resume and (done := run_folder.finished_results(settings.resume)) and done.get("complete"):
        run_setup.print_line(out, f"{settings.resume} is already finished; there is nothing to run")
        outcome.show(out, done, table)
        return done
    counts = errors.DropCount(max_dropped=settings.max_dropped, flag="--max-dropped")

    def prepare(resolved: Any, mesh: Any) -> tuple[Any, Inputs]:
        del resolved, mesh
        inputs = _load(settings, counts)
        return initial_model.with_date(settings, inputs.model), inputs

    def stages(inputs: Inputs) -> list[tuple[str, float]]:
        weights = [("sample", 2.0), ("revise", 2.0 * settings.rounds), ("agreement", 1.0), ("compare", 1.0)]
        used = {"revise": settings.rounds, "agreement": inputs.held_out, "compare": settings.judge}
        return [each for each in weights if used.get(each[0], True)]

    with run_setup.open_folder(settings, out, stages=stages, prepare=prepare) as opened:
        inputs: Inputs = opened.prepared
        sizes = {"prompts": len(inputs.prompts.ids), "held-out pairs": len(inputs.held_out)}
        outcome.describe_data(out, counts, sizes)
        outcome.describe_model(opened, out, inputs.model, inputs.model.cfg)
        lines = _sample(settings, opened, inputs)
        facts: dict[str, Any] = {"prompts": len(inputs.prompts.ids)}
        revised: list[feedback.Revised] = []
        if settings.rounds:
            revised, found = _revise(settings, opened, inputs, lines)
            facts["revisions"] = found
        if settings.judge is not None:
            facts["judge"] = _compare(settings, opened, inputs, lines)
        facts["incidents"] = opened.folder.incidents()
    facts["complete"] = not any(facts.get(name, {}).get("open") for name in ("revisions", "judge"))
    return _finish(settings, opened.folder, out, facts, counts, lines, revised)


def _load(settings: Any, counts: errors.DropCount) -> Inputs:
    """Loads the models and the data."""

    def other(path: str | None, flag: str, same: Any) -> Any:
        if path is None or path == settings.model:
            return same
        return (
            None
            if judge_settings.is_address(path)
            else own_models.with_dtype(settings, own_models.load(settings, path, flag))
        )

    initial_model.check(settings.model)
    found = answers.read_prompts(settings, settings.data.path, counts)
    model = own_models.with_dtype(settings, own_models.load(settings, settings.model, "--model"))
    prompts = answers.encode_prompts(
        model, found, width=settings.prompt_width, max_new_tokens=settings.max_new_tokens, counts=counts
    )
    held_out, conversations = [], []
    if settings.held_out is not None:
        rankings, _ = readers.read_rankings(settings.held_out, counts=counts)
        for each in rankings:
            texts = [dialogues.answer_turn(answer).text for answer in each.responses]
            worse = next(i for i, rank in enumerate(each.ranks) if rank > each.ranks[0])
            held_out.append(feedback.Pair(prompt_text(each.prompt), texts[0], texts[worse]))
        conversations = human_comparisons.conversation_ids(rankings).tolist()
    editor = other(settings.editor, "--editor", model)
    judge = other(settings.judge, "--judge", model) if settings.judge else None
    if judge_settings.is_address(settings.judge):
        own_models.judge(settings, None, batch=settings.batch)  # raises an error if a package is missing
    return Inputs(model, prompts, editor, judge, held_out, conversations)


def prompt_text(turns: Any) -> str:
    """Returns a prompt as requests show it: its text, or all turns with their roles if there are several."""
    if len(turns) == 1:
        return turns[0].text
    return "\n\n".join(f"{turn.role.capitalize()}: {turn.text}" for turn in turns)


def _sample(settings: Any, opened: run_setup.OpenRun, inputs: Inputs) -> list[list[dict[str, Any]]]:
    """Returns the lines of the answers to each prompt, which are read if all of them have been sampled."""
    path = opened.folder.path / SAMPLES
    progress = opened.progress
    if path.exists():
        flat = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        progress.skip("sample")
    else:
        file = answers.SampleFile(path, answers.identity(settings, inputs.model, settings.data.path))
        flat = answers.sample_file(
            answers.sampler(settings, inputs.model, opened.mesh),
            inputs.model,
            inputs.prompts,
            file,
            n=_ANSWERS if settings.judge else 1,
            seed=settings.seed,
            on_progress=lambda done, total: progress.update("sample", done, total),
        )
        progress.finish("sample")
    n = len(flat) // len(inputs.prompts.ids)
    return [flat[i * n : (i + 1) * n] for i in range(len(inputs.prompts.ids))]


def _texts(inputs: Inputs) -> list[str]:
    return [prompt_text(record.prompt) for record in inputs.prompts.records]


def _revise(
    settings: Any, opened: run_setup.OpenRun, inputs: Inputs, lines: list[list[dict[str, Any]]]
) -> tuple[list[feedback.Revised], dict[str, Any]]:
    """Revises the first answers and writes the demonstrations; returns the revisions and facts about them."""
    progress, folder = opened.progress, opened.folder
    writer = own_models.writer(settings, inputs.editor)
    progress.start("revise", 1)
    found = feedback.revise(
        _texts(inputs),
        [each[0]["response"] for each in lines],
        writer.generate,
        name=writer.name,
        principles=feedback.HARMLESSNESS[: settings.principles],
        rounds=settings.rounds,
        critique=settings.critique,
        examples=few_shot.REVISIONS if settings.few_shot else (),
        seed=settings.seed,
        answers=folder.path / "revisions.jsonl",
        max_questions=settings.max_requests,
        batch=_ASKED * settings.batch,
        on_answer=lambda done, total: progress.update("revise", done, total),
    )
    progress.finish("revise")
    written = [
        {
            "prompt": chat.messages(record.prompt),
            "response": text,
            "revision": step,
            "principle": each.principles[step - 1],
        }
        for record, each in zip(inputs.prompts.records, found.revised_N, strict=True)
        for step, text in enumerate(each.responses)
        if step > 0
    ]
    atomic.replace_file(folder.path / DEMONSTRATIONS, answers.as_lines(written))
    left = len(found.revised_N) - len(found.complete(settings.rounds))
    _note_errors(folder, "revise", found.errors, left, "answers were not revised completely")
    lengths = [
        np.mean([len(each.responses[step]) for each in found.revised_N if len(each.responses) > step] or [0])
        for step in range(settings.rounds + 1)
    ]
    return found.revised_N, {
        "demonstrations": len(written),
        "open": left,
        "asked": found.asked,
        "stored": found.stored,
        "tokens": found.tokens,
        "characters": [float(each) for each in lengths],
    }


def _compare(
    settings: Any, opened: run_setup.OpenRun, inputs: Inputs, lines: list[list[dict[str, Any]]]
) -> dict[str, Any]:
    """Labels the pairs of answers and writes the comparisons; returns facts about the labels."""
    judge = own_models.judge(settings, inputs.judge, batch=settings.batch)
    facts: dict[str, Any] = {"asked": 0, "open": 0}
    if inputs.held_out:
        facts |= _agreement(settings, opened, inputs, judge)
    texts = [[line["response"] for line in each] for each in lines]
    kept = [i for i, (first, second) in enumerate(texts) if first != second]
    pairs = [feedback.Pair(_texts(inputs)[i], *texts[i]) for i in kept]
    labels = _label(settings, opened, judge, pairs, stage="compare", asked=facts["asked"])
    written = []
    for i, preference in zip(kept, labels.preference_N.tolist()):
        if np.isnan(preference):
            continue
        first = preference >= 0.5
        chosen, rejected = texts[i] if first else texts[i][::-1]
        written.append(
            {
                "prompt": chat.messages(inputs.prompts.records[i].prompt),
                "chosen": chosen,
                "rejected": rejected,
                "preference": float(preference if first else 1 - preference),
            }
        )
    atomic.replace_file(opened.folder.path / COMPARISONS, answers.as_lines(written))
    left = len(pairs) - len(written)
    _note_errors(opened.folder, "compare", labels.errors, left, "pairs have no label")
    return facts | {
        "comparisons": len(written),
        "equal_answers": len(lines) - len(kept),
        "open": left + facts["open"],
        "position_bias": labels.position_bias,
        "unclear": labels.unclear,
        "asked": labels.asked + facts["asked"],
        "stored": labels.stored,
        "tokens": labels.tokens,
        "preferences": [line["preference"] for line in written],
    }


def _label(
    settings: Any, opened: run_setup.OpenRun, judge: Any, pairs: list[feedback.Pair], *, stage: str, asked: int = 0
) -> feedback.Labels:
    """Returns the labels of pairs; ``asked`` is the number of questions that the judge has been asked before."""
    numbers_N1 = feedback.sampled_principles(
        len(pairs), rounds=1, principles=settings.principles, seed=settings.seed + 1
    )
    opened.progress.start(stage, 1)
    labels = feedback.label(
        pairs,
        judge,
        principle=[feedback.HARMLESSNESS[i].question for i in numbers_N1[:, 0]],
        examples=few_shot.COMPARISONS if settings.few_shot else (),
        clamp=settings.clamp,
        answers=opened.folder.path / "labels.jsonl",
        max_questions=None if settings.max_requests is None else settings.max_requests - asked,
        batch=_ASKED * settings.batch,
        on_answer=lambda done, total: opened.progress.update(stage, done, total),
    )
    opened.progress.finish(stage)
    return labels


def _agreement(settings: Any, opened: run_setup.OpenRun, inputs: Inputs, judge: Any) -> dict[str, Any]:
    """Reports how often the judge agrees with people, before its labels are used."""
    labels = _label(settings, opened, judge, inputs.held_out, stage="agreement")
    n, left = len(inputs.held_out), int(np.isnan(labels.preference_N).sum())
    facts = {"asked": labels.asked, "open": left, "held_out": n - left}
    _note_errors(opened.folder, "agreement", labels.errors, left, "held-out pairs have no label")
    if left == n:
        return facts
    agreed = feedback.agreement(labels, np.ones(n, bool), clusters=inputs.conversations)
    interval = f"95 % interval {agreed.lo:.1%} to {agreed.hi:.1%}"
    text = f"the judge agrees with {agreed.mean:.1%} of {n - left} held-out labels ({interval})"
    opened.progress.message("agreement", text)
    if agreed.lo <= 0.5:
        opened.folder.note("agreement", f"{text}, so it may be no better than chance")
    return facts | {"agreement": list(agreed)}


def _note_errors(folder: Any, stage: str, found: dict[str, int], left: int, what: str) -> None:
    if left:
        reasons = "; ".join(f"{n} x {name}" for name, n in found.items()) or "--max-requests was reached"
        folder.note(stage, f"{left} {what} ({reasons}); --resume makes the missing requests")


def _finish(
    settings: Any,
    folder: run_folder.RunFolder,
    out: Console,
    facts: dict[str, Any],
    counts: errors.DropCount,
    lines: list[list[dict[str, Any]]],
    revised: list[feedback.Revised],
) -> dict[str, Any]:
    """Writes report.html and, last, results.json, and prints the table."""
    results = run_folder.finite(
        {
            "seed": settings.seed,
            "seconds": folder.elapsed.total,
            "dropped": counts.dropped | counts.truncated,
            "headlines": [_headline(facts)],
            **facts,
            "transcripts": [
                {
                    "prompt": prompt_text([dialogues.Turn(**_turn(turn)) for turn in each[0]["prompt"]]),
                    "answers": {
                        ("answer" if step == 0 else f"revision {step}"): text
                        for step, text in enumerate(revised[i].responses if revised else [each[0]["response"]])
                    },
                }
                for i, each in enumerate(lines[:TRANSCRIPTS])
            ],
        }
    )
    report.write_report(
        folder.path / "report.html",
        results,
        [],
        title="Feedback of a model",
        settings=setting_checks.by_flag(settings),
        sections=_sections(results),
    )
    folder.write_json(run_folder.RESULTS, results)
    outcome.show(out, results, table)
    for name in (DEMONSTRATIONS, COMPARISONS):
        if (folder.path / name).exists():
            run_setup.print_line(out, f"{name.removesuffix('.jsonl')}: {folder.path / name}")
    run_setup.print_line(out, f"report: {folder.path / 'report.html'}   results: {folder.path / run_folder.RESULTS}")
    return results


def _turn(message: dict[str, Any]) -> dict[str, Any]:
    return {"role": message["role"], "text": str(message["content"])}


def _headline(facts: dict[str, Any]) -> str:
    parts = []
    if found := facts.get("revisions"):
        parts.append(errors.counted(found["demonstrations"], "demonstrations"))
    if found := facts.get("judge"):
        parts.append(errors.counted(found["comparisons"], "comparisons"))
    return f"{' and '.join(parts)} from {errors.counted(facts['prompts'], 'prompts')}."


def _sections(results: dict[str, Any]) -> list[page.Section]:
    found = []
    if revisions := results.get("revisions"):
        with plots.axes(height=2.4) as (svg, (ax,)):
            ax.plot(revisions["characters"], "o-", color=plots.color("sft"))
            ax.set_xlabel("Number of revisions")
            ax.set_ylabel("Mean length (characters)")
        caption = "Mean length of the answers after each revision. A strong fall may mean that revisions only refuse."
        found.append(page.Section("Revisions", [page.Figure(svg[0], "Length", caption)], _numbers(revisions)))
    if judged := results.get("judge"):
        with plots.axes(height=2.4) as (svg, (ax,)):
            ax.hist(judged["preferences"], bins=np.linspace(0.5, 1, 21).tolist(), color=plots.color("reward_model"))
            ax.set_xlabel("Probability of the preferred answer")
            ax.set_ylabel("Pairs")
        caption = "Labels close to 1 may be overconfident; --clamp bounds them."
        found.append(page.Section("The judge", [page.Figure(svg[0], "Labels", caption)], _numbers(judged)))
    return found


def _numbers(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, value in facts.items():
        if name == "agreement":
            rows.append(("Agreement with held-out labels", f"{value[0]:.1%} ({value[1]:.1%} to {value[2]:.1%})"))
        elif isinstance(value, int | float):
            rows.append(
                (name.replace("_", " ").capitalize(), f"{value:,.3g}" if isinstance(value, float) else f"{value:,}")
            )
    return rows


def table(results: dict[str, Any]) -> list[tuple[str, Any]]:
    """Returns the rows of the table that is printed at the end of a run."""
    rows: list[tuple[str, Any]] = [("prompts", results["prompts"])]
    if found := results.get("revisions"):
        rows += [("demonstrations", found["demonstrations"]), ("answers not revised completely", found["open"])]
    if found := results.get("judge"):
        rows += [(name, found[key]) for name, key in _JUDGED if key in found]
    return rows


_JUDGED = (
    ("agreement of the judge with held-out labels", "agreement"),
    ("comparisons", "comparisons"),
    ("pairs without a label", "open"),
    ("preference of the judge for the first place", "position_bias"),
)
