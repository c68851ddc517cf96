"""A reward model, trained and diagnosed; and what it is worth beside simple rules, by cross-validation.

    python experiments/reward_model.py                                the built-in world, about 2 minutes on two cores
    python experiments/reward_model.py --data.path FILE.jsonl.gz      the same on human comparisons
    python experiments/reward_model.py --data.path FILE --folds 5     cross-validated beside two baselines
    python experiments/reward_model.py --training.trains ^head/       the scalar head alone, on a frozen trunk
    python experiments/reward_model.py --pmp.prompts 3000 --training.limit 125
                                                                      preference-model pretraining first (HH A.2)
    python experiments/reward_model.py --resume runs/NAME             go on with a run that was stopped or killed

The base model and the SFT model come first, as in instructgpt.py, whose settings are settings here too. Written below
``--out``: results.json, report.html, config.json, metrics.jsonl, tensorboard/, checkpoints/, reward_model/ (Hugging
Face form, with what its scores were normalised on).

``--folds`` wants scikit-learn (``pip install "rlhf_jax[baselines]"``). Each fold trains its tokenizer, a small base
model and an ensemble of reward models on its own training pairs. The baselines, on the same folds: the shorter answer
wins, and a logistic regression on TF-IDF features, with the strength of its penalty chosen on inner splits. Differences
are paired; intervals count conversations, which are never split over folds.

To expect of the default preset: it ranks 69 % of held-out pairs as labelers did (66 to 72), 71 % of training pairs.

Hardware: two CPU cores. Time of five folds of 2,000 pairs: 5 to 7 minutes. To expect of 1,992 harmlessness pairs: the
reward model ranks 61.1 % as people did (59.0 to 63.3), the regression 62.0, the shorter answer 55.8; that is 5.3 points
above the one (3.0 to 7.7) and 0.8 below the other (-3.3 to 1.6). With so few pairs, words are learnt better one by one
than in order: the model leans on length, and is right on 79 % of pairs with the shorter answer chosen, 38 % of others.
"""

from __future__ import annotations

from launch import process_setup

if __name__ == "__main__":
    process_setup.use_huge_pages()

import dataclasses
import pathlib
import time
from typing import Any

from launch import command_line, entry_point, run_folder, settings
from preferences import baselines, cross_validation, cross_validation_results, reward_run
from preferences.reward_settings import SMOKE_CV, RewardRun, check
from recipe import human_comparisons, run_setup
from rich.console import Console

from rlhf_jax.data import errors
from rlhf_jax.report import console


def parse(arguments: list[str]) -> RewardRun:
    """Settings from the command line; exits for --help, raises SettingError for what cannot be."""
    asked = command_line.parse(RewardRun, arguments, doc=__doc__, adjust=_small)
    preset = settings.preset(
        asked.preset,
        dialogues=asked.data.path is not None,
        pretrained=asked.model is not None,
        published=asked.published,
    )
    check(asked, preset)
    return asked


def _small(preset: RewardRun) -> RewardRun:
    """The smoke preset's models of --folds."""
    if preset.preset != "smoke":
        return preset
    return dataclasses.replace(preset, cv=dataclasses.replace(preset.cv, **SMOKE_CV))


def run(asked: RewardRun) -> dict[str, Any]:
    """The whole job; returns what results.json holds."""
    out = Console()
    if asked.resume and (finished := run_folder.finished_results(asked.resume)):
        _show(out, finished)
        run_setup.print_line(out, f"{asked.resume} is finished; nothing was run")
        return finished
    path, results = _cross_validated(asked, out) if asked.folds else reward_run.run(asked, out)
    results |= {"seed": asked.seed, "preset": asked.preset}
    results["peak_rss_mb"] = process_setup.peak_memory_mb()
    results["seconds"] = time.time() - process_setup.START_TIME
    results = run_folder.finite(results)
    if asked.folds:
        cross_validation_results.write_page(path / "report.html", results)
    else:
        reward_run.write_page(path / "report.html", results)
    run_folder.write_json(path / run_folder.RESULTS, results)
    _show(out, results)
    run_setup.print_line(
        out, f"report: {path / 'report.html'}   numbers: {path / run_folder.RESULTS}   {results['seconds']:.0f} s"
    )
    return results


def _cross_validated(asked: RewardRun, out: Console) -> tuple[pathlib.Path, dict[str, Any]]:
    baselines.need_sklearn()
    if asked.resume:
        run_folder.check_data_unchanged(asked.resume, asked)
    path = pathlib.Path(asked.resume) if asked.resume else run_folder.free_path(asked)
    counts = errors.DropCount(max_dropped=asked.data.max_dropped)
    found = human_comparisons.read(asked.data, counts)
    human_comparisons.check_roles(found)
    pairs = human_comparisons.pairs(found)
    if len(pairs) < 10 * asked.folds:
        raise settings.SettingError(
            f"--folds {asked.folds} is too many for the {len(pairs)} pairs of {asked.data.path}"
        )
    folder = run_folder.RunFolder(path) if asked.resume else run_folder.create(path, asked)
    run_setup.print_line(out, f"writing to {path}; {len(pairs)} pairs, {counts.report()}")
    with console.StageProgress([(f"fold-{n}", 1.0) for n in range(1, asked.folds + 1)]) as progress:
        done = cross_validation.cross_validate(
            pairs, asked.cv, folds=asked.folds, seed=asked.seed, folder=folder, progress=progress
        )
    folder.log.close()
    return path, {"dropped": counts.dropped, **cross_validation_results.summary(pairs, done, seed=asked.seed)}


def _show(out: Console, results: dict[str, Any]) -> None:
    for made in cross_validation_results.tables(results) if "folds" in results else reward_run.tables(results):
        out.print(made)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    entry_point.execute(run, parse, arguments)


if __name__ == "__main__":
    main()
