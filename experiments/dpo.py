"""Trains a policy with DPO or a related loss on comparisons, starting from an SFT model, and evaluates it.

    python experiments/dpo.py --model MODEL --data.path FILE
                                                             your own model and data; other settings apply, which --help
                                                             shows if it follows these flags
    python experiments/dpo.py                                DPO on the built-in world
    python experiments/dpo.py --loss kto                     or cdpo, robust, ipo, hinge, orpo, simpo, dpo-sft, dpo-norm
    python experiments/dpo.py --rounds 4                     four rounds of sampling, labelling and training
    python experiments/dpo.py --rounds 4 --judge labelers    labels from simulated labelers instead of the reward model
    python experiments/dpo.py --preset smoke                 all stages, too short to learn much
    python experiments/dpo.py --data.path FILE.jsonl.gz      human comparisons (docs/data.md)
    python experiments/dpo.py --resume runs/NAME             resume an interrupted run

The base model, the SFT models and the comparisons are created as in instructgpt.py, whose settings apply here too,
except those without effect, which are refused. Most losses have a reference, which is an SFT model or, in later rounds
without --hold-reference, the current policy. The log-probabilities of the reference are computed before training and
saved in reference/. A reward model is trained on the same pairs, unless --pairs reduces those of the policy. Its
accuracy is compared with the accuracy of the policy's implicit reward. With --rounds, the reward model also labels the
samples unless --judge selects another source of labels.

The run folder contains results.json, report.html, config.json, metrics.jsonl, tensorboard/, checkpoints/, reference/
and policy/, a model in Hugging Face format.

The run takes about 5 minutes and 1.4 GB on two CPU cores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from finetune import preference_settings
from launch import command_line, process_setup, setting_checks
from launch import settings as settings_lib
from launch.setting_checks import require
from preferences import direct_settings


@dataclasses.dataclass(frozen=True)
class DPOSettings(direct_settings.DirectSettings, settings_lib.Settings):
    """Settings of dpo.py, in addition to those of instructgpt.py."""

    command: ClassVar[str] = "dpo"

    rounds: int = 0
    """Number of rounds of sampling, labelling and training. In each round, the reference is the policy at the start of
    the round. 0 trains once, on the comparisons."""
    samples: int = 4
    """Number of answers to sample for each prompt of a round. The best and the worst form a pair."""
    judge: Literal["reward", "labelers", "gold"] = "reward"
    """Source of the labels in rounds: the reward model or, in the built-in world, the simulated labelers or the gold
    utility."""
    hold_reference: bool = False
    """Use the SFT model as the reference in all rounds, as in online DPO."""


USED_PPO_SETTINGS = ("learning_rate", "adam_eps", "adam_tf1", "adam_b2", "weight_decay", "temperature")
"""The --ppo settings that dpo.py accepts. The policy is trained with the optimiser of PPO."""
ROUND_PPO_SETTINGS = ("iterations", "batch", "minibatches")
"""The --ppo settings that it also accepts with --rounds in the built-in world, which uses ``iterations`` times
``batch`` prompts. ``minibatches`` has no effect, but may have to be changed with ``batch``, which it must divide."""


OWN = """Trains your own model with DPO or a related loss on your own comparisons.

    python experiments/dpo.py --model MODEL --data.path FILE
    python experiments/dpo.py --model MODEL --data.path FILE --loss kto      or cdpo, robust, ipo, hinge, orpo, simpo,
                                                                             dpo-sft, dpo-norm
    python experiments/dpo.py --model MODEL --data.path FILE --lora.rank 16  low-rank adapters, merged at the end
    python experiments/dpo.py --model tiny --data.path FILE                  a small model with random weights
    python experiments/dpo.py --resume runs/NAME                             resume an interrupted run

MODEL is a folder in Hugging Face format or the output folder of an earlier command, such as sft.py. FILE has pairs or
rankings in any of the forms of docs/data.md. Only the policy is trained, and MODEL is its reference. The
log-probabilities of the reference are computed before training and saved in reference/. Without --model or --data.path,
dpo.py trains in the built-in world or from scratch; with --rounds, it trains the stages of instructgpt.py first. --help
shows the settings of these runs if it does not follow these flags.

The run folder contains model/, in Hugging Face format with its tokenizer, results.json (accuracy of the implicit reward
and log-probabilities of held-out pairs, before and after), report.html, config.json, metrics.jsonl, tensorboard/,
checkpoints/ and reference/. Other commands accept the run folder as their --model.
"""


def parse(arguments: list[str]) -> Any:
    """Parses the command line; raises SettingError for invalid settings."""
    own = preference_settings.OwnDPOSettings
    if preference_settings.is_own(arguments, "--rounds", own=own, world=DPOSettings):
        return command_line.parse_stage(own, arguments, doc=OWN, check=preference_settings.check_dpo)
    settings = command_line.parse(DPOSettings, arguments, doc=__doc__, unused=_unused)
    direct_settings.check(settings)
    direct_settings.check_mesh(settings, settings.mesh)
    for name, least in (("rounds", 0), ("samples", 2)):
        require(getattr(settings, name) >= least, settings, name, f"at least {least}")
    if settings.data.path is not None and settings.judge != "reward":
        raise settings_lib.SettingError(
            f"--judge {settings.judge} requires the built-in world; leave out --judge or --data.path"
        )
    if settings.published is not None:
        raise settings_lib.SettingError(
            f"--published {settings.published} selects settings of PPO, which dpo.py does not run; leave it out"
        )
    return settings


def _unused(settings: DPOSettings) -> Iterator[tuple[Sequence[str], str]]:
    """Yields the settings that have no effect on the run, and why."""
    names = ("samples", "judge", "hold_reference") if settings.rounds == 0 else ("pairs",)
    yield names, f"with --rounds {settings.rounds}"
    if not settings.has_reference:
        yield ("hold_reference",), f"with --loss {settings.loss}, which has no reference"
    yield from direct_settings.unused(settings)
    used = (*USED_PPO_SETTINGS, *ROUND_PPO_SETTINGS)
    unread = [field.name for field in dataclasses.fields(settings_lib.PPO) if field.name not in used]
    yield [f"ppo.{name}" for name in unread], "on dpo.py"
    rounds = [f"ppo.{name}" for name in ROUND_PPO_SETTINGS]
    if settings.rounds == 0:
        yield rounds, "on dpo.py without --rounds"
    elif settings.data.path is not None:
        yield rounds, "on dpo.py with --data.path, whose prompts it uses"
    if settings.learning_rate is not None:
        yield ("ppo.learning_rate",), "with --learning-rate"
    yield ("reward_model.heldout",), "on dpo.py, which trains one reward model"
    yield ("hosts",), "on dpo.py, which runs on a single host"


if __name__ == "__main__":
    command_line.answer_help(parse)
    process_setup.use_huge_pages()


import numpy as np
from finetune import direct_training
from launch import entry_point, run_folder
from preferences import direct_alignment
from preferences import pairs as pairs_lib
from recipe import comparison_data, evaluation, jobs, precompile, reward_diagnosis, run_setup, stages, tasks
from rich.console import Console

from rlhf_jax import lm, metrics, report
from rlhf_jax.data import errors
from rlhf_jax.report import console
from rlhf_jax.report import results as results_lib


def run(settings: Any) -> dict[str, Any]:
    """Runs all stages and returns the contents of results.json."""
    if isinstance(settings, preference_settings.OwnDPOSettings):
        return direct_training.run(settings)
    preference_settings.warn_without_data(settings)
    out = Console()
    if settings.resume and (finished := run_folder.finished_results(settings.resume)):
        run_setup.print_line(out, f"{settings.resume} is already finished; there is nothing to run")
        out.print(console.results_table(finished))
        return finished
    names = [f"{settings.loss}-round{r}" for r in range(settings.rounds)] or [settings.loss]
    weights = [*((name, 20.0) for name in names), ("evaluate", 20.0)]

    def check_prompts(task: tasks.Task) -> None:
        if 0 < len(task.rl_prompts) < settings.rounds:
            raise settings_lib.SettingError(
                f"--rounds is {settings.rounds}; it must be at most {len(task.rl_prompts)}, the number of prompts"
            )

    with run_setup.open_run(settings, out, kind=settings.loss, weights=weights, accept=check_prompts) as (folder, job):
        trainer = direct_alignment.make_trainer(job, settings, folder.path)
        with precompile.in_background(job, {}, compile_rest=trainer.compile_ahead):
            base = stages.pretrain(job)
            sft = stages.supervised(job, "sft", base, epochs=settings.sft.epochs, mix=0.0)
            sft_mix = stages.supervised(job, "sft_mix", base, epochs=settings.sft.mix_epochs, mix=settings.sft.mix)
            (ranked, *_), validation, facts = comparison_data.load_or_collect(job, [sft, sft_mix])
            (reward,) = stages.train_reward_models(job, sft_mix, [ranked], validation=validation)
            reward_facts = reward_diagnosis.measure(job, reward, validation, ranked)
            policy, training_facts = _train(job, trainer, settings, sft_mix, reward, ranked, facts)
            held_out = pairs_lib.from_rankings(
                validation, prompt_width=job.task.prompt_width, per_prompt=0, seed=settings.seed
            )
            implicit = trainer.accuracy(policy, sft_mix, held_out)
            policies = {"base": base, "sft": sft, "sft_mix": sft_mix, settings.loss: policy}
            evaluated = evaluation.evaluate(job, policies, reward, labeler_temperature=facts.get("labeler_temperature"))
    results = {
        "peak_rss_mb": process_setup.peak_memory_mb(),
        "incidents": folder.incidents(),
        "seed": settings.seed,
        "preset": settings.preset,
        "loss": settings.loss,
        "dropped": job.task.dropped.dropped | job.task.dropped.truncated,
        # At least 1, as in `jobs.Job.programs`.
        "programs": {name: n for name, n in job.programs().items() if name != "ppo"}
        | {"direct": max(trainer.train_step.traces, 1)},
        "reward_model": reward_facts | facts,
        "implicit_accuracy": implicit,
        **training_facts,
        **evaluated,
    }
    results = run_folder.finite(results) | {"seconds": folder.elapsed.total}
    lm.save(folder.path / "policy", job.cfg, policy, tokenizer=job.task.tokenizer)
    report.write_report(
        folder.path / "report.html",
        results,
        metrics.read(folder.path),
        title=f"{results_lib.label(settings.loss)} from an SFT model",
        settings=setting_checks.by_flag(settings),
    )
    folder.write_json(run_folder.RESULTS, results)
    out.print(console.results_table(results))
    for name, used in results["training_data"].items():
        numbers = ", ".join(errors.counted(n, noun.replace("_", " ")) for noun, n in used.items())
        run_setup.print_line(out, f"{results_lib.label(name)} was trained on {numbers}")
    mean, bounds = results_lib.format_parts(implicit, percent=True)
    interval = f" ({bounds})" if bounds else ""
    run_setup.print_line(out, f"the implicit reward agrees with the labels of {mean} % of held-out pairs{interval}")
    run_setup.print_line(out, f"report: {folder.path / 'report.html'}   results: {folder.path / run_folder.RESULTS}")
    return results


def _train(
    job: jobs.Job,
    trainer: direct_alignment.Trainer,
    settings: DPOSettings,
    sft: Any,
    reward: Any,
    ranked: Any,
    facts: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """Trains on the comparisons or in rounds; returns the policy and facts about the pairs for results.json."""
    if settings.rounds == 0:
        pairs = pairs_lib.from_rankings(
            ranked, prompt_width=job.task.prompt_width, per_prompt=settings.pairs, seed=settings.seed
        )
        unseen = direct_alignment.schedule(settings, len(pairs), devices=trainer.devices).unseen
        policy = trainer.train(sft, pairs, name=settings.loss, seed=settings.seed)
        used = {"pairs": len(pairs), "prompts": len(np.unique(pairs.prompt_B)), "sampled_answers": 0}
        return policy, {"pairs": len(pairs), "unseen": unseen, "training_data": _training_data(settings, used, ranked)}
    judges: dict[str, Any] = {"reward": pairs_lib.reward_judge, "gold": pairs_lib.gold_judge}
    if settings.judge == "labelers":
        judges["labelers"] = pairs_lib.make_labeler_judge(job, facts["labeler_temperature"])
    policy, rounds = direct_alignment.iterate(
        trainer,
        sft,
        reward,
        job.task.rl_prompts,
        judge=judges[settings.judge],
        name=settings.loss,
        seed=settings.seed,
        rounds=settings.rounds,
        samples=settings.samples,
        hold_reference=settings.hold_reference,
    )
    prompts = len(job.task.rl_prompts) // settings.rounds * settings.rounds
    used = {"pairs": sum(each.pairs for each in rounds), "prompts": prompts}
    used["sampled_answers"] = prompts * settings.samples
    return policy, {
        "rounds": [each._asdict() for each in rounds],
        "training_data": _training_data(settings, used, ranked),
    }


def _training_data(settings: DPOSettings, used: dict[str, int], ranked: Any) -> dict[str, dict[str, int]]:
    """Returns the numbers of pairs, prompts and sampled answers that the policy and the reward model are trained on."""
    labelled = pairs_lib.count(ranked)
    reward_model = {"pairs": labelled["pairs"], "prompts": labelled["prompts"], "sampled_answers": 0}
    return {settings.loss: used, "reward_model": reward_model}


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    entry_point.execute(run, parse, arguments)


if __name__ == "__main__":
    main()
