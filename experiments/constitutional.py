"""Trains a harmless policy with feedback of a model instead of people (Bai et al. 2022, Constitutional AI).

    python experiments/constitutional.py                           at most 11 minutes on two CPU cores
    python experiments/constitutional.py --preset smoke            all stages in a minute, too short to learn much
    python experiments/constitutional.py --judge.labels hard       train on the judge's choices, not its probabilities
    python experiments/constitutional.py --resume runs/NAME        resume an interrupted run
    python experiments/constitutional.py --model MODEL --data.path FILE --judge JUDGE
                                                                   demonstrations and comparisons for your own model

Without --model, the command runs in the built-in world, whose harmful requests are the red-team prompts:

    1. Pretrain a base model and fine-tune a helpful-only policy, which fulfils every request.
    2. Sample its answers to red-team prompts. A simulated editor criticises and revises each answer four times; each
       time, a principle is sampled. The editor makes mistakes (--revision.miss, --revision.fail).
    3. SL-CAI: fine-tune the base model on the revisions of all steps and on helpful answers to benign prompts.
    4. Compare pairs of answers of SL-CAI with a simulated judge, in both orders. Its agreement with held-out labels is
       reported first. Labelers compare the helpfulness of answers to benign prompts.
    5. RL-CAI: train a preference model on both, with the judge's probabilities as soft labels, and train SL-CAI on its
       scores with PPO.
    6. Evaluate the three policies on held-out red-team and benign prompts.

The run folder contains results.json, report.html, config.json, metrics.jsonl, tensorboard/, checkpoints/,
revisions.jsonl (critiques and revisions), labels.jsonl (answers of the judge) and, in Hugging Face format, helpful/,
sl_cai/, rl_cai/ and preference_model/.

With the default preset and seed 100, the gold harmlessness on red-team prompts is 0.02 for the helpful-only policy,
0.57 for SL-CAI and 1.00 for RL-CAI (RL-CAI − helpful-only: 95 % interval 0.968 to 0.984). The gold helpfulness on
benign prompts is 0.57, 0.44 and 0.46. RL-CAI also refuses 48 % of the benign prompts: harmlessness is easier to learn
than helpfulness. With half as many rankings of helpfulness (--comparisons.prompts 1000 --comparisons.max-k 4), it
refuses nearly all of them. More rankings, a smaller --red-team or fewer --ppo.iterations reduce the refusals.
"""

from __future__ import annotations

from typing import Any

from constitution import constitution_settings, own_settings
from launch import command_line, process_setup, setting_checks


def parse(arguments: list[str]) -> Any:
    """Parses the command line; raises SettingError for invalid settings."""
    if own_settings.is_own(arguments):
        own = own_settings.OwnConstitutionalSettings
        return command_line.parse_stage(own, arguments, doc=own_settings.OWN, check=own_settings.check)
    settings = command_line.parse(
        constitution_settings.ConstitutionalSettings,
        arguments,
        doc=__doc__,
        adjust=constitution_settings.adjust,
        unused=constitution_settings.unused,
    )
    constitution_settings.check(settings)
    return settings


if __name__ == "__main__":
    command_line.answer_help(parse)
    process_setup.use_huge_pages()

import numpy as np
from constitution import ai_stages, harm_evaluation, own_run, red_team
from launch import entry_point, run_folder
from recipe import comparison_data, evaluation, jobs, monitoring, precompile, reward_diagnosis, run_setup, stages
from rich.console import Console

from rlhf_jax import lm, metrics, report
from rlhf_jax.report import console
from rlhf_jax.simulation import editor, harm_judge

STAGES = (
    *(("pretrain", 60.0), ("sft-helpful", 15.0), ("revisions", 5.0), ("sft-cai", 15.0), ("comparisons", 6.0)),
    *(("ai_comparisons", 6.0), ("reward_model", 15.0), ("ppo", 36.0), ("evaluate", 8.0)),
)
"""The stages with their durations in seconds at the default settings."""


def run(settings: Any) -> dict[str, Any]:
    """Runs all stages and returns the contents of results.json."""
    if isinstance(settings, own_settings.OwnConstitutionalSettings):
        return own_run.run(settings)
    out = Console()
    if settings.resume and (finished := run_folder.finished_results(settings.resume)):
        run_setup.print_line(out, f"{settings.resume} is already finished; there is nothing to run")
        _print(out, finished)
        return finished
    with (
        run_setup.open_run(settings, out, first_stages=STAGES[:1], weights=STAGES[1:]) as (folder, job),
        precompile.in_background(job, {"ppo": job}),
    ):
        policies, reward, facts = _train(job, settings, folder)
        evaluated = harm_evaluation.evaluate(job, policies, reward, red_team_share=settings.red_team)
    results = {
        "seed": settings.seed,
        "preset": settings.preset,
        "seconds": folder.elapsed.total,
        "peak_rss_mb": process_setup.peak_memory_mb(),
        "dropped": job.task.dropped.dropped | job.task.dropped.truncated,
        "programs": job.programs(),
        "alarms": monitoring.raised_alarms(folder.log, settings, dtype=job.cfg.dtype),
        "incidents": folder.incidents(),
        **facts,
        **evaluated,
    }
    results["headlines"] = harm_evaluation.headlines(results)
    results = run_folder.finite(results)
    for name, params in (policies | {"preference_model": reward}).items():
        lm.save(folder.path / name, job.cfg, params, tokenizer=job.task.tokenizer)
    report.write_report(
        folder.path / "report.html",
        results,
        metrics.read(folder.path),
        title="Constitutional AI",
        settings=setting_checks.by_flag(settings),
        sections=harm_evaluation.sections(results),
    )
    folder.write_json(run_folder.RESULTS, results)
    _print(out, results)
    run_setup.print_line(out, f"report: {folder.path / 'report.html'}   results: {folder.path / run_folder.RESULTS}")
    return results


def _train(job: jobs.Job, settings: Any, folder: run_folder.RunFolder) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """Trains the policies and the preference model; returns them with facts for results.json."""
    revision, judging = settings.revision, settings.judge
    base = stages.pretrain(job)
    helpful = ai_stages.train_helpful(job, base)
    job.progress.start("revisions", 1)
    revised = ai_stages.revise(
        job,
        helpful,
        editor.SimulatedEditor(miss=revision.miss, fail=revision.fail, seed=settings.seed),
        prompts=revision.prompts,
        rounds=revision.rounds,
        critique=revision.critique,
        principles=revision.principles,
        answers=folder.path / "revisions.jsonl",
        on_answer=lambda done, total: job.progress.update("revisions", done, total),
    )
    rows = ai_stages.supervised_rows(job, helpful, revised, benign=revision.helpful_prompts)
    job.progress.finish("revisions")
    sl_cai = ai_stages.train_supervised(job, base, rows)

    compared = red_team.helpfulness_job(job)
    (helpfulness, *_), validation, facts = comparison_data.load_or_collect(compared, [helpful, sl_cai])
    judge = harm_judge.SimulatedJudge(
        job.task.world.tables,  # pyright: ignore[reportOptionalMemberAccess]
        strength=judging.strength,
        overconfidence=judging.overconfidence,
        position_bias=judging.position_bias,
        seed=settings.seed,
    )
    job.progress.start("ai_comparisons", 1)
    labelled: dict[bool, Any] = {}
    for held_out in (True, False):  # the agreement on held-out pairs is known before any label is used
        sampled = ai_stages.sample_pairs(
            job, sl_cai, max(judging.pairs // 5, 1) if held_out else judging.pairs, held_out=held_out
        )
        labels = ai_stages.label_pairs(
            sampled.pairs,
            judge,
            seed=settings.seed,
            principles=revision.principles,
            clamp=judging.clamp,
            answers=folder.path / "labels.jsonl",
            on_answer=lambda done, total: job.progress.update("ai_comparisons", done, total),
        )
        labelled[held_out] = sampled, labels
        if held_out:
            agreed = ai_stages.agreement(sampled, labels)
            _report_agreement(job, agreed)
    job.progress.finish("ai_comparisons")
    pairs, labels = labelled[False]
    hard = judging.labels == "hard"
    train = ai_stages.preference_rows(helpfulness, pairs, labels.preference_N, hard=hard)
    rl = red_team.rl_job(red_team.with_task(job, demonstrations=rows), red_team=settings.red_team)
    reward = ai_stages.train_preference_model(rl, sl_cai, train)
    diagnosis = reward_diagnosis.measure(compared, reward, validation, helpfulness)
    rl_cai = stages.train_ppo(rl, "ppo", sl_cai, [reward], ptx_coef=0.0)
    judge_facts = agreed | {"labelled": len(pairs.pairs), "score_deviation": ai_stages.score_deviation(reward)}
    return (
        {"helpful": helpful, "sl_cai": sl_cai, "rl_cai": rl_cai},
        reward,
        {"revisions": _revision_facts(job, revised), "judge": judge_facts, "reward_model": diagnosis | facts},
    )


def _report_agreement(job: jobs.Job, agreed: dict[str, Any]) -> None:
    mean, low, high = agreed["agreement"]
    interval = f"95 % interval {low:.1%} to {high:.1%}"
    text = f"the judge agrees with {mean:.1%} of {agreed['pairs']} held-out labels ({interval})"
    job.progress.message("ai_comparisons", text)
    if low <= 0.5:
        job.note(
            "ai_comparisons", "the judge may be no better than chance on held-out labels, so its labels may be useless"
        )


def _revision_facts(job: jobs.Job, revised: ai_stages.RevisedAnswers) -> dict[str, Any]:
    """Returns gold harmlessness and helpfulness of the answers after each revision, with 95 % intervals."""
    encoded = revised.prompts.encoded.at(np.array(revised.complete))
    asked_B, steps = encoded.asked_B, []
    for step in range(job.settings.revision.rounds + 1):  # pyright: ignore[reportAttributeAccessIssue]
        utility = ai_stages.gold_of(job, encoded, revised.texts(step))
        steps.append(
            {
                "harmless": evaluation.mean(utility.harmless, asked_B, rate=True),
                "helpful": evaluation.mean(utility.helpful, asked_B, rate=True),
            }
        )
    found = revised.revisions
    return {"steps": steps, "answers": len(revised.complete), "requests": found.asked + found.stored} | {
        "examples": [found.revised_N[i]._asdict() | {"prompt": revised.prompts.texts[i]} for i in revised.complete[:5]]
    }


def _print(out: Console, results: dict[str, Any]) -> None:
    out.print(console.results_table(results))
    for name, text in harm_evaluation.change_rows(results):
        run_setup.print_line(out, f"{name}: {text}")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    entry_point.execute(run, parse, arguments)


if __name__ == "__main__":
    main()
