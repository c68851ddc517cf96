"""Settings of DPO and related losses, and their checks. This module imports neither JAX nor the library."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from launch import mesh_settings
from launch import settings as settings_lib
from launch.setting_checks import require, require_divides

Loss = Literal["dpo", "cdpo", "robust", "ipo", "hinge", "kto", "orpo", "simpo", "dpo-sft", "dpo-norm"]


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """Settings of the preference loss."""

    loss: Loss = "dpo"
    """Preference loss. ipo, orpo, simpo and dpo-norm average log-probabilities over tokens; orpo and simpo need no
    reference model."""
    beta: float | None = None
    """Strength of the KL penalty to the reference (for simpo, the scale of the rewards; not for orpo). None uses 0.5
    for ipo, 1 for dpo-norm, 2 for simpo and 0.1 for the other losses."""
    label_smoothing: float | None = None
    """Assumed share of flipped labels, for cdpo and robust. None uses 0.1."""
    desirable_weight: float = 1.0
    """Weight of the good answers in kto."""
    undesirable_weight: float = 1.0
    """Weight of the bad answers in kto."""
    odds_weight: float | None = None
    """Weight of the odds-ratio term in orpo, relative to the likelihood. None uses 1."""
    margin: float | None = None
    """Target difference between the two rewards in simpo. None uses 0.5."""
    sft_coef: float | None = None
    """Weight of the SFT loss that dpo-sft adds to DPO. None uses 0.5."""

    @property
    def paired(self) -> bool:
        """Whether a row of a batch is a pair of answers. Otherwise, a row is a single labelled answer."""
        return self.loss != "kto"

    @property
    def has_reference(self) -> bool:
        """Whether the loss needs a reference model."""
        return self.loss not in ("orpo", "simpo")


@dataclasses.dataclass(frozen=True)
class DirectSettings(LossSettings):
    """Settings of DPO and related losses."""

    epochs: int = 1
    """Number of passes over the pairs."""
    batch: int = 64
    """Number of pairs per step. For kto, each answer is a separate row, so a step has twice as many rows."""
    micro_batches: int = 1
    """Number of parts into which each batch is split to save memory. The gradient is the same."""
    learning_rate: float | None = None
    """Peak learning rate, with warmup over the first tenth of the steps and cosine decay to a tenth. None uses half of
    --ppo.learning-rate."""
    pairs: int = 0
    """Maximum number of pairs per prompt on which the policy is trained, sampled from all pairs of its answers that
    differ in rank. 0 uses all pairs, as the reward model does."""

    @property
    def batch_rows(self) -> int:
        """Number of rows per batch."""
        return self.batch if self.paired else 2 * self.batch


def check_loss(settings: LossSettings) -> None:
    """Raises SettingError, naming the flag, for a setting of the loss that is out of range."""
    for name in ("beta", "odds_weight", "margin", "sft_coef", "desirable_weight", "undesirable_weight"):
        value = getattr(settings, name)
        require(value is None or 0 <= value < math.inf, settings, name, "at least 0 and finite")
    require(settings.beta is None or settings.beta > 0, settings, "beta", "above 0")
    value = settings.label_smoothing
    require(value is None or 0 <= value < 0.5, settings, "label_smoothing", "at least 0 and below 0.5")


def check(settings: DirectSettings) -> None:
    """Raises SettingError, naming the flag, for a setting that is out of range."""
    for name, least in (("epochs", 1), ("batch", 1), ("micro_batches", 1), ("pairs", 0)):
        require(getattr(settings, name) >= least, settings, name, f"at least {least}")
    check_loss(settings)
    value = settings.learning_rate
    require(value is None or 0 < value < math.inf, settings, "learning_rate", "above 0 and finite")
    rows = settings.batch_rows
    require_divides(settings, "micro_batches", rows, f"{rows}, the number of rows per batch")


_LOSSES = {
    "label_smoothing": ("cdpo", "robust"),
    "odds_weight": ("orpo",),
    "margin": ("simpo",),
    "sft_coef": ("dpo-sft",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
"""Settings that only some losses use."""


def unused(settings: LossSettings) -> list[tuple[list[str], str]]:
    """Returns the settings that have no effect with the loss, and why."""
    names = [name for name, losses in _LOSSES.items() if settings.loss not in losses]
    names += ["beta"] if settings.loss == "orpo" else []
    return [(names, f"with --loss {settings.loss}, which does not use it")]


def check_mesh(settings: DirectSettings, mesh: settings_lib.Mesh) -> None:
    """Raises SettingError if the rows of a micro-batch cannot be split evenly among the devices."""
    rows = settings.batch_rows // settings.micro_batches
    parts = f" divided by --micro-batches {settings.micro_batches}" if settings.micro_batches > 1 else ""
    name = "--batch" if rows == settings.batch else f"the rows of --batch {settings.batch}{parts}"
    mesh_settings.check_divides(mesh, name, rows)
