"""A scalar head on the trunk, or several: a reward model's score, a critic's values.

``params["head"] = {"kernel_D", "bias", "gain"}``: three ordinary parameters, bias and gain scalars. Several heads on
one trunk, an ensemble or one for each thing that is judged, are ``{"kernel_HD", "bias", "gain"}`` with bias and gain
of shape ``[H]``; whatever one head gives as ``[...]`` they give as ``[..., H]``. A language model without a head lacks
the key, and the trunk ignores it where it is there.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import parallel, types
from rlhf_jax.lm import config
from rlhf_jax.lm import params as lm_params


def with_head(
    rng: jax.Array, params: types.Params, cfg: config.LMConfig, *, zero: bool = False, heads: int | None = None
) -> types.Params:
    """Return ``params`` with a fresh head; an old one is replaced, and the trunk's arrays are shared, not copied.

    The kernel is drawn with std 1 / sqrt(D + 1), or is 0 with ``zero`` (a critic on a shared trunk); bias 0, gain 1
    (Ziegler et al. 2019, code). ``heads``: that many, each drawn for itself; None for the one of ``kernel_D``.
    """
    return {**params, **lm_params.draw(rng, lm_params.head_table(cfg, zero=zero, heads=heads))}


def without_head(params: types.Params) -> types.Params:
    """Return ``params`` less the head."""
    return {name: node for name, node in params.items() if name != "head"}


def count_heads(params: types.Params) -> int | None:
    """H where there are several heads, None where there is one."""
    return params["head"]["kernel_HD"].shape[0] if "kernel_HD" in params["head"] else None


def scalar(params: types.Params, hidden_BLD: jax.Array) -> jax.Array:
    """``gain * (hidden . kernel) + bias`` over the last axis, float32: ``[..., D] -> [...]``, or ``[..., H]``."""
    if "head" not in params:
        raise ValueError('params have no "head": make one with lm.with_head(rng, params, cfg)')
    head = params["head"]
    hidden_BLD = hidden_BLD.astype(jnp.float32)
    if "kernel_HD" in head:
        dot = jnp.einsum(
            "...d,hd->...h", hidden_BLD, parallel.gathered(head["kernel_HD"], None, "embed").astype(jnp.float32)
        )
        shape = (1,) * (dot.ndim - 1) + head["gain"].shape
        return head["gain"].reshape(shape) * dot + head["bias"].reshape(shape)
    dot = jnp.einsum("...d,d->...", hidden_BLD, parallel.gathered(head["kernel_D"], "embed").astype(jnp.float32))
    return head["gain"] * dot + head["bias"]


def value(params: types.Params, hidden_BLD: jax.Array) -> jax.Array:
    """:func:`scalar` of a critic, which has one head; raises ValueError where there are several."""
    if "head" in params and count_heads(params) is not None:
        raise ValueError(
            f"a value comes from one head, and there are {count_heads(params)}: lm.heads.combine makes one of them"
        )
    return scalar(params, hidden_BLD)


def combine(params: types.Params, weights_H: jax.Array) -> types.Params:
    """One head whose score is the weighted sum of several: all equal to 1 / H for an ensemble, one-hot for one of them.

    Raises ValueError where there are not as many heads as weights.
    """
    heads = count_heads(params)
    if heads is None or weights_H.shape != (heads,):
        raise ValueError(f"{weights_H.shape} weights for {heads or 1} heads")
    head = params["head"]
    scaled_H = weights_H * head["gain"]
    one = {
        "kernel_D": jnp.sum(scaled_H[:, None] * head["kernel_HD"], axis=0),
        "bias": jnp.sum(weights_H * head["bias"]),
        "gain": jnp.ones_like(head["gain"][0]),
    }
    return {**params, "head": one}


def absorb_gain(params: types.Params) -> types.Params:
    """The same scores with gain 1: what training made of the gain goes into the kernel.

    After it the gain holds what a normalisation makes of it and nothing else.
    """
    head, name = params["head"], "kernel_HD" if "kernel_HD" in params["head"] else "kernel_D"
    gain = head["gain"][:, None] if head["gain"].ndim else head["gain"]
    return {**params, "head": {**head, name: gain * head[name], "gain": jnp.ones_like(head["gain"])}}


def reset(params: types.Params) -> types.Params:
    """Gain 1 and bias 0, which Ziegler et al. 2019 (code) do before each normalisation, before and after training."""
    head = params["head"]
    return {**params, "head": {**head, "gain": jnp.ones_like(head["gain"]), "bias": jnp.zeros_like(head["bias"])}}


def shift_bias(params: types.Params, amount: jax.Array | float) -> types.Params:
    """Add ``amount`` to every score the model gives; of several heads, a scalar or ``[H]``."""
    head = params["head"]
    return {**params, "head": {**head, "bias": head["bias"] + amount}}


def centre(params: types.Params, scores: jax.Array, *, where: jax.Array | None = None) -> types.Params:
    """Shift the bias so that what scored ``scores`` with these ``params`` scores 0 on average, with each head.

    Which answers those are is the rule: demonstrations in InstructGPT 3.5, reference summaries in Stiennon et al.
    2020, a held-out set in Bai et al. 2022, B.2. ``scores`` have any shape, and H as their last axis where there are
    several heads; ``where`` is like them, less that axis.
    """
    return shift_bias(params, -_moments(params, scores, where)[0])


def standardise(params: types.Params, scores: jax.Array, *, where: jax.Array | None = None) -> types.Params:
    """Set gain and bias so that what scored ``scores`` with these ``params`` has mean 0 and variance 1.

    Ziegler et al. 2019, on 256 samples of the reference policy. Scores that do not vary are only centred.
    """
    mean, std = _moments(params, scores, where)
    scale = jnp.where(std > 0, 1 / jnp.where(std > 0, std, 1.0), 1.0)
    head = params["head"]
    return {**params, "head": {**head, "gain": head["gain"] * scale, "bias": (head["bias"] - mean) * scale}}


def _moments(params: types.Params, scores: jax.Array, where: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation, of each head by itself."""
    several = params["head"]["gain"].ndim
    axes = tuple(range(scores.ndim - several))
    if where is not None and several:
        where = where[..., None]
    return jnp.mean(scores, axis=axes, where=where), jnp.std(scores, axis=axes, where=where)


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """What a model's scores were normalised on, kept beside the model by `lm.save`; the head's numbers apply it.

    ``raw score = (score - bias) / gain``: differences of raw scores are the log odds that the model was trained for,
    where what training made of the gain was absorbed (:func:`absorb_gain`) before the scores were normalised.
    """

    rule: str
    """In words: demonstrations, reference outputs, policy samples, held-out."""
    gain: float | tuple[float, ...]
    """Of the head, or of each head."""
    bias: float | tuple[float, ...]

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no score can be undone with."""
        for number in (*np.ravel(self.gain).tolist(), *np.ravel(self.bias).tolist()):
            if not math.isfinite(number):
                raise ValueError(f"a normalisation on {self.rule} holds {number}")
        if 0.0 in np.ravel(self.gain):
            raise ValueError(f"a normalisation on {self.rule} holds a gain of 0")


def normalisation(params: types.Params, rule: str) -> Normalisation:
    """The record of what the head's gain and bias stand at."""
    gain, bias = (np.asarray(params["head"][name], np.float64) for name in ("gain", "bias"))
    if gain.ndim:
        return Normalisation(rule, tuple(gain.tolist()), tuple(bias.tolist()))
    return Normalisation(rule, float(gain), float(bias))
