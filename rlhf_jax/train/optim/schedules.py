"""Learning-rate schedules: functions ``(step, total) -> multiplier`` with values in [0, 1].

``step`` counts updates from 0 to ``total - 1`` and may be a Python int, a NumPy number or a traced array. The result is
float32, so that the argument types of a compiled step never change. Multiply it by the peak learning rate, as in
``hyper["learning_rate"] = peak * cosine(i, total)``.
"""

from __future__ import annotations

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def _library(*values: Any) -> types.ModuleType:
    """Returns jax.numpy for JAX arrays and NumPy otherwise, so that a schedule of host numbers uses no device."""
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


def _progress(step: Any, total: Any) -> Any:
    xp = _library(step, total)
    return xp.clip(xp.float32(step) / xp.maximum(xp.float32(total), 1), 0, 1)


def constant(step: Any, total: Any) -> Any:
    """Returns 1 at every step."""
    xp = _library(step, total)
    return xp.ones_like(_progress(step, total))


def constant_with_warmup(step: Any, total: Any, *, warmup: Any = 10, initial: Any = 0.1) -> Any:
    """Returns a linear warmup from ``initial`` to 1, followed by a constant 1 (InstructGPT's PPO).

    Args:
        step: Number of updates done.
        total: Total number of updates; not used.
        warmup: Number of updates until the multiplier is 1 (InstructGPT: 10 iterations); 0 for no warmup.
        initial: Multiplier at step 0 (InstructGPT: 0.1).

    Returns:
        A float32 multiplier.

    Example:
        >>> from rlhf_jax.train.optim import schedules
        >>> [round(float(schedules.constant_with_warmup(i, 100)), 2) for i in (0, 5, 10, 99)]
        [0.1, 0.55, 1.0, 1.0]
    """
    xp = _library(step, total, warmup, initial)
    done = xp.where(xp.asarray(warmup) > 0, _progress(step, warmup), xp.float32(1))
    return xp.float32(initial + (1 - initial) * done)


def cosine(step: Any, total: Any, *, final: Any = 0.1) -> Any:
    """Returns a cosine decay from 1 to ``final``: ``final + (1 - final) (1 + cos(pi step / total)) / 2``.

    InstructGPT uses ``final=0.1`` for SFT and reward models.

    Example:
        >>> from rlhf_jax.train.optim import schedules
        >>> [round(float(schedules.cosine(i, 100)), 2) for i in (0, 50, 100)]
        [1.0, 0.55, 0.1]
    """
    xp = _library(step, total, final)
    return xp.float32(final + (1 - final) * 0.5 * (1 + xp.cos(xp.pi * _progress(step, total))))


def linear(step: Any, total: Any, *, final: Any = 0.0) -> Any:
    """Returns a linear decay from 1 to ``final``, ``1 - (1 - final) step / total`` (Stiennon's PPO: to 0)."""
    xp = _library(step, total, final)
    return xp.float32(1 - (1 - final) * _progress(step, total))
