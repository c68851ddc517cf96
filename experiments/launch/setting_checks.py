"""Checks that settings are in range and consistent before anything is created or compiled."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from typing import Any

from launch import mesh_settings
from launch.settings import PPO, SettingError, Settings

_POSITIVE = (
    *("data.prompt_width", "data.response_width", "world.labelers", "net.layers", "net.width", "net.heads"),
    *("net.mlp", "pretrain.documents", "pretrain.steps", "pretrain.batch", "sft.demonstrations", "sft.epochs"),
    *("sft.mix_epochs", "comparisons.prompts", "reward_model.batch", "ppo.iterations", "ppo.batch", "ppo.epochs"),
    *("ppo.minibatches", "evaluation.prompts", "evaluation.best_of", "evaluation.best_of_prompts", "saves"),
    "max_skipped",
    *("evaluation.skills", "evaluation.pretraining_rows", "pretrain.learning_rate", "sft.learning_rate"),
    *("reward_model.learning_rate", "ppo.learning_rate", "ppo.critic_learning_rate", "ppo.clip", "ppo.value_clip"),
    *("ppo.temperature", "ppo.max_grad_norm", "ppo.ptx_ratio", "ppo.samples", "ppo.micro_batches", "ppo.adam_eps"),
    *("ppo.kl_target", "ppo.reward_clip", "ppo.shards", "evaluation.temperature"),
)
_NOT_NEGATIVE = (
    *("seed", "world.slips", "world.spread", "world.tie_width", "pretrain.warmup", "ppo.warmup", "ppo.kl_coef"),
    *("ppo.ptx_coef", "evaluation.transcripts", "ppo.kl_gain", "ppo.kl_loss_coef", "ppo.entropy_coef"),
    *("ppo.value_coef", "ppo.weight_decay"),
)
_SHARES = (
    *("data.max_dropped", "data.held_out", "world.lapse", "sft.mix", "ppo.lambda_", "ppo.ema", "ppo.discount"),
    *("ppo.reference_ema", "ppo.adam_b2"),
)
KL_IN_LOSS = ("grpo", "dr-grpo")
"""Methods that penalise the KL in the loss and not in the reward."""
_CRITIC_SETTINGS = ("critic", "value_coef", "value_clip", "lambda_", "whiten_rewards", "normalise_values")
_KL_IN_REWARD = ("kl_coef", "kl_target", "kl_gain", "both_kl_terms")
_COMPARING_METHODS = ("rloo", "grpo", "dr-grpo")
_OFF_POLICY = (
    "used together with --ppo.correct-sampler: truncated sampling draws from a distribution other than the policy's, "
    "which makes log-ratios and KL wrong"
)


def flag_name(name: str) -> str:
    """Returns the flag of a setting, such as ``--ppo.kl-coef`` for ``ppo.kl_coef``."""
    return "--" + re.sub("_(?!$)", "-", name)


def require(ok: bool, settings: Any, name: str, requirement: str) -> None:
    """Raises SettingError with the flag and its value unless ``ok``. ``requirement`` completes "it must be"."""
    if not ok:
        raise SettingError(f"{flag_name(name)} is {_value(settings, name)!r}; it must be {requirement}")


def require_divides(settings: Any, name: str, size: int, what: str) -> None:
    """Raises SettingError unless the setting divides ``size``, which the message calls ``what``."""
    if size % (value := _value(settings, name)):
        raise SettingError(f"{flag_name(name)} is {value}; it must divide {what}")


def _value(settings: Any, name: str) -> Any:
    return operator.attrgetter(name)(settings)


_OF_THE_WORLD = ("world", "comparisons", "pretrain.documents", "sft.demonstrations", "evaluation.split")
_OF_THE_WORLD += ("evaluation.skills",)
_OF_A_FILE = ("data.vocab_size", "data.prompt_width", "data.response_width", "data.held_out")
_OF_A_NEW_MODEL = ("net", "pretrain.steps", "pretrain.learning_rate", "pretrain.warmup", "data.vocab_size")


def check_used(settings: Settings, preset: Settings) -> None:
    """Raises SettingError for the first setting that was changed from the preset and has no effect on the run."""
    unused = (
        (settings.data.path is not None, _OF_THE_WORLD, "with --data.path, which replaces the built-in world"),
        (settings.data.path is None, _OF_A_FILE, "without --data.path"),
        (settings.model is not None, _OF_A_NEW_MODEL, "with --model, which replaces the new model"),
    )
    for names, why in ((names, why) for applies, names, why in unused if applies):
        for name in names:
            value = _value(settings, name)
            fields = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else [""]
            for field in fields:
                full = f"{name}.{field}" if field else name
                if _value(settings, full) != _value(preset, full):
                    raise SettingError(f"{flag_name(full)} has no effect {why}; leave it out")


def _check_ppo(settings: Settings) -> None:
    ppo, default = settings.ppo, PPO()
    for name in ("ppo.minibatches", "ppo.samples"):
        require_divides(settings, name, ppo.batch, f"--ppo.batch {ppo.batch}")
    answers = ppo.batch // ppo.minibatches
    text_rows = answers * ppo.ptx_ratio
    require_divides(settings, "ppo.micro_batches", answers, f"{answers}, the number of answers in a minibatch")
    if ppo.method in _COMPARING_METHODS:
        requirement = f"at least 2 with --ppo.method {ppo.method}, which compares the answers to a prompt"
        require(ppo.samples >= 2, settings, "ppo.samples", requirement)
    if ppo.method != "ppo":
        for name in _CRITIC_SETTINGS:
            unset = getattr(ppo, name) == getattr(default, name)
            require(unset, settings, f"ppo.{name}", f"left out with --ppo.method {ppo.method}, which has no critic")
    without = f"left out with --ppo.method {ppo.method}"
    if ppo.method in KL_IN_LOSS:
        for name in _KL_IN_REWARD:
            unset = getattr(ppo, name) == getattr(default, name)
            why = f"{without}, which has no KL in the reward; set --ppo.kl-loss-coef"
            require(unset, settings, f"ppo.{name}", why)
    elif (ppo.kl_loss_coef or 0) > 0 and not ppo.both_kl_terms:
        why = "0 with --ppo.kl-loss-coef, or the KL is penalised twice; --ppo.both-kl-terms allows this"
        require(ppo.kl_coef == 0, settings, "ppo.kl_coef", why)
    if ppo.method not in ("ppo", "reinforce-pp"):
        require(ppo.discount == 1, settings, "ppo.discount", f"{without}, whose rewards are not discounted")
    unset = ppo.kl_gain == default.kl_gain or ppo.kl_target is not None
    require(unset, settings, "ppo.kl_gain", "left out without --ppo.kl-target, which enables the adaptive coefficient")
    require(text_rows >= 1, settings, "ppo.ptx_ratio", "large enough for each minibatch to have a pretraining row")
    require_divides(settings, "ppo.shards", answers, f"{answers}, the number of answers in a minibatch")
    text = round(text_rows)
    require_divides(settings, "ppo.shards", text, f"{text}, the number of pretraining rows in a minibatch")


def check(settings: Settings) -> None:
    """Raises SettingError, naming the flag, for the first setting that is out of range or conflicts with another."""
    for name in _POSITIVE:
        value = _value(settings, name)
        require(value is None or 0 < value < math.inf, settings, name, "positive and finite")
    for name in _NOT_NEGATIVE:
        value = _value(settings, name)
        require(value is None or 0 <= value < math.inf, settings, name, "at least 0 and finite")
    for name in _SHARES:
        value = _value(settings, name)
        require(value is None or 0 <= value <= 1, settings, name, "between 0 and 1")
    require(0 < settings.data.held_out < 1, settings, "data.held_out", "above 0 and below 1")
    require(settings.sft.mix < 1, settings, "sft.mix", "below 1")
    require(settings.ppo.ema < 1, settings, "ppo.ema", "below 1")
    require(settings.ppo.adam_b2 < 1, settings, "ppo.adam_b2", "below 1")
    for name in ("ppo.top_k", "ppo.top_p"):
        value = _value(settings, name)
        require(value is None or settings.ppo.correct_sampler, settings, name, _OFF_POLICY)
        require(value is None or value > 0, settings, name, "positive")
    require((settings.ppo.top_p or 0.0) <= 1, settings, "ppo.top_p", "at most 1")
    require(
        settings.data.vocab_size >= 260, settings, "data.vocab_size", "at least 260 (256 bytes and 4 special tokens)"
    )
    require(settings.world.labelers >= 2, settings, "world.labelers", "at least 2")
    require(0.5 < settings.world.agreement < 1, settings, "world.agreement", "above 0.5 and below 1")
    require(settings.evaluation.split in ("test", "validation"), settings, "evaluation.split", "test or validation")
    width, heads = settings.net.width, settings.net.heads
    requirement = f"such that --net.width {width} is a multiple of twice this number"
    require(width % (2 * heads) == 0, settings, "net.heads", requirement)
    k = settings.comparisons
    require(2 <= k.min_k <= k.max_k, settings, "comparisons.min_k", f"between 2 and --comparisons.max-k {k.max_k}")
    _check_ppo(settings)
    mesh_settings.check(settings)
    if settings.data.path is None:
        most = settings.comparisons.prompts // (2 if settings.reward_model.heldout else 1)
        half = "half of " if settings.reward_model.heldout else ""
        requirement = f"at most {half}--comparisons.prompts {settings.comparisons.prompts}"
        require(settings.reward_model.batch <= most, settings, "reward_model.batch", requirement)
