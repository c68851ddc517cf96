"""Iterated online RLHF for helpfulness and harmlessness in the built-in world (Bai et al. 2022, HH).

    python experiments/hh.py                                      three rounds
    python experiments/hh.py --preset smoke                       all stages in about a minute, too short to learn much
    python experiments/hh.py --online.sets base online online     other comparison sets
    python experiments/hh.py --pm.harmless-weight 3               lambda-weighted harmlessness loss (HH 5.1.2)
    python experiments/hh.py --pm.separate                        a head for helpfulness and one for harmlessness
    python experiments/hh.py --online.red-team 0.5                more red-team prompts in the comparisons and in RL
    python experiments/hh.py --online.labels judge --judge JUDGE  labels of a model
    python experiments/hh.py --online.labels people               labels of people
    python experiments/hh.py --resume runs/NAME                   resume a run that was interrupted or waits for labels

The base model and the SFT model are trained as in instructgpt.py, whose settings apply here too, except those without
effect, which are refused. Each round has four steps:

    1. Two answers to each new prompt are sampled, from the SFT model, by rejection sampling, or from the policies so
       far.
    2. Simulated labelers, a judge or people compare their helpfulness on ordinary prompts and their harmlessness on
       requests for help with harm.
    3. A preference model is trained from scratch on the pairs of all rounds.
    4. A policy is trained with PPO from scratch. Snapshots of it are kept.

A static policy, whose preference model has as many pairs, all of answers of the SFT model, is trained for comparison.
At the end, all policies answer the same held-out prompts, and their gold utilities are compared by Elo scores relative
to the SFT model.

With --online.labels people, each round adds its pairs to a comparison store, prints the commands with which people
label them, and ends. When they have done so, --resume continues the run.

The run folder contains results.json, report.html, config.json, metrics.jsonl, tensorboard/, checkpoints/ and, in
Hugging Face format, sft_mix/, policy/ and preference_model/, those of the last round; labels.jsonl has the answers of a
judge, and comparisons.sqlite the labels of people.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from launch import command_line, process_setup
from launch.settings import Settings
from online import hh_settings
from online.hh_settings import HHSettings


def parse(arguments: list[str]) -> HHSettings:
    """Parses the command line; raises SettingError for invalid settings."""
    settings = command_line.parse(HHSettings, arguments, doc=__doc__, adjust=_adjust_preset, unused=hh_settings.unused)
    hh_settings.check(settings)
    if settings.online.store is None:
        return settings
    online = dataclasses.replace(settings.online, store=os.path.abspath(settings.online.store))
    return dataclasses.replace(settings, online=online)  # which can be resumed from any working directory


def _adjust_preset(preset: Settings) -> Settings:
    changes = hh_settings.SMOKE if preset.preset == "smoke" else {}
    if preset.published is None:
        changes = changes | {"ppo": {"kl_coef": hh_settings.KL_COEF}}
    changed = {name: dataclasses.replace(getattr(preset, name), **each) for name, each in changes.items()}
    return dataclasses.replace(preset, **changed)


if __name__ == "__main__":
    command_line.answer_help(parse)
    process_setup.use_huge_pages()

from functools import partial

from launch import entry_point, run_folder
from online import comparison_sets, hh_results, label_sources, rounds
from recipe import jobs, monitoring, run_setup, stages
from rich.console import Console

from rlhf_jax import lm
from rlhf_jax.data import errors
from rlhf_jax.feedback import store


def run(settings: HHSettings) -> dict[str, Any]:
    """Runs all rounds and returns the contents of results.json; without the labels of people, ends and returns {}."""
    out = Console()
    if settings.resume and (finished := run_folder.finished_results(settings.resume)):
        run_setup.print_line(out, f"{settings.resume} is already finished; there is nothing to run")
        hh_results.show(out, finished)
        return finished
    first = [each for each in run_setup.FIRST_STAGES if each[0] in ("pretrain", "sft_mix")]
    judge: list[Any] = []

    def accept(task: Any) -> None:
        hh_settings.accept(task)
        judge.append(label_sources.load_judge(settings))

    options: dict[str, Any] = {"first_stages": first, "accept": accept}
    try:
        with run_setup.open_run(settings, out, weights=rounds.weights(settings), **options) as (folder, job):
            start, made, evaluated = _train(job, settings, label_sources.make(settings, job, folder.path, judge[0]))
    except label_sources.Waiting as waiting:
        run_setup.print_line(out, str(waiting))
        return {}
    except store.StoreError as error:
        raise errors.DataError(str(error)) from None
    results = {
        "seconds": folder.elapsed.total,
        "peak_rss_mb": process_setup.peak_memory_mb(),
        "seed": settings.seed,
        "preset": settings.preset,
        "alarms": monitoring.raised_alarms(
            folder.log, settings, dtype=job.cfg.dtype, stages=rounds.rl_stages(settings)
        ),
        "incidents": folder.incidents(),
        **evaluated,
    }
    results = run_folder.finite(results)
    models = {"sft_mix": start, "policy": made.final, "preference_model": made.rewards[-1]}
    for name, params in models.items():
        lm.save(folder.path / name, job.cfg, params, tokenizer=job.task.tokenizer)
    hh_results.write_page(folder.path / "report.html", results)
    folder.write_json(run_folder.RESULTS, results)
    hh_results.show(out, results)
    run_setup.print_line(out, f"report: {folder.path / 'report.html'}   results: {folder.path / run_folder.RESULTS}")
    return results


def _train(
    job: jobs.Job, settings: HHSettings, source: label_sources.Source | None
) -> tuple[Any, rounds.Made, dict[str, Any]]:
    """Runs all stages with the labels of a source; returns the SFT model, what the rounds made and its evaluation."""
    online = settings.online
    job = rounds.with_prompts(job, online.red_team)
    base = stages.pretrain(job)
    start = stages.supervised(job, "sft_mix", base, epochs=settings.sft.mix_epochs, mix=settings.sft.mix)
    make = None if source is None else partial(label_sources.sample_and_ask, source=source)
    collect = partial(comparison_sets.collect, make=make)
    made = rounds.run(job, start, online, settings.pm, log=partial(_watched, job), collect_set=collect)
    evaluated = rounds.evaluate(job, online.sets, made)
    return start, made, evaluated if source is None else {"labels": online.labels, **evaluated}


def _watched(job: jobs.Job, stage: str) -> Any:
    """Returns the log of a stage of RL, which raises alarms."""
    message = partial(job.progress.message, stage)
    return monitoring.watch_stage(job.log, stage, job.settings, message, dtype=job.cfg.dtype)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    entry_point.execute(run, parse, arguments)


if __name__ == "__main__":
    main()
