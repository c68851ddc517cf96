"""Checks that settings are in range and consistent before anything is created or compiled."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
import operator
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from launch import mesh_settings
from launch.run_settings import Lora, Optimizer, RunSettings, StageSettings, is_architecture
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
    *("ppo.kl_target", "ppo.reward_clip", "ppo.shards", "evaluation.temperature", "hosts.count", "hosts.timeout"),
    "hosts.silence",
)
_NOT_NEGATIVE = (
    *("seed", "world.slips", "world.spread", "world.tie_width", "pretrain.warmup", "ppo.warmup", "ppo.kl_coef"),
    *("ppo.ptx_coef", "evaluation.transcripts", "ppo.kl_gain", "ppo.kl_loss_coef", "ppo.entropy_coef"),
    *("ppo.value_coef", "ppo.weight_decay", "hosts.index"),
)
_SHARES = (
    *("data.max_dropped", "data.held_out", "world.lapse", "sft.mix", "ppo.lambda_", "ppo.ema", "ppo.discount"),
    *("ppo.reference_ema", "ppo.adam_b2"),
)
KL_IN_LOSS = ("grpo", "dr-grpo")
"""Methods that penalise the KL in the loss and not in the reward."""
_COMPARING_METHODS = ("rloo", "grpo", "dr-grpo")
_OFF_POLICY = (
    "used together with --ppo.correct-sampler: truncated sampling draws from a distribution other than the policy's, "
    "which makes log-ratios and KL wrong"
)


def flag_name(name: str) -> str:
    """Returns the flag of a setting, such as ``--ppo.kl-coef`` for ``ppo.kl_coef``."""
    return "--" + re.sub("_(?!$)", "-", name)


def by_flag(settings: Any) -> dict[str, Any]:
    """Returns the values of all settings by flag, for reports."""
    return {flag_name(name): value_of(settings, name) for name in field_names(settings)}


def require(ok: bool, settings: Any, name: str, requirement: str) -> None:
    """Raises SettingError with the flag and its value unless ``ok``. ``requirement`` completes "it must be"."""
    if not ok:
        raise SettingError(f"{flag_name(name)} is {value_of(settings, name)!r}; it must be {requirement}")


def require_divides(settings: Any, name: str, size: int, what: str) -> None:
    """Raises SettingError unless the setting divides ``size``, which the message calls ``what``."""
    if size % (value := value_of(settings, name)):
        raise SettingError(f"{flag_name(name)} is {value}; it must divide {what}")


def value_of(settings: Any, name: str) -> Any:
    """Returns the value of a setting, such as that of ``ppo.clip``."""
    return operator.attrgetter(name)(settings)


Unused = Iterable[tuple[Sequence[str], str]]
"""Settings or groups of settings that have no effect on a run, such as ppo.clip or world, and why.

The reason may end in "; " and advice, such as "; set --ppo.kl-loss-coef". Otherwise, the advice is "leave it out".
"""
_OF_THE_WORLD = ("world", "comparisons", "pretrain.documents", "sft.demonstrations", "evaluation.split")
_OF_THE_WORLD += ("evaluation.skills",)
_OF_A_FILE = ("demonstrations", "prompts", "pretraining")
_OF_A_FILE += ("vocab_size", "prompt_width", "response_width", "held_out", "max_dropped")
_OF_A_NEW_MODEL = ("net", "pretrain.steps", "pretrain.learning_rate", "pretrain.warmup", "data.vocab_size")
_OF_A_CRITIC = ("critic", "critic_learning_rate", "value_coef", "value_clip", "lambda_", "whiten_rewards")
_OF_A_CRITIC += ("normalise_values",)
_OF_KL_IN_REWARD = ("kl_coef", "kl_target", "kl_gain", "both_kl_terms")


def kl_field(ppo: PPO) -> str:
    """Returns the name of the setting with the method's KL coefficient."""
    return "kl_loss_coef" if ppo.method in KL_IN_LOSS else "kl_coef"


def kl_loss_coef(ppo: PPO) -> float:
    """Returns the weight of the KL in the loss, which has a default with grpo."""
    default = 0.04 if ppo.method == "grpo" else 0.0
    return default if ppo.kl_loss_coef is None else ppo.kl_loss_coef


def _unused_by_ppo(ppo: PPO) -> dict[str, str]:
    """Returns the --ppo settings that have no effect with the other ones, each with the reason."""
    method, in_reward = f"with --ppo.method {ppo.method}", ppo.method not in KL_IN_LOSS
    unused: dict[str, str] = {}
    if ppo.method != "ppo":
        unused |= dict.fromkeys(_OF_A_CRITIC, f"{method}, which has no critic")
    elif ppo.critic != "zero-head":
        why = f"with --ppo.critic {ppo.critic}, except on clipping, because Adam cancels it"
        why += "; set --ppo.critic-learning-rate"
        unused["value_coef"] = why
    if ppo.method not in ("ppo", "reinforce-pp"):
        unused["discount"] = f"{method}, whose rewards are not discounted"
    if not in_reward:
        why = f"{method}, which has no KL in the reward; set --ppo.kl-loss-coef"
        return unused | dict.fromkeys(_OF_KL_IN_REWARD, why) | _unused_reference(ppo, 0.0)
    if ppo.kl_target is None:
        unused["kl_gain"] = "without --ppo.kl-target, which enables the adaptive coefficient"
    if ppo.kl_coef == 0:
        unused |= dict.fromkeys(("kl_target", "kl_gain", "both_kl_terms"), "with --ppo.kl-coef 0")
    if kl_loss_coef(ppo) == 0:
        unused["both_kl_terms"] = "without --ppo.kl-loss-coef"
    return unused | _unused_reference(ppo, ppo.kl_coef)


def _unused_reference(ppo: PPO, kl_coef: float) -> dict[str, str]:
    without = "without a KL penalty; set --ppo.kl-coef or --ppo.kl-loss-coef"
    return {"reference_ema": without} if kl_coef == kl_loss_coef(ppo) == 0 else {}


def unused_ppo(runs: Sequence[PPO], *, ptx: bool = True, why: str = "") -> Unused:
    """Returns the --ppo settings that have no effect on any of a command's RL runs.

    Args:
        runs: The settings of the RL runs.
        ptx: Whether a run may have a pretraining loss.
        why: Why none has, as in ``"on sweep.py, which ..."``.
    """
    unused = [_unused_by_ppo(ppo) for ppo in runs]
    for name, reason in unused[0].items() if unused else ():
        if all(name in other for other in unused):
            yield (f"ppo.{name}",), reason
    if not ptx:
        yield ("ppo.ptx_coef", "ppo.ptx_ratio"), why
    elif all(ppo.ptx_coef == 0 for ppo in runs):
        yield ("ppo.ptx_ratio",), "with --ppo.ptx-coef 0"


def check_used(settings: Settings, preset: Settings, unused: Unused) -> None:
    """Raises SettingError for the first setting that differs from the preset and has no effect on the run.

    Args:
        settings: The settings of the run.
        preset: The settings before flags were applied, or those of the run to resume.
        unused: Settings without effect, in addition to those that depend only on --data.path and --model.
    """
    common = (
        (settings.data.path is not None, _OF_THE_WORLD, "with --data.path, which replaces the built-in world"),
        (settings.data.path is None, [f"data.{name}" for name in _OF_A_FILE], "without --data.path"),
        (
            settings.given_model is None,
            ("template",),
            "without --model, whose chat template it changes",
        ),
        (settings.given_model is not None, _OF_A_NEW_MODEL, "with --model, which replaces the new model"),
        (settings.model is not None, ("net",), f"with --model {settings.model}, which has its own size"),
    )
    refuse_changed(settings, preset, [(names, why) for applies, names, why in common if applies])
    refuse_changed(settings, preset, unused)


def refuse_changed(settings: Any, default: Any, unused: Unused) -> None:
    """Raises SettingError for the first of the settings ``unused`` that differs from ``default``."""
    for names, why in unused:
        for full in itertools.chain.from_iterable(field_names(value_of(settings, name), name) for name in names):
            if value_of(settings, full) != value_of(default, full):
                advice = "" if "; " in why else "; leave it out"
                group, _, last = full.rpartition(".")
                off = value_of(settings, full) is False  # as it is typed, such as --ppo.no-whiten
                shown = f"{group}{'.' * bool(group)}no_{last}" if off else full
                raise SettingError(f"{flag_name(shown)} has no effect {why}{advice}")


def field_names(value: Any, prefix: str = "") -> list[str]:
    """Returns the names of all settings in a group, such as ppo.clip; a setting that is no group is returned itself."""
    if not dataclasses.is_dataclass(value):
        return [prefix]
    fields = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return [each for name, part in fields for each in field_names(part, f"{prefix}.{name}" if prefix else name)]


def check_finite(settings: Any) -> None:
    """Raises SettingError for the first setting that is NaN or infinite, or contains such a number."""
    for name in field_names(settings):
        value = value_of(settings, name)
        numbers = value if isinstance(value, tuple) else (value,)
        ok = all(math.isfinite(each) for each in numbers if isinstance(each, float))
        require(ok, settings, name, "finite")


def _check_ranges(settings: Any, group: str = "") -> None:
    for name in (name for name in _POSITIVE if name.startswith(group)):
        number = value_of(settings, name)
        require(number is None or 0 < number < math.inf, settings, name, "positive and finite")
    for name in (name for name in _NOT_NEGATIVE if name.startswith(group)):
        number = value_of(settings, name)
        require(number is None or 0 <= number < math.inf, settings, name, "at least 0 and finite")
    for name in (name for name in _SHARES if name.startswith(group)):
        number = value_of(settings, name)
        require(number is None or 0 <= number <= 1, settings, name, "between 0 and 1")


def check_ppo(settings: Any, runs: Sequence[PPO]) -> None:
    """Raises SettingError for the first of the settings in ``settings.ppo`` that is out of range or in conflict."""
    _check_ranges(settings, "ppo.")
    ppo = settings.ppo
    negative = "at most 0, because a positive score rewards answers that never end"
    require(ppo.missing_stop_score <= 0, settings, "ppo.missing_stop_score", negative)
    require(ppo.ema < 1, settings, "ppo.ema", "below 1")
    require(ppo.adam_b2 < 1, settings, "ppo.adam_b2", "below 1")
    for name in ("ppo.top_k", "ppo.top_p"):
        number = value_of(settings, name)
        require(number is None or ppo.correct_sampler, settings, name, _OFF_POLICY)
        require(number is None or number > 0, settings, name, "positive")
    require((ppo.top_p or 0.0) <= 1, settings, "ppo.top_p", "at most 1")
    for name in ("ppo.minibatches", "ppo.samples"):
        require_divides(settings, name, ppo.batch, f"--ppo.batch {ppo.batch}")
    answers = ppo.batch // ppo.minibatches
    text_rows = answers * ppo.ptx_ratio
    require_divides(settings, "ppo.micro_batches", answers, f"{answers}, the number of answers in a minibatch")
    if ppo.method in _COMPARING_METHODS:
        requirement = f"at least 2 with --ppo.method {ppo.method}, which compares the answers to a prompt"
        require(ppo.samples >= 2, settings, "ppo.samples", requirement)
    for run in runs:
        if run.method not in KL_IN_LOSS and kl_loss_coef(run) > 0 and not run.both_kl_terms and run.kl_coef > 0:
            raise SettingError(
                f"--ppo.kl-loss-coef is {run.kl_loss_coef}, but the KL penalty in the reward has the coefficient "
                f"{run.kl_coef}, so the KL is penalised twice; --ppo.both-kl-terms allows this"
            )
    require(text_rows >= 1, settings, "ppo.ptx_ratio", "large enough for each minibatch to have a pretraining row")
    require_divides(settings, "ppo.shards", answers, f"{answers}, the number of answers in a minibatch")
    text = round(text_rows)
    require_divides(settings, "ppo.shards", text, f"{text}, the number of pretraining rows in a minibatch")


def check(settings: Settings, *, runs: Sequence[PPO] | None = None) -> None:
    """Raises SettingError, naming the flag, for the first setting that is out of range or conflicts with another.

    ``runs`` are the settings of the command's RL runs; by default, a single run with ``settings.ppo``.
    """
    check_finite(settings)
    _check_ranges(settings)
    require(0 < settings.data.held_out < 1, settings, "data.held_out", "above 0 and below 1")
    require(settings.sft.mix < 1, settings, "sft.mix", "below 1")
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
    check_ppo(settings, [settings.ppo] if runs is None else runs)
    mesh_settings.check(settings)
    template_options(settings.template.options)
    if settings.data.path is None:
        most = settings.comparisons.prompts // (2 if settings.reward_model.heldout else 1)
        half = "half of " if settings.reward_model.heldout else ""
        requirement = f"at most {half}--comparisons.prompts {settings.comparisons.prompts}"
        require(settings.reward_model.batch <= most, settings, "reward_model.batch", requirement)


def template_options(text: str | None) -> dict[str, Any]:
    """Returns the value of --template.options; raises SettingError if it is not a JSON object."""
    try:
        options = json.loads(text or "{}")
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise SettingError(
            f"--template.options is {text!r}; it must be a JSON object, such as "
            """'{"enable_thinking": false}'"""
        )
    return options


def check_template(settings: Any) -> None:
    """Raises SettingError if --template.options is not a JSON object, or if a model with random weights has both."""
    template_options(settings.template.options)
    if is_architecture(model := _found(settings, "model")):
        default = dataclasses.replace(settings, template=type(settings.template)())
        why = f"with --model {model}, whose chat template has no variables"
        refuse_changed(settings, default, [(("template",), why)])


def check_log(settings: RunSettings) -> None:
    """Raises SettingError if the package of a service in --log is not installed."""
    for name in settings.log:
        if name != "tensorboard" and name not in sys.modules and importlib.util.find_spec(name) is None:
            raise SettingError(f"--log {name} needs a package; install it with pip install -e '.[{name}]'")


def check_stage(settings: Any) -> None:
    """Raises SettingError for the first setting of a command without presets that is out of range.

    Only settings that the command has are checked.
    """
    check_finite(settings)
    for name in _OF_STAGES_POSITIVE:
        number = _found(settings, name)
        require(number is None or 0 < number < math.inf, settings, name, "positive and finite")
    for name in ("seed", "weight_decay", "epsilon", "b1", "b2", "data.held_out"):
        number = _found(settings, name)
        require(number is None or 0 <= number < math.inf, settings, name, "at least 0 and finite")
    for name in ("b1", "b2", "data.held_out"):
        number = _found(settings, name)
        require(number is None or number < 1, settings, name, "below 1")
    limit = _found(settings, "data.max_dropped")
    require(limit is None or 0 <= limit <= 1, settings, "data.max_dropped", "between 0 and 1")
    size = _found(settings, "data.vocab_size")
    require(size is None or size >= 260, settings, "data.vocab_size", "at least 260 (256 bytes and 4 special tokens)")
    if isinstance(settings, Optimizer):
        unused = {"adafactor": ("b1", "b2", "epsilon"), "lion": ("epsilon",)}.get(settings.optimizer, ())
        refuse_changed(settings, Optimizer(), [(unused, f"with --optimizer {settings.optimizer}")])
    if isinstance(settings, StageSettings):
        require_divides(settings, "micro_batches", settings.batch, f"--batch {settings.batch}")
        if settings.lora.rank is None:
            refuse_changed(settings, dataclasses.replace(settings, lora=Lora()), [(("lora",), "without --lora.rank")])
        require(not (settings.steps and settings.epochs != 1), settings, "epochs", "left out with --steps")
    if _found(settings, "template") is not None:
        check_template(settings)
    mesh_settings.check(settings)


_OF_STAGES_POSITIVE = (
    *("learning_rate", "epochs", "steps", "batch", "micro_batches", "max_grad_norm", "saves", "max_skipped"),
    *("lora.rank", "lora.alpha", "data.width", "data.prompt_width", "data.response_width", "max_new_tokens"),
)


def _found(settings: Any, name: str) -> Any:
    try:
        return value_of(settings, name)
    except AttributeError:
        return None
