"""Names, axis labels and captions of the logged training metrics in the report."""

from __future__ import annotations

from typing import NamedTuple

from rlhf_jax.report import results as results_lib

STAGES = {
    "pretrain": "Pretraining",
    "sft": "Supervised fine-tuning",
    "sft_mix": "Supervised fine-tuning",
    "distill": "Distillation",
    "reward_model": "Reward model",
    "ppo": "Reinforcement learning",
    "ppo_ptx": "Reinforcement learning",
} | dict.fromkeys(results_lib.DIRECT_METHODS, "Direct preference optimisation")
"""Title of each stage, in display order; stages with the same title share their plots."""


class Metric(NamedTuple):
    """Name, y-axis label and caption of a logged metric; minor metrics are shown in a collapsed section."""

    name: str
    ylabel: str
    caption: str
    minor: bool = False


METRICS = {
    "loss": Metric(
        "Loss", "Loss (nats)", "Lower is better. The faint line shows each logged value, the solid line a running mean."
    ),
    "validation_loss": Metric(
        "Validation loss",
        "Loss (nats)",
        "Loss on held-out pairs. If it rises while the training loss falls, the model overfits.",
    ),
    "accuracy": Metric(
        "Accuracy",
        "Fraction",
        "Fraction of pairs ranked correctly; for KTO, fraction of answers whose implicit reward has the right sign. "
        "Higher is better.",
    ),
    "margin": Metric(
        "Margin",
        "Implicit reward",
        "Mean difference in implicit reward between chosen and rejected answers. It should grow during training.",
    ),
    "chosen_logprob": Metric(
        "Chosen answers",
        "Log-probability (nats per answer)",
        "Log-probability of the chosen answers. It often falls during DPO training, which is not an error.",
    ),
    "rejected_logprob": Metric(
        "Rejected answers",
        "Log-probability (nats per answer)",
        "Log-probability of the rejected answers. It should fall faster than that of the chosen answers.",
    ),
    "reward": Metric("Reward", "Reward-model score", "Score that RL maximises. It usually rises, then levels off."),
    "gold": Metric(
        "Gold utility",
        "Gold utility",
        "True quality, which the reward model approximates. If it falls while the reward rises, the policy exploits "
        "errors of the reward model.",
    ),
    "heldout_reward": Metric(
        "Held-out reward",
        "Score of a second reward model",
        "Score of a reward model that is not used to train the policy. If it falls while the reward rises, the policy "
        "is over-optimised.",
    ),
    "kl": Metric(
        "KL from the reference",
        "KL (nats per answer)",
        "Divergence of the policy from its reference model. If it keeps growing, the KL penalty is too weak.",
    ),
    "pretraining_loss": Metric(
        "Pretraining loss",
        "Loss (nats per token)",
        "If it rises, the policy predicts pretraining text less well. The pretraining term of PPO-ptx limits the rise.",
    ),
    "length": Metric(
        "Answer length",
        "Tokens per answer",
        "If it rises steadily together with the reward, the reward model may favour long answers.",
    ),
    "entropy": Metric(
        "Entropy", "Entropy (nats per token)", "Randomness of the policy. If it falls to 0, the policy has collapsed."
    ),
    "explained_variance": Metric(
        "Explained variance",
        "Fraction",
        "It is 1 for a perfect critic and 0 for a critic that is no better than a constant.",
        minor=True,
    ),
    "value_loss": Metric(
        "Value loss", "Loss (squared score)", "Error of the critic. It should fall early and then stay low.", minor=True
    ),
    "policy_loss": Metric(
        "Policy loss", "Clipped surrogate loss", "It is usually close to 0 or slightly negative.", minor=True
    ),
    "clip_fraction": Metric(
        "Clipped tokens",
        "Fraction of tokens",
        "Values above about 0.3 mean that the updates are too large for the clip range.",
        minor=True,
    ),
    "approx_kl": Metric(
        "KL of an update",
        "KL (nats per token)",
        "Divergence of the updated policy from the policy that sampled the batch.",
        minor=True,
    ),
    "ratio_max": Metric(
        "Largest probability ratio",
        "New over old probability",
        "If it spikes, an update is too large, or the samples do not come from the current policy.",
        minor=True,
    ),
    "stopped": Metric(
        "Finished answers",
        "Fraction of answers",
        "Fraction of answers that end with a stop token; the others are truncated.",
        minor=True,
    ),
    "sampler_gap": Metric(
        "Difference between sampler and trainer",
        "Largest difference (nats)",
        "Largest difference between the log-probabilities that the sampler and the trainer compute for the same token. "
        "Anything above rounding error is a bug, unless the sampler uses top-k or top-p.",
        minor=True,
    ),
    "kl_coef": Metric(
        "KL coefficient",
        "Score per nat",
        "Strength of the KL penalty. It is constant unless the penalty is adaptive.",
        minor=True,
    ),
    "grad_norm": Metric("Gradient norm", "Norm", "Norm before clipping. Spikes often precede divergence.", minor=True),
    "learning_rate": Metric("Learning rate", "Learning rate", "Learning rate at each step.", minor=True),
}
"""Metrics in display order; other logged metrics are not plotted."""
