"""A scalar head on the trunk: a reward model's score, a critic's values.

``params["head"] = {"kernel_D", "bias", "gain"}``. The three keys are ordinary parameters; a language model without a
head lacks the key, and the trunk ignores it where it is there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax import types
from rlhf_jax.lm import config
from rlhf_jax.lm import params as lm_params


def with_head(rng: jax.Array, params: types.Params, cfg: config.LMConfig, *, zero: bool = False) -> types.Params:
    """Return ``params`` with a fresh head; an old one is replaced, and the trunk's arrays are shared, not copied.

    The kernel is drawn with std 1 / sqrt(D + 1), or is 0 with ``zero`` (a critic on a shared trunk); bias 0, gain 1
    (Ziegler et al. 2019, code).
    """
    return {**params, **lm_params.draw(rng, lm_params.head_table(cfg, zero=zero))}


def without_head(params: types.Params) -> types.Params:
    """Return ``params`` less the head."""
    return {name: node for name, node in params.items() if name != "head"}


def scalar(params: types.Params, hidden_BLD: jax.Array) -> jax.Array:
    """``gain * (hidden . kernel) + bias`` over the last axis, in float32: ``[..., D] -> [...]``."""
    if "head" not in params:
        raise ValueError('params have no "head": make one with lm.with_head(rng, params, cfg)')
    head = params["head"]
    dot = jnp.einsum("...d,d->...", hidden_BLD.astype(jnp.float32), head["kernel_D"].astype(jnp.float32))
    return head["gain"] * dot + head["bias"]


def shift_bias(params: types.Params, amount: jax.Array | float) -> types.Params:
    """Add ``amount`` to every score the model gives."""
    head = params["head"]
    return {**params, "head": {**head, "bias": head["bias"] + amount}}


def centre(params: types.Params, scores: jax.Array, *, where: jax.Array | None = None) -> types.Params:
    """Shift the bias so that what scored ``scores`` with these ``params`` scores 0 on average.

    Of demonstrations in InstructGPT 3.5, of reference summaries in Stiennon et al. 2020.
    """
    return shift_bias(params, -jnp.mean(scores, where=where))


def standardise(params: types.Params, scores: jax.Array, *, where: jax.Array | None = None) -> types.Params:
    """Set gain and bias so that what scored ``scores`` with these ``params`` has mean 0 and variance 1.

    Ziegler et al. 2019, on samples of the reference policy. Scores that do not vary are only centred.
    """
    mean, std = jnp.mean(scores, where=where), jnp.std(scores, where=where)
    scale = jnp.where(std > 0, 1 / jnp.where(std > 0, std, 1.0), 1.0)
    head = params["head"]
    return {**params, "head": {**head, "gain": head["gain"] * scale, "bias": (head["bias"] - mean) * scale}}
