"""Measures one training step of Tunix's DPOTrainer with a frozen reference."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import numpy as np
from tunix.sft.dpo import dpo_trainer

from benchmarks import measured_process
from benchmarks.peers import tunix_models


def main() -> None:
    """Measures the workload that the command line names."""
    options = measured_process.parse_options(__doc__)
    clock, shapes, size = measured_process.Clock(options), options.workload.shapes, options.workload.size
    model, reference = (tunix_models.make(size, bfloat16=options.accelerator) for _ in range(2))
    rng = np.random.default_rng(0)
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
