"""Runs InstructGPT's recipe, from pretraining to PPO-ptx, and reports the results (Ouyang et al. 2022).

    python experiments/instructgpt.py                            about 5 minutes on two CPU cores, 2 GB of memory
    python experiments/instructgpt.py --preset smoke             all stages in about a minute, too short to learn much
    python experiments/instructgpt.py --data.path FILE.jsonl.gz  human comparisons from a file (docs/data.md)
    python experiments/instructgpt.py --model PATH               start from a model in Hugging Face format
    python experiments/instructgpt.py --stop-after sft           only the stages up to this one
    python experiments/instructgpt.py --resume runs/NAME         resume an interrupted or stopped run

The stages are:

    1. Pretrain a base model on text about a built-in world, which is a simulation with known facts and preferences.
    2. Fine-tune two SFT models on demonstrations.
    3. Sample answers from them, rank the answers with simulated labelers and train a reward model on the comparisons.
    4. Train a policy with PPO and another one with PPO-ptx.
    5. Evaluate all policies on held-out prompts.

With --data.path, comparisons come from a file (also as --data.comparisons), and so does everything else that has no
file of its own: --data.demonstrations, --data.prompts and --data.pretraining.

The run folder contains results.json, report.html, config.json, metrics.jsonl, tensorboard/, checkpoints/ and, in
Hugging Face format, base/ (unless it is --model), sft/, sft_mix/, ppo/, policy/ (the PPO-ptx policy) and reward_model/.

With the default preset, the reward model should agree with the labelers on about 70 % of held-out pairs. PPO and
PPO-ptx should beat SFT on 65 to 73 % of held-out prompts at a KL of 2 nats, about as often as best-of-16. PPO has an
alignment tax (its loss on pretraining text rises); PPO-ptx has none.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from launch import command_line, process_setup, setting_checks
from launch.settings import Settings


@dataclasses.dataclass(frozen=True)
class RecipeSettings(Settings):
    """Settings of instructgpt.py that no other command has."""

    stop_after: Literal["pretrain", "sft", "sft_mix", "comparisons", "reward_model", "ppo", "ppo_ptx"] | None = None
    """Stage after which the run stops and saves its models. --resume continues it, also with a later stage. None runs
    all stages and the evaluation."""


def parse(arguments: list[str]) -> RecipeSettings:
    """Parses the command line; raises SettingError for invalid settings."""
    named = [re.sub(r"^--data\.comparisons(?==|$)", "--data.path", each) for each in arguments]
    return command_line.parse(RecipeSettings, named, doc=__doc__)


if __name__ == "__main__":
    command_line.answer_help(parse)
    process_setup.use_huge_pages()

from collections.abc import Iterator
from typing import Any

from launch import entry_point, host_agreement, run_folder
from recipe import comparison_data, evaluation, jobs, monitoring, precompile, reward_diagnosis, run_setup, stages
from rich.console import Console

from rlhf_jax import lm, metrics, report
from rlhf_jax.distributed import hosts
from rlhf_jax.report import console


def _stages(job: jobs.Job) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs the stages; yields the name of each and what it made."""
    settings = job.settings
    base = stages.pretrain(job)
    yield "pretrain", {"base": base}
    sft = stages.supervised(job, "sft", base, epochs=settings.sft.epochs, mix=0.0)
    yield "sft", {"sft": sft}
    sft_mix = stages.supervised(job, "sft_mix", base, epochs=settings.sft.mix_epochs, mix=settings.sft.mix)
    yield "sft_mix", {"sft_mix": sft_mix}
    parts, validation, facts = comparison_data.load_or_collect(job, [sft, sft_mix])
    yield "comparisons", {"facts": facts}
    rewards = stages.train_reward_models(job, sft_mix, parts, validation=validation)
    diagnoses = [
        reward_diagnosis.measure(job, reward, validation, part) for reward, part in zip(rewards, parts, strict=True)
    ]
    yield "reward_model", {"rewards": rewards, "diagnoses": diagnoses}
    ppo = stages.train_ppo(job, "ppo", sft_mix, rewards, ptx_coef=0.0)
    yield "ppo", {"ppo": ppo}
    yield "ppo_ptx", {"ppo_ptx": stages.train_ppo(job, "ppo_ptx", sft_mix, rewards, ptx_coef=settings.ppo.ptx_coef)}


def run(settings: RecipeSettings) -> dict:
    """Runs all stages and returns the contents of results.json."""
    out = Console()
    if settings.resume and (finished := run_folder.finished_results(settings.resume)):
        out.quiet = not hosts.current().first
        run_setup.print_line(out, f"{settings.resume} is already finished; there is nothing to run")
        out.print(console.results_table(finished))
        return finished
    stop = settings.stop_after
    first, weights = _weights(stop)
    rl_stages = [name for name, _ in weights if name != "evaluate"]
    made: dict[str, Any] = {}
    with (
        run_setup.open_run(settings, out, weights=weights, first_stages=first) as (folder, job),
        precompile.in_background(job, dict.fromkeys(rl_stages, job)),
    ):
        for stage, part in _stages(job):
            made |= part
            if stage == stop:
                break
        policies = {name: made[name] for name in POLICIES if name in made}
        facts, diagnoses = made.get("facts", {}), made.get("diagnoses", [{}])
        evaluated: dict[str, Any] = {}
        if stop is None:
            evaluated = evaluation.evaluate(
                job, policies, made["rewards"][0], labeler_temperature=facts.get("labeler_temperature")
            )
    results = {
        **({} if stop is None else {"stopped_after": stop}),
        "seconds": folder.elapsed.total,
        "peak_rss_mb": process_setup.peak_memory_mb(),
        "seed": settings.seed,
        "preset": settings.preset,
        "published": settings.published,
        "dropped": job.task.dropped.dropped | job.task.dropped.truncated,
        "programs": job.programs(),
        "alarms": monitoring.raised_alarms(folder.log, settings, dtype=job.cfg.dtype),
        "incidents": folder.incidents(),
        **({"ptx_coef": monitoring.ptx_coef(folder.log)} if "ppo_ptx" in made else {}),
        "reward_model": diagnoses[0] | facts,
        **({"heldout_reward_model": diagnoses[1]} if len(diagnoses) > 1 else {}),
        **evaluated,
    }
    results = run_folder.finite(results)
    models = {("policy" if name == "ppo_ptx" else name): params for name, params in policies.items()}
    models |= {"reward_model": made["rewards"][0]} if "rewards" in made else {}
    if job.base is not None:
        del models["base"]
    models = {name: host_agreement.gather(params) for name, params in models.items()}
    if not hosts.current().first:
        return results
    for name, params in models.items():
        lm.save(folder.path / name, job.cfg, params, tokenizer=job.task.tokenizer)
    report.write_report(
        folder.path / "report.html",
        results,
        metrics.read(folder.path),
        title="From a base model to PPO-ptx",
        settings=setting_checks.by_flag(settings),
    )
    folder.write_json(run_folder.RESULTS, results)
    if stop is None:
        out.print(console.results_table(results))
    else:
        saved = ", ".join(f"{name}/" for name in models) or "no models"
        run_setup.print_line(out, f"stopped after {stop}; saved {saved}; continue with --resume {folder.path}")
    lines = [f"compiled programs: {', '.join(f'{n} {name}' for name, n in results['programs'].items())}"]
    if alarms := ", ".join(f"{a['name']} ({a['stage']}, step {a['step']})" for a in results["alarms"]):
        lines.append(f"alarms: {alarms}")
    lines += [f"{incident['stage']}: {incident['text']}" for incident in results["incidents"]]
    lines.append(f"report: {folder.path / 'report.html'}   results: {folder.path / run_folder.RESULTS}")
    for line in lines:
        run_setup.print_line(out, line)
    return results


POLICIES = ("base", "sft", "sft_mix", "ppo", "ppo_ptx")


def _weights(stop: str | None) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """Returns the stages that the run shares with other commands, and the others, with their durations in seconds."""
    weights = [*run_setup.FIRST_STAGES, ("ppo", 36.0), ("ppo_ptx", 43.0), ("evaluate", 20.0)]
    names = [name for name, _ in weights]
    shown, n = len(names) if stop is None else 1 + names.index(stop), len(run_setup.FIRST_STAGES)
    return weights[: min(n, shown)], weights[n:shown]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    entry_point.execute(run, parse, arguments)


if __name__ == "__main__":
    main()
