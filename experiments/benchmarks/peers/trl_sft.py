"""A step of TRL's SFTTrainer on rows of ids."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import numpy as np
from datasets import Dataset
from transformers import GPT2LMHeadModel, set_seed
from trl import SFTConfig, SFTTrainer

from benchmarks import timing
from benchmarks.peers import random_text, torch_models


def main() -> None:
    """Measure it."""
    given = timing.options(__doc__, variants=("plain", "defaults"))
    clock, shapes, size = timing.Clock(given), given.work.shapes, given.work.size
    set_seed(0)
    rng = np.random.default_rng(0)
    rows = [random_text.ids(rng, size, shapes.length) for _ in range(shapes.rows * clock.total)]
    arguments = torch_models.trainer_arguments(
        given, clock.total, per_device_train_batch_size=shapes.rows, max_length=shapes.length
    )
    trainer = SFTTrainer(
        model=GPT2LMHeadModel(torch_models.config(size)),
        args=SFTConfig(**arguments),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=random_text.tokenizer(size),
        callbacks=[torch_models.Timer(clock)],
    )
    trainer.train()
    clock.report(packages=(*torch_models.PACKAGES, "trl"), tokens=shapes.rows * shapes.length)


if __name__ == "__main__":
    main()
