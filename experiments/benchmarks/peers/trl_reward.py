"""A step of TRL's RewardTrainer on pairs of rows of ids."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import numpy as np
from datasets import Dataset
from transformers import GPT2ForSequenceClassification, set_seed
from trl import RewardConfig, RewardTrainer

from benchmarks import timing
from benchmarks.peers import random_text, torch_models


def main() -> None:
    """Measure it."""
    given = timing.options(__doc__, variants=("plain", "defaults"))
    clock, shapes, size = timing.Clock(given), given.work.shapes, given.work.size
    set_seed(0)
    rng = np.random.default_rng(0)
    pairs = range(shapes.rows * clock.total)
    data = Dataset.from_dict(
        {name: [random_text.ids(rng, size, shapes.length) for _ in pairs] for name in ("chosen_ids", "rejected_ids")}
    )
    arguments = torch_models.trainer_arguments(
        given, clock.total, per_device_train_batch_size=shapes.rows, max_length=shapes.length
    )
    trainer = RewardTrainer(
        model=GPT2ForSequenceClassification(torch_models.config(size, num_labels=1)),
        args=RewardConfig(**arguments),
        train_dataset=data,
        processing_class=random_text.tokenizer(size),
        callbacks=[torch_models.Timer(clock)],
    )
    trainer.train()
    clock.report(packages=(*torch_models.PACKAGES, "trl"), tokens=2 * shapes.rows * shapes.length)


if __name__ == "__main__":
    main()
