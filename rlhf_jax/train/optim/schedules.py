"""Learning-rate shapes: ``(step, total) -> multiplier`` in [0, 1].

``step`` counts updates from 0 to ``total - 1`` and may be a Python int, a NumPy number or a traced array; the answer is
float32, so that a hyperparameter built from it never changes the type of a compiled step. The peak rate multiplies it
outside, as in ``hyper["learning_rate"] = peak * cosine(i, total)``.
"""

from __future__ import annotations

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def _library(*values: Any) -> types.ModuleType:
    """NumPy on the host, where a schedule should not cost a device program; jax.numpy under a trace."""
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


def _progress(step: Any, total: Any) -> Any:
    xp = _library(step, total)
    return xp.clip(xp.float32(step) / xp.maximum(xp.float32(total), 1), 0, 1)


def constant(step: Any, total: Any) -> Any:
    """1 throughout."""
    xp = _library(step, total)
    return xp.ones_like(_progress(step, total))


def constant_with_warmup(step: Any, total: Any, *, warmup: Any = 10, initial: Any = 0.1) -> Any:
    """A straight line from ``initial`` at step 0 to 1 at step ``warmup``, then 1 (InstructGPT's PPO: 10 iterations)."""
    xp = _library(step, total, warmup, initial)
    done = xp.where(xp.asarray(warmup) > 0, _progress(step, warmup), xp.float32(1))
    return xp.float32(initial + (1 - initial) * done)


def cosine(step: Any, total: Any, *, final: Any = 0.1) -> Any:
    """Half a cosine from 1 to ``final`` at ``total``: final + (1 - final) (1 + cos(pi step / total)) / 2."""
    xp = _library(step, total, final)
    return xp.float32(final + (1 - final) * 0.5 * (1 + xp.cos(xp.pi * _progress(step, total))))


def linear(step: Any, total: Any, *, final: Any = 0.0) -> Any:
    """A straight line from 1 to ``final`` at ``total``: the u-th of U updates has 1 - (u - 1) / U for final = 0."""
    xp = _library(step, total, final)
    return xp.float32(1 - (1 - final) * _progress(step, total))
