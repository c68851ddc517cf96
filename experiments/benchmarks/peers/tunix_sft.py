"""Measures one step of Tunix's PeftTrainer, which here trains all parameters."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import numpy as np
from tunix.sft import peft_trainer, utils

from benchmarks import measured_process
from benchmarks.peers import tunix_models


def main() -> None:
    """Measures the workload that the command line names."""
    options = measured_process.parse_options(__doc__)
    clock, shapes, size = measured_process.Clock(options), options.workload.shapes, options.workload.size
    model, rng = tunix_models.make(size, bfloat16=options.accelerator), np.random.default_rng(0)
    mask = np.ones((shapes.rows, shapes.length), bool)

    def batch() -> peft_trainer.TrainingInput:
        return peft_trainer.TrainingInput(input_tokens=tunix_models.rows(rng, size, *mask.shape), input_mask=mask)

    def model_input(x: peft_trainer.TrainingInput) -> dict:
        return {
            "input_tokens": x.input_tokens,
            "input_mask": x.input_mask,
            "positions": utils.build_positions_from_mask(x.input_mask),
            "attention_mask": utils.make_causal_attn_mask(x.input_mask),
        }

    trainer = peft_trainer.PeftTrainer(
        model, tunix_models.optimizer(), peft_trainer.TrainingConfig(eval_every_n_steps=10**9)
    ).with_gen_model_input_fn(model_input)
    trainer.train(tunix_models.timed(clock, batch, model))
    clock.report(packages=tunix_models.PACKAGES, tokens=mask.size)


if __name__ == "__main__":
    main()
