"""DPO and its relatives: from an SFT model and comparisons straight to a policy, with a table and a report.

    python experiments/dpo.py                                DPO on the built-in world
    python experiments/dpo.py --loss kto                     or cdpo, robust, ipo, hinge, orpo, simpo, dpo-sft, dpo-norm
    python experiments/dpo.py --rounds 4                     iterated: sample, label, train, with a new reference each
    python experiments/dpo.py --rounds 4 --judge labelers    labelled by simulated people in place of the reward model
    python experiments/dpo.py --preset smoke                 all of it, too short to learn much
    python experiments/dpo.py --data.path FILE.jsonl.gz      on human comparisons (docs/data.md)
    python experiments/dpo.py --resume runs/NAME             go on with a run that was stopped or killed

Stages: base model, supervised fine-tuning and comparisons as in instructgpt.py, all of whose settings are settings here
too; then the log-probabilities of the SFT model, computed once and kept in reference/; training; evaluation. A reward
model is trained on the same comparisons: it labels the rounds, and is what the table and the implicit reward are held
against. Written below ``--out``: results.json, report.html, config.json, metrics.jsonl, tensorboard/, checkpoints/,
reference/, policy/ (Hugging Face form).

Hardware: two CPU cores, 1.4 GB. Time: 3.5 minutes. To expect: DPO wins against SFT on 65 to 70 % of held-out prompts at
a KL of 2.7 nats, and its implicit reward ranks 68 % of held-out pairs right, the reward model 69 %.
"""

from __future__ import annotations

from launch import process_setup
from recipe import jobs

if __name__ == "__main__":
    process_setup.use_huge_pages()

import dataclasses
import time
from typing import Any, ClassVar, Literal

from launch import command_line, entry_point, run_folder, settings
from preferences import direct_methods
from preferences import pairs as pairs_lib
from recipe import comparison_data, evaluation, precompile, reward_diagnosis, run_setup, stages, tasks
from rich.console import Console

from rlhf_jax import lm, metrics, report
from rlhf_jax.report import console
from rlhf_jax.report import results as results_lib


@dataclasses.dataclass(frozen=True)
class DPO(direct_methods.Direct, settings.Settings):
    """DPO and its relatives, with every setting of the main job."""

    command: ClassVar[str] = "dpo"

    rounds: int = 0
    """Rounds of sampling, labelling and training with the latest policy as reference; 0: train on the comparisons."""
    samples: int = 4
    """Answers to each prompt of a round; the best and the worst make a pair."""
    judge: Literal["reward", "labelers", "gold"] = "reward"
    """Who labels the rounds: the reward model, or of the built-in world the labelers or the gold utility."""
    hold_reference: bool = False
    """Keep the SFT model as the reference of every round (online DPO), in place of the latest policy."""


READ = ("learning_rate", "iterations", "batch", "minibatches", "adam_eps", "adam_tf1")
"""Of --ppo: the rate and Adam, how many prompts there are for rounds, and what must divide the batch."""


def parse(arguments: list[str]) -> DPO:
    """Settings from the command line; raises SettingError for what cannot be."""
    asked = command_line.parse(DPO, arguments, doc=__doc__)
    direct_methods.check(asked)
    direct_methods.check_mesh(asked, asked.mesh)
    for name, least in (("rounds", 0), ("samples", 2)):
        if getattr(asked, name) < least:
            raise settings.SettingError(f"--{name} is {getattr(asked, name)}; it must be at least {least}")
    if asked.data.path is not None and asked.judge != "reward":
        raise settings.SettingError(f"--judge {asked.judge} needs the built-in world; leave it or --data.path out")
    unread = ("samples", "judge", "hold_reference") if asked.rounds == 0 else ("pairs",)
    plain = {field.name: field.default for field in dataclasses.fields(DPO)}
    for name in unread:
        if getattr(asked, name) != plain[name]:
            flag = name.replace("_", "-")
            raise settings.SettingError(f"--{flag} is not read with --rounds {asked.rounds}; leave it out")
    if asked.published is not None:
        raise settings.SettingError(
            f"--published {asked.published} is about PPO, which dpo.py does not run; leave it out"
        )
    ppo = (f"ppo.{field.name}" for field in dataclasses.fields(settings.PPO) if field.name not in READ)
    direct_methods.refuse_unread(asked, (*ppo, "reward_model.heldout", "on_alarm"), program="dpo.py")
    if asked.hold_reference and not direct_methods.KINDS[asked.loss].reference:
        raise settings.SettingError(f"--hold-reference is of no use to --loss {asked.loss}, which has no reference")
    return asked


def run(asked: DPO) -> dict[str, Any]:
    """The whole job; returns what results.json holds."""
    out = Console()
    if asked.resume and (finished := run_folder.finished_results(asked.resume)):
        out.print(console.results_table(finished))
        run_setup.print_line(out, f"{asked.resume} is finished; nothing was run")
        return finished
    names = [f"{asked.loss}-round{r}" for r in range(asked.rounds)] or [asked.loss]
    weights = [*((name, 20.0) for name in names), ("evaluate", 20.0)]

    def accept(task: tasks.Task) -> None:
        if 0 < len(task.rl_prompts) < asked.rounds:
            raise settings.SettingError(
                f"--rounds is {asked.rounds}; there are {len(task.rl_prompts)} prompts for them"
            )

    with run_setup.open_run(asked, out, kind=asked.loss, weights=weights, accept=accept) as (folder, job):
        trainer = direct_methods.make_trainer(job, asked, folder.path)
        with precompile.in_background(job, {}, compile_rest=trainer.compile_ahead):
            base = stages.pretrain(job)
            sft = stages.supervised(job, "sft", base, epochs=asked.sft.epochs, mix=0.0)
            sft_mix = stages.supervised(job, "sft_mix", base, epochs=asked.sft.mix_epochs, mix=asked.sft.mix)
            (ranked, *_), validation, facts = comparison_data.load_or_collect(job, [sft, sft_mix])
            (reward,) = stages.train_reward_models(job, sft_mix, [ranked], validation=validation)
            judged = reward_diagnosis.measure(job, reward, validation, ranked)
            policy, learnt = _learnt(job, trainer, asked, sft_mix, reward, ranked, facts)
            held = pairs_lib.from_rankings(
                validation, prompt_width=job.task.prompt_width, per_prompt=0, seed=asked.seed
            )
            implicit = trainer.accuracy(policy, sft_mix, held)
            policies = {"base": base, "sft": sft, "sft_mix": sft_mix, asked.loss: policy}
            found = evaluation.evaluate(job, policies, reward)
    results = {
        "peak_rss_mb": process_setup.peak_memory_mb(),
        "incidents": folder.incidents(),
        "seed": asked.seed,
        "preset": asked.preset,
        "loss": asked.loss,
        "dropped": job.task.dropped.dropped | job.task.dropped.truncated,
        # As often as each was traced, or by an earlier process; see `jobs.Job.programs`.
        "programs": {name: n for name, n in job.programs().items() if name != "ppo"}
        | {"direct": max(trainer.train_step.traces, 1)},
        "reward_model": judged | facts,
        "implicit_accuracy": implicit,
        **learnt,
        **found,
    }
    results = run_folder.finite(results) | {"seconds": time.time() - process_setup.START_TIME}
    lm.save(folder.path / "policy", job.cfg, policy, tokenizer=job.task.tokenizer, pad_id=job.task.fmt.pad_id)
    title = f"{results_lib.label(asked.loss)} from an SFT model"
    report.write_report(
        folder.path / "report.html",
        results,
        metrics.read(folder.path),
        title=title,
        settings=dataclasses.asdict(asked),
    )
    folder.write_json(run_folder.RESULTS, results)
    out.print(console.results_table(results))
    mean, low, high = (100 * x for x in implicit)
    run_setup.print_line(
        out, f"held-out pairs ranked right by the implicit reward: {mean:.1f} % ({low:.1f}–{high:.1f})"
    )
    run_setup.print_line(out, f"report: {folder.path / 'report.html'}   numbers: {folder.path / run_folder.RESULTS}")
    return results


def _learnt(
    job: jobs.Job,
    trainer: direct_methods.Trainer,
    asked: DPO,
    sft: Any,
    reward: Any,
    ranked: Any,
    facts: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """The policy, from the comparisons or in rounds, and what was learnt from."""
    if asked.rounds == 0:
        width = job.task.prompt_width
        pairs = pairs_lib.from_rankings(ranked, prompt_width=width, per_prompt=asked.pairs, seed=asked.seed)
        learnt = {"pairs": len(pairs), "unseen": direct_methods.plan(asked, len(pairs), devices=trainer.devices).unseen}
        return trainer.train(sft, pairs, name=asked.loss, seed=asked.seed), learnt
    judges: dict[str, Any] = {"reward": pairs_lib.judged_by_reward, "gold": pairs_lib.judged_by_gold}
    if asked.judge == "labelers":
        judges["labelers"] = pairs_lib.judged_by_labelers(job, facts["labeler_temperature"])
    policy, rounds = direct_methods.iterate(
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


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    entry_point.execute(run, parse, arguments)


if __name__ == "__main__":
    main()
