"""Trains and evaluates a reward model in the built-in world or on human comparisons, or cross-validates it.

    python experiments/reward_model.py --model MODEL --data.path FILE
                                                                      your own model and data; other settings apply,
                                                                      which --help shows if it follows these flags
    python experiments/reward_model.py                                the built-in world
    python experiments/reward_model.py --data.path FILE.jsonl.gz      human comparisons
    python experiments/reward_model.py --data.path FILE --folds 5     cross-validation of the model and two baselines
    python experiments/reward_model.py --training.trains ^head/       only the scalar head, on a frozen trunk
    python experiments/reward_model.py --pmp.prompts 3000 --training.limit 125
                                                                      preference-model pretraining (Bai et al. 2022)
    python experiments/reward_model.py --data.path FILE --folds 5 --pmp.prompts 4000
                                                                      the same without labels, cross-validated
    python experiments/reward_model.py --resume runs/NAME             resume an interrupted run

Without --folds, the base model and the SFT model are trained first, as in instructgpt.py, whose settings apply here
too, except those of PPO and evaluation. Of those of PPO, --ppo.temperature applies to sampled answers. The run folder
contains results.json, report.html, config.json, metrics.jsonl, tensorboard/, checkpoints/ and reward_model/, a Hugging
Face model with normalised scores, or, with --folds, the results of each fold.

Cross-validation (--folds) requires scikit-learn (pip install -e '.[baselines]'). In each fold, a tokenizer, a small
base model and an ensemble of reward models are trained on the training pairs. Two baselines are evaluated on the same
folds: preferring the shorter answer, and a logistic regression on TF-IDF features whose penalty is chosen on inner
splits. All pairs of a conversation are in the same fold, and intervals are clustered by conversation.

With --folds and --pmp.prompts, a second ensemble starts from a preference model, which is trained on comparisons that
need no labels: an assistant turn of a training dialogue is better than a turn of another conversation. It has the same
settings, and the report shows the difference in accuracy. This doubles the time.

On two CPU cores, a run in the built-in world takes about 2 minutes, and five-fold cross-validation on 2,000 pairs
takes 5 to 7 minutes.

In the built-in world, the reward model should agree with the labelers on 68 % of held-out pairs (95 % interval 65 to
70 %) and on 72 % of training pairs. In cross-validation on 1,992 harmlessness pairs, the expected accuracies are:

    reward model            61.1 % (59.0 to 63.3); 79 % if the chosen answer is the shorter one, and 38 % otherwise
    logistic regression     62.0 %, which is 0.8 points above the reward model (-1.6 to 3.3)
    shorter answer          55.8 %, which is 5.3 points below the reward model (3.0 to 7.7)
"""

from __future__ import annotations

import dataclasses
from typing import Any

from finetune import preference_settings
from launch import command_line, process_setup
from launch import settings as settings_lib
from preferences.reward_settings import SMOKE_CV, RewardSettings, check, unused

OWN = """Trains a reward model on your own comparisons, starting from your own model.

    python experiments/reward_model.py --model MODEL --data.path FILE
    python experiments/reward_model.py --model MODEL --data.path FILE --lora.rank 16     low-rank adapters and a head
    python experiments/reward_model.py --model MODEL --data.path FILE --training.trains ^head/   only the head
    python experiments/reward_model.py --model tiny --data.path FILE                     a small model, random weights
    python experiments/reward_model.py --model MODEL --data.path FILE --pmp.path CROWD   two files of comparisons
    python experiments/reward_model.py --resume runs/NAME                                resume an interrupted run

MODEL is a folder in Hugging Face format or the output folder of an earlier command, such as sft.py. FILE has pairs or
rankings in any of the forms of docs/data.md. Only the reward model is trained; with --pmp.path, on the comparisons in
CROWD first (preference-model pretraining, Askell et al. 2021), such as the votes on a website, and then on FILE.
Without --model or --data.path, reward_model.py trains in the built-in world or from scratch, with the settings that
--help shows without these flags.

The run folder contains model/, in Hugging Face format with its tokenizer, results.json (accuracy, calibration, length
bias and groups of the held-out comparisons), report.html, config.json, metrics.jsonl, tensorboard/ and checkpoints/.
Other commands accept the run folder as their reward model.
"""


def parse(arguments: list[str]) -> Any:
    """Parses the command line; raises SettingError for invalid settings."""
    own = preference_settings.OwnRewardSettings
    if preference_settings.is_own(arguments, "--folds", own=own, world=RewardSettings):
        return command_line.parse_stage(own, arguments, doc=OWN, check=preference_settings.check_reward)
    settings = command_line.parse(RewardSettings, arguments, doc=__doc__, adjust=_adjust_preset, unused=unused)
    check(settings)
    return settings


def _adjust_preset(preset: RewardSettings) -> RewardSettings:
    """Makes the models of --folds smaller in the smoke preset."""
    if preset.preset != "smoke":
        return preset
    return dataclasses.replace(preset, cv=dataclasses.replace(preset.cv, **SMOKE_CV))


if __name__ == "__main__":
    command_line.answer_help(parse)
    process_setup.use_huge_pages()

import pathlib

import numpy as np
from finetune import reward_training
from launch import elapsed_time, entry_point, run_folder
from preferences import cross_validation, cross_validation_results, reward_baselines, reward_run
from recipe import human_comparisons, run_setup
from rich.console import Console
from rich.table import Table

from rlhf_jax.data import errors
from rlhf_jax.report import results as results_lib


def run(settings: Any) -> dict[str, Any]:
    """Trains or cross-validates and returns the contents of results.json."""
    if isinstance(settings, preference_settings.OwnRewardSettings):
        return reward_training.run(settings)
    preference_settings.warn_without_data(settings)
    out = Console()
    if settings.resume and (results := run_folder.finished_results(settings.resume)):
        run_setup.print_line(out, f"{settings.resume} is already finished; there is nothing to run")
        _show(out, results)
        return results
    path, results = (_cross_validate if settings.folds else reward_run.run)(settings, out)
    results |= {"seed": settings.seed, "preset": settings.preset}
    results["peak_rss_mb"] = process_setup.peak_memory_mb()
    results["seconds"] = elapsed_time.ElapsedTime(path).total
    results = run_folder.finite(results)
    title, plotted, note = "A reward model", results, "All intervals are 95 % confidence intervals."
    if settings.folds:
        title, plotted = "A reward model, cross-validated", results["methods"]
        note = f"Each pair is scored by a model that was not trained on it. {note}"
    note = " ".join([note, *_rough(results)])
    cross_validation_results.write_page(path / "report.html", title, plotted, _tables(results), note)
    run_folder.write_json(path / run_folder.RESULTS, results)
    _show(out, results)
    run_setup.print_line(
        out, f"report: {path / 'report.html'}   results: {path / run_folder.RESULTS}   {results['seconds']:.0f} s"
    )
    return results


def _cross_validate(settings: RewardSettings, out: Console) -> tuple[pathlib.Path, dict[str, Any]]:
    reward_baselines.need_sklearn()
    if settings.resume:
        run_folder.lock(f"--resume {settings.resume}", pathlib.Path(settings.resume))
        run_folder.check_inputs_unchanged(settings.resume, settings)
    path = pathlib.Path(settings.resume) if settings.resume else run_folder.free_path(settings)
    counts = errors.DropCount(max_dropped=settings.data.max_dropped, flag="--data.max-dropped")
    rankings = human_comparisons.read(settings.data, counts)
    human_comparisons.check_roles(rankings)
    pairs = human_comparisons.pairs(rankings)
    if len(pairs) < 10 * settings.folds:
        raise settings_lib.SettingError(
            f"--folds is {settings.folds}; it must be at most {len(pairs) // 10}, a tenth of the {len(pairs)} pairs of "
            f"{settings.data.path}"
        )
    if (n := len(np.unique(human_comparisons.conversation_ids(pairs)))) < settings.folds:
        raise settings_lib.SettingError(
            f"--folds is {settings.folds}; it must be at most {n}, the number of conversations in {settings.data.path}"
        )
    folder = run_folder.resume(path, settings) if settings.resume else run_folder.create(path, settings)
    run_setup.print_line(out, f"writing to {path}; data: {errors.counted(len(pairs), 'pairs')}, {counts.report()}")
    weights = [(f"fold-{n}", 1.0) for n in range(1, settings.folds + 1)]
    with run_setup.make_progress(weights, folder) as progress:
        folds = cross_validation.cross_validate(
            pairs,
            settings.cv,
            folds=settings.folds,
            seed=settings.seed,
            folder=folder,
            progress=progress,
            pmp=settings.pmp,
        )
    folder.log.close()
    folder.elapsed.save()
    summary = cross_validation_results.summary(pairs, folds, seed=settings.seed)
    return path, {"dropped": counts.dropped, "incidents": folder.incidents(), **summary}


def _tables(results: dict[str, Any]) -> list[tuple[str, Table]]:
    return (cross_validation_results if "folds" in results else reward_run).titled_tables(results)


def _rough(results: dict[str, Any]) -> list[str]:
    """Returns sentences about intervals that are rough."""
    groups = results["by_turn"] + results["by_length"] if "folds" in results else results["reward_model"]["groups"]
    marked = any(map(results_lib.is_rough, groups))
    return [*results_lib.rough_intervals(results), *([results_lib.ROUGH_NOTE] if marked else [])]


def _show(out: Console, results: dict[str, Any]) -> None:
    for _, table in _tables(results):
        out.print(table)
    for text in _rough(results):
        run_setup.print_line(out, text)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    entry_point.execute(run, parse, arguments)


if __name__ == "__main__":
    main()
