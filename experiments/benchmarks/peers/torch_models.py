"""The measured models in transformers, and what TRL's trainers have in common."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

import torch
from transformers import GPT2Config, TrainerCallback

from benchmarks import sizes, timing

PACKAGES = ("torch", "transformers")

torch.set_num_threads(os.cpu_count() or 1)


def config(size: sizes.Size, **more: Any) -> GPT2Config:
    """GPT-2 of a size, without dropout."""
    return GPT2Config(
        n_layer=size.layers,
        n_embd=size.width,
        n_head=size.heads,
        vocab_size=size.vocab,
        n_positions=size.positions,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=sizes.EOS,
        eos_token_id=sizes.EOS,
        pad_token_id=sizes.PAD,
        **more,
    )


def trainer_arguments(given: argparse.Namespace, steps: int, **more: Any) -> dict[str, Any]:
    """What all of TRL's trainers are given: nothing is saved, logged or evaluated.

    TRL's own defaults, bfloat16 autocast and gradient checkpointing, are faster than float32 on some CPUs and slower
    on others, so both are measured.
    """
    arguments = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": not given.accelerator,
        "max_steps": steps,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10**6,
        "disable_tqdm": True,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    if given.variant == "plain":
        arguments |= {"bf16": given.accelerator, "fp16": False, "gradient_checkpointing": False}
    return arguments | more


class Timer(TrainerCallback):
    """Times every step of a trainer, from the end of the one before, so that loading data counts."""

    def __init__(self, clock: timing.Clock) -> None:
        """Nothing is timed before training begins."""
        self._clock, self._left = clock, clock.total

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the first repetition."""
        self._clock.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """End a repetition and start the next."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._clock.stop()
        self._left -= 1
        if self._left > 0:
            self._clock.start()
