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
from typing import NoReturn

_BEGAN = time.time()


def _with_huge_pages() -> None:
    """Start over with glibc's huge pages where that is not decided yet: steps run about a third faster on a CPU."""
    tunables = os.environ.get("GLIBC_TUNABLES")
    if sys.platform == "linux" and tunables is None and __name__ == "__main__":
        environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "RLHF_JAX_BEGAN": repr(_BEGAN)}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


_with_huge_pages()
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # torch is not needed, and not missed

import dataclasses  # noqa: E402
import pathlib  # noqa: E402
import resource  # noqa: E402

import tyro  # noqa: E402
from pipeline import ahead, evaluation, rundir, settings, stages, start, tasks  # noqa: E402
from rich.console import Console  # noqa: E402

from rlhf_jax import checkpoint, console, lm, metrics, report  # noqa: E402
from rlhf_jax.data import errors  # noqa: E402
from rlhf_jax.train import loop  # noqa: E402

WEIGHTS = {
    "pretrain": 50,
    "sft": 13,
    "sft_mix": 14,
    "comparisons": 15,
    "reward_model": 20,
    "ppo": 37,
    "ppo_ptx": 38,
    "evaluate": 21,
}
"""Seconds that the stages are expected to take, for the estimate of the time left."""


def parse(arguments: list[str]) -> settings.Settings:
    """Settings from the command line; exits for --help, raises SettingError for what cannot be."""
    name = _peek(arguments, "--preset") or "default"
    resume = _peek(arguments, "--resume")
    dialogues = _peek(arguments, "--data.path") is not None
    started = _peek(arguments, "--model") is not None
    if resume:
        begin = rundir.saved_settings(resume)
    else:
        begin = settings.preset(name, dialogues=dialogues, started=started)
    asked = tyro.cli(settings.Settings, args=arguments, default=begin, prog="instructgpt.py", description=__doc__)
    if resume and dataclasses.replace(asked, resume=None) != dataclasses.replace(begin, resume=None):
        raise settings.SettingError(
            f"--resume {resume} goes on with the settings of its config.json; give no other setting beside it"
        )
    settings.check(asked)
    if asked.model is None:
        return asked
    if asked.net != begin.net:
        raise settings.SettingError("--net sizes a model made from nothing; leave it out beside --model")
    # Absolute, so that the run can be resumed from anywhere.
    return dataclasses.replace(asked, model=str(pathlib.Path(asked.model).absolute()))


def _peek(arguments: list[str], flag: str) -> str | None:
    """The value of a flag that decides what the other flags start from."""
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(flag + "="):
            return argument.split("=", 1)[1]
    return None


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
        "dropped": task.dropped.dropped | task.dropped.truncated,
        "programs": job.programs(),
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
    _say(out, f"report: {folder.path / 'report.html'}   numbers: {folder.path / rundir.RESULTS}")
    return results


def _say(out: Console, text: str) -> None:
    """Print a line whole, whatever the terminal's width, and its brackets as they are."""
    out.print(text, soft_wrap=True, markup=False, highlight=False)


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    try:
        run(parse(sys.argv[1:] if arguments is None else arguments))
    except (settings.SettingError, errors.DataError, checkpoint.CheckpointError, loop.DivergedError) as error:
        _refuse(str(error))
    except loop.Preempted as stopped:
        print(f"{stopped}; go on with --resume", file=sys.stderr)
        raise SystemExit(75) from None  # EX_TEMPFAIL: try again later


if __name__ == "__main__":
    main()
