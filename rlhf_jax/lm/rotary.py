"""Rotary position embeddings (Su et al. 2021)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.lm import config

Angles = tuple[jax.Array, jax.Array]
"""Cosine and sine, ``[B,1,L,half]`` float32."""


def angles(positions_BL: jax.Array, theta: float, scaling: Any, cfg: config.LMConfig) -> Angles | None:
    """Returns cosine and sine of the rotation at each position; None if the model has no rotary positions.

    Args:
        positions_BL: int32 positions.
        theta: Base of the frequencies.
        scaling: `config.LinearScaling`, `config.Llama3Scaling` or None.
        cfg: Architecture.

    Returns:
        Two ``[B,1,L,half]`` float32 arrays, or None.
    """
    if cfg.positions != "rope":
        return None
    half = cfg.rope_width // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if isinstance(scaling, config.LinearScaling):
        frequencies = frequencies / scaling.factor
    elif isinstance(scaling, config.Llama3Scaling):
        turns = frequencies * (scaling.length / (2 * jnp.pi))
        kept = jnp.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
        frequencies = kept * frequencies + (1.0 - kept) * frequencies / scaling.factor
    angles = positions_BL.astype(jnp.float32)[:, None, :, None] * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BHLC: jax.Array, rotation: Angles) -> jax.Array:
    """Returns heads whose features i and i + half are rotated by the angle of the position (Llama's pairing)."""
    cos, sin = rotation
    half = cos.shape[-1]
    first, second = x_BHLC[..., :half].astype(jnp.float32), x_BHLC[..., half : 2 * half].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BHLC.dtype)
    return jnp.concatenate([rotated, x_BHLC[..., 2 * half :]], axis=-1)
