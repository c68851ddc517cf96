"""Every setting of a plan. Each field's docstring is its ``--help``."""

from __future__ import annotations

import dataclasses
from typing import Literal

Stage = Literal["sft", "reward_model", "dpo", "ppo", "ppo-collect", "ppo-update"]


@dataclasses.dataclass(frozen=True)
class MeshSizes:
    """The sizes of the mesh's axes."""

    data: int = -1
    """Copies of the model, each with rows of its own; -1: as many as the other axes leave chips for."""
    fsdp: int = 1
    """Over how many chips parameters and optimiser state are spread; rows too."""
    tensor: int = 1
    """Over how many chips heads, MLP and vocabulary are spread."""
    sequence: int = 1
    """Over how many chips the columns of a row are spread."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to ask about."""

    stage: Stage = "sft"
    """Whose step; `ppo` is a whole iteration in one program, the other two are its halves."""
    model: str = "llama-3-8b"
    """A preset (llama-3-8b, llama-3-70b, pythia-1b, gpt2, tiny), or a Hugging Face config.json or its folder."""
    topology: str | None = None
    """Chips to plan for, such as v5e:16x16 or v5p:4x4x8; `cpu`, `cpu:8` for eight of them, `gpu`; none: those here."""
    mesh: MeshSizes = dataclasses.field(default_factory=MeshSizes)
    batch: int = 64
    """Rows a step, over all chips: sequences of sft, prompts of reward_model, pairs of dpo, answers of ppo."""
    length: int = 2048
    """Tokens of a row of sft and reward_model."""
    completions: int = 4
    """Answers to each prompt of reward_model."""
    prompt: int = 512
    """Tokens of a prompt of dpo and ppo."""
    response: int = 512
    """Tokens of an answer of dpo and ppo."""
    minibatches: int = 4
    """Optimiser steps an epoch of ppo."""
    epochs: int = 1
    """Passes over a rollout of ppo."""
    micro_batches: int = 1
    """Parts of a batch (of a minibatch of ppo) that are held in memory one at a time."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What layers compute in."""
    params: Literal["bfloat16", "float32"] = "float32"
    """Of the parameters that are trained."""
    moment: Literal["bfloat16", "float32"] = "float32"
    """Of Adam's first moment; the second is as the parameters are."""
    frozen: Literal["bfloat16", "float32"] = "float32"
    """Of reference and reward model, which nothing is added to."""
    remat: Literal["none", "dots", "full"] | None = None
    """What the backward pass computes again; none given: as the model's configuration says."""
    attention: Literal["auto", "einsum", "xla", "cudnn"] | None = None
    """The kernel; none given: as the model's configuration says."""
    memory: float | None = None
    """GiB of a device to plan with; none given: what the chip has."""
    tries: int = 3
    """Nearby settings to compile where it does not fit, until one does; 0: none."""
    json: str | None = None
    """File for all numbers."""
