"""Settings of plan.py. The docstring of a field is its help text."""

from __future__ import annotations

import dataclasses
from typing import Literal

from launch import setting_checks

Stage = Literal["sft", "reward_model", "dpo", "ppo", "ppo-collect", "ppo-update"]


@dataclasses.dataclass(frozen=True)
class MeshSizes:
    """Sizes of the mesh axes."""

    data: int = -1
    """Number of model copies, each of which processes part of the rows. -1 uses as many copies as the number of chips
    allows."""
    fsdp: int = 1
    """Number of chips over which rows, parameters and optimiser state are sharded."""
    tensor: int = 1
    """Number of chips over which attention heads, MLP and vocabulary are sharded."""
    sequence: int = 1
    """Number of chips over which the tokens of a row are sharded."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Settings of plan.py."""

    stage: Stage = "sft"
    """Stage whose step is planned. `ppo` is a whole iteration in one program; `ppo-collect` and `ppo-update` are its
    two halves."""
    model: str = "llama-3-8b"
    """Preset (llama-3-8b, llama-3-70b, pythia-1b, gpt2, tiny), or a Hugging Face config.json or its folder."""
    topology: str | None = None
    """Chips to plan for: a TPU topology such as v5e:16x16 or v5p:4x4x8, `cpu`, `cpu:8` (eight CPU devices) or `gpu`.
    None uses the devices of this machine."""
    mesh: MeshSizes = dataclasses.field(default_factory=MeshSizes)
    batch: int = 64
    """Rows per step, over all chips. A row is a sequence (sft), a prompt (reward_model), a pair (dpo) or an answer
    (ppo)."""
    length: int = 2048
    """Tokens per row, for sft and reward_model."""
    completions: int = 4
    """Answers per prompt, for reward_model."""
    prompt: int = 512
    """Tokens per prompt, for dpo and ppo."""
    response: int = 512
    """Tokens per answer, for dpo and ppo."""
    minibatches: int = 4
    """Optimiser steps per epoch, for ppo."""
    epochs: int = 1
    """Passes over a rollout, for ppo."""
    micro_batches: int = 1
    """Number of parts into which each batch (for ppo, each minibatch) is split to save memory."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the computations in the layers."""
    params: Literal["bfloat16", "float32"] = "float32"
    """Dtype of the trained parameters."""
    moment: Literal["bfloat16", "float32"] = "float32"
    """Dtype of Adam's first moment; the second moment has the dtype of the parameters."""
    frozen: Literal["bfloat16", "float32"] = "float32"
    """Dtype of the frozen models: the reference and the reward model."""
    remat: Literal["none", "dots", "full"] | None = None
    """Rematerialisation in the backward pass. None uses the setting of the model's configuration."""
    attention: Literal["auto", "einsum", "xla", "cudnn"] | None = None
    """Attention kernel. None uses the setting of the model's configuration."""
    memory: float | None = None
    """Memory of a chip in GiB. None uses the memory that chips of this kind have."""
    tries: int = 3
    """Maximum number of similar plans to compile if the plan does not fit. The search ends at the first that fits."""
    json: str | None = None
    """JSON file to which all numbers are written. None writes no file."""


_USERS: dict[str, tuple[Stage, ...]] = {
    "length": ("sft", "reward_model"),
    "completions": ("reward_model",),
    "prompt": ("dpo", "ppo", "ppo-collect", "ppo-update"),
    "response": ("dpo", "ppo", "ppo-collect", "ppo-update"),
    "frozen": ("dpo", "ppo", "ppo-collect", "ppo-update"),
    "minibatches": ("ppo", "ppo-update"),
    "epochs": ("ppo", "ppo-collect", "ppo-update"),
    "micro_batches": ("sft", "reward_model", "dpo", "ppo", "ppo-update"),
    "remat": ("sft", "reward_model", "dpo", "ppo", "ppo-update"),
}
"""Settings of some stages only. ``ppo-collect`` uses the epochs to count the training tokens of an iteration."""


def check_used(plan: Plan) -> None:
    """Raises SettingError for the first setting that differs from its default and has no effect on the stage."""
    names = [name for name, stages in _USERS.items() if plan.stage not in stages]
    setting_checks.refuse_changed(plan, Plan(), [(names, f"with --stage {plan.stage}")])
