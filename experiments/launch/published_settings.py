"""PPO settings reported in papers. Settings that a paper does not report keep their preset values.

Coefficients are relative to the scale of each paper's reward, so their effect differs between rewards; compare runs by
the KL that they reach. Learning rates suit models of at least 100 million parameters and are used only with --model.
"""

from __future__ import annotations

from typing import Any

_SHARED: dict[str, Any] = {"clip": 0.2, "discount": 1.0, "lambda_": 0.95}

PPO_SETTINGS: dict[str, dict[str, Any]] = {
    # Ouyang et al. 2022, appendix C, which reports neither lambda nor value clip nor Adam's epsilon.
    "instructgpt": _SHARED
    | {"kl_coef": 0.02, "batch": 512, "minibatches": 8, "epochs": 1, "warmup": 10, "schedule": "constant"}
    | {"ema": 0.992, "ptx_coef": 27.8, "ptx_ratio": 8.0, "temperature": 1.0},
    # Stiennon et al. 2020, appendix B.1.
    "stiennon": _SHARED | {"kl_coef": 0.05, "batch": 512, "epochs": 4, "schedule": "linear", "warmup": 0, "ema": 0.0},
    # Ziegler et al. 2019, released code for the style tasks, with an adaptive KL coefficient, whitened rewards,
    # TensorFlow's Adam and a zero value head on the policy's trunk.
    "ziegler": _SHARED
    | {"kl_coef": 0.15, "kl_target": 6.0, "kl_gain": 0.0512, "batch": 512, "minibatches": 1, "epochs": 4}
    | {"value_clip": 0.2, "whiten_rewards": True, "temperature": 0.7, "missing_stop_score": -1.0, "ema": 0.0}
    | {"schedule": "linear", "warmup": 0, "adam_eps": 1e-5, "adam_tf1": True}
    | {"critic": "zero-head", "value_coef": 0.1},
    # Huang et al. 2024, "The N+ implementation details".
    "n-plus": _SHARED
    | {"kl_coef": 0.05, "batch": 512, "minibatches": 1, "epochs": 4, "value_clip": 0.2, "temperature": 0.7}
    | {"missing_stop_score": -1.0, "schedule": "linear", "warmup": 0, "adam_eps": 1e-5, "ema": 0.0}
    | {"value_coef": 0.1},
    # Bai et al. 2022, "Training a helpful and harmless assistant", appendix B.1.
    "hh": _SHARED | {"kl_coef": 0.001, "epochs": 1, "entropy_coef": 0.0, "ema": 0.0},
    # Xu et al. 2024, appendix A, without its top-k of 200, which requires --ppo.correct-sampler.
    "xu": {"kl_coef": 0.1, "batch": 512, "minibatches": 4, "clip": 0.2, "discount": 1.0, "lambda_": 1.0, "ema": 0.0}
    | {"reward_clip": 20.0, "normalise_values": True, "temperature": 1.0},
    # A widely copied tutorial. None of the papers uses its entropy bonus or its gradient clipping.
    "tutorial": _SHARED | {"kl_coef": 0.2, "entropy_coef": 0.01, "temperature": 0.7, "epochs": 4, "max_grad_norm": 1.0},
}

LEARNING_RATES: dict[str, dict[str, Any]] = {
    "instructgpt": {"learning_rate": 9.65e-6, "critic_learning_rate": 9e-6},
    "stiennon": {"learning_rate": 1.5e-5, "critic_learning_rate": 1.5e-5},
    "ziegler": {"learning_rate": 1e-5, "critic_learning_rate": 1e-5},
    "n-plus": {"learning_rate": 3e-6, "critic_learning_rate": 3e-6},
    "xu": {"learning_rate": 1e-5, "critic_learning_rate": 5e-6},
}
"""Learning rates reported in the papers. For InstructGPT, the policy's learning rate is that of SFT, because the paper
reports only the range that was searched, 2.55e-6 to 2.55e-5."""
