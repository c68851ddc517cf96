"""A step of TRL's DPOTrainer with a frozen reference."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import numpy as np
from datasets import Dataset
from transformers import GPT2LMHeadModel, set_seed
from trl import DPOConfig, DPOTrainer

from benchmarks import timing
from benchmarks.peers import random_text, torch_models


def main() -> None:
    """Measure it."""
    given = timing.options(__doc__, variants=("plain", "defaults"))
    clock, shapes, size = timing.Clock(given), given.work.shapes, given.work.size
    set_seed(0)
    rng = np.random.default_rng(0)
    pairs = range(shapes.rows * clock.total)

    def answer() -> str:
        # The trainer takes text alone, and leaves the space between prompt and answer to the caller.
        return " " + random_text.text(rng, size, shapes.length - shapes.dpo_prompt - 1) + " <eos>"

    data = Dataset.from_dict(
        {
            "prompt": [random_text.text(rng, size, shapes.dpo_prompt) for _ in pairs],
            "chosen": [answer() for _ in pairs],
            "rejected": [answer() for _ in pairs],
        }
    )
    model, reference = (GPT2LMHeadModel(torch_models.config(size)) for _ in range(2))
    reference.load_state_dict(model.state_dict())
    arguments = torch_models.trainer_arguments(
        given, clock.total, per_device_train_batch_size=shapes.rows, max_length=shapes.length
    )
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=DPOConfig(**arguments),
        train_dataset=data,
        processing_class=random_text.tokenizer(size),
        callbacks=[torch_models.Timer(clock)],
    )
    row = trainer.train_dataset[0]
    assert len(row["prompt_ids"]) + len(row["chosen_ids"]) == shapes.length, "the rows have another length than meant"
    trainer.train()
    clock.report(packages=(*torch_models.PACKAGES, "trl"), tokens=2 * shapes.rows * shapes.length)


if __name__ == "__main__":
    main()
