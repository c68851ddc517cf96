"""Settings of reward_model.py and dpo.py with a user's own model and data. Docstrings of fields are help texts."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from launch import config_file
from launch.run_settings import SettingError, StageSettings
from launch.setting_checks import refuse_changed, require
from launch.settings import peek
from preferences import direct_settings, reward_settings


@dataclasses.dataclass(frozen=True)
class Comparisons:
    """Human comparisons."""

    path: str
    """JSONL, JSON (also compressed) or Parquet file of pairs or rankings in any of the formats in docs/data.md. A
    pattern with * selects several files."""
    max_dropped: float = 0.01
    """Maximum share of unusable records. A file with a larger share is refused."""
    held_out: float = 0.1
    """Share of the comparisons held out to measure accuracy. Comparisons with the same system text and first question
    are held out together."""
    prompt_width: int | None = None
    """Maximum number of tokens in a prompt. Longer prompts lose their oldest turns or, with a single turn, are dropped;
    both are counted. None uses the width that holds 99 % of the prompts, at most what the model's maximum length leaves
    for them."""
    response_width: int | None = None
    """Maximum number of tokens in an answer. Longer answers are truncated and lose their stop token. None uses the
    width that holds 99 % of the answers, at most what the model's maximum length leaves for them."""
    vocab_size: int = 8192
    """Vocabulary size of the tokenizer that is trained on the file if --model has random weights."""


@dataclasses.dataclass(frozen=True)
class RewardTraining(reward_settings.RewardLoss):
    """Training of the reward model."""

    heads: int = 1
    """Number of heads on one trunk. The heads form an ensemble, whose scores are averaged."""
    keep_heads: bool = False
    """Save the heads instead of their average, for --ppo.uncertainty or --ppo.worst-case of ppo.py. The numbers in the
    report are those of the average."""
    trains: str = ""
    """Regular expression for the names of the parameters to train, such as ^head/. The others are frozen. The empty
    default trains all parameters."""
    limit: int | None = None
    """Maximum number of training prompts. None uses all prompts."""
    normalise: Literal["chosen", "held-out", "none"] = "chosen"
    """Texts whose scores are shifted to mean 0 after training: the `chosen` answers of at most 1,024 training prompts
    (as InstructGPT does with demonstrations) or all `held-out` answers (HH). `none` leaves the scores unchanged."""


@dataclasses.dataclass(frozen=True)
class OwnPretraining:
    """Preference-model pretraining (PMP): training on many comparisons by a crowd, such as votes on the answers of a
    website, before the human comparisons (Askell et al. 2021, HH A.2). It takes one epoch and trains the whole model
    or, with --lora.rank, adapters of its own."""

    path: str | None = None
    """File of comparisons for PMP, in any of the formats in docs/data.md, in pairs or rankings. None leaves PMP out.
    Comparisons that open like a held-out one of --data.path are dropped."""
    binary: bool = True
    """Replace each pair A > B with GOOD:A > BAD:A and BAD:B > GOOD:B, which start with control tokens, and remove the
    tokens after PMP. If off, train on the rankings."""
    learning_rate: float | None = None
    """Peak learning rate of PMP, with the schedule of --learning-rate. None uses the default of --learning-rate, which
    is 2e-5 for a given model, 2e-4 with --lora.rank and 1e-3 for random weights."""
    pretraining_rate: float | None = None
    """Peak learning rate with which --model was pretrained, such as 3e-4, if you know it: PMP then uses 0.1 and the
    human comparisons 0.01 of it, as in HH. The rate is not part of a model, so None uses --pmp.learning-rate and
    --learning-rate, which are equal by default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """Packing of comparisons."""

    packing: bool | None = None
    """Put several answers, each with its prompt, into a row. They do not see each other, and the result is the same.
    None does so if it saves a tenth of the computation, and on one device."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnRewardSettings(Packing, StageSettings):
    """Settings of reward_model.py with --model and --data.path."""

    command: ClassVar[str] = "reward_model"
    inputs: ClassVar[tuple[str, ...]] = (*StageSettings.inputs, "pmp.path")

    batch: int = 16
    """Number of prompts per step, each with all its answers; of pairs with --training.loss pairs and in PMP with
    --pmp.binary."""
    data: Comparisons
    pmp: OwnPretraining = dataclasses.field(default_factory=OwnPretraining)
    training: RewardTraining = dataclasses.field(default_factory=RewardTraining)
    on_alarm: Literal["report", "stop"] = "report"
    """Response to an alarm, such as a rising validation loss. `report` prints it and continues; `stop` saves and stops
    the run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnDPOSettings(direct_settings.LossSettings, Packing, StageSettings):
    """Settings of dpo.py with --model and --data.path."""

    command: ClassVar[str] = "dpo"
    default_rates: ClassVar[tuple[float, float, float]] = (2e-6, 5e-5, 5e-4)

    learning_rate: float | None = None
    """Peak learning rate, with a linear warmup over the first tenth of the steps and cosine decay to a tenth. None uses
    2e-6 for a given model, 5e-5 with --lora.rank and 5e-4 for random weights."""
    batch: int = 16
    """Number of rows per step: pairs or, for kto, answers."""
    data: Comparisons
    pairs: int = 0
    """Maximum number of pairs per prompt, sampled from all pairs of its answers that differ in rank. 0 uses all."""


def is_own(
    arguments: list[str],
    other: str | None,
    *,
    own: type,
    world: type,
    needed: Sequence[str] = ("--model", "--data.path"),
) -> bool:
    """Returns whether a command line, or the run that it resumes, has a model and a file of its own.

    Args:
        arguments: The command line without the program's name.
        other: A flag that selects the other settings, such as --folds; None if there is none.
        own: The settings with a model and a file.
        world: The other settings of the command.
        needed: The flags that select ``own``.

    Raises:
        SettingError: A flag of only ``own`` is given, but not all that it needs.
    """
    if resume := peek(arguments, "--resume"):
        return "lora" in config_file.read(resume)
    missing = [flag for flag in needed if peek(arguments, flag) is None]
    if not missing and (other is None or peek(arguments, other) is None):
        return True
    if {"-h", "--help"} & set(arguments):
        return False
    theirs = _flags(world)
    only_own = {flag for flag in _flags(own) if flag not in theirs}
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        if flag in only_own and not missing:
            raise SettingError(f"{flag} has no effect with {other}; leave out one of them")
        if flag in only_own:
            raise SettingError(f"{flag} needs {' and '.join(missing)}; add {'it' if len(missing) == 1 else 'them'}")
    return False


def _flags(kind: type, prefix: str = "--") -> set[str]:
    """Returns all flags of a settings class; a boolean setting has two."""
    hints, flags = typing.get_type_hints(kind), set()
    for field in dataclasses.fields(kind):
        name, hint = field.name.replace("_", "-"), hints[field.name]
        if dataclasses.is_dataclass(hint):
            flags |= _flags(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            flags |= {f"{prefix}{name}", *([f"{prefix}no-{name}"] if bool in (hint, *typing.get_args(hint)) else [])}
    return flags


def warn_without_data(settings: Any) -> None:
    """Prints a warning if a command starts from a given model, but without a file of comparisons."""
    if settings.given_model is not None and settings.data.path is None and settings.resume is None:
        import rich.console  # imported late, because --help does not need it

        rich.console.Console(stderr=True).print(
            f"warning: --data.path is missing, so the built-in world replaces your data; add --data.path FILE to train "
            f"--model {settings.given_model} on comparisons of your own",
            style="yellow",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def check_reward(settings: OwnRewardSettings) -> None:
    """Raises SettingError, naming the flag, for a setting of the reward model that is out of range or unused."""
    _check_data(settings)
    training = settings.training
    reward_settings.check_loss(settings)
    limit = 1 if training.limit is None else training.limit
    for name, value in (("heads", training.heads), ("limit", limit)):
        require(value >= 1, settings, f"training.{name}", "at least 1")
    if training.keep_heads and training.heads == 1:
        raise SettingError("--training.keep-heads has no effect with one head; set --training.heads, or leave it out")
    if training.trains and settings.lora.rank is not None:
        raise SettingError("--training.trains has no effect with --lora.rank, which trains adapters; leave it out")
    pmp = settings.pmp
    for name, value in (("learning_rate", pmp.learning_rate), ("pretraining_rate", pmp.pretraining_rate)):
        require(value is None or 0 < value < math.inf, settings, f"pmp.{name}", "above 0 and finite")
    unused = list(reward_settings.unused_of_loss(training))
    if pmp.path is None:
        names = [field.name for field in dataclasses.fields(pmp) if field.name != "path"]
        unused += [([f"pmp.{name}" for name in names], "without --pmp.path")]
    elif pmp.pretraining_rate is not None:
        unused += [(("learning_rate", "pmp.learning_rate"), "with --pmp.pretraining-rate, which sets both rates")]
    default = dataclasses.replace(settings, training=RewardTraining(), pmp=OwnPretraining(), learning_rate=None)
    refuse_changed(settings, default, unused)


def check_dpo(settings: OwnDPOSettings) -> None:
    """Raises SettingError, naming the flag, for a setting of dpo.py that is out of range or unused."""
    _check_data(settings)
    direct_settings.check_loss(settings)
    require(settings.pairs >= 0, settings, "pairs", "at least 0")
    fields = [field.name for field in dataclasses.fields(direct_settings.LossSettings) if field.name != "loss"]
    defaults: dict[str, Any] = {name: getattr(direct_settings.LossSettings(), name) for name in fields}
    refuse_changed(settings, dataclasses.replace(settings, **defaults), direct_settings.unused(settings))


def _check_data(settings: Any) -> None:
    share = settings.data.held_out
    require(0 < share < 1 and math.isfinite(share), settings, "data.held_out", "above 0 and below 1")
