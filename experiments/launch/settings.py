"""Settings of instructgpt.py, which the other commands extend; each field's docstring is its ``--help``."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from launch import published_settings


class SettingError(ValueError):
    """An invalid setting; the message names the flag and says what to do."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Human comparisons that replace the built-in world."""

    path: str | None = None
    """File of pairs or rankings in JSONL, JSON (also .gz) or Parquet: whole dialogues in Anthropic's format, prompts
    with chosen and rejected answers, messages, or ranked responses (docs/data.md). * matches several files. By default,
    the built-in world is used."""
    max_dropped: float = 0.01
    """Maximum share of unusable records; a file with more is refused."""
    vocab_size: int = 1024
    """Vocabulary of the byte-level BPE tokenizer trained on the file's training dialogues. Unused with --model."""
    prompt_width: int = 128
    """Maximum tokens of a prompt; longer prompts lose their oldest turns and are counted."""
    response_width: int = 64
    """Maximum tokens of an answer; longer answers are truncated, lose their stop token and are counted."""
    held_out: float = 0.1
    """Share of the comparisons held out for the reward model's accuracy and the prompts of the evaluation."""


@dataclasses.dataclass(frozen=True)
class World:
    """The built-in world: flaws of its demonstrations and differences between its labelers."""

    slips: float = 1.0
    """Factor that multiplies the probability of every flaw in a demonstration; 0 makes demonstrations flawless."""
    labelers: int = 20
    """Number of labelers in the training pool and in the held-out pool."""
    spread: float = 0.25
    """Relative standard deviation of the labelers' weights on the parts of the gold utility."""
    polite_taste: float = 0.12
    """Utility of four polite words to a labeler. The gold utility is highest at one or two polite words, so a policy
    can raise the reward with more of them."""
    agreement: float = 0.75
    """How often two training labelers agree on a pair of SFT samples; sets the noise of their choices."""
    tie_width: float = 0.01
    """Largest difference in a labeler's noisy utility at which two answers are ranked equal."""
    lapse: float = 0.02
    """Share of rankings made at random."""


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Sizes of the device mesh that a run is sharded over; all 1 for a single device."""

    data: int = 1
    """Number of copies of the model, each of which processes a part of the rows; -1 uses all devices that the other
    axes leave free."""
    fsdp: int = 1
    """Number of devices that rows, parameters and optimiser state are sharded over."""
    tensor: int = 1
    """Number of devices that heads, MLP and vocabulary are sharded over."""
    sequence: int = 1
    """Number of devices that the columns of a row are sharded over."""
    simulate: int | None = None
    """Number of devices to simulate on the CPU, to try a mesh without the hardware."""


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Processes that run together, each with its own devices; see --mesh. On a TPU slice, under SLURM and under Open
    MPI before version 5 they are detected automatically.
    """

    coordinator: str | None = None
    """HOST:PORT on which the first process listens; the same for all processes."""
    count: int | None = None
    """Number of processes."""
    index: int | None = None
    """Index of this process, from 0."""
    timeout: float = 300.0
    """Seconds to wait for the other processes at the start."""
    silence: float = 30.0
    """Seconds without a heartbeat after which a process is considered lost; a closed connection is noticed at once."""


@dataclasses.dataclass(frozen=True)
class Net:
    """Size of the model that is trained from scratch if --model is not given: a small Llama (rotary positions, RMS
    norm, gated MLP).
    """

    layers: int = 3
    """Number of layers."""
    width: int = 96
    """Model width."""
    heads: int = 4
    """Attention heads; the width must be a multiple of twice their number."""
    mlp: int = 256
    """Width of the gated MLP."""


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Pretraining of the base model on the corpus; skipped with --model."""

    documents: int = 80_000
    """Number of documents in the built-in world's corpus."""
    steps: int = 640
    """Optimiser steps."""
    batch: int = 64
    """Rows per step, also in supervised fine-tuning."""
    learning_rate: float = 6e-3
    """Peak learning rate; cosine decay to a tenth."""
    warmup: int = 20
    """Steps of the linear warmup, which starts at a tenth of the rate."""


@dataclasses.dataclass(frozen=True)
class SFT:
    """Supervised fine-tuning of two models, `sft` and `sft_mix`."""

    demonstrations: int = 6000
    """Number of demonstrations in the built-in world."""
    epochs: int = 2
    """Epochs of the baseline `sft` over the demonstrations."""
    mix_epochs: int = 2
    """Epochs of `sft_mix`, from which PPO starts (InstructGPT C.3)."""
    mix: float = 0.1
    """Share of pretraining rows in the batches of `sft_mix`."""
    learning_rate: float = 3e-3
    """Peak learning rate of both models; cosine decay to a tenth."""


@dataclasses.dataclass(frozen=True)
class Comparisons:
    """Samples of the SFT models, ranked by simulated labelers."""

    prompts: int = 1600
    """Training prompts whose samples are ranked. Validation uses another tenth of this number."""
    min_k: int = 4
    """Minimum number of answers to a prompt."""
    max_k: int = 9
    """Maximum number of answers to a prompt."""


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """The reward model, trained from `sft_mix` for one epoch."""

    batch: int = 8
    """Prompts per step, each with all its answers."""
    learning_rate: float = 1.5e-3
    """Peak learning rate; cosine decay to a tenth."""
    heldout: bool = False
    """Train on one half of the comparisons and train a second model on the other half. PPO logs the second model's mean
    score as heldout_reward; an alarm is raised if it falls while the reward rises."""


@dataclasses.dataclass(frozen=True)
class PPO:
    """PPO and PPO-ptx, which differs only by the added pretraining loss; or an RL method without a critic."""

    method: Literal["ppo", "reinforce", "rloo", "grpo", "dr-grpo", "reinforce-pp"] = "ppo"
    """RL method: how advantages are estimated and averaged. Settings that the method does not use are refused."""
    samples: int = 1
    """Number of answers to each prompt; rloo, grpo and dr-grpo compare them and need at least two."""
    iterations: int = 38
    """Number of rollouts, each followed by its updates."""
    batch: int = 256
    """Answers per rollout."""
    minibatches: int = 4
    """Minibatches per epoch, each used for one optimiser step."""
    micro_batches: int = 1
    """Number of parts that each minibatch is split into to save memory; the gradient is the same."""
    shards: int = 1
    """Number of blocks that a rollout is split into; each minibatch takes the same number of rows from every block. If
    it is a multiple of --mesh.data x --mesh.fsdp, answers stay on the device that sampled them. Results depend on this
    number but not on the number of devices."""
    epochs: int = 1
    """Passes over each rollout (1 in InstructGPT, 4 in Ziegler and Stiennon)."""
    learning_rate: float = 6e-4
    """Learning rate of the policy after the warmup."""
    critic_learning_rate: float = 1e-3
    """Learning rate of the critic after the warmup."""
    critic: Literal["reward", "policy", "zero-head"] = "reward"
    """Initial weights of the critic: the reward model (InstructGPT, Stiennon), the SFT model with a new head (Xu), or a
    zero head on the policy's trunk, which both losses train (Ziegler)."""
    value_coef: float = 1.0
    """Weight of the value loss (0.1 in Ziegler). It matters if policy and critic share a trunk; for a separate critic,
    change the learning rate instead."""
    warmup: int = 5
    """Iterations of the linear warmup of both learning rates, which starts at a tenth."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of both learning rates: constant (InstructGPT), linear to 0 (Ziegler, Stiennon) or cosine to a tenth."""
    adam_eps: float = 1e-5
    """Epsilon of Adam."""
    adam_tf1: bool = False
    """Use TensorFlow 1's Adam, which adds epsilon before the bias correction, so that the first steps are smaller."""
    kl_coef: float = 0.055
    """Weight of the KL in the reward, per nat; the reward has standard deviation 1 on SFT samples."""
    kl_target: float | None = None
    """Target of an adaptive KL coefficient: KL per answer in nats (6 in Ziegler). None keeps the coefficient fixed."""
    kl_gain: float = 0.1
    """Gain of the adaptive coefficient."""
    kl_loss_coef: float = 0.0
    """Weight of the k3 estimate of the KL in the loss (0.04 in GRPO); --ppo.kl-coef weights the KL in the reward."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus; InstructGPT, Stiennon and Ziegler use none."""
    reward_clip: float | None = None
    """Bound on the absolute value of scores (20 in Xu)."""
    whiten_rewards: bool = False
    """Scale the per-token rewards of a rollout to variance 1 and keep their mean (Ziegler)."""
    normalise_values: bool = False
    """Train the critic on returns normalised by their running mean and deviation (Xu)."""
    reference_ema: float | None = None
    """Decay per iteration of a reference that is a moving average of the policy (Xu); None keeps the reference
    fixed."""
    discount: float = 1.0
    """Discount factor of rewards, in GAE and in the reward-to-go of methods without a critic."""
    clip: float = 0.2
    """Clip range of the probability ratio."""
    value_clip: float = 0.5
    """Clip range: how far a value may move from its value at the rollout in the value loss."""
    lambda_: float = 0.95
    """Lambda of GAE."""
    temperature: float = 1.0
    """Temperature of the rollouts and of every log-probability in PPO."""
    top_k: int | None = None
    """Sample rollouts from the k most likely tokens only; needs --ppo.correct-sampler."""
    top_p: float | None = None
    """Sample rollouts from the most likely tokens with this total probability; needs --ppo.correct-sampler."""
    correct_sampler: bool = False
    """Weight each token by the ratio of its probability under the policy to that under the sampler, at most 2."""
    missing_stop_score: float = -3.0
    """Score of an answer without a stop token, in standard deviations of the reward."""
    missing_stop: Literal["replace", "subtract"] = "replace"
    """Whether that score replaces the answer's own (`replace`, as in the papers) or is added to it (`subtract`)."""
    ema: float = 0.95
    """Decay of the averaged policy, which is evaluated and saved (0.992 in InstructGPT, over far more updates); 0 uses
    the last weights."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are scaled down."""
    ptx_coef: float = 1.0
    """Weight of the mean pretraining loss per token in PPO-ptx (27.8 in InstructGPT, which normalises differently)."""
    ptx_ratio: float = 1.0
    """Pretraining rows per answer and epoch in PPO-ptx (8 in InstructGPT)."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The evaluation on held-out prompts."""

    prompts: int = 1280
    """Number of held-out prompts; each policy answers each of them once, `sft` twice."""
    split: str = "test"
    """Split of the built-in world's prompts: `test` for results, `validation` to choose settings."""
    best_of: int = 16
    """Samples per prompt of the best-of-n baseline."""
    best_of_prompts: int = 400
    """Number of held-out prompts for the best-of-n baseline."""
    skills: int = 800
    """Total number of skill problems; each skill has the same number."""
    pretraining_rows: int = 512
    """Number of held-out rows of pretraining text for the pretraining loss."""
    transcripts: int = 12
    """Number of prompts whose answers the report shows side by side."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """From a base model to PPO-ptx: pretraining, SFT, reward model, PPO, PPO-ptx, evaluation and report."""

    command: ClassVar[str] = "instructgpt"
    """Name of the command, which config.json records."""

    model: str | None = None
    """Folder of a model and its tokenizer in Hugging Face format to start from; by default a new model of the size
    given by --net.*."""
    preset: str = "default"
    """`default`: about 5 minutes on two CPU cores; `smoke`: every stage within about a minute, too short to learn
    much."""
    published: Literal["instructgpt", "stiennon", "ziegler", "n-plus", "hh", "xu", "tutorial"] | None = None
    """Paper whose PPO settings replace the preset's; its learning rates are used only with --model."""
    seed: int = 0
    """Seed of the world, the data, the initial weights and all samples."""
    out: str | None = None
    """Folder of all output; by default runs/COMMAND-PRESET-seed-SEED-TIME."""
    resume: str | None = None
    """Folder of a run to resume with the settings that it was started with."""
    on_alarm: Literal["report", "stop"] = "report"
    """Response to an alarm in PPO (KL below 0, gold falling, entropy collapsing, ...): `report` it and continue, or
    save and `stop`."""
    saves: int = 5
    """Checkpoints per stage; a killed run loses at most the work since the last one."""
    max_skipped: int = 10
    """Number of consecutive steps with a non-finite loss or gradient after which the run stops; such steps are
    skipped."""
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
"""Settings that the smoke preset changes."""

DIALOGUES: dict[str, dict[str, Any]] = {
    "pretrain": {"steps": 400, "batch": 16},
    "ppo": {"iterations": 24, "batch": 64, "minibatches": 2},
    "evaluation": {"prompts": 512, "best_of_prompts": 64, "pretraining_rows": 128},
}
"""Settings that both presets change for a file of dialogues, whose rows are five times as long."""

PRETRAINED: dict[str, dict[str, Any]] = {
    "sft": {"learning_rate": 1e-4},
    "reward_model": {"learning_rate": 5e-5},
    "ppo": {"learning_rate": 2e-5, "critic_learning_rate": 5e-5},
}
"""Settings that both presets change for --model: learning rates for about 100 million parameters; larger models need
lower ones."""


def preset(name: str, *, dialogues: bool = False, pretrained: bool = False, published: str | None = None) -> Settings:
    """Returns the settings of a preset.

    Args:
        name: ``default`` or ``smoke``.
        dialogues: Whether the run reads a file instead of the built-in world.
        pretrained: Whether the run starts from a given model.
        published: A paper whose PPO settings replace the preset's.

    Returns:
        The settings, before the flags of a command line.

    Raises:
        SettingError: The preset or the paper is unknown.
    """
    if name not in ("default", "smoke"):
        raise SettingError(f"--preset is {name!r}; it must be default or smoke")
    settings = Settings(preset=name)
    groups = ((DIALOGUES, dialogues), (SMOKE, name == "smoke"), (PRETRAINED, pretrained))
    for changes in (changes for changes, applies in groups if applies):
        parts = {part: dataclasses.replace(getattr(settings, part), **change) for part, change in changes.items()}
        settings = dataclasses.replace(settings, **parts)
    if published is not None:
        papers = published_settings.PPO_SETTINGS
        if published not in papers:
            raise SettingError(f"--published is {published!r}; it must be one of {', '.join(papers)}")
        changes = papers[published] | (published_settings.LEARNING_RATES.get(published, {}) if pretrained else {})
        settings = dataclasses.replace(settings, published=published, ppo=dataclasses.replace(settings.ppo, **changes))
    return settings


def peek(arguments: list[str], flag: str) -> str | None:
    """Returns the value of a flag, such as --preset, that changes the defaults of others; None if it is absent."""
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(flag + "="):
            return argument.split("=", 1)[1]
    return None
