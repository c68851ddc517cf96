"""Settings that all training commands have. The docstring of a field is its help text."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import ClassVar, Literal

ARCHITECTURES = ("tiny", "gpt2", "pythia-1b", "llama-3-8b", "llama-3-70b")
"""Values of --model that are not folders: architectures of models with random weights."""


def is_architecture(model: str | None) -> bool:
    """Returns whether ``model`` names an architecture instead of a folder."""
    return model in ARCHITECTURES and not pathlib.Path(model).exists()


class SettingError(ValueError):
    """An invalid setting; the message names the flag and says what to do."""


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Sizes of the axes of the device mesh. The defaults use a single device."""

    data: int = 1
    """Number of copies of the model, each of which processes part of the rows. -1 uses as many copies as
    the number of devices allows."""
    fsdp: int = 1
    """Number of devices over which rows, parameters and optimiser state are sharded."""
    tensor: int = 1
    """Number of devices over which attention heads, MLP and vocabulary are sharded."""
    sequence: int = 1
    """Number of devices over which the tokens of a row are sharded."""
    simulate: int | None = None
    """Number of devices to simulate on the CPU, to try a mesh without the hardware. None uses real devices."""


@dataclasses.dataclass(frozen=True)
class Compute:
    """Number format of the computation."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute dtype of all models; parameters, optimiser and log-probabilities are float32. None uses the dtype in the
    config.json of the model, or float32 if that is float16, and float32 for a new model."""


@dataclasses.dataclass(frozen=True)
class TrainCompute(Compute):
    """Number format and memory of training."""

    remat: Literal["none", "dots", "full"] = "none"
    """Activations that are computed again in the backward pass to save memory: none, all except the results of matrix
    products (`dots`), or all (`full`)."""


@dataclasses.dataclass(frozen=True)
class Template:
    """The chat template of the model."""

    options: str | None = None
    """Values of the template's variables as a JSON object, such as {"enable_thinking": false}. They are saved with the
    trained models."""
    date: str | None = None
    """Date (YYYY-MM-DD) for a template that writes the current date. None is the day on which the run starts."""


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Settings of a command that trains in a run folder and can be resumed."""

    command: ClassVar[str]
    """Name of the command, saved in config.json."""
    inputs: ClassVar[tuple[str, ...]] = ()
    """Names of the settings, such as data.path, that are files or model folders. A run cannot be resumed if they have
    changed."""

    functions: ClassVar[tuple[str, ...]] = ()
    """Names of the settings that are tuples of Python functions, whose files must not change either."""

    seed: int = 0
    """Seed of the data, the initial weights and all samples."""
    out: str | None = None
    """Output folder. None uses runs/NAME-TIME, where NAME is the command."""
    resume: str | None = None
    """Folder of a run to resume with its saved settings. None starts a new run."""
    saves: int = 5
    """Number of checkpoints per stage. A killed run loses only the work since the last one."""
    max_skipped: int = 10
    """Number of consecutive skipped steps after which the run stops. Steps with a non-finite loss or gradient, or
    with nothing to learn from, are skipped."""
    log: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where to log the metrics in addition to metrics.jsonl. With `wandb`, WANDB_MODE=offline logs without a network.
    A resumed run continues the run of the service."""
    reuse_programs: bool = True
    """Keep compiled programs in the folder `programs` beside the run folder; later runs with the same shapes load them
    and start faster. JAX_COMPILATION_CACHE_DIR, if set, replaces this folder."""
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    compute: TrainCompute = dataclasses.field(default_factory=TrainCompute)

    def folder_name(self, kind: str | None = None) -> str:
        """Returns the beginning of the run folder's default name; ``kind`` defaults to the name of the command."""
        return f"{kind or self.command}-seed-{self.seed}"

    def batches(self) -> dict[str, int]:
        """Returns the numbers of rows that must be multiples of --mesh.data x --mesh.fsdp, by flag or description."""
        return {}


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021). The saved model has them merged into its weights."""

    rank: int | None = None
    """Rank of the adapters. None trains all parameters."""
    alpha: float | None = None
    """Scale of the adapters, which is divided by the rank. None uses twice the rank."""
    pattern: str = "layers/.*/kernel"
    """Regular expression for the names of the kernels that get adapters, such as "layers/(q|v)/kernel"."""

    @property
    def scale(self) -> float:
        """The factor by which the product of the two low-rank matrices is multiplied."""
        assert self.rank is not None
        return (2.0 * self.rank if self.alpha is None else self.alpha) / self.rank


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimiser of a stage."""

    optimizer: Literal["adamw", "muon", "adafactor", "lion"] = "adamw"
    """Optimiser. `muon` trains the kernels of the layers with Muon and the other parameters with AdamW."""
    b1: float = 0.9
    """Decay of the momentum; with `muon`, of that of AdamW. Has no effect with `adafactor`, which has none."""
    b2: float = 0.95
    """Decay of AdamW's second moment or, for `lion`, of its momentum (0.99 in the paper). Has no effect with
    `adafactor`, whose decay follows its own schedule."""
    epsilon: float = 1e-8
    """Number added to the root of AdamW's second moment. Has no effect with `adafactor` and `lion`."""
    weight_decay: float = 0.0
    """Decoupled weight decay, multiplied by the learning rate. It is not applied to biases and norms."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """The model that a stage trains, and for how long."""

    model: str
    """The model to start from: a folder in Hugging Face format, the output folder of an earlier command, or the name
    of an architecture (tiny, gpt2, pythia-1b, llama-3-8b) for random weights and a tokenizer trained on the data."""
    learning_rate: float | None = None
    """Peak learning rate, with a linear warmup over the first tenth of the steps and cosine decay to a tenth. None uses
    2e-5 for a given model, 2e-4 with --lora.rank and 1e-3 for random weights."""
    epochs: int = 1
    """Number of passes over the data."""
    steps: int | None = None
    """Number of optimiser steps. None is as many as --epochs takes."""
    batch: int = 16
    """Number of rows per step."""
    micro_batches: int = 1
    """Number of parts into which each batch is split to save memory. The gradient is the same."""
    max_grad_norm: float = 1.0
    """Maximum gradient norm. Larger gradients are scaled down to it."""
    lora: Lora = dataclasses.field(default_factory=Lora)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSettings(RunSettings, Optimizer, Training):
    """Settings of a command that trains a model of the user's own in a single stage."""

    inputs: ClassVar[tuple[str, ...]] = ("model", "data.path")
    default_rates: ClassVar[tuple[float, float, float]] = (2e-5, 2e-4, 1e-3)
    """Default learning rates for a given model, with --lora.rank and for random weights."""

    template: Template = dataclasses.field(default_factory=Template)

    def batches(self) -> dict[str, int]:
        """Returns the number of rows that must be a multiple of --mesh.data x --mesh.fsdp, by flag or description."""
        parts = f" divided by --micro-batches {self.micro_batches}" if self.micro_batches > 1 else ""
        return {f"--batch {self.batch}{parts}" if parts else "--batch": self.batch // self.micro_batches}
