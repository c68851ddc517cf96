"""Measures one iteration of TRL's PPOTrainer, which TRL includes up to version 1.12."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import numpy as np
from datasets import Dataset
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, set_seed
from trl.experimental.ppo import PPOConfig, PPOTrainer

from benchmarks import measured_process
from benchmarks.peers import random_text, torch_models


def main() -> None:
    """Measures the workload that the command line names."""
    options = measured_process.parse_options(__doc__, variants=("plain", "defaults"))
    clock, shapes, size = measured_process.Clock(options), options.workload.shapes, options.workload.size
    set_seed(0)
    rng = np.random.default_rng(0)
    B = shapes.ppo_samples
    data = Dataset.from_dict(
        {"input_ids": [random_text.ids(rng, size, shapes.ppo_prompt) for _ in range(B * clock.total)]}
    )
    policy, reference = (GPT2LMHeadModel(torch_models.config(size)) for _ in range(2))
    reference.load_state_dict(policy.state_dict())
    reward, value = (GPT2ForSequenceClassification(torch_models.config(size, num_labels=1)) for _ in range(2))
    arguments = torch_models.trainer_arguments(
        options,
        -1,
        # All samples form one device batch, because gradient accumulation makes the trainer skip optimiser steps.
        per_device_train_batch_size=B,
        gradient_accumulation_steps=1,
        num_mini_batches=shapes.ppo_minibatches,
        num_ppo_epochs=shapes.ppo_epochs,
        response_length=shapes.ppo_answer,
        total_episodes=B * clock.total,
        local_rollout_forward_batch_size=B,
        num_sample_generations=0,
        temperature=1.0,
        kl_coef=0.05,
        stop_token_id=None,
    )
    trainer = PPOTrainer(
        args=PPOConfig(**arguments),
        processing_class=random_text.tokenizer(size),
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=data,
        eval_dataset=data.select(range(min(16, len(data)))),
        callbacks=[torch_models.Timer(clock)],
    )
    trainer.train()
    steps = int(next(iter(trainer.optimizer.optimizer.state.values()))["step"])
    expected = clock.total * shapes.ppo_epochs * shapes.ppo_minibatches
    assert steps == expected, f"the trainer took {steps} optimiser steps instead of {expected}"
    clock.report(packages=(*torch_models.PACKAGES, "trl"), tokens=B * shapes.ppo_answer)


if __name__ == "__main__":
    main()
