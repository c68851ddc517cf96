"""How the report draws the numbers that a training stage logs: what they are called, their axes, how to read them."""

from __future__ import annotations

from typing import NamedTuple

from rlhf_jax.report import results as results_lib

STAGES = {
    "pretrain": "Pretraining",
    "sft": "Supervised fine-tuning",
    "sft_mix": "Supervised fine-tuning",
    "reward_model": "Reward model",
    "ppo": "Reinforcement learning",
    "ppo_ptx": "Reinforcement learning",
} | dict.fromkeys(results_lib.DIRECT, "Learning from pairs")
"""Stages in the order in which they are shown; those of one name share their plots."""


class Metric(NamedTuple):
    """How a logged metric is drawn: name, axis with its unit, how to read it; minor ones lie in a closed part."""

    name: str
    ylabel: str
    caption: str
    minor: bool = False


METRICS = {
    "loss": Metric("Loss", "Nats", "Lower is better; the faint line is the batch, the strong one a running mean."),
    "validation_loss": Metric(
        "Validation loss", "Nats", "Of pairs that are not trained on; a rise while the loss falls is overfitting."
    ),
    "accuracy": Metric(
        "Accuracy", "Share", "Share of targets that the model predicts or ranks right; higher is better."
    ),
    "margin": Metric(
        "Margin", "Implicit reward", "By how much the better answer of a pair leads; it grows as the policy moves."
    ),
    "chosen_logprob": Metric(
        "Better answers", "Nats per answer", "Their log-probability; that it falls too is common, and no error."
    ),
    "rejected_logprob": Metric(
        "Worse answers", "Nats per answer", "Their log-probability; it falls faster than that of the better ones."
    ),
    "reward": Metric("Reward", "Reward-model score", "What PPO is trained to raise; it climbs and then levels off."),
    "gold": Metric(
        "Gold",
        "Gold utility",
        "What the score stands for; where it falls while the score climbs, the policy games the reward model.",
    ),
    "heldout_reward": Metric(
        "Held-out reward",
        "Score of a second reward model",
        "Of a reward model that nothing is trained on; a fall while the score climbs is over-optimisation.",
    ),
    "kl": Metric(
        "KL from the reference",
        "Nats per answer",
        "How far the policy has moved from where it started; growth without a bound means too weak a penalty.",
    ),
    "pretraining_loss": Metric(
        "Pretraining loss",
        "Nats per token",
        "A rise is what the policy forgets of its pretraining text; PPO-ptx is there to hold it.",
    ),
    "length": Metric("Answer length", "Tokens", "A steady climb beside the score hints at reward for length alone."),
    "entropy": Metric("Entropy", "Nats per token", "How open the policy's choice is; a fall to 0 is a collapse."),
    "explained_variance": Metric(
        "Explained variance", "Share", "1 is a perfect critic, 0 one no better than a constant.", minor=True
    ),
    "value_loss": Metric(
        "Value loss", "Squared score", "The critic's error; it falls early and then stays low.", minor=True
    ),
    "policy_loss": Metric("Policy loss", "Clipped surrogate", "It hovers around 0 or a little below.", minor=True),
    "clip_fraction": Metric(
        "Clipped tokens", "Share", "Above about 0.3 the steps are too large for the clip.", minor=True
    ),
    "approx_kl": Metric("KL of an update", "Nats per token", "How far one update moves the policy.", minor=True),
    "ratio_max": Metric(
        "Largest probability ratio",
        "New over old probability",
        "Spikes mean too large a step, or samples that the policy being trained did not write.",
        minor=True,
    ),
    "stopped": Metric(
        "Finished answers", "Share", "Answers that end by themselves instead of being cut off.", minor=True
    ),
    "sampler_gap": Metric(
        "Sampler against trainer",
        "Largest gap (nats)",
        "Between the two log-probabilities of one token; anything but rounding is a bug.",
        minor=True,
    ),
    "kl_coef": Metric(
        "KL coefficient", "Score per nat", "The strength of the penalty; flat if not adapted.", minor=True
    ),
    "grad_norm": Metric("Gradient norm", "Norm", "Before clipping; spikes come before divergence.", minor=True),
    "learning_rate": Metric("Learning rate", "Rate", "The schedule as it was run.", minor=True),
}
