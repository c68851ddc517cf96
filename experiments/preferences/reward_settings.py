"""Settings of reward_model.py that are not the main job's. Each field's docstring is its ``--help``."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, ClassVar, Literal

import jax
from launch import mesh_settings, settings
from launch.settings import SettingError

from rlhf_jax import lm
from rlhf_jax.train.optim import partition


@dataclasses.dataclass(frozen=True)
class Training:
    """How the reward model is trained; --reward-model.batch and --reward-model.learning-rate are the main job's."""

    loss: Literal["ranking", "pairs", "plackett-luce", "best"] = "ranking"
    """All pairs of a prompt together (InstructGPT), the same pairs shuffled as rows of their own, the likelihood of the
    whole ranking, or of the best answer alone (Ziegler)."""
    ties_in_divisor: bool = True
    """Divide a prompt's loss by all its pairs, as printed; off: by those without a tie (`ranking` alone)."""
    label_smoothing: float = 0.0
    """Assumed share of wrong labels (`ranking` and `pairs`)."""
    margin: float = 0.0
    """By how much the better answer should lead (`ranking` and `pairs`)."""
    centering: float = 0.0
    """Weight of the square of a pair's summed scores (`ranking` and `pairs`; 0.01 in Eisenstein 2023)."""
    epochs: int = 1
    """Passes over the comparisons; more overfit at once (InstructGPT C.2)."""
    heads: int = 1
    """Heads on one trunk, an ensemble whose scores are averaged."""
    trains: str = ""
    """Regular expression of the parameters that are trained, such as ^head/; the rest is frozen. Empty: all."""
    limit: int | None = None
    """Use only so many training prompts."""
    normalise: Literal["demonstrations", "references", "policy", "held-out", "none"] = "demonstrations"
    """What scores 0 on average afterwards: demonstrations (InstructGPT); reference outputs, demonstrations
    of other prompts here (Stiennon); samples of the policy, with variance 1 (Ziegler); held-out answers (HH)."""


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """Preference-model pretraining (PMP) between language pretraining and the labelers' comparisons (HH A.2)."""

    prompts: int = 0
    """Prompts of the source, whose answers another crowd ranked; 0: none."""
    agreement: float = 0.6
    """How often two people of the crowd agree: it is noisier than the labelers."""
    polite_taste: float = 0.5
    """What four polite words are worth to the crowd: it is related to the labelers, and not the same."""
    binary: bool = True
    """Each pair as two with control tokens, GOOD:A > BAD:A and BAD:B > GOOD:B; off: the ranking itself."""
    rate: float = 0.1
    """Of PMP, times --pretrain.learning-rate (0.1 as published)."""
    tuning_rate: float | None = 0.01
    """Of what follows, times --pretrain.learning-rate (0.01 as published); none: --reward-model.learning-rate."""


@dataclasses.dataclass(frozen=True)
class CrossValidation:
    """The small models of --folds; their settings were chosen on inner splits of training pairs."""

    vocab_size: int = 2048
    """Of the byte-level BPE tokenizer of each fold."""
    layers: int = 1
    """Layers."""
    width: int = 64
    """Model width."""
    heads: int = 4
    """Attention heads; divides the width."""
    mlp: int = 128
    """Width of the gated mlp."""
    prompt_width: int = 32
    """Tokens of a prompt that are read, its last ones."""
    response_width: int = 128
    """Tokens of an answer that are read; of a longer one the first and its end mark."""
    pretrain_steps: int = 150
    """Steps of the base model on the training dialogues."""
    pretrain_batch: int = 32
    """Rows a step."""
    pretrain_learning_rate: float = 6e-3
    """Peak; cosine to a tenth."""
    members: int = 3
    """Reward models from each base, whose scores are averaged."""
    epochs: int = 2
    """Of each member over the training pairs."""
    batch: int = 32
    """Pairs a step."""
    learning_rate: float = 1e-3
    """Peak; linear to 0."""
    weight_decay: float = 0.1
    """Of AdamW."""
    word_dropout: float = 0.2
    """Share of tokens left out at random in training, anew in each batch."""

    @property
    def row_width(self) -> int:
        """Tokens of a packed row."""
        return self.prompt_width + self.response_width


@dataclasses.dataclass(frozen=True)
class RewardRun(settings.Settings):
    """A reward model, trained and diagnosed; with every setting of the main job that comes before reinforcement."""

    command: ClassVar[str] = "reward_model"

    folds: int = 0
    """Cross-validate on --data.path in so many parts instead, beside simple baselines."""
    training: Training = dataclasses.field(default_factory=Training)
    pmp: Pretraining = dataclasses.field(default_factory=Pretraining)
    cv: CrossValidation = dataclasses.field(default_factory=CrossValidation)


SMOKE_CV: dict[str, Any] = {"vocab_size": 300, "width": 16, "heads": 2, "mlp": 16, "pretrain_steps": 4}
SMOKE_CV |= {"pretrain_batch": 4, "members": 2, "epochs": 1, "batch": 8, "response_width": 32}
"""What the smoke preset changes of --folds."""


def _require(ok: bool, flag: str, value: Any, wanted: str) -> None:
    if not ok:
        raise SettingError(f"--{flag.replace('_', '-')} is {value!r}; it must be {wanted}")


def _check_pattern(asked: RewardRun) -> None:
    """Refuse a pattern that is none or names no parameter; names depend on the kind of model, not on its size."""
    training, key = asked.training, jax.random.key(0)
    try:
        if asked.model is None:
            cfg = lm.LMConfig(
                vocab_size=8, n_layers=1, d_model=8, n_heads=2, d_mlp=8, max_length=8, tie_embeddings=True
            )
        else:
            cfg = lm.load_config(asked.model)
    except (OSError, ValueError):
        return  # a model that cannot be read is refused where it is, with a reason
    heads = None if training.heads == 1 else training.heads
    params = jax.eval_shape(partial(lm.with_head, cfg=cfg, heads=heads), key, lm.abstract(cfg))
    try:
        partition.split(params, training.trains)
    except ValueError as error:
        raise SettingError(f"--training.trains: {error}") from error


def check(asked: RewardRun, preset: settings.Settings) -> None:
    """Raise SettingError, naming the setting, for what cannot be, and for what would be asked in vain."""
    for name in ("ppo", "evaluation"):
        if getattr(asked, name) != getattr(preset, name):
            raise SettingError(f"--{name}.* is about policies, of which reward_model.py trains none; leave it out")
    training, pmp, cv = asked.training, asked.pmp, asked.cv
    _require(not asked.reward_model.heldout, "reward_model.heldout", True, "left out: this trains one reward model")
    _require(asked.folds == 0 or asked.folds >= 2, "folds", asked.folds, "0 or at least 2")
    _require(not asked.folds or asked.data.path is not None, "folds", asked.folds, "left out without --data.path")
    _require(not asked.folds or not mesh_settings.is_sharded(asked), "folds", asked.folds, "left out beside --mesh.*")
    _require(not asked.folds or asked.model is None, "folds", asked.folds, "left out beside --model")
    plain = (training, pmp) == (Training(), Pretraining())
    _require(not asked.folds or plain, "folds", asked.folds, "left out beside --training.* and --pmp.*; it has --cv.*")
    _require(0 <= training.label_smoothing < 0.5, "training.label_smoothing", training.label_smoothing, "in [0, 0.5)")
    for name in ("margin", "centering"):
        value = getattr(training, name)
        _require(0 <= value < math.inf, f"training.{name}", value, "at least 0 and finite")
    if training.loss in ("plackett-luce", "best"):
        for name in ("label_smoothing", "margin", "centering"):
            value = getattr(training, name)
            _require(value == 0, f"training.{name}", value, f"left out with --training.loss {training.loss}")
    limit = 1 if training.limit is None else training.limit
    for name, value in (("epochs", training.epochs), ("heads", training.heads), ("limit", limit)):
        _require(value >= 1, f"training.{name}", value, "at least 1")
    if training.trains:
        _check_pattern(asked)
    _require(pmp.prompts >= 0, "pmp.prompts", pmp.prompts, "at least 0")
    _require(not pmp.prompts or asked.data.path is None, "pmp.prompts", pmp.prompts, "left out beside --data.path")
    _require(not pmp.prompts or asked.model is None, "pmp.prompts", pmp.prompts, "left out beside --model")
    _require(0.5 < pmp.agreement < 1, "pmp.agreement", pmp.agreement, "above 0.5 and below 1")
    for name, value in (("rate", pmp.rate), ("tuning_rate", pmp.tuning_rate)):
        _require(value is None or 0 < value < math.inf, f"pmp.{name}", value, "positive and finite")
    for field in dataclasses.fields(cv):
        value = getattr(cv, field.name)
        if field.name == "word_dropout":
            _require(0 <= value < 1, "cv.word_dropout", value, "in [0, 1)")
        elif field.name == "weight_decay":
            _require(0 <= value < math.inf, "cv.weight_decay", value, "at least 0 and finite")
        else:
            _require(0 < value < math.inf, f"cv.{field.name}", value, "positive and finite")
    _require(cv.vocab_size >= 260, "cv.vocab_size", cv.vocab_size, "at least 260 (256 bytes, 4 special tokens)")
    even = cv.width % cv.heads == 0 and (cv.width // cv.heads) % 2 == 0
    _require(even, "cv.heads", cv.heads, f"such that each has an even share of --cv.width {cv.width}")
