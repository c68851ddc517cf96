"""InstructGPT's recipe from nothing to PPO-ptx, with a table and a report (Ouyang et al. 2022).

    python experiments/instructgpt.py                            under 5 minutes on two CPU cores, 2 GB
    python experiments/instructgpt.py --preset smoke             all of it in about a minute, too short to learn much
    python experiments/instructgpt.py --data.path FILE.jsonl.gz  the same on human comparisons (docs/data.md)
    python experiments/instructgpt.py --model PATH               the same from a model you have, in Hugging Face form
    python experiments/instructgpt.py --resume runs/NAME         go on with a run that was stopped or killed

Stages: a base model from a built-in world's corpus; two supervised recipes; comparisons ranked by simulated labelers; a
reward model; PPO and PPO-ptx; evaluation on held-out prompts. Everything is written below ``--out``: results.json,
report.html, config.json, metrics.jsonl, tensorboard/, checkpoints/, policy/ and reward_model/ (Hugging Face form).

To expect of the default preset: a reward model that ranks 67 to 70 % of held-out pairs as their labelers did; PPO and
PPO-ptx that beat SFT on 73 to 79 % of held-out prompts at a KL of 2 to 3 nats, close to best-of-16 or above it; an
alignment tax on PPO and none on PPO-ptx.
"""

from __future__ import annotations

from launch import process_setup

if __name__ == "__main__":
    process_setup.use_huge_pages()

import time

from launch import command_line, host_agreement, run_folder, settings
from recipe import collection, evaluation, monitoring, precompile, reward_diagnosis, session, stages
from rich.console import Console

from rlhf_jax import lm, metrics, report
from rlhf_jax.distributed import hosts
from rlhf_jax.report import console


def parse(arguments: list[str]) -> settings.Settings:
    """Settings from the command line; exits for --help, raises SettingError for what cannot be."""
    return command_line.parse(settings.Settings, arguments, prog="instructgpt.py", doc=__doc__)


def run(asked: settings.Settings) -> dict:
    """The whole job; returns what results.json holds."""
    out = Console()
    if asked.resume and (finished := run_folder.finished_results(asked.resume)):
        out.quiet = not hosts.current().first
        out.print(console.results_table(finished))
        session.say(out, f"{asked.resume} is finished; nothing was run")
        return finished
    weights = [("ppo", 36.0), ("ppo_ptx", 43.0), ("evaluate", 20.0)]
    with (
        session.opened(asked, out, kind="instructgpt", weights=weights) as (folder, job),
        precompile.compiling(job, {"ppo": job, "ppo_ptx": job}),
    ):
        base = stages.pretrain(job)
        sft = stages.supervised(job, "sft", base, epochs=asked.sft.epochs, mix=0.0)
        sft_mix = stages.supervised(job, "sft_mix", base, epochs=asked.sft.mix_epochs, mix=asked.sft.mix)
        parts, validation, facts = collection.gather(job, [sft, sft_mix])
        rewards = stages.train_reward_models(job, sft_mix, parts, validation=validation)
        judged = [
            reward_diagnosis.reward_model_facts(job, each, validation, part) for each, part in zip(rewards, parts)
        ]
        ppo = stages.optimise(job, "ppo", sft_mix, rewards, ptx_coef=0.0)
        ppo_ptx = stages.optimise(job, "ppo_ptx", sft_mix, rewards, ptx_coef=asked.ppo.ptx_coef)
        policies = {"base": base, "sft": sft, "sft_mix": sft_mix, "ppo": ppo, "ppo_ptx": ppo_ptx}
        found = evaluation.evaluate(job, policies, rewards[0])
    results = {
        "seconds": time.time() - process_setup.BEGAN,
        "peak_rss_mb": process_setup.peak_memory_mb(),
        "seed": asked.seed,
        "preset": asked.preset,
        "published": asked.published,
        "dropped": job.task.dropped.dropped | job.task.dropped.truncated,
        "programs": job.programs(),
        "alarms": monitoring.raised(folder.log, asked),
        "incidents": folder.incidents(),
        "ptx_coef": monitoring.ptx_coef(folder.log),
        "reward_model": judged[0] | facts,
        **({"heldout_reward_model": judged[1]} if len(rewards) > 1 else {}),
        **found,
    }
    results = run_folder.finite(results)
    saved = [("policy", host_agreement.whole(ppo_ptx)), ("reward_model", host_agreement.whole(rewards[0]))]
    if not hosts.current().first:
        return results
    for name, params in saved:
        lm.save(folder.path / name, job.cfg, params, tokenizer=job.task.tokenizer, pad_id=job.task.fmt.pad_id)
    report.write_report(
        folder.path / "report.html",
        results,
        metrics.read(folder.path),
        title="From a base model to PPO-ptx",
        settings=settings.as_dict(asked),
    )
    results["seconds"] = time.time() - process_setup.BEGAN
    folder.write_json(run_folder.RESULTS, results)
    out.print(console.results_table(results))
    session.say(out, f"compiled programs: {', '.join(f'{n} {name}' for name, n in results['programs'].items())}")
    if alarms := ", ".join(f"{a['name']} ({a['stage']}, step {a['step']})" for a in results["alarms"]):
        session.say(out, f"alarms: {alarms}")
    for incident in results["incidents"]:
        session.say(out, f"{incident['stage']}: {incident['text']}")
    session.say(out, f"report: {folder.path / 'report.html'}   numbers: {folder.path / run_folder.RESULTS}")
    return results


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    command_line.enter(run, parse, arguments)


if __name__ == "__main__":
    main()
