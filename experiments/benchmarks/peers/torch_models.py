"""The benchmark models in transformers, and the code that the measurements of TRL's trainers share."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

import torch
from transformers import GPT2Config, TrainerCallback

from benchmarks import measured_process, workload_sizes

PACKAGES = ("torch", "transformers")

torch.set_num_threads(os.cpu_count() or 1)


def config(size: workload_sizes.Size, **extra: Any) -> GPT2Config:
    """Returns the configuration of a GPT-2 without dropout."""
    return GPT2Config(
        n_layer=size.layers,
        n_embd=size.width,
        n_head=size.heads,
        vocab_size=size.vocab,
        n_positions=size.positions,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=workload_sizes.EOS,
        eos_token_id=workload_sizes.EOS,
        pad_token_id=workload_sizes.PAD,
        **extra,
    )


def trainer_arguments(options: argparse.Namespace, steps: int, **overrides: Any) -> dict[str, Any]:
    """Returns arguments for TRL's trainers that disable saving, logging and evaluation.

    The variant "plain" uses float32 on a CPU and no gradient checkpointing. The variant "defaults" uses TRL's bfloat16
    autocast and gradient checkpointing. Which variant is faster depends on the CPU.
    """
    arguments = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": not options.accelerator,
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
    if options.variant == "plain":
        arguments |= {"bf16": options.accelerator, "fp16": False, "gradient_checkpointing": False}
    return arguments | overrides


class Timer(TrainerCallback):
    """Times every step of a trainer from the end of the previous step, so that data loading counts."""

    def __init__(self, clock: measured_process.Clock) -> None:
        """Stores the clock; the first repetition starts when training begins."""
        self._clock, self._left = clock, clock.total

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Starts the first repetition."""
        self._clock.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Ends a repetition and starts the next."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._clock.stop()
        self._left -= 1
        if self._left > 0:
            self._clock.start()
