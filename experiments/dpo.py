"""DPO and its relatives: from an SFT model and comparisons straight to a policy, with a table and a report.

    python experiments/dpo.py                                DPO on the built-in world
    python experiments/dpo.py --loss kto                     or cdpo, robust, ipo, hinge, orpo, simpo, dpo-sft, dpo-norm
    python experiments/dpo.py --rounds 4                     iterated: sample, label, train, with a new reference each
    python experiments/dpo.py --rounds 4 --judge labelers    labelled by simulated people in place of the reward model
    python experiments/dpo.py --preset smoke                 all of it, too short to learn much
    python experiments/dpo.py --data.path FILE.jsonl.gz      on human comparisons in Anthropic's format
    python experiments/dpo.py --resume runs/NAME             go on with a run that was stopped or killed

Stages: base model, supervised fine-tuning and comparisons as in instructgpt.py, all of whose settings are settings here
too; then the log-probabilities of the SFT model, computed once and kept in reference/; training; evaluation. A reward
model is trained on the same comparisons: it labels the rounds, and is what the table and the implicit reward are held
against. Written below ``--out``: results.json, report.html, config.json, metrics.jsonl, tensorboard/, checkpoints/,
reference/, policy/ (Hugging Face form).
"""

from __future__ import annotations

import os
import sys

if sys.platform == "linux" and os.environ.get("GLIBC_TUNABLES") is None and __name__ == "__main__":
    # Huge pages make steps about a third faster on a CPU; glibc reads this once, when a process starts.
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import dataclasses
import pathlib
import resource
import time
from typing import Any, Literal

from pipeline import ahead, command, direct, evaluation, preferences, rundir, settings, stages, start, tasks
from rich.console import Console

from rlhf_jax import console, lm, metrics, report
from rlhf_jax import results as results_lib

_COMMON = {"pretrain": 60, "sft": 15, "sft_mix": 16, "comparisons": 11, "reward_model": 19}
"""Seconds that the stages are expected to take, for the estimate of the time left."""


@dataclasses.dataclass(frozen=True)
class DPO(direct.Direct, settings.Settings):
    """DPO and its relatives, with every setting of the main job."""

    rounds: int = 0
    """Rounds of sampling, labelling and training with the latest policy as reference; 0: train on the comparisons."""
    samples: int = 4
    """Answers to each prompt of a round; the best and the worst make a pair."""
    judge: Literal["reward", "labelers", "gold"] = "reward"
    """Who labels the rounds: the reward model, or of the built-in world the labelers or the gold utility."""
    hold_reference: bool = False
    """Keep the SFT model as the reference of every round (online DPO), in place of the latest policy."""


def parse(arguments: list[str]) -> DPO:
    """Settings from the command line; raises SettingError for what cannot be."""
    asked = command.parse(DPO, arguments, prog="dpo.py", doc=__doc__)
    direct.check(asked)
    for name, least in (("rounds", 0), ("samples", 2)):
        if getattr(asked, name) < least:
            raise settings.SettingError(f"--{name} is {getattr(asked, name)}; it must be at least {least}")
    if asked.data.path is not None and asked.judge != "reward":
        raise settings.SettingError(f"--judge {asked.judge} needs the built-in world; leave it or --data.path out")
    if asked.hold_reference and not direct.KINDS[asked.loss].reference:
        raise settings.SettingError(f"--hold-reference is of no use to --loss {asked.loss}, which has no reference")
    return asked


def run(asked: DPO) -> dict[str, Any]:
    """The whole job; returns what results.json holds."""
    began, out = time.time(), Console()
    if asked.resume and (finished := rundir.finished_results(asked.resume)):
        out.print(console.results_table(finished))
        _say(out, f"{asked.resume} is finished; nothing was run")
        return finished
    path = pathlib.Path(asked.resume) if asked.resume else rundir.free_path(asked, kind=asked.loss)
    model_files = start.fingerprint(asked.model) if asked.model else None
    if asked.resume and model_files:
        rundir.same_model(asked.resume, asked, model_files)
    begin = start.load(asked.model) if asked.model else None
    task = tasks.make_task(asked, begin)
    if 0 < len(task.rl_prompts) < asked.rounds:
        raise settings.SettingError(f"--rounds is {asked.rounds}; there are {len(task.rl_prompts)} prompts for them")
    folder = rundir.RunFolder(path) if asked.resume else rundir.create(path, asked, model_files=model_files)
    _say(out, f"writing to {folder.path}; data: {task.dropped.report()}")
    names = [f"{asked.loss}-round{r}" for r in range(asked.rounds)] or [asked.loss]
    weights = [*_COMMON.items(), *((name, 20.0) for name in names), ("evaluate", 20.0)]
    with console.StageProgress(weights) as progress:
        job = stages.make_job(
            asked, task, start=begin, checkpoints=folder.checkpoints, log=folder.log, progress=progress
        )
        trainer = direct.make_trainer(job, asked, folder.path)
        with ahead.compiling(job, instead=trainer.compile_ahead):
            base = stages.pretrain(job)
            sft = stages.supervised(job, "sft", base, epochs=asked.sft.epochs, mix=0.0)
            sft_mix = stages.supervised(job, "sft_mix", base, epochs=asked.sft.mix_epochs, mix=asked.sft.mix)
            ranked, validation, facts = stages.comparisons(job, [sft, sft_mix])
            reward = stages.train_reward_model(job, sft_mix, ranked)
            reward = stages.normalised(job, reward, sft_mix)
            judged = evaluation.reward_model_facts(job, reward, validation)
            policy, learnt = _learnt(job, trainer, asked, sft_mix, reward, ranked, facts)
            held = preferences.from_rankings(validation, prompt_width=task.prompt_width, per_prompt=0, seed=asked.seed)
            implicit = trainer.accuracy(policy, sft_mix, held)
            policies = {"base": base, "sft": sft, "sft_mix": sft_mix, asked.loss: policy}
            found = evaluation.evaluate(job, policies, reward)
    folder.log.close()
    results = {
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "seed": asked.seed,
        "preset": asked.preset,
        "loss": asked.loss,
        "dropped": task.dropped.dropped | task.dropped.truncated,
        "programs": _programs(job, trainer),
        "reward_model": judged | facts,
        "implicit_accuracy": implicit,
        **learnt,
        **found,
    }
    results = rundir.finite(results) | {"seconds": time.time() - began}
    lm.save(folder.path / "policy", job.cfg, policy, tokenizer=task.tokenizer, pad_id=task.fmt.pad_id)
    title = f"{results_lib.label(asked.loss)} from an SFT model"
    report.write_report(
        folder.path / "report.html",
        results,
        metrics.read(folder.path),
        title=title,
        settings=dataclasses.asdict(asked),
    )
    folder.write_json(rundir.RESULTS, results)
    out.print(console.results_table(results))
    mean, low, high = (100 * x for x in implicit)
    _say(out, f"held-out pairs ranked right by the implicit reward: {mean:.1f} % ({low:.1f}–{high:.1f})")
    _say(out, f"report: {folder.path / 'report.html'}   numbers: {folder.path / rundir.RESULTS}")
    return results


def _learnt(
    job: stages.Job,
    trainer: direct.Trainer,
    asked: DPO,
    sft: Any,
    reward: Any,
    ranked: Any,
    facts: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """The policy, from the comparisons or in rounds, and what was learnt from."""
    if asked.rounds == 0:
        width = job.task.prompt_width
        pairs = preferences.from_rankings(ranked, prompt_width=width, per_prompt=asked.pairs, seed=asked.seed)
        return trainer.train(sft, pairs, name=asked.loss, seed=asked.seed), {"pairs": len(pairs)}
    judges: dict[str, Any] = {"reward": preferences.judged_by_reward, "gold": preferences.judged_by_gold}
    if asked.judge == "labelers":
        judges["labelers"] = preferences.judged_by_labelers(job, facts["labeler_temperature"])
    policy, rounds = direct.iterate(
        trainer,
        sft,
        reward,
        job.task.rl_prompts,
        judge=judges[asked.judge],
        name=asked.loss,
        seed=asked.seed,
        rounds=asked.rounds,
        samples=asked.samples,
        latest=not asked.hold_reference,
    )
    return policy, {"rounds": [dict(zip(each._fields, each)) for each in rounds]}


def _programs(job: stages.Job, trainer: direct.Trainer) -> dict[str, int]:
    """How often each of the large programs was traced, which is how often it was compiled."""
    steps = {"supervised": job.supervised_step, "reward_model": job.reward_step, "direct": trainer.train_step}
    return {name: step.traces for name, step in steps.items()} | {"sampling": job.sampler.traces}


def _say(out: Console, text: str) -> None:
    """Print a line whole, whatever the terminal's width, and its brackets as they are."""
    out.print(text, soft_wrap=True, markup=False, highlight=False)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    command.enter(run, parse, arguments)


if __name__ == "__main__":
    main()
