"""Settings of ppo.py and their checks; imports neither jax nor the library, so that ``--help`` is fast."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import types
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from launch import setting_checks, settings
from launch.run_settings import Lora, Optimizer, RunSettings, SettingError, Template

NEW_HEAD, ZERO_HEAD = "new-head", "zero-head"


@dataclasses.dataclass(frozen=True)
class Method(settings.RL):
    """RL: the method and its settings."""

    iterations: int = 30
    """Number of iterations. Each samples a rollout and then updates the policy on it."""
    batch: int = 64
    """Answers per rollout."""
    minibatches: int = 2
    """Number of minibatches, and thus of optimiser steps, per epoch."""
    ema: float = 0.9
    """Decay of the moving average of the policy's weights that is evaluated and saved (0.992 in InstructGPT, which has
    far more updates). 0 uses the last weights."""
    learning_rate: float | None = None
    """Learning rate of the policy after the warmup. None uses 2e-5, or 2e-4 with --lora.rank."""
    critic_learning_rate: float | None = None
    """Learning rate of the critic after the warmup. None uses 5e-5, or 5e-4 with --lora.rank."""
    missing_stop_score: float | None = None
    """Score for an answer without a stop token, at most 0. None uses -3 if all rewards are normalised reward models,
    and otherwise leaves the scores of such answers as they are."""
    uncertainty: float = 0.0
    """Weight of the penalty for disagreement of an ensemble, which consists of all reward models and their heads (see
    --training.keep-heads of reward_model.py): their reward is the mean of their scores minus this weight times the
    standard deviation (Coste 2023, with the variance). 0 has no ensemble, and sums the scores of the reward models."""
    worst_case: bool = False
    """Use the lowest score of the ensemble as its reward (Coste 2023)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What ppo.py trains, on which prompts and with which rewards."""

    policy: str
    """The policy to start from: a folder in Hugging Face format, or the output folder of an earlier command."""
    prompts: str
    """JSONL, JSON (also compressed) or Parquet file with prompts in any of the forms in docs/data.md. A pattern with *
    selects several files."""
    reward_model: tuple[str, ...] = ()
    """Reward models: folders in Hugging Face format, or output folders of reward_model.py. They must have the policy's
    tokenizer, but may have another size."""
    reward: tuple[str, ...] = ()
    """Reward functions, each as MODULE:FUNCTION or FILE.py:FUNCTION. A function gets the prompts, as lists of chat
    messages, and the answers, as texts, and returns a number for each answer, or for each of its tokens."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each reward in their sum, first those of --reward-model, then those of --reward. By default, all are
    1. An ensemble (--ppo.uncertainty, --ppo.worst-case) is one reward."""
    normalise: bool = True
    """Scale the scores of each reward model to mean 0 and standard deviation 1 on answers of the policy, so that KL
    coefficients are comparable. Scores of reward functions are never changed."""
    critic: str | None = None
    """Initial critic: the folder of a reward model, `new-head` for the policy with a new head, or `zero-head` for a
    zero head on the policy's trunk, which both losses then train. None uses the first reward model, or else
    `new-head`."""
    reference: str | None = None
    """Folder of the model from which the KL is measured. None uses --policy."""
    ptx: str | None = None
    """File of the pretraining loss of PPO-ptx: demonstrations in any of the forms in docs/data.md, records with a field
    `text`, or a .txt file. None has no such loss."""
    max_new_tokens: int = 128
    """Maximum number of tokens in an answer."""
    prompt_width: int | None = None
    """Maximum number of tokens in a prompt. Longer prompts lose their oldest turns or, with a single turn, are dropped;
    both are counted. None uses the width that holds 99 % of the prompts, at most the model's maximum length without
    --max-new-tokens."""
    max_dropped: float = 0.01
    """Maximum share of unusable prompts. A file with a larger share is refused."""
    held_out: float = 0.1
    """Share of the prompts, at most 256 prompts, held out to evaluate the policy before and after training. 0 holds out
    none."""
    show_every: int = 5
    """Number of iterations between answers to two fixed prompts, which are printed and saved in samples.jsonl. Those of
    the last iteration are shown too. 0 shows none."""
    stop_at_kl: float | None = None
    """KL from the reference, in nats per answer. If an iteration exceeds it, training ends, and the policy is evaluated
    and saved."""
    on_alarm: Literal["report", "stop"] = "report"
    """Response to an alarm, such as a negative KL. `report` prints it and continues; `stop` saves and stops the run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOSettings(RunSettings, Optimizer, Training):
    """Settings of ppo.py."""

    command: ClassVar[str] = "ppo"
    inputs: ClassVar[tuple[str, ...]] = ("policy", "prompts", "reward_model", "critic", "reference", "ptx")
    functions: ClassVar[tuple[str, ...]] = ("reward",)

    epsilon: float = 1e-5
    """Number added to the root of AdamW's second moment. Has no effect with `adafactor` and `lion`."""
    lora: Lora = dataclasses.field(default_factory=Lora)
    template: Template = dataclasses.field(default_factory=Template)
    ppo: Method = dataclasses.field(default_factory=Method)

    def batches(self) -> dict[str, int]:
        """Returns the numbers of rows that must be multiples of --mesh.data x --mesh.fsdp, by flag or description."""
        return settings.rl_batches(self.ppo, ptx=self.ptx is not None)


def method(chosen: PPOSettings) -> settings.PPO:
    """Returns the settings of the RL method in the form of the other commands, with all defaults filled in."""
    own, adapters = chosen.ppo, chosen.lora.rank is not None
    shared: dict[str, Any] = {field.name: getattr(own, field.name) for field in dataclasses.fields(settings.RL)}
    score = own.missing_stop_score
    if score is None:
        normalised = chosen.normalise and not chosen.reward
        score = -3.0 if normalised else 0.0
        shared["missing_stop"] = own.missing_stop if normalised else "subtract"
    if chosen.ptx is None:
        shared["ptx_coef"] = 0.0
    return settings.PPO(
        **shared,
        learning_rate=own.learning_rate or (2e-4 if adapters else 2e-5),
        critic_learning_rate=own.critic_learning_rate or (5e-4 if adapters else 5e-5),
        critic="zero-head" if chosen.critic == ZERO_HEAD else "reward",
        missing_stop_score=score,
    )


def check(chosen: PPOSettings) -> None:
    """Raises SettingError for the first setting that is out of range, in conflict with another, or without effect."""
    _check_ranges(chosen)
    _check_rewards(chosen)
    full = method(chosen)
    setting_checks.check_ppo(types.SimpleNamespace(ppo=full), [full])
    refuse = setting_checks.refuse_changed
    refuse(chosen, dataclasses.replace(chosen, ppo=Method()), _unused(chosen, full))
    optimizer = {"adafactor": ("b1", "b2", "epsilon"), "lion": ("epsilon",)}.get(chosen.optimizer, ())
    default = dataclasses.replace(chosen, b1=Optimizer.b1, b2=Optimizer.b2, epsilon=PPOSettings.epsilon)
    refuse(chosen, default, [(optimizer, f"with --optimizer {chosen.optimizer}")])
    if full.method != "ppo":
        refuse(chosen, dataclasses.replace(chosen, critic=None), [(["critic"], f"with --ppo.method {full.method}")])
    if chosen.lora.rank is None:
        refuse(chosen, dataclasses.replace(chosen, lora=Lora()), [(["lora"], "without --lora.rank")])
        return
    for name, value, why in (
        ("reference", chosen.reference, "adapters are trained on --policy, which is therefore the reference"),
        ("ppo.reference_ema", full.reference_ema, "adapters are trained on the reference, which must not change"),
        ("critic", chosen.critic if chosen.critic == ZERO_HEAD else None, "adapters need a critic of their own"),
    ):
        if value is not None:
            raise SettingError(f"{setting_checks.flag_name(name)} is {value}; leave it out with --lora.rank: {why}")


def _check_ranges(chosen: PPOSettings) -> None:
    require = setting_checks.require
    require(chosen.max_new_tokens >= 1, chosen, "max_new_tokens", "at least 1")
    require(chosen.prompt_width is None or chosen.prompt_width >= 1, chosen, "prompt_width", "at least 1")
    require(0 <= chosen.held_out < 1, chosen, "held_out", "at least 0 and below 1")
    require(0 <= chosen.max_dropped <= 1, chosen, "max_dropped", "between 0 and 1")
    require(chosen.show_every >= 0, chosen, "show_every", "at least 0")
    require(chosen.stop_at_kl is None or chosen.stop_at_kl > 0, chosen, "stop_at_kl", "above 0")
    least = chosen.ppo.uncertainty
    require(math.isfinite(least) and least >= 0, chosen, "ppo.uncertainty", "at least 0")
    for name in ("learning_rate", "critic_learning_rate"):  # 0 would be taken for None
        require(getattr(chosen.ppo, name) != 0, chosen, f"ppo.{name}", "positive")


def is_ensemble(chosen: PPOSettings) -> bool:
    """Returns whether the reward models form an ensemble, whose disagreement matters."""
    return chosen.ppo.worst_case or chosen.ppo.uncertainty != 0


def _check_rewards(chosen: PPOSettings) -> None:
    n = len(chosen.reward_model) + len(chosen.reward)
    if n == 0:
        raise SettingError("no reward is given; set --reward-model FOLDER or --reward MODULE:FUNCTION")
    if is_ensemble(chosen):
        if chosen.ppo.uncertainty and chosen.ppo.worst_case:
            raise SettingError("--ppo.uncertainty has no effect with --ppo.worst-case; leave out one of them")
        if not chosen.reward_model:
            flag = "worst-case" if chosen.ppo.worst_case else "uncertainty"
            raise SettingError(f"--ppo.{flag} needs an ensemble of reward models; set --reward-model, or leave it out")
        n = 1 + len(chosen.reward)
    if chosen.reward_weights and len(chosen.reward_weights) != n:
        raise SettingError(
            f"the number of --reward-weights is {len(chosen.reward_weights)}; it must be {n}, the number of rewards"
        )
    if chosen.reward_weights and not any(chosen.reward_weights):
        raise SettingError("--reward-weights has only zeros; at least one weight must differ from 0")
    if not chosen.reward_model:
        default = dataclasses.replace(chosen, normalise=True)
        setting_checks.refuse_changed(chosen, default, [(["normalise"], "without --reward-model")])


def _unused(chosen: PPOSettings, full: settings.PPO) -> Iterator[tuple[list[str], str]]:
    own = {field.name for field in dataclasses.fields(Method)}
    for names, why in setting_checks.unused_ppo([full], ptx=chosen.ptx is not None, why="without --ptx"):
        why = why.replace(f"--ppo.critic {full.critic}", "a separate critic")
        yield [name for name in names if name.removeprefix("ppo.") in own], why


def with_absolute_files(chosen: PPOSettings) -> PPOSettings:
    """Makes the paths of FILE.py:FUNCTION absolute, so that the run can be resumed from any working directory."""

    def absolute(reward: str) -> str:
        file, colon, name = reward.rpartition(":")
        return f"{pathlib.Path(file).absolute()}{colon}{name}" if os.path.isfile(file) else reward

    return dataclasses.replace(chosen, reward=tuple(map(absolute, chosen.reward)))
