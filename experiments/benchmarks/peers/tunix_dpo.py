"""A step of Tunix's DPOTrainer with a frozen reference."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import numpy as np
from tunix.sft.dpo import dpo_trainer

from benchmarks import timing
from benchmarks.peers import tunix_models


def main() -> None:
    """Measure it."""
    given = timing.options(__doc__)
    clock, shapes, size = timing.Clock(given), given.work.shapes, given.work.size
    model, reference, rng = (
        tunix_models.make(size, bfloat16=given.accelerator),
        tunix_models.make(size, bfloat16=given.accelerator),
        np.random.default_rng(0),
    )
    B, P, T = shapes.rows, shapes.dpo_prompt, shapes.length - shapes.dpo_prompt

    def batch() -> dpo_trainer.TrainingInput:
        return dpo_trainer.TrainingInput(
            prompt_ids=tunix_models.rows(rng, size, B, P),
            prompt_mask=np.ones((B, P), bool),
            chosen_ids=tunix_models.rows(rng, size, B, T),
            chosen_mask=np.ones((B, T), bool),
            rejected_ids=tunix_models.rows(rng, size, B, T),
            rejected_mask=np.ones((B, T), bool),
        )

    trainer = dpo_trainer.DPOTrainer(
        model, reference, tunix_models.optimizer(), dpo_trainer.DPOTrainingConfig(eval_every_n_steps=10**9)
    )
    trainer.train(tunix_models.timed(clock, batch, model))
    clock.report(packages=tunix_models.PACKAGES, tokens=2 * B * shapes.length)


if __name__ == "__main__":
    main()
