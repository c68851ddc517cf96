"""Converts the --ppo settings to the options and hyperparameters of the PPO train step."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
from launch import setting_checks
from launch.settings import PPO

from rlhf_jax import aggregation, kl
from rlhf_jax.train import estimators, ppo
from rlhf_jax.train.optim import schedules


def train_step_options(settings: PPO) -> dict[str, Any]:
    """Returns the keyword arguments of `ppo.make_train_step` for the RL method of the settings."""
    samples = settings.samples
    has_kl_loss = settings.method in setting_checks.KL_IN_LOSS or setting_checks.kl_loss_coef(settings) > 0
    estimate, reduction = {
        "ppo": (partial(estimators.gae, whiten_rewards=settings.whiten_rewards), aggregation.token_mean),
        "reinforce": (estimators.reinforce, aggregation.sequence_sum),
        "rloo": (partial(estimators.rloo, samples=samples), aggregation.sequence_sum),
        "grpo": (partial(estimators.grpo, samples=samples), aggregation.sequence_mean),
        "dr-grpo": (partial(estimators.dr_grpo, samples=samples), aggregation.constant_mean),
        "reinforce-pp": (estimators.reinforce_pp, aggregation.token_mean),
    }[settings.method]
    return {
        "epochs": settings.epochs,
        "minibatches": settings.minibatches,
        "micro_batches": settings.micro_batches,
        "samples": samples,
        "shards": settings.shards,
        "estimate": estimate,
        "reduction": reduction,
        "kl_loss": kl.k3 if has_kl_loss else None,
        "entropy_bonus": settings.entropy_coef > 0,
        "unfinished": ppo.replace_score if settings.missing_stop == "replace" else ppo.subtract_penalty,
        "normalise_values": settings.normalise_values,
        "correct_sampler": settings.correct_sampler,
    }


def has_critic(settings: PPO) -> bool:
    """Returns whether the method trains a critic."""
    return settings.method == "ppo"


def hyper(settings: PPO, i: int, *, ptx_coef: float) -> ppo.Hyper:
    """Returns the hyperparameters of iteration ``i``."""
    shape = {"constant": schedules.constant, "linear": schedules.linear, "cosine": schedules.cosine}[settings.schedule]
    rate = schedules.constant_with_warmup(i, settings.iterations, warmup=settings.warmup)
    rate = rate * shape(i, settings.iterations)
    numbers = {
        "learning_rate": settings.learning_rate * rate,
        "critic_learning_rate": settings.critic_learning_rate * rate,
        "kl_coef": 0.0 if settings.method in setting_checks.KL_IN_LOSS else settings.kl_coef,
        "clip": settings.clip,
        "value_clip": settings.value_clip,
        "lambda_": settings.lambda_,
        "temperature": settings.temperature,
        "missing_stop_score": settings.missing_stop_score,
        "reward_clip": math.inf if settings.reward_clip is None else settings.reward_clip,
        "value_coef": settings.value_coef,
        "entropy_coef": settings.entropy_coef,
        "kl_loss_coef": setting_checks.kl_loss_coef(settings),
        "ptx_coef": ptx_coef,
        "max_grad_norm": math.inf if settings.max_grad_norm is None else settings.max_grad_norm,
        "ema_decay": settings.ema,
        "reference_decay": 1.0 if settings.reference_ema is None else settings.reference_ema,
        "discount": settings.discount,
        "kl_target": 6.0 if settings.kl_target is None else settings.kl_target,
        "kl_gain": 0.0 if settings.kl_target is None else settings.kl_gain,
    }
    return ppo.Hyper(**{name: np.float32(number) for name, number in numbers.items()})  # type: ignore[arg-type]
