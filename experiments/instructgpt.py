"""Runs InstructGPT's recipe, from pretraining to PPO-ptx, and reports the results (Ouyang et al. 2022).

    python experiments/instructgpt.py                            about 5 minutes on two CPU cores, 2 GB of memory
    python experiments/instructgpt.py --preset smoke             all stages in about a minute, too short to learn much
    python experiments/instructgpt.py --data.path FILE.jsonl.gz  human comparisons from a file (docs/data.md)
    python experiments/instructgpt.py --model PATH               start from a model in Hugging Face format
    python experiments/instructgpt.py --resume runs/NAME         resume an interrupted run

The stages are:

    1. Pretrain a base model on text about a built-in world, which is a simulation with known facts and preferences.
    2. Fine-tune two SFT models on demonstrations.
    3. Sample answers from them, rank the answers with simulated labelers and train a reward model on the comparisons.
    4. Train a policy with PPO and another one with PPO-ptx.
    5. Evaluate all policies on held-out prompts.

The run folder contains results.json, report.html, config.json, metrics.jsonl, tensorboard/, checkpoints/ and, in
Hugging Face format, policy/ (the PPO-ptx policy) and reward_model/.

With the default preset, the reward model should agree with the labelers on 68 to 69 % of held-out pairs. PPO and
PPO-ptx should beat SFT on 69 to 74 % of held-out prompts at a KL of 2 nats, about as often as best-of-16. PPO has an
alignment tax (its loss on pretraining text rises); PPO-ptx has none.
"""

from __future__ import annotations

from launch import command_line, process_setup
from launch.settings import Settings


def parse(arguments: list[str]) -> Settings:
    """Parses the command line; raises SettingError for invalid settings."""
    return command_line.parse(Settings, arguments, doc=__doc__)


if __name__ == "__main__":
    command_line.answer_help(parse)
    process_setup.use_huge_pages()

import dataclasses
import time

from launch import entry_point, host_agreement, run_folder
from recipe import comparison_data, evaluation, monitoring, precompile, reward_diagnosis, run_setup, stages
from rich.console import Console

from rlhf_jax import lm, metrics, report
from rlhf_jax.distributed import hosts
from rlhf_jax.report import console


def run(settings: Settings) -> dict:
    """Runs all stages and returns the contents of results.json."""
    out = Console()
    if settings.resume and (finished := run_folder.finished_results(settings.resume)):
        out.quiet = not hosts.current().first
        run_setup.print_line(out, f"{settings.resume} is already finished; there is nothing to run")
        out.print(console.results_table(finished))
        return finished
    weights = [("ppo", 36.0), ("ppo_ptx", 43.0), ("evaluate", 20.0)]
    with (
        run_setup.open_run(settings, out, weights=weights) as (folder, job),
        precompile.in_background(job, {"ppo": job, "ppo_ptx": job}),
    ):
        base = stages.pretrain(job)
        sft = stages.supervised(job, "sft", base, epochs=settings.sft.epochs, mix=0.0)
        sft_mix = stages.supervised(job, "sft_mix", base, epochs=settings.sft.mix_epochs, mix=settings.sft.mix)
        parts, validation, facts = comparison_data.load_or_collect(job, [sft, sft_mix])
        rewards = stages.train_reward_models(job, sft_mix, parts, validation=validation)
        diagnoses = [
            reward_diagnosis.measure(job, reward, validation, part) for reward, part in zip(rewards, parts, strict=True)
        ]
        ppo = stages.train_ppo(job, "ppo", sft_mix, rewards, ptx_coef=0.0)
        ppo_ptx = stages.train_ppo(job, "ppo_ptx", sft_mix, rewards, ptx_coef=settings.ppo.ptx_coef)
        policies = {"base": base, "sft": sft, "sft_mix": sft_mix, "ppo": ppo, "ppo_ptx": ppo_ptx}
        evaluated = evaluation.evaluate(job, policies, rewards[0], labeler_temperature=facts.get("labeler_temperature"))
    results = {
        "seconds": time.time() - process_setup.START_TIME,
        "peak_rss_mb": process_setup.peak_memory_mb(),
        "seed": settings.seed,
        "preset": settings.preset,
        "published": settings.published,
        "dropped": job.task.dropped.dropped | job.task.dropped.truncated,
        "programs": job.programs(),
        "alarms": monitoring.raised_alarms(folder.log, settings, dtype=job.cfg.dtype),
        "incidents": folder.incidents(),
        "ptx_coef": monitoring.ptx_coef(folder.log),
        "reward_model": diagnoses[0] | facts,
        **({"heldout_reward_model": diagnoses[1]} if len(rewards) > 1 else {}),
        **evaluated,
    }
    results = run_folder.finite(results)
    models = {"policy": host_agreement.gather(ppo_ptx), "reward_model": host_agreement.gather(rewards[0])}
    if not hosts.current().first:
        return results
    for name, params in models.items():
        lm.save(folder.path / name, job.cfg, params, tokenizer=job.task.tokenizer)
    report.write_report(
        folder.path / "report.html",
        results,
        metrics.read(folder.path),
        title="From a base model to PPO-ptx",
        settings=dataclasses.asdict(settings),
    )
    folder.write_json(run_folder.RESULTS, results)
    out.print(console.results_table(results))
    lines = [f"compiled programs: {', '.join(f'{n} {name}' for name, n in results['programs'].items())}"]
    if alarms := ", ".join(f"{a['name']} ({a['stage']}, step {a['step']})" for a in results["alarms"]):
        lines.append(f"alarms: {alarms}")
    lines += [f"{incident['stage']}: {incident['text']}" for incident in results["incidents"]]
    lines.append(f"report: {folder.path / 'report.html'}   results: {folder.path / run_folder.RESULTS}")
    for line in lines:
        run_setup.print_line(out, line)
    return results


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    entry_point.execute(run, parse, arguments)


if __name__ == "__main__":
    main()
