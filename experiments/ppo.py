"""Trains a policy by reinforcement learning from its own answers (PPO, Ouyang et al. 2022, section 3.5).

    python experiments/ppo.py --policy SFT --reward-model RM --prompts prompts.jsonl
    python experiments/ppo.py --policy SFT --reward my_rewards.py:score --prompts prompts.jsonl   a Python function
    python experiments/ppo.py --policy SFT --reward-model RM --prompts FILE --ppo.method grpo --ppo.samples 8
    python experiments/ppo.py --policy SFT --reward-model RM --prompts FILE --ptx demonstrations.jsonl   PPO-ptx
    python experiments/ppo.py --resume runs/NAME                                resume an interrupted run

SFT and RM are folders in Hugging Face format or output folders of sft.py and reward_model.py. The function of a FILE.py
gets the prompts, as lists of chat messages, and the answers, as texts, and returns a number for each answer. If it has
a parameter `records`, it also gets the other columns of each prompt. To score every token, it has a parameter `tokens`,
which are the text pieces of each answer's tokens, not ids, and returns a list of numbers for each answer.

The run folder contains model/, the moving average of the policy in Hugging Face format, samples.jsonl, results.json,
report.html, config.json, metrics.jsonl, tensorboard/ and checkpoints/.
"""

from __future__ import annotations

from finetune import policy_settings
from finetune.policy_settings import ZERO_HEAD, PPOSettings
from launch import command_line, process_setup


def parse(arguments: list[str]) -> PPOSettings:
    """Parses the command line; raises SettingError for invalid settings."""
    parsed = command_line.parse_stage(PPOSettings, arguments, doc=__doc__, check=policy_settings.check)
    return policy_settings.with_absolute_files(parsed)


if __name__ == "__main__":
    command_line.answer_help(parse)
    process_setup.use_huge_pages()

import contextlib
import math
import pathlib
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from finetune import policy_data, policy_inputs, policy_rewards, policy_samples, stage_run, training
from launch import device_mesh, entry_point, run_folder
from recipe import engine, monitoring, optimiser_choice, rl_methods

from rlhf_jax import generation, lm, parallel, types
from rlhf_jax.data import batching, errors
from rlhf_jax.train import loop, ppo, ppo_models
from rlhf_jax.train.optim import update


def run(settings: PPOSettings) -> dict[str, Any]:
    """Trains the policy and returns the contents of results.json."""
    return stage_run.run(
        settings,
        counts=errors.DropCount(max_dropped=settings.max_dropped, flag="--max-dropped"),
        prepare=partial(policy_inputs.prepare, settings),
        train=partial(_train_with_rewards, settings),
        title="Reinforcement learning",
        rows=policy_samples.table,
    )


def _train_with_rewards(
    settings: PPOSettings, job: engine.Engine, folder: pathlib.Path, prepared: stage_run.Prepared
) -> stage_run.Trained:
    with _reward_errors(prepared.inputs.rewards):
        return stage_run.Trained(*_train(job, policy_inputs.stage_of(settings), settings, prepared.inputs, folder))


@contextlib.contextmanager
def _reward_errors(found: policy_rewards.Rewards) -> Iterator[None]:
    """Replaces the error of a compiled program by that of the reward function that caused it."""
    try:
        yield
    except run_folder.SettingError:
        raise
    except Exception as error:
        if found.failure is None:
            raise
        raise found.failure from error


class _KLLimit:
    """A log that ends the stage when the KL of an iteration exceeds the limit."""

    def __init__(self, log: Any, limit: float | None) -> None:
        self._log, self._limit, self.reached = log, limit, False

    def exceeded(self, values: Mapping[str, float | None]) -> bool:
        """Returns whether the KL of a logged iteration is above the limit."""
        return self._limit is not None and (values.get("kl") or 0.0) > self._limit

    def __call__(self, step: int, values: dict[str, float]) -> None:
        self._log(step, values)
        if self.exceeded(values):
            self.reached = True
            raise loop.Alarmed(f"KL {values['kl']:.3g} above --stop-at-kl {self._limit:g} at step {step}")

    def rewind(self, step: int) -> None:
        self._log.rewind(step)


def _train(
    job: engine.Engine, stage: str, settings: PPOSettings, inputs: policy_inputs.Inputs, folder: pathlib.Path
) -> tuple[types.Params, dict[str, Any]]:
    """Trains and evaluates the policy; returns its averaged parameters and results."""
    method, policy, mesh = policy_settings.method(settings), inputs.policy, job.mesh
    key = job.key(stage)
    train, held_out = inputs.train, inputs.held_out
    spec = generation.Sampling(
        max_new_tokens=settings.max_new_tokens,
        stop_ids=policy.fmt.stop_ids,
        pad_id=policy.fmt.pad_id,
        top_k=method.top_k,
        top_p=method.top_p,
    )
    if not method.correct_sampler:
        generation.check_on_policy(spec)
    scorer = policy_rewards.Scorer(inputs.rewards, policy.fmt, inputs.prompts, mesh)
    models = ppo_models.from_config(
        job.cfg,
        spec,
        prompt_width=inputs.prompts.tokens_BP.shape[1],
        samples=method.samples,
        critic=rl_methods.has_critic(method),
        critic_cfg=None if inputs.critic is None else inputs.critic.cfg,
        score=scorer.score,
    )
    one_each = ppo_models.from_config(job.cfg, spec, prompt_width=inputs.prompts.tokens_BP.shape[1])
    size = device_mesh.round_rows_up(min(64, method.batch), mesh)
    sampler = policy_samples.Sampler(one_each, temperature=method.temperature, size=size, mesh=mesh)

    def sample_some() -> types.Rollout:
        some = train.at(range(min(policy_rewards.NORMALISED_ON if inputs.rewards.models else 8, len(train))))
        return sampler(policy.params, inputs.reference, some, jax.random.fold_in(key, 3)).rollout

    parts = policy_rewards.parameters(job, scorer, sample_some, normalise=settings.normalise, size=size)
    start, critic = _trainables(job, settings, inputs, parts, key=jax.random.fold_in(key, 4))
    reward = {"parts": parts, "critic": None if critic is None else critic.frozen}
    if inputs.rewards.ensemble:
        reward["penalty"] = np.float32(settings.ppo.uncertainty)
    frozen = ppo.Frozen(inputs.reference, reward)
    if settings.critic == ZERO_HEAD:
        models = models._replace(join=ppo.shared_trunk)
    elif settings.lora.rank is not None:
        models = models._replace(join=partial(_join, start, critic))
    tx = optimiser_choice.chosen(settings)

    def new_state() -> ppo.PPOState:
        reference = None if method.reference_ema is None else inputs.reference
        make = lambda policy, critic, reference: ppo.create(policy, critic, tx, reference=reference)  # noqa: E731
        return job.create_on_mesh(make, start.params, None if critic is None else critic.params, reference)

    say = partial(job.progress.message, stage)
    watch = monitoring.watch(
        job.log,
        stage,
        lambda text: say(_with_flags(text)),
        stop=settings.on_alarm == "stop",
        dtype=job.cfg.dtype,
        **_thresholds(method),
    )
    limit = _KLLimit(watch, settings.stop_at_kl)
    callbacks = []
    if settings.show_every:
        show = policy_samples.make_show(
            folder,
            sampler,
            scorer,
            held_out if len(held_out) else train,
            every=settings.show_every,
            last=method.iterations,
            key=jax.random.fold_in(key, 5),
            policy_of=lambda params: start.join(inputs.reference, params["policy"]),
            frozen=frozen,
            say=say,
        )
        callbacks.append(show)
    step = parallel.jit_step(ppo.make_train_step(models, **rl_methods.train_step_options(method)), mesh=mesh)
    with job.checkpoints(stage) as checkpoints:
        saved = checkpoints.latest() or 0
    began = time.perf_counter()
    state = _fit(
        job, stage, step, new_state, method, limit, train, inputs.ptx, saved=saved, frozen=frozen, callbacks=callbacks
    )
    params = start.merge(inputs.reference, jax.block_until_ready(state.ema))
    del state
    rows, seconds = job.log.rows(stage), time.perf_counter() - began
    results: dict[str, Any] = {
        "iterations": len(rows),
        "prompts": {"training": len(train), "held_out": len(held_out)},
        # Sampled tokens, but the seconds include scoring and the updates.
        "tokens_per_second": method.batch * sum(row["length"] for row in rows[saved:]) / seconds
        if len(rows) > saved
        else None,
    }
    results["alarms"] = [
        {"stage": stage, "step": alarm.step, "name": alarm.name, "message": alarm.message} for alarm in watch.alarms
    ]
    if limit.reached:
        results["stopped_at_kl"] = settings.stop_at_kl
    return params, results | _evaluate(job, sampler, scorer, inputs, frozen, params, held_out)


def _with_flags(alarm: str) -> str:
    """Adds the flags of ppo.py that an alarm about unfinished answers describes."""
    flags = " (flags: --max-new-tokens and --ppo.missing-stop-score)"
    return alarm + flags if "lack a stop token" in alarm else alarm


def _thresholds(method: Any) -> dict[str, float]:
    """Returns the thresholds of alarms that differ from their defaults."""
    changed: dict[str, float] = {}
    if method.correct_sampler:  # the sampler may then differ from the policy
        changed |= {"max_gap": math.inf, "max_mean_gap": math.inf}
    if method.missing_stop == "subtract" and method.missing_stop_score == 0:  # unfinished answers keep their scores
        changed |= {"max_unfinished": math.inf, "almost_all": math.inf}
    return changed


def _trainables(
    job: engine.Engine,
    settings: PPOSettings,
    inputs: policy_inputs.Inputs,
    parts: dict[str, types.Params],
    *,
    key: jax.Array,
) -> tuple[training.Trainable, training.Trainable | None]:
    """Returns what is trained of the policy and of the critic, if the method has one."""
    policy = inputs.policy
    start = training.trainable(settings.lora, job.cfg, policy.params, jax.random.fold_in(key, 0))
    if not rl_methods.has_critic(policy_settings.method(settings)):
        return start, None
    if settings.critic == ZERO_HEAD:
        head = lm.with_head(key, policy.params, job.cfg, zero=True)["head"]
        return start, training.Trainable({"head": head}, None, update.all_trained, update.all_trained)
    if inputs.critic is None:
        cfg, initial = job.cfg, lm.with_head(jax.random.fold_in(key, 1), policy.params, job.cfg)
    else:
        name = next((name for name, each in inputs.rewards.models.items() if each is inputs.critic), None)
        cfg, initial = inputs.critic.cfg, inputs.critic.params if name is None else parts[name]
        initial = policy_rewards.one_head(initial)
    return start, training.trainable(settings.lora, cfg, job.put_params(initial), jax.random.fold_in(key, 2))


def _join(
    start: training.Trainable, critic: training.Trainable | None, frozen: ppo.Frozen, params: types.Params
) -> types.Params:
    """Attaches the adapters of policy and critic to their models."""
    joined = {"policy": start.join(frozen.reference, params["policy"])}
    return joined if critic is None else joined | {"critic": critic.join(frozen.reward["critic"], params["critic"])}


def _fit(
    job: engine.Engine,
    stage: str,
    step: parallel.JitStep,
    new_state: Any,
    method: Any,
    limit: _KLLimit,
    prompts: policy_data.Prompts,
    ptx: types.TokenBatch | None,
    *,
    saved: int,
    **options: Any,
) -> ppo.PPOState:
    """Trains until the last iteration or the KL limit. ``saved`` iterations have a checkpoint. Returns the state."""
    key, n_text = (
        job.key(stage),
        method.epochs * method.minibatches * round(method.batch // method.minibatches * method.ptx_ratio),
    )
    order = batching.epoch_batches(
        0, n=len(prompts), batch_size=method.batch // method.samples, key=key, steps=method.iterations
    )
    n, text_key = 1 if ptx is None else len(ptx.tokens_BL), jax.random.fold_in(key, 1)
    text_order = batching.epoch_batches(0, n=n, batch_size=n_text, key=text_key, steps=method.iterations)

    def batch_at(i: int) -> ppo.Batch:
        text = None if ptx is None else jax.tree.map(lambda x: x[text_order[i]], ptx)
        return ppo.Batch(prompts.tokens_BP[order[i]], prompts.mask_BP[order[i]], text)  # type: ignore[arg-type]

    def newest_state() -> ppo.PPOState:
        with job.checkpoints(stage) as checkpoints:
            return checkpoints.restore(new_state())[1]

    if any(limit.exceeded(row) for row in job.log.rows(stage) if row["step"] <= saved):  # ended before the resume
        limit.reached = True
        job.progress.skip(stage)
        return newest_state()
    try:
        return job.fit(
            stage,
            step,
            new_state(),
            method.iterations,
            batch_at=batch_at,
            hyper_at=lambda i: rl_methods.hyper(method, i, ptx_coef=method.ptx_coef),
            log=limit,
            **options,
        )
    except loop.Alarmed as alarmed:
        if not limit.reached:
            raise
        job.note(
            stage, f"ended after {alarmed.step} of {errors.counted(method.iterations, 'iterations')}: {alarmed.reason}"
        )
        job.progress.finish(stage)
        return newest_state()


def _evaluate(
    job: engine.Engine,
    sampler: policy_samples.Sampler,
    scorer: policy_rewards.Scorer,
    inputs: policy_inputs.Inputs,
    frozen: ppo.Frozen,
    params: types.Params,
    held_out: policy_data.Prompts,
) -> dict[str, Any]:
    """Returns the results of the policy before and after training on the held-out prompts, if there are any."""
    if not len(held_out):
        job.progress.skip("evaluate")
        return {}
    job.progress.start("evaluate", 2)
    measured = {}
    before, after = policy_samples.BEFORE, policy_samples.AFTER
    for number, (name, policy) in enumerate({before: inputs.policy.params, after: params}.items()):
        sampled = sampler(policy, inputs.reference, held_out, jax.random.fold_in(job.key("evaluate"), number))
        measured[name] = policy_samples.Measured(
            sampled, scorer.measure(frozen.reward, sampled.rollout, size=sampler.size)
        )
        job.progress.update("evaluate", number + 1, 2)
    job.progress.finish("evaluate")
    return policy_samples.compare(measured[before], measured[after], held_out) | {
        "reference": before if inputs.reference is inputs.policy.params else "reference",
        "transcripts": policy_samples.transcripts(scorer, held_out, measured),
    }


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    entry_point.execute(run, parse, arguments)


if __name__ == "__main__":
    main()
