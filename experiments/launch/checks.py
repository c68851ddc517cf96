"""Which settings cannot be; said by name, before anything is made or compiled."""

from __future__ import annotations

import math
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
    *("ppo.kl_target", "ppo.reward_clip", "ppo.shards"),
)
_NOT_NEGATIVE = (
    *("seed", "world.slips", "world.spread", "world.tie_width", "pretrain.warmup", "ppo.warmup", "ppo.kl_coef"),
    *("ppo.ptx_coef", "evaluation.transcripts", "ppo.kl_gain", "ppo.kl_loss_coef", "ppo.entropy_coef"),
    "ppo.value_coef",
)
_SHARES = (
    *("data.max_dropped", "data.held_out", "world.lapse", "sft.mix", "ppo.lambda_", "ppo.ema", "ppo.discount"),
    "ppo.reference_ema",
)
_OF_THE_CRITIC = ("critic", "value_coef", "value_clip", "lambda_", "whiten_rewards", "normalise_values")
_COMPARING = ("rloo", "grpo", "dr-grpo")
_ON_POLICY = (
    "left out unless --ppo.correct-sampler is given: what is cut off makes the samples those of another distribution "
    "than the policy's, and then log-ratios and KL are wrong"
)


def _value(settings: Settings, name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _or(value: Any, instead: Any) -> Any:
    """What to check where a setting may be none."""
    return instead if value is None else value


def _require(ok: bool, settings: Settings, name: str, wanted: str) -> None:
    if not ok:
        flag = name.replace("_", "-").rstrip("-")
        raise SettingError(f"--{flag} is {_value(settings, name)!r}; it must be {wanted}")


def _check_method(settings: Settings) -> None:
    ppo, plain = settings.ppo, PPO()
    divides = ppo.batch % ppo.samples == 0
    _require(divides, settings, "ppo.samples", f"a divisor of --ppo.batch {ppo.batch}")
    divides = (ppo.batch // ppo.minibatches) % ppo.micro_batches == 0
    minibatch = f"a divisor of a minibatch's {ppo.batch // ppo.minibatches} answers"
    _require(divides, settings, "ppo.micro_batches", minibatch)
    if ppo.method in _COMPARING:
        wanted = f"at least 2 with --ppo.method {ppo.method}, which compares the answers to a prompt"
        _require(ppo.samples >= 2, settings, "ppo.samples", wanted)
    if ppo.method != "ppo":
        for name in _OF_THE_CRITIC:
            same = getattr(ppo, name) == getattr(plain, name)
            _require(same, settings, f"ppo.{name}", f"left out with --ppo.method {ppo.method}, which has no critic")


def check(settings: Settings) -> None:
    """Raise SettingError, naming the setting, for anything out of range; before anything is made or compiled."""
    for name in _POSITIVE:
        _require(0 < _or(_value(settings, name), 1) < math.inf, settings, name, "positive and finite")
    for name in _NOT_NEGATIVE:
        _require(0 <= _value(settings, name) < math.inf, settings, name, "at least 0 and finite")
    for name in _SHARES:
        _require(0 <= _or(_value(settings, name), 1) <= 1, settings, name, "between 0 and 1")
    _require(0 < settings.data.held_out < 1, settings, "data.held_out", "above 0 and below 1")
    _require(settings.sft.mix < 1, settings, "sft.mix", "below 1")
    _require(settings.ppo.ema < 1, settings, "ppo.ema", "below 1")
    for name in ("ppo.top_k", "ppo.top_p"):
        given = _value(settings, name)
        _require(given is None or settings.ppo.correct_sampler, settings, name, _ON_POLICY)
        _require(given is None or given > 0, settings, name, "positive")
    _require((settings.ppo.top_p or 0.0) <= 1, settings, "ppo.top_p", "at most 1")
    _require(settings.data.vocab_size >= 260, settings, "data.vocab_size", "at least 260 (256 bytes, 4 special tokens)")
    _require(settings.world.labelers >= 2, settings, "world.labelers", "at least 2")
    _require(0.5 < settings.world.agreement < 1, settings, "world.agreement", "above 0.5 and below 1")
    _require(settings.evaluation.split in ("test", "validation"), settings, "evaluation.split", "test or validation")
    heads = settings.net.heads
    divides = settings.net.width % heads == 0 and (settings.net.width // heads) % 2 == 0
    _require(divides, settings, "net.heads", f"such that each has an even share of --net.width {settings.net.width}")
    k = settings.comparisons
    _require(2 <= k.min_k <= k.max_k, settings, "comparisons.min_k", f"between 2 and --comparisons.max-k {k.max_k}")
    divides = settings.ppo.batch % settings.ppo.minibatches == 0
    _require(divides, settings, "ppo.minibatches", f"a divisor of --ppo.batch {settings.ppo.batch}")
    _check_method(settings)
    rows = settings.ppo.batch // settings.ppo.minibatches * settings.ppo.ptx_ratio
    _require(rows >= 1, settings, "ppo.ptx_ratio", "such that each minibatch gets a pretraining row")
    for of, size in (("answers", settings.ppo.batch // settings.ppo.minibatches), ("pretraining rows", round(rows))):
        wanted = f"a divisor of a minibatch's {size} {of}"
        _require(size % settings.ppo.shards == 0, settings, "ppo.shards", wanted)
    mesh_settings.check(settings)
    if settings.data.path is None:
        most = settings.comparisons.prompts // (2 if settings.reward_model.heldout else 1)
        of = "half of " if settings.reward_model.heldout else ""
        wanted = f"at most {of}--comparisons.prompts {settings.comparisons.prompts}"
        _require(settings.reward_model.batch <= most, settings, "reward_model.batch", wanted)
