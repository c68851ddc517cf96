"""Settings of instructgpt.py, which most other commands extend. The docstring of a field is its help text."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from launch import published_settings
from launch.run_settings import Compute, Mesh, RunSettings, SettingError, Template, TrainCompute, is_architecture

__all__ = ["Compute", "Mesh", "RunSettings", "SettingError", "Template", "TrainCompute", "is_architecture"]


@dataclasses.dataclass(frozen=True)
class Data:
    """Human comparisons that replace the built-in world."""

    path: str | None = None
    """JSONL, JSON (also compressed) or Parquet file of pairs or rankings in any of the formats in docs/data.md. A
    pattern with * selects several files. None uses the built-in world. --data.comparisons is another name."""
    demonstrations: str | None = None
    """File of prompts with answers for the SFT models. None uses the best answers of the training comparisons."""
    prompts: str | None = None
    """File of prompts for RL and evaluation, of which the share --data.held-out is only used for evaluation. None uses
    the prompts of the comparisons."""
    pretraining: str | None = None
    """File of documents for pretraining and PPO-ptx: text with blank lines between documents (.txt), or records with a
    field `text`. None uses the dialogues of the comparisons."""
    max_dropped: float = 0.01
    """Maximum share of unusable records in --data.path. A file with a larger share is refused."""
    vocab_size: int = 1024
    """Vocabulary size of the byte-level BPE tokenizer trained on the file. Has no effect with --model."""
    prompt_width: int = 128
    """Maximum number of tokens in a prompt. Longer prompts lose their oldest turns or, with a single turn, are
    dropped; both are reported."""
    response_width: int = 64
    """Maximum number of tokens in an answer. Longer answers are truncated, lose their stop token and are reported."""
    held_out: float = 0.1
    """Share of the comparisons held out to measure the reward model's accuracy and to evaluate policies. Comparisons
    with the same system text and first question are held out together."""


@dataclasses.dataclass(frozen=True)
class World:
    """The demonstrations and the simulated labelers of the built-in world."""

    slips: float = 1.0
    """Factor applied to the probability of every flaw in a demonstration. 0 makes demonstrations flawless."""
    labelers: int = 20
    """Number of labelers in each of the two pools, training and held-out."""
    spread: float = 0.25
    """Relative standard deviation, across labelers, of the weights on the components of the gold utility."""
    polite_taste: float = 0.12
    """Mean utility of four polite words to a labeler. The gold utility is highest at one or two polite words, so a
    policy can raise its reward by using more."""
    agreement: float = 0.75
    """Probability that two training labelers agree on a pair of SFT samples. It sets the noise of their choices."""
    tie_width: float = 0.01
    """Consecutive answers in a ranking are tied if the labeler's noisy utilities differ by at most this number."""
    lapse: float = 0.02
    """Probability that a ranking is random."""


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Processes of a run on several hosts. They are detected automatically on a TPU slice, under SLURM and under Open
    MPI before version 5. Elsewhere, set coordinator, count and index.
    """

    coordinator: str | None = None
    """HOST:PORT on which the first process listens. All processes need the same value."""
    count: int | None = None
    """Number of processes."""
    index: int | None = None
    """Index of this process, from 0."""
    timeout: float = 300.0
    """Seconds to wait for the other processes to connect."""
    silence: float = 30.0
    """Seconds without a heartbeat after which a process is considered lost. Closed connections are detected at once."""


@dataclasses.dataclass(frozen=True)
class Net:
    """Size of the small Llama model that is trained from scratch unless --model is given."""

    layers: int = 3
    """Number of layers."""
    width: int = 96
    """Model width."""
    heads: int = 4
    """Number of attention heads. --net.width must be a multiple of twice this number."""
    mlp: int = 256
    """Hidden width of the gated MLP."""


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Pretraining of the base model on a text corpus. It is skipped with --model."""

    documents: int = 42_000
    """Number of documents in the built-in world's corpus."""
    steps: int = 336
    """Number of optimiser steps."""
    batch: int = 64
    """Rows per step, in pretraining and in supervised fine-tuning."""
    learning_rate: float = 6e-3
    """Peak learning rate, with cosine decay to a tenth."""
    warmup: int = 20
    """Number of warmup steps. The warmup is linear and starts at a tenth of the peak learning rate."""


@dataclasses.dataclass(frozen=True)
class SFT:
    """Supervised fine-tuning of two models: `sft`, the baseline, and `sft_mix`, from which PPO starts."""

    demonstrations: int = 4500
    """Number of demonstrations in the built-in world."""
    epochs: int = 2
    """Number of passes over the demonstrations for `sft`."""
    mix_epochs: int = 2
    """Number of passes over the demonstrations for `sft_mix`."""
    mix: float = 0.1
    """Share of pretraining rows in the batches of `sft_mix` (InstructGPT C.3)."""
    learning_rate: float = 3e-3
    """Peak learning rate of both models, with cosine decay to a tenth."""


@dataclasses.dataclass(frozen=True)
class Comparisons:
    """Samples of the SFT models in the built-in world, ranked by simulated labelers."""

    prompts: int = 1500
    """Number of training prompts. A tenth as many are added for validation."""
    min_k: int = 4
    """Minimum number of answers per prompt."""
    max_k: int = 9
    """Maximum number of answers per prompt."""


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """Training of the reward model, which starts from `sft_mix` and lasts one epoch."""

    batch: int = 8
    """Prompts per step, each with all its answers."""
    learning_rate: float = 1.5e-3
    """Peak learning rate, with cosine decay to a tenth."""
    heldout: bool = False
    """Train on half of the comparisons, and train a second reward model on the other half. No question is in both
    halves. PPO logs the second model's mean score as heldout_reward and raises an alarm if it falls while the reward
    rises."""


@dataclasses.dataclass(frozen=True)
class RL:
    """The settings of RL that all commands have."""

    method: Literal["ppo", "reinforce", "rloo", "grpo", "dr-grpo", "reinforce-pp"] = "ppo"
    """RL method. Only ppo has a critic. The other methods refuse settings of the critic."""
    samples: int = 1
    """Number of answers to each prompt. It must be at least 2 for rloo, grpo and dr-grpo, which compare them."""
    iterations: int = 24
    """Number of iterations. Each samples a rollout and then updates the policy on it."""
    batch: int = 256
    """Answers per rollout."""
    minibatches: int = 4
    """Number of minibatches, and thus of optimiser steps, per epoch."""
    micro_batches: int = 1
    """Number of parts into which each minibatch is split to save memory. The gradient is the same."""
    shards: int = 1
    """Number of blocks into which a rollout is split. Every minibatch takes the same number of rows from each block, so
    this number affects the results. If it is a multiple of --mesh.data x --mesh.fsdp, answers stay on their device."""
    epochs: int = 1
    """Number of passes over each rollout (1 in InstructGPT, 4 in Ziegler and Stiennon)."""
    value_coef: float = 1.0
    """Weight of the value loss (0.1 in Ziegler), for a critic with a zero head. For a separate critic, whose Adam
    cancels the weight, change the learning rate of the critic instead."""
    warmup: int = 5
    """Number of warmup iterations for both learning rates. The warmup is linear and starts at a tenth."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay of both learning rates: none (InstructGPT), linear to 0 (Ziegler, Stiennon) or cosine to a tenth."""
    kl_coef: float = 0.055
    """Weight of the KL penalty in the reward, per nat. Scores have standard deviation 1 on SFT samples. grpo and
    dr-grpo have no KL in the reward; they use --ppo.kl-loss-coef."""
    kl_target: float | None = None
    """Target KL per answer, in nats, of an adaptive KL coefficient (6 in Ziegler). None keeps the coefficient fixed."""
    kl_gain: float = 0.1
    """Gain of the adaptive KL coefficient, which --ppo.kl-target enables."""
    kl_loss_coef: float | None = None
    """Weight of the k3 estimate of the KL in the loss. None uses 0.04 with grpo, as in the paper, and 0 otherwise.
    Methods other than grpo and dr-grpo also need --ppo.kl-coef 0, or --ppo.both-kl-terms."""
    both_kl_terms: bool = False
    """Allow a KL loss in addition to the KL penalty in the reward."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, which InstructGPT, Stiennon and Ziegler do not use."""
    reward_clip: float | None = None
    """Maximum absolute value to which scores are clipped (20 in Xu). None does not clip them."""
    whiten_rewards: bool = False
    """Scale the per-token rewards of a rollout to variance 1 without changing their mean (Ziegler)."""
    normalise_values: bool = False
    """Train the critic on returns normalised by their running mean and standard deviation (Xu)."""
    reference_ema: float | None = None
    """Decay per iteration of the moving average of the policy that replaces the reference (Xu). None keeps the
    reference fixed."""
    discount: float = 1.0
    """Discount factor of rewards."""
    clip: float = 0.2
    """Clip range of the probability ratio, which is clipped to 1 plus or minus this number."""
    value_clip: float = 0.5
    """Maximum change of a value since the rollout, beyond which the value loss is clipped."""
    lambda_: float = 0.95
    """Lambda of GAE."""
    temperature: float = 1.0
    """Sampling temperature of the policy and of all log-probabilities: in rollouts, in the comparisons, in the
    normalisation of the reward and in best-of-n."""
    top_k: int | None = None
    """Number of most likely tokens to sample from. Requires --ppo.correct-sampler. None samples from all tokens."""
    top_p: float | None = None
    """Total probability of the most likely tokens to sample from. Requires --ppo.correct-sampler. None samples
    from all tokens."""
    correct_sampler: bool = False
    """Weight each token by its probability under the policy divided by that under the sampler, capped at 2."""
    missing_stop: Literal["replace", "subtract"] = "replace"
    """Whether --ppo.missing-stop-score, which is at most 0, replaces the score of an answer without a stop token
    (`replace`, as in the papers) or is added to it (`subtract`)."""
    ema: float = 0.95
    """Decay of the moving average of the policy's weights that is evaluated and saved (0.992 in InstructGPT, which has
    far more updates). 0 uses the last weights."""
    max_grad_norm: float | None = 1.0
    """Maximum gradient norm, of policy and critic separately unless they share a trunk. Larger gradients are scaled
    down to it. None disables clipping, which no paper reports."""
    ptx_coef: float = 1.0
    """Weight of the mean pretraining loss per token in PPO-ptx (27.8 in InstructGPT, which normalises differently)."""
    ptx_ratio: float = 1.0
    """Pretraining rows per answer and epoch in PPO-ptx (8 in InstructGPT)."""


@dataclasses.dataclass(frozen=True)
class PPO(RL):
    """The RL stages: PPO, or another method, without a pretraining loss (`ppo`) and with one (`ppo_ptx`)."""

    learning_rate: float = 6e-4
    """Learning rate of the policy after the warmup."""
    critic_learning_rate: float = 1e-3
    """Learning rate of the critic after the warmup."""
    critic: Literal["reward", "policy", "zero-head"] = "reward"
    """Initial critic: `reward` for the reward model (InstructGPT, Stiennon), `policy` for the SFT model with a new head
    (Xu), or `zero-head` for a zero head on the policy's trunk, which both losses then train (Ziegler)."""
    adam_eps: float = 1e-5
    """Epsilon of Adam."""
    adam_b2: float = 0.95
    """Decay of Adam's second moment (0.95 in InstructGPT, 0.999 in Ziegler). That of the first moment is 0.9."""
    weight_decay: float = 0.0
    """Weight decay of AdamW, multiplied by the learning rate. 0 is Adam."""
    adam_tf1: bool = False
    """Use TensorFlow 1's Adam. It adds epsilon before the bias correction, which makes the first steps smaller."""
    missing_stop_score: float = -3.0
    """Score for an answer without a stop token, at most 0, in standard deviations of the reward."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Evaluation on held-out prompts."""

    prompts: int = 1280
    """Number of held-out prompts. Each policy answers them once, except `sft`, which answers them twice."""
    temperature: float | None = None
    """Sampling temperature of the evaluation, which also applies to the KL; 0.01 is near-greedy (Stiennon, N+). None
    uses --ppo.temperature, as best-of-n always does except in compare.py."""
    split: str = "test"
    """Split of the built-in world's prompts: `test` to report results, `validation` to tune settings."""
    best_of: int = 16
    """Number of samples per prompt in the best-of-n baseline."""
    best_of_prompts: int = 320
    """Number of held-out prompts in the best-of-n baseline and in the diversity of every policy."""
    skills: int = 800
    """Number of skill problems of the built-in world, divided evenly among four skills: copy, sort, sum and look."""
    pretraining_rows: int = 512
    """Number of held-out rows of pretraining text on which the pretraining loss is measured."""
    transcripts: int = 12
    """Number of prompts for which the report shows the answers of all policies."""


@dataclasses.dataclass(frozen=True)
class Settings(RunSettings):
    """Settings of instructgpt.py."""

    command: ClassVar[str] = "instructgpt"
    inputs: ClassVar[tuple[str, ...]] = (
        *("model", "data.path", "data.demonstrations", "data.prompts", "data.pretraining"),
    )

    model: str | None = None
    """Folder of the model to start from, in Hugging Face format and with its tokenizer, the output folder of an earlier
    command, or the name of an architecture (tiny, gpt2, pythia-1b, llama-3-8b), of which a new model is trained. None
    trains a new model of the size given by --net.*."""
    preset: str = "default"
    """`default`, with which instructgpt.py takes about 5 minutes on two CPU cores, or `smoke`, which runs all stages in
    about a minute, too short to learn much."""
    published: Literal["instructgpt", "stiennon", "ziegler", "n-plus", "hh", "xu", "tutorial"] | None = None
    """Paper (or popular `tutorial`) whose PPO settings replace those of the preset. Its learning rates are used only
    with --model. None uses the preset's settings."""
    seed: int = 0
    """Seed of the built-in world, the data, the initial weights and all samples."""
    out: str | None = None
    """Output folder. None uses runs/NAME-PRESET-seed-SEED-TIME, where NAME is the command or, for dpo.py, the loss."""
    on_alarm: Literal["report", "stop"] = "report"
    """Response to an alarm in reward-model training or RL, such as a rising validation loss or a negative KL. `report`
    prints it and continues; `stop` saves and stops the run."""
    hosts: Hosts = dataclasses.field(default_factory=Hosts)
    data: Data = dataclasses.field(default_factory=Data)
    template: Template = dataclasses.field(default_factory=Template)
    world: World = dataclasses.field(default_factory=World)
    net: Net = dataclasses.field(default_factory=Net)
    pretrain: Pretrain = dataclasses.field(default_factory=Pretrain)
    sft: SFT = dataclasses.field(default_factory=SFT)
    comparisons: Comparisons = dataclasses.field(default_factory=Comparisons)
    reward_model: RewardModel = dataclasses.field(default_factory=RewardModel)
    ppo: PPO = dataclasses.field(default_factory=PPO)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)

    @property
    def given_model(self) -> str | None:
        """The folder of the model to start from; None if a new model is trained."""
        return None if is_architecture(self.model) else self.model

    def folder_name(self, kind: str | None = None) -> str:
        """Returns the beginning of the run folder's default name; ``kind`` defaults to the name of the command."""
        return f"{kind or self.command}-{self.preset}-seed-{self.seed}"

    def batches(self) -> dict[str, int]:
        """Returns the numbers of rows that must be multiples of --mesh.data x --mesh.fsdp, by flag or description."""
        first = {"--pretrain.batch": self.pretrain.batch, "--reward-model.batch": self.reward_model.batch}
        return first | rl_batches(self.ppo)


def rl_batches(ppo: RL, *, ptx: bool = True) -> dict[str, int]:
    """Returns the numbers of rows of RL that must be multiples of --mesh.data x --mesh.fsdp, by flag or description."""
    answers = ppo.batch // ppo.minibatches
    minibatch = f"--ppo.batch {ppo.batch} divided by --ppo.minibatches {ppo.minibatches}"
    parts = f" and --ppo.micro-batches {ppo.micro_batches}" if ppo.micro_batches > 1 else ""
    samples = f" divided by --ppo.samples {ppo.samples}" if ppo.samples > 1 else ""
    text = {f"--ppo.ptx-ratio {ppo.ptx_ratio:g} times {minibatch}": round(answers * ppo.ptx_ratio)}
    return {
        f"--ppo.batch{f' {ppo.batch}' if samples else ''}{samples}": ppo.batch // ppo.samples,
        minibatch + parts: answers // ppo.micro_batches,
    } | (text if ptx else {})


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
"""Settings that the default preset changes with --data.path, since rows then have 192 tokens instead of 38."""

PRETRAINED: dict[str, dict[str, Any]] = {
    "sft": {"learning_rate": 1e-4},
    "reward_model": {"learning_rate": 5e-5},
    "ppo": {"learning_rate": 2e-5, "critic_learning_rate": 5e-5},
}
"""Learning rates that both presets use with --model. They suit models of about 100 million parameters; larger models
need lower ones."""


def preset(name: str, *, dialogues: bool = False, pretrained: bool = False, published: str | None = None) -> Settings:
    """Returns the settings of a preset.

    Args:
        name: ``default`` or ``smoke``.
        dialogues: Whether the run uses a file (--data.path) instead of the built-in world.
        pretrained: Whether the run starts from a model (--model).
        published: Paper whose PPO settings replace those of the preset.

    Returns:
        The settings, before any flags are applied.

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
        papers = published_settings.PAPERS
        if published not in papers:
            raise SettingError(f"--published is {published!r}; it must be one of {', '.join(papers)}")
        changes = papers[published].settings(learning_rates=pretrained)
        settings = dataclasses.replace(settings, published=published, ppo=dataclasses.replace(settings.ppo, **changes))
    return settings


def peek(arguments: list[str], flag: str) -> str | None:
    """Returns the value of a flag that must be read before the others, such as --preset; None if it is absent."""
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(flag + "="):
            return argument.split("=", 1)[1]
    return None
