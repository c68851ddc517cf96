"""Every setting of the main job. Each field's docstring is its ``--help``; each field is read somewhere."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from launch import published_settings as papers


class SettingError(ValueError):
    """A setting that cannot be; the message names it."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Real human comparisons instead of the built-in world."""

    path: str | None = None
    """A file of pairs or rankings, JSONL, JSON (.gz too) or Parquet: whole dialogues in Anthropic's format, prompt with
    chosen and rejected, messages, or ranked responses (docs/data.md); * for several. None: the built-in world."""
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
class Mesh:
    """Over how many devices a run is spread; a mesh of one is none."""

    data: int = 1
    """Copies of the model, each with rows of its own; -1: as many as the other axes leave devices for."""
    fsdp: int = 1
    """Devices that parameters and optimiser state are spread over; rows too."""
    tensor: int = 1
    """Devices that heads, MLP and vocabulary are spread over."""
    sequence: int = 1
    """Devices that the columns of a row are spread over."""
    simulate: int | None = None
    """Let the CPU look like so many devices, to try a mesh where there are none."""


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Processes that run this together, each with its own devices; see --mesh. A TPU slice, SLURM and Open MPI say by
    themselves who they are."""

    coordinator: str | None = None
    """HOST:PORT of the first one, where it listens; the same on all."""
    count: int | None = None
    """How many there are."""
    index: int | None = None
    """Which one this is, from 0."""
    timeout: float = 300.0
    """Seconds to wait for the others to come."""
    silence: float = 30.0
    """Seconds without a sign of another one after which it is given up; a closed connection is seen at once."""


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
    heldout: bool = False
    """Train on a half of the comparisons, and a second model on the other, whose mean score PPO logs as heldout_reward:
    an alarm tells where that falls while the reward rises."""


@dataclasses.dataclass(frozen=True)
class PPO:
    """PPO, and PPO-ptx, which adds the pretraining loss and is the same in all else; or a method without a critic."""

    method: Literal["ppo", "reinforce", "rloo", "grpo", "dr-grpo", "reinforce-pp"] = "ppo"
    """How advantages and their mean are made; every setting below that a method has no use for is refused."""
    samples: int = 1
    """Answers to each prompt; rloo, grpo and dr-grpo compare them and need two or more."""
    iterations: int = 38
    """Rollouts, each followed by the updates on it."""
    batch: int = 256
    """Answers a rollout."""
    minibatches: int = 4
    """Optimiser steps an epoch."""
    micro_batches: int = 1
    """Parts of a minibatch that are held in memory one at a time; the gradient is the same."""
    shards: int = 1
    """Blocks of a rollout, of which each minibatch takes as many rows; as many as --mesh.data x --mesh.fsdp, or a
    multiple, keeps answers on the device that wrote them. What is learnt depends on it, and not on the devices."""
    epochs: int = 1
    """Passes over each rollout (1 in InstructGPT, 4 in Ziegler and Stiennon)."""
    learning_rate: float = 6e-4
    """Of the policy, after the warmup."""
    critic_learning_rate: float = 1e-3
    """Of the critic."""
    critic: Literal["reward", "policy", "zero-head"] = "reward"
    """What it starts from: the reward model (InstructGPT, Stiennon); the SFT model with a new head (Xu); or, one with
    the policy, a head of zeros on the trunk that both train (Ziegler)."""
    value_coef: float = 1.0
    """Weight of the value loss (0.1 in Ziegler); a critic on its own has its rate instead."""
    warmup: int = 5
    """Iterations from a tenth of the rates to the rates."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the rates: constant (InstructGPT), linear to 0 (Ziegler, Stiennon), cosine to a tenth."""
    adam_eps: float = 1e-5
    """Of Adam."""
    adam_tf1: bool = False
    """Adam as TensorFlow 1 has it: epsilon is added before the bias correction, and first steps are smaller."""
    kl_coef: float = 0.055
    """Reward per nat; the reward has standard deviation 1 on SFT samples."""
    kl_target: float | None = None
    """Nats a sequence that an adaptive coefficient steers to (6 in Ziegler); none: the coefficient is fixed."""
    kl_gain: float = 0.1
    """Of the adaptive coefficient."""
    kl_loss_coef: float = 0.0
    """Weight of the KL as a loss, k3 (0.04 in GRPO); --ppo.kl-coef is the KL in the reward."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus; InstructGPT, Stiennon and Ziegler have none."""
    reward_clip: float | None = None
    """Scores are kept within this on both sides (20 in Xu)."""
    whiten_rewards: bool = False
    """Scale the per-token rewards of a rollout to variance 1, and keep their mean (Ziegler)."""
    normalise_values: bool = False
    """Let the critic learn returns less their running mean over their deviation (Xu)."""
    reference_ema: float | None = None
    """Decay of a reference that follows the policy, once an iteration (Xu); none: the reference stays."""
    discount: float = 1.0
    """Of GAE and of rewards to go."""
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
    missing_stop: Literal["replace", "subtract"] = "replace"
    """Whether that score replaces the answer's own (the papers' rule) or is added to it."""
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
    published: Literal["instructgpt", "stiennon", "ziegler", "n-plus", "hh", "xu", "tutorial"] | None = None
    """Begin with the settings of PPO that a paper reports; its learning rates only beside --model."""
    seed: int = 0
    """Of everything: world, data, initial weights, samples."""
    out: str | None = None
    """Folder for all files; by default runs/instructgpt-PRESET-seed-SEED-TIME."""
    resume: str | None = None
    """Go on with the run in this folder, with the settings it was started with."""
    on_alarm: Literal["report", "stop"] = "report"
    """On an alarm in PPO (KL below 0, gold falling, entropy collapsing, ...): tell and go on, or save and stop."""
    saves: int = 5
    """Checkpoints within a stage; a run that is killed loses no more than the time between two."""
    max_skipped: int = 10
    """Steps in a row whose loss or gradient is not finite, which are left out, before the run saves and stops."""
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    hosts: Hosts = dataclasses.field(default_factory=Hosts)
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


def preset(name: str, *, dialogues: bool = False, started: bool = False, published: str | None = None) -> Settings:
    """The settings that a preset starts from: for the built-in world or a file, from nothing or from a given model.

    ``published`` names a paper whose settings of PPO replace the preset's. Raises SettingError for unknown names.
    """
    if name not in ("default", "smoke"):
        raise SettingError(f"--preset is {name!r}; it must be default or smoke")
    settings = Settings(preset=name)
    asked = ((SMOKE, name == "smoke"), (STARTED, started))
    for changes in ([DIALOGUES] if dialogues else []) + [changes for changes, on in asked if on]:
        parts = {part: dataclasses.replace(getattr(settings, part), **change) for part, change in changes.items()}
        settings = dataclasses.replace(settings, **parts)
    if published is not None:
        if published not in papers.PUBLISHED:
            raise SettingError(f"--published is {published!r}; it must be one of {', '.join(papers.PUBLISHED)}")
        changes = papers.PUBLISHED[published] | (papers.RATES.get(published, {}) if started else {})
        settings = dataclasses.replace(settings, published=published, ppo=dataclasses.replace(settings.ppo, **changes))
    return settings


def peek(arguments: list[str], flag: str) -> str | None:
    """The value of a flag that decides what the other flags start from."""
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(flag + "="):
            return argument.split("=", 1)[1]
    return None


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
