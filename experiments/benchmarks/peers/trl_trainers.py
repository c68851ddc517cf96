"""Measures one training step of TRL's SFTTrainer, RewardTrainer or DPOTrainer."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, set_seed
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from benchmarks import measured_process
from benchmarks.peers import random_text, torch_models

TRAINERS = {"sft": (SFTTrainer, SFTConfig), "reward": (RewardTrainer, RewardConfig), "dpo": (DPOTrainer, DPOConfig)}


def main() -> None:
    """Measures the workload that the command line names."""
    options = measured_process.parse_options(__doc__, variants=("plain", "defaults"))
    clock, workload = measured_process.Clock(options), options.workload
    shapes, size, kind = workload.shapes, workload.size, workload.kind
    set_seed(0)
    rng = np.random.default_rng(0)
    rows = range(shapes.rows * clock.total)
    models: dict[str, Any] = {}
    if kind == "reward":
        models["model"] = GPT2ForSequenceClassification(torch_models.config(size, num_labels=1))
        columns = {
            name: [random_text.ids(rng, size, shapes.length) for _ in rows] for name in ("chosen_ids", "rejected_ids")
        }
    elif kind == "sft":
        models["model"] = GPT2LMHeadModel(torch_models.config(size))
        columns = {"input_ids": [random_text.ids(rng, size, shapes.length) for _ in rows]}
    else:
        models = {name: GPT2LMHeadModel(torch_models.config(size)) for name in ("model", "ref_model")}
        models["ref_model"].load_state_dict(models["model"].state_dict())
        # DPOTrainer accepts only text and does not insert the space between prompt and answer.
        answer_length = shapes.length - shapes.dpo_prompt - 1
        columns = {"prompt": [random_text.text(rng, size, shapes.dpo_prompt) for _ in rows]} | {
            name: [f" {random_text.text(rng, size, answer_length)} <eos>" for _ in rows]
            for name in ("chosen", "rejected")
        }
    arguments = torch_models.trainer_arguments(
        options, clock.total, per_device_train_batch_size=shapes.rows, max_length=shapes.length
    )
    trainer_class, config_class = TRAINERS[kind]
    trainer = trainer_class(
        **models,
        args=config_class(**arguments),
        train_dataset=Dataset.from_dict(columns),
        processing_class=random_text.tokenizer(size),
        callbacks=[torch_models.Timer(clock)],
    )
    if kind == "dpo":
        row = trainer.train_dataset[0]
        length = len(row["prompt_ids"]) + len(row["chosen_ids"])
        assert length == shapes.length, f"rows have {length} tokens instead of {shapes.length}"
    trainer.train()
    tokens = (1 if kind == "sft" else 2) * shapes.rows * shapes.length
    clock.report(packages=(*torch_models.PACKAGES, "trl"), tokens=tokens)


if __name__ == "__main__":
    main()
