"""InstructGPT's recipe from nothing to PPO-ptx, with a table and a report (Ouyang et al. 2022).

    python experiments/instructgpt.py                            about 5 minutes on two CPU cores, 2 GB
    python experiments/instructgpt.py --preset smoke             all of it in about a minute, too short to learn much
    python experiments/instructgpt.py --data.path FILE.jsonl.gz  the same on human comparisons in Anthropic's format
    python experiments/instructgpt.py --model PATH               the same from a model you have, in Hugging Face form
    python experiments/instructgpt.py --resume runs/NAME         go on with a run that was stopped or killed

Stages: a base model from a built-in world's corpus; two supervised recipes; comparisons ranked by simulated labelers; a
reward model; PPO and PPO-ptx; evaluation on held-out prompts. Everything is written below ``--out``: results.json,
report.html, config.json, metrics.jsonl, tensorboard/, checkpoints/, policy/ and reward_model/ (Hugging Face form).

To expect of the default preset: a reward model that ranks 67 to 70 % of held-out pairs as their labelers did; PPO and
PPO-ptx that beat SFT on 70 to 78 % of held-out prompts at a KL of 2 to 3 nats, close to best-of-16 or above it; an
alignment tax on PPO and none on PPO-ptx.
"""

from __future__ import annotations

import os
import sys
import time

_BEGAN = time.time()


def _with_huge_pages() -> None:
    """Start over with glibc's huge pages where that is not decided yet: steps run about a third faster on a CPU."""
    tunables = os.environ.get("GLIBC_TUNABLES")
    if sys.platform == "linux" and tunables is None and __name__ == "__main__":
        environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "RLHF_JAX_BEGAN": repr(_BEGAN)}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


_with_huge_pages()
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # torch is not needed, and not missed

import pathlib  # noqa: E402
import resource  # noqa: E402

from pipeline import ahead, command, evaluation, rundir, settings, stages, start, tasks, watching  # noqa: E402
from rich.console import Console  # noqa: E402

from rlhf_jax import console, lm, metrics, report  # noqa: E402

WEIGHTS = {
    "pretrain": 60,
    "sft": 15,
    "sft_mix": 16,
    "comparisons": 11,
    "reward_model": 19,
    "ppo": 36,
    "ppo_ptx": 43,
    "evaluate": 20,
}
"""Seconds that the stages are expected to take, for the estimate of the time left."""


def parse(arguments: list[str]) -> settings.Settings:
    """Settings from the command line; exits for --help, raises SettingError for what cannot be."""
    return command.parse(settings.Settings, arguments, prog="instructgpt.py", doc=__doc__)


def run(asked: settings.Settings) -> dict:
    """The whole job; returns what results.json holds."""
    began = float(os.environ.get("RLHF_JAX_BEGAN", _BEGAN))
    out = Console()
    if asked.resume and (finished := rundir.finished_results(asked.resume)):
        out.print(console.results_table(finished))
        _say(out, f"{asked.resume} is finished; nothing was run")
        return finished
    path = pathlib.Path(asked.resume) if asked.resume else rundir.free_path(asked)
    # A model or a file that cannot be used is refused before anything is written.
    model_files = start.fingerprint(asked.model) if asked.model else None
    if asked.resume and model_files:
        rundir.same_model(asked.resume, asked, model_files)
    begin = start.load(asked.model) if asked.model else None
    task = tasks.make_task(asked, begin)
    folder = rundir.RunFolder(path) if asked.resume else rundir.create(path, asked, model_files=model_files)
    _say(out, f"writing to {folder.path}; data: {task.dropped.report()}")
    if begin is not None:
        _say(out, f"from {begin.path} ({begin.cfg.model_type}); chat template: {begin.fmt.origin}")
    with console.StageProgress(list(WEIGHTS.items())) as progress:
        job = stages.make_job(
            asked, task, start=begin, checkpoints=folder.checkpoints, log=folder.log, progress=progress
        )
        with ahead.compiling(job):
            base = stages.pretrain(job)
            sft = stages.supervised(job, "sft", base, epochs=asked.sft.epochs, mix=0.0)
            sft_mix = stages.supervised(job, "sft_mix", base, epochs=asked.sft.mix_epochs, mix=asked.sft.mix)
            train, validation, facts = stages.comparisons(job, [sft, sft_mix])
            reward = stages.train_reward_model(job, sft_mix, train)
            reward = stages.normalised(job, reward, sft_mix)
            judged = evaluation.reward_model_facts(job, reward, validation)
            ppo = stages.optimise(job, "ppo", sft_mix, reward, ptx_coef=0.0)
            ppo_ptx = stages.optimise(job, "ppo_ptx", sft_mix, reward, ptx_coef=asked.ppo.ptx_coef)
            policies = {"base": base, "sft": sft, "sft_mix": sft_mix, "ppo": ppo, "ppo_ptx": ppo_ptx}
            found = evaluation.evaluate(job, policies, reward)
    folder.log.close()
    results = {
        "seconds": time.time() - began,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "seed": asked.seed,
        "preset": asked.preset,
        "published": asked.published,
        "dropped": task.dropped.dropped | task.dropped.truncated,
        "programs": job.programs(),
        "alarms": watching.raised(folder.log, asked),
        "reward_model": judged | facts,
        **found,
    }
    results = rundir.finite(results)
    for name, params in (("policy", ppo_ptx), ("reward_model", reward)):
        lm.save(folder.path / name, job.cfg, params, tokenizer=task.tokenizer, pad_id=task.fmt.pad_id)
    report.write_report(
        folder.path / "report.html",
        results,
        metrics.read(folder.path),
        title="From a base model to PPO-ptx",
        settings=settings.as_dict(asked),
    )
    results["seconds"] = time.time() - began
    folder.write_json(rundir.RESULTS, results)
    out.print(console.results_table(results))
    _say(out, f"compiled programs: {', '.join(f'{n} {name}' for name, n in results['programs'].items())}")
    if results["alarms"]:
        _say(out, "alarms: " + ", ".join(f"{a['name']} ({a['stage']}, step {a['step']})" for a in results["alarms"]))
    _say(out, f"report: {folder.path / 'report.html'}   numbers: {folder.path / rundir.RESULTS}")
    return results


def _say(out: Console, text: str) -> None:
    """Print a line whole, whatever the terminal's width, and its brackets as they are."""
    out.print(text, soft_wrap=True, markup=False, highlight=False)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    command.enter(run, parse, arguments)


if __name__ == "__main__":
    main()
