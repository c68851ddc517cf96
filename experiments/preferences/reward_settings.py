"""Settings that reward_model.py adds to those of instructgpt.py. Each field's docstring is its ``--help`` text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

from launch import mesh_settings
from launch import settings as settings_lib
from launch.run_settings import is_architecture
from launch.setting_checks import require
from launch.settings import SettingError


@dataclasses.dataclass(frozen=True)
class RewardLoss:
    """The loss of a reward model."""

    loss: Literal["ranking", "pairs", "plackett-luce", "best"] = "ranking"
    """Loss. `ranking` keeps all pairs of a prompt in one row (InstructGPT); `pairs` shuffles them as separate rows.
    `plackett-luce` is the likelihood of the whole ranking; `best` is the likelihood of the best answer (Ziegler)."""
    ties_in_divisor: bool = True
    """Divide the loss of a prompt by the number of all its pairs, as InstructGPT's formula does. If off, divide by the
    number of pairs that are not tied. Only for `ranking`."""
    label_smoothing: float = 0.0
    """Assumed share of wrong labels. Only for `ranking` and `pairs`."""
    margin: float = 0.0
    """Margin by which the better answer should score higher. Only for `ranking` and `pairs`."""
    centering: float = 0.0
    """Weight of the penalty on the squared sum of a pair's scores (0.01 in Eisenstein 2023). Only for `ranking` and
    `pairs`."""


@dataclasses.dataclass(frozen=True)
class Training(RewardLoss):
    """Training of the reward model. --reward-model.batch and --reward-model.learning-rate apply as well."""

    epochs: int = 1
    """Number of passes over the comparisons. InstructGPT (C.2) overfits with more than one."""
    heads: int = 1
    """Number of heads on one trunk. The heads form an ensemble, whose scores are averaged."""
    trains: str = ""
    """Regular expression for the names of the parameters to train, such as ^head/. The others are frozen. The empty
    default trains all parameters."""
    limit: int | None = None
    """Maximum number of training prompts. None uses all prompts."""
    normalise: Literal["demonstrations", "references", "policy", "held-out", "none"] = "demonstrations"
    """Texts whose scores are shifted to mean 0 after training: `demonstrations` (InstructGPT), `references` (Stiennon;
    here, the second half of the demonstrations), `policy` samples, whose scores are also scaled to variance 1
    (Ziegler), or `held-out` answers (HH). `none` leaves the scores unchanged."""


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """Preference-model pretraining (PMP) before training on the labelers' comparisons (HH A.2)."""

    prompts: int = 0
    """Number of prompts for PMP, whose answers a simulated crowd ranks; 0 disables PMP. With --folds, number of
    comparisons without labels: an assistant turn of a training dialogue and a turn of another conversation. A second
    ensemble is then trained after PMP."""
    agreement: float = 0.6
    """Agreement rate of two crowd members; lower than the labelers' rate, so that the data is noisier. Not for
    --folds."""
    polite_taste: float = 0.5
    """Utility that the crowd assigns to four polite words; larger than for the labelers, so that preferences differ.
    Not for --folds."""
    binary: bool = True
    """Replace each pair A > B with GOOD:A > BAD:A and BAD:B > GOOD:B, which start with control tokens. If off, train on
    the rankings."""
    rate: float = 0.1
    """Learning rate of PMP as a multiple of --pretrain.learning-rate or, with --folds, --cv.pretrain-learning-rate (0.1
    in HH)."""
    tuning_rate: float | None = 0.01
    """Learning rate on the labelers' comparisons after PMP, as a multiple of --pretrain.learning-rate (0.01 in HH);
    None uses --reward-model.learning-rate. Not for --folds, where both ensembles use --cv.learning-rate."""


@dataclasses.dataclass(frozen=True)
class CrossValidation:
    """The small models of --folds. Defaults were chosen on inner splits of the training pairs."""

    vocab_size: int = 2048
    """Vocabulary size of each fold's byte-level BPE tokenizer."""
    layers: int = 1
    """Number of layers."""
    width: int = 64
    """Model width."""
    heads: int = 4
    """Number of attention heads; the width per head must be an even integer."""
    mlp: int = 128
    """Width of the gated MLP."""
    prompt_width: int = 32
    """Maximum number of tokens in a prompt; the last tokens are kept."""
    response_width: int = 128
    """Maximum number of tokens in an answer; the first tokens and the end-of-turn token are kept."""
    pretrain_steps: int = 150
    """Number of training steps of the base model on the training dialogues."""
    pretrain_batch: int = 32
    """Number of rows per step of the base model."""
    pretrain_learning_rate: float = 6e-3
    """Peak learning rate of the base model, with cosine decay to a tenth."""
    members: int = 3
    """Number of reward models trained from each base model; their scores are averaged."""
    epochs: int = 2
    """Number of passes of each reward model over the training pairs."""
    batch: int = 32
    """Number of pairs per step."""
    learning_rate: float = 1e-3
    """Peak learning rate of the reward models, with linear decay to 0."""
    weight_decay: float = 0.1
    """Weight decay of AdamW."""
    word_dropout: float = 0.2
    """Probability of dropping each token of a training batch, except the last token of a sequence."""

    @property
    def row_width(self) -> int:
        """Number of tokens per packed row."""
        return self.prompt_width + self.response_width


@dataclasses.dataclass(frozen=True)
class RewardSettings(settings_lib.Settings):
    """Settings of reward_model.py: those of instructgpt.py up to the reward model, and those below."""

    command: ClassVar[str] = "reward_model"

    folds: int = 0
    """Number of folds for cross-validating a model and two baselines on --data.path. 0 trains a single model. With
    --pmp.prompts, a model after preference-model pretraining is compared on the same folds."""
    training: Training = dataclasses.field(default_factory=Training)
    pmp: Pretraining = dataclasses.field(default_factory=Pretraining)
    cv: CrossValidation = dataclasses.field(default_factory=CrossValidation)


SMOKE_CV: dict[str, Any] = {"vocab_size": 300, "width": 16, "heads": 2, "mlp": 16, "pretrain_steps": 4}
SMOKE_CV |= {"pretrain_batch": 4, "members": 2, "epochs": 1, "batch": 8, "response_width": 32}
"""Settings of --folds that the smoke preset changes."""


def _check_pattern(settings: RewardSettings) -> None:
    """Raises SettingError if --training.trains is not a regular expression or matches no parameter.

    Parameter names do not depend on the size of the model, so a tiny model is checked unless --model is set.
    """
    import jax  # these imports are slow, and --help does not need them

    from rlhf_jax import lm
    from rlhf_jax.train.optim import partition

    training, key = settings.training, jax.random.key(0)
    try:
        if is_architecture(settings.model):
            cfg = lm.LMConfig.preset(str(settings.model), vocab_size=8)
        elif settings.model is None:
            cfg = lm.LMConfig(
                vocab_size=8, n_layers=1, d_model=8, n_heads=2, d_mlp=8, max_length=8, tie_embeddings=True
            )
        else:
            cfg = lm.load_config(settings.model)
    except (OSError, ValueError):
        return  # loading the model later raises the error with the reason
    heads = None if training.heads == 1 else training.heads
    params = jax.eval_shape(partial(lm.with_head, cfg=cfg, heads=heads), key, lm.abstract(cfg))
    try:
        partition.split(params, training.trains)
    except ValueError as error:
        raise SettingError(f"--training.trains: {error}") from error


_OF_A_SINGLE_MODEL = ("on_alarm", "saves", "max_skipped", "world", "net", "pretrain", "sft", "comparisons", "training")
_OF_A_SINGLE_MODEL += (
    "reward_model",
    "pmp.agreement",
    "pmp.polite_taste",
    "pmp.tuning_rate",
    "data.vocab_size",
    "data.prompt_width",
    "data.response_width",
)
_OF_A_SINGLE_MODEL += ("data.held_out", "data.demonstrations", "data.prompts", "data.pretraining", "compute")


def unused_of_loss(training: RewardLoss) -> Iterator[tuple[Sequence[str], str]]:
    """Yields the settings of the loss that have no effect on the run, and why."""
    if training.loss in ("plackett-luce", "best"):
        names = ("ties_in_divisor", "label_smoothing", "margin", "centering")
        yield [f"training.{name}" for name in names], f"with --training.loss {training.loss}"
    if training.loss == "pairs":
        yield ("training.ties_in_divisor",), "with --training.loss pairs, which drops tied pairs"


def unused(settings: RewardSettings) -> Iterator[tuple[Sequence[str], str]]:
    """Yields the settings that have no effect on the run, and why."""
    training, pmp = settings.training, settings.pmp
    sampled = settings.data.path is None or training.normalise == "policy"  # with --folds, there is a --data.path
    names = [field.name for field in dataclasses.fields(settings_lib.PPO) if field.name != "temperature" or not sampled]
    yield (*(f"ppo.{name}" for name in names), "evaluation"), "on reward_model.py, which trains no policy"
    yield ("reward_model.heldout",), "on reward_model.py, which trains one reward model"
    yield ("sft.mix", "sft.mix_epochs"), "on reward_model.py, which starts from `sft`"
    yield ("hosts",), "on reward_model.py, which runs on a single host"
    if training.normalise != "policy":
        yield ("data.prompts",), f"on reward_model.py with --training.normalise {training.normalise}"
    if settings.given_model is not None:
        yield ("pretrain.documents",), "on reward_model.py with --model, which pretrains no model"
    if settings.folds:
        yield _OF_A_SINGLE_MODEL, "with --folds, which uses --cv.*"
    else:
        yield ("cv",), "without --folds"
    yield from unused_of_loss(training)
    if pmp.prompts == 0:
        names = [field.name for field in dataclasses.fields(pmp) if field.name != "prompts"]
        yield [f"pmp.{name}" for name in names], "without --pmp.prompts"
    elif pmp.tuning_rate is not None:
        yield ("reward_model.learning_rate",), "with --pmp.prompts, which uses --pmp.tuning-rate"


def check_loss(settings: Any) -> None:
    """Raises SettingError for a setting of the loss, ``settings.training``, that is out of range."""
    training = settings.training
    require(0 <= training.label_smoothing < 0.5, settings, "training.label_smoothing", "in [0, 0.5)")
    for name in ("margin", "centering"):
        value = getattr(training, name)
        require(0 <= value < math.inf, settings, f"training.{name}", "at least 0 and finite")


def check(settings: RewardSettings) -> None:
    """Raises SettingError, naming the flag, for a setting that is out of range or conflicts with another."""
    if settings.published is not None:
        raise SettingError(
            f"--published {settings.published} selects settings of PPO, which reward_model.py does not run; leave it "
            "out"
        )
    training, pmp, cv, folds = settings.training, settings.pmp, settings.cv, settings.folds
    require(folds == 0 or folds >= 2, settings, "folds", "0 or at least 2")
    if folds and settings.data.path is None:
        raise SettingError(f"--folds is {folds}; it needs --data.path")
    for allowed, condition in (
        (not mesh_settings.is_sharded(settings), "left out with --mesh.*"),
        (settings.model is None, "left out with --model"),
    ):
        require(not folds or allowed, settings, "folds", condition)
    check_loss(settings)
    limit = 1 if training.limit is None else training.limit
    for name, value in (("epochs", training.epochs), ("heads", training.heads), ("limit", limit)):
        require(value >= 1, settings, f"training.{name}", "at least 1")
    if training.trains:
        _check_pattern(settings)
    require(pmp.prompts >= 0, settings, "pmp.prompts", "at least 0")
    built_in = folds > 0 or settings.data.path is None
    require(not pmp.prompts or built_in, settings, "pmp.prompts", "left out with --data.path, but for --folds")
    require(not pmp.prompts or settings.model is None, settings, "pmp.prompts", "left out with --model")
    require(0.5 < pmp.agreement < 1, settings, "pmp.agreement", "above 0.5 and below 1")
    for name, value in (("rate", pmp.rate), ("tuning_rate", pmp.tuning_rate)):
        require(value is None or 0 < value < math.inf, settings, f"pmp.{name}", "above 0 and finite")
    for field in dataclasses.fields(cv):
        value = getattr(cv, field.name)
        if field.name == "word_dropout":
            require(0 <= value < 1, settings, "cv.word_dropout", "in [0, 1)")
        elif field.name == "weight_decay":
            require(0 <= value < math.inf, settings, "cv.weight_decay", "at least 0 and finite")
        else:
            require(0 < value < math.inf, settings, f"cv.{field.name}", "above 0 and finite")
    require(cv.vocab_size >= 260, settings, "cv.vocab_size", "at least 260 (256 bytes, 4 special tokens)")
    even = cv.width % cv.heads == 0 and (cv.width // cv.heads) % 2 == 0
    require(even, settings, "cv.heads", f"a divisor of --cv.width {cv.width} that leaves an even width per head")
