"""Every setting of the main job. Each field's docstring is its ``--help``; each field is read somewhere."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


class SettingError(ValueError):
    """A setting that cannot be; the message names it."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Real human comparisons instead of the built-in world."""

    path: str | None = None
    """A JSONL file (.gz too) of {"chosen", "rejected"} dialogues in Anthropic's format; none: the built-in world."""
    max_dropped: float = 0.01
    """Share of records that may be dropped before the run refuses the file."""
    vocab_size: int = 1024
    """Of the byte-level BPE tokenizer trained on the file's training dialogues; --model brings its own tokenizer."""
    prompt_width: int = 128
    """Tokens of a prompt; older turns of a longer one are dropped, and counted."""
    response_width: int = 64
    """Tokens of an answer; a longer one is cut off without its end mark, and counted."""
    held_out: float = 0.1
    """Share of the comparisons kept for the reward model's accuracy and for the evaluation's prompts."""


@dataclasses.dataclass(frozen=True)
class World:
    """The built-in world: how demonstrators slip and how labelers differ."""

    slips: float = 1.0
    """Scales the probability of every flaw in a demonstration; 0 is flawless."""
    labelers: int = 20
    """Labelers in the training pool, and as many in the held-out pool."""
    spread: float = 0.25
    """Relative standard deviation of how a labeler weighs the parts of the gold utility."""
    polite_taste: float = 0.12
    """What four polite words are worth to a labeler, beyond gold: the way a reward model can be fooled."""
    agreement: float = 0.75
    """How often two training labelers agree on a pair of SFT samples; sets the noise of their choices."""
    tie_width: float = 0.01
    """Answers closer than this in a labeler's noisy utility are ranked equal."""
    lapse: float = 0.02
    """Share of rankings made without looking."""


@dataclasses.dataclass(frozen=True)
class Net:
    """The model of a run that starts from nothing, a small Llama: rotary positions, RMS norms, gated mlp."""

    layers: int = 3
    """Layers."""
    width: int = 96
    """Model width."""
    heads: int = 4
    """Attention heads; divides the width."""
    mlp: int = 256
    """Width of the gated mlp."""


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """The base model, from nothing, on the corpus."""

    documents: int = 80_000
    """Documents of the built-in world's corpus."""
    steps: int = 640
    """Optimiser steps."""
    batch: int = 64
    """Rows a step; supervised fine-tuning uses the same."""
    learning_rate: float = 6e-3
    """Peak; cosine to a tenth."""
    warmup: int = 20
    """Steps from a tenth of the peak to the peak."""


@dataclasses.dataclass(frozen=True)
class SFT:
    """Supervised fine-tuning, InstructGPT's two recipes."""

    demonstrations: int = 6000
    """Demonstrations of the built-in world."""
    epochs: int = 2
    """Epochs of the baseline `sft` over the demonstrations."""
    mix_epochs: int = 2
    """Epochs of `sft_mix`, where PPO starts (InstructGPT C.3)."""
    mix: float = 0.1
    """Share of pretraining rows in the batches of `sft_mix`."""
    learning_rate: float = 3e-3
    """Peak of both; cosine to a tenth."""


@dataclasses.dataclass(frozen=True)
class Comparisons:
    """Samples of the SFT model, ranked by labelers."""

    prompts: int = 1600
    """Prompts whose samples are ranked for training; a tenth as many again for validation."""
    min_k: int = 4
    """Fewest answers a prompt."""
    max_k: int = 9
    """Most answers a prompt."""


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """The reward model, from the SFT model, one epoch."""

    batch: int = 8
    """Prompts a step, each with all its answers."""
    learning_rate: float = 1.5e-3
    """Peak; cosine to a tenth."""


@dataclasses.dataclass(frozen=True)
class PPO:
    """PPO, and PPO-ptx, which adds the pretraining loss and is the same in all else."""

    iterations: int = 38
    """Rollouts, each followed by the updates on it."""
    batch: int = 256
    """Prompts a rollout, one answer each."""
    minibatches: int = 4
    """Optimiser steps an epoch."""
    epochs: int = 1
    """Passes over each rollout (1 in InstructGPT, 4 in Ziegler and Stiennon)."""
    learning_rate: float = 6e-4
    """Of the policy; constant after the warmup."""
    critic_learning_rate: float = 1e-3
    """Of the critic."""
    warmup: int = 5
    """Iterations from a tenth of the rates to the rates."""
    kl_coef: float = 0.055
    """Reward per nat; the reward has standard deviation 1 on SFT samples."""
    clip: float = 0.2
    """Of the probability ratio."""
    value_clip: float = 0.5
    """How far a value may move in the clipped value loss."""
    lambda_: float = 0.95
    """Of GAE; the discount is 1."""
    temperature: float = 1.0
    """Of the rollouts and of every scoring pass."""
    top_k: int | None = None
    """Draw rollouts from the k likeliest tokens alone; needs --ppo.correct-sampler."""
    top_p: float | None = None
    """Draw rollouts from the likeliest tokens that have this probability together; needs --ppo.correct-sampler."""
    correct_sampler: bool = False
    """Weigh each token by how much likelier the policy makes it than the sampler did, at most twofold."""
    missing_stop_score: float = -3.0
    """Score of an answer that did not stop, in standard deviations of the reward."""
    ema: float = 0.95
    """Decay of the averaged policy, the result (0.992 in InstructGPT, over far more updates); 0: the last weights."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    ptx_coef: float = 1.0
    """Weight of the mean pretraining loss per token in PPO-ptx (27.8 in InstructGPT, other normalisation)."""
    ptx_ratio: float = 1.0
    """Pretraining rows for each answer and epoch in PPO-ptx (8 in InstructGPT)."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out prompts, and what is measured on them."""

    prompts: int = 1280
    """Held-out prompts; one answer of each policy to each, two of `sft`."""
    split: str = "test"
    """`test` for results, `validation` to choose settings by."""
    best_of: int = 16
    """Samples a prompt of the best-of-n reference."""
    best_of_prompts: int = 400
    """Held-out prompts of the best-of-n reference."""
    skills: int = 800
    """Skill problems, as many of each skill."""
    pretraining_rows: int = 512
    """Held-out rows of pretraining text for the pretraining loss."""
    transcripts: int = 12
    """Prompts whose answers are shown side by side."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """From a base model to PPO-ptx: pretraining, SFT, reward model, PPO, PPO-ptx, evaluation, report."""

    model: str | None = None
    """Start from the model and the tokenizer in this folder of Hugging Face form; none: from nothing, with --net."""
    preset: str = "default"
    """`default`: about 5 minutes on two CPU cores; `smoke`: all of it in about a minute, too short to learn much."""
    seed: int = 0
    """Of everything: world, data, initial weights, samples."""
    out: str | None = None
    """Folder for all files; by default runs/instructgpt-PRESET-seed-SEED-TIME."""
    resume: str | None = None
    """Go on with the run in this folder, with the settings it was started with."""
    saves: int = 5
    """Checkpoints within a stage; a run that is killed loses no more than the time between two."""
    data: Data = dataclasses.field(default_factory=Data)
    world: World = dataclasses.field(default_factory=World)
    net: Net = dataclasses.field(default_factory=Net)
    pretrain: Pretrain = dataclasses.field(default_factory=Pretrain)
    sft: SFT = dataclasses.field(default_factory=SFT)
    comparisons: Comparisons = dataclasses.field(default_factory=Comparisons)
    reward_model: RewardModel = dataclasses.field(default_factory=RewardModel)
    ppo: PPO = dataclasses.field(default_factory=PPO)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)


SMOKE: dict[str, dict[str, Any]] = {
    "net": {"layers": 2, "width": 64, "mlp": 128},
    "pretrain": {"documents": 6000, "steps": 60, "batch": 32},
    "sft": {"demonstrations": 640, "epochs": 2, "mix_epochs": 2},
    "comparisons": {"prompts": 96, "max_k": 5},
    "reward_model": {"batch": 8},
    "ppo": {"iterations": 4, "batch": 64, "minibatches": 2, "warmup": 1, "ema": 0.5},
    "evaluation": {
        "prompts": 128,
        "best_of": 4,
        "best_of_prompts": 32,
        "skills": 80,
        "pretraining_rows": 64,
        "transcripts": 4,
    },
    "data": {"vocab_size": 512, "prompt_width": 48, "response_width": 24},
}
"""What the smoke preset changes."""

DIALOGUES: dict[str, dict[str, Any]] = {
    "pretrain": {"steps": 400, "batch": 16},
    "ppo": {"iterations": 24, "batch": 64, "minibatches": 2},
    "evaluation": {"prompts": 512, "best_of_prompts": 64, "pretraining_rows": 128},
}
"""What both presets change for a file of dialogues, whose rows are five times as long."""


STARTED: dict[str, dict[str, Any]] = {
    "sft": {"learning_rate": 1e-4},
    "reward_model": {"learning_rate": 5e-5},
    "ppo": {"learning_rate": 2e-5, "critic_learning_rate": 5e-5},
}
"""What both presets change for a given model: rates for some 100 million parameters, which larger ones want lower."""


def preset(name: str, *, dialogues: bool = False, started: bool = False) -> Settings:
    """The settings that a preset starts from: for the built-in world or a file, from nothing or from a given model."""
    if name not in ("default", "smoke"):
        raise SettingError(f"--preset is {name!r}; it must be default or smoke")
    settings = Settings(preset=name)
    asked = ((SMOKE, name == "smoke"), (STARTED, started))
    for changes in ([DIALOGUES] if dialogues else []) + [changes for changes, on in asked if on]:
        parts = {part: dataclasses.replace(getattr(settings, part), **change) for part, change in changes.items()}
        settings = dataclasses.replace(settings, **parts)
    return settings


_POSITIVE = (
    *("data.prompt_width", "data.response_width", "world.labelers", "net.layers", "net.width", "net.heads"),
    *("net.mlp", "pretrain.documents", "pretrain.steps", "pretrain.batch", "sft.demonstrations", "sft.epochs"),
    *("sft.mix_epochs", "comparisons.prompts", "reward_model.batch", "ppo.iterations", "ppo.batch", "ppo.epochs"),
    *("ppo.minibatches", "evaluation.prompts", "evaluation.best_of", "evaluation.best_of_prompts", "saves"),
    *("evaluation.skills", "evaluation.pretraining_rows", "pretrain.learning_rate", "sft.learning_rate"),
    *("reward_model.learning_rate", "ppo.learning_rate", "ppo.critic_learning_rate", "ppo.clip", "ppo.value_clip"),
    *("ppo.temperature", "ppo.max_grad_norm", "ppo.ptx_ratio"),
)
_NOT_NEGATIVE = (
    *("seed", "world.slips", "world.spread", "world.tie_width", "pretrain.warmup", "ppo.warmup", "ppo.kl_coef"),
    *("ppo.ptx_coef", "evaluation.transcripts"),
)
_SHARES = ("data.max_dropped", "data.held_out", "world.lapse", "sft.mix", "ppo.lambda_", "ppo.ema")


_ON_POLICY = (
    "left out unless --ppo.correct-sampler is given: what is cut off makes the samples those of another distribution "
    "than the policy's, and then log-ratios and KL are wrong"
)


def _value(settings: Settings, name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _require(ok: bool, settings: Settings, name: str, wanted: str) -> None:
    if not ok:
        flag = name.replace("_", "-").rstrip("-")
        raise SettingError(f"--{flag} is {_value(settings, name)!r}; it must be {wanted}")


def check(settings: Settings) -> None:
    """Raise SettingError, naming the setting, for anything out of range; before anything is made or compiled."""
    for name in _POSITIVE:
        _require(0 < _value(settings, name) < math.inf, settings, name, "positive and finite")
    for name in _NOT_NEGATIVE:
        _require(0 <= _value(settings, name) < math.inf, settings, name, "at least 0 and finite")
    for name in _SHARES:
        _require(0 <= _value(settings, name) <= 1, settings, name, "between 0 and 1")
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
    rows = settings.ppo.batch // settings.ppo.minibatches * settings.ppo.ptx_ratio
    _require(rows >= 1, settings, "ppo.ptx_ratio", "such that each minibatch gets a pretraining row")
    if settings.data.path is None:
        least = settings.comparisons.prompts // settings.reward_model.batch
        _require(
            least >= 1, settings, "reward_model.batch", f"at most --comparisons.prompts {settings.comparisons.prompts}"
        )


def as_dict(settings: Settings) -> dict[str, Any]:
    """Nested dictionaries, as config.json holds them."""
    return dataclasses.asdict(settings)


def from_dict(values: dict[str, Any]) -> Settings:
    """Undo `as_dict`; raises SettingError for a field that does not exist."""
    parts: dict[str, Any] = {}
    for field in dataclasses.fields(Settings):
        if field.name not in values:
            raise SettingError(f"the saved configuration lacks {field.name}")
        value = values[field.name]
        if isinstance(value, dict):
            maker: Any = field.default_factory
            known = {f.name for f in dataclasses.fields(maker)}
            if set(value) != known:
                raise SettingError(f"the saved configuration has other fields under {field.name} than this version")
            value = maker(**value)
        parts[field.name] = value
    return Settings(**parts)
