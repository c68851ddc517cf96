"""Scalar heads: the score of a reward model, the values of a critic, and their normalisation.

``params["head"]`` is ``{"kernel_D", "bias", "gain"}``, with a scalar bias and gain. Several heads on one trunk, such as
an ensemble or one head per criterion, are ``{"kernel_HD", "bias", "gain"}`` with bias and gain of shape ``[H]``.
Results are ``[...]`` for one head and ``[..., H]`` for several. A language model has no ``head``, and its trunk ignores
one.
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
    """Returns ``params`` with a fresh head, bias 0 and gain 1 (Ziegler et al. 2019, code).

    The arrays of the trunk are shared, and an old head is replaced.

    Args:
        rng: Random key, consumed.
        params: Parameters of the model.
        cfg: Architecture.
        zero: Initialises the kernel to 0, for a critic on the policy's trunk, instead of std 1 / sqrt(D + 1).
        heads: Number of heads, 2 or more; None for one.

    Returns:
        Parameters with ``"head"``.
    """
    return {**params, **lm_params.draw(rng, lm_params.head_table(cfg, zero=zero, heads=heads))}


def without_head(params: types.Params) -> types.Params:
    """Returns ``params`` without the head."""
    return {name: node for name, node in params.items() if name != "head"}


def count_heads(params: types.Params) -> int | None:
    """Returns H if there are several heads, None if there is one."""
    return params["head"]["kernel_HD"].shape[0] if "kernel_HD" in params["head"] else None


def scalar(params: types.Params, hidden_BLD: jax.Array) -> jax.Array:
    """Returns ``gain * (hidden . kernel) + bias``, float32: ``[..., D] -> [...]``, or ``[..., H]``.

    Raises:
        ValueError: ``params`` have no head.
    """
    if "head" not in params:
        raise ValueError('params have no "head": add one with lm.with_head(rng, params, cfg)')
    head = params["head"]
    hidden_BLD = hidden_BLD.astype(jnp.float32)
    if "kernel_HD" in head:
        dot = jnp.einsum(
            "...d,hd->...h", hidden_BLD, parallel.gather_weight(head["kernel_HD"], None, "embed").astype(jnp.float32)
        )
        shape = (1,) * (dot.ndim - 1) + head["gain"].shape
        return head["gain"].reshape(shape) * dot + head["bias"].reshape(shape)
    dot = jnp.einsum("...d,d->...", hidden_BLD, parallel.gather_weight(head["kernel_D"], "embed").astype(jnp.float32))
    return head["gain"] * dot + head["bias"]


def value(params: types.Params, hidden_BLD: jax.Array) -> jax.Array:
    """Returns `scalar` for a critic, which must have one head; raises ValueError if there are several."""
    if "head" in params and count_heads(params) is not None:
        raise ValueError(
            f"a critic has one head, but params have {count_heads(params)}: combine them with lm.heads.combine"
        )
    return scalar(params, hidden_BLD)


def combine(params: types.Params, weights_H: jax.Array) -> types.Params:
    """Returns parameters with one head, whose score is the weighted sum of several heads.

    Weights of 1 / H average an ensemble; a one-hot vector selects a head.

    Raises:
        ValueError: The number of weights is not the number of heads.
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
    """Returns parameters with the same scores and gain 1: the trained gain is multiplied into the kernel.

    Afterwards the gain reflects only later normalisations.
    """
    head, name = params["head"], "kernel_HD" if "kernel_HD" in params["head"] else "kernel_D"
    gain = head["gain"][:, None] if head["gain"].ndim else head["gain"]
    return {**params, "head": {**head, name: gain * head[name], "gain": jnp.ones_like(head["gain"])}}


def reset(params: types.Params) -> types.Params:
    """Returns parameters with gain 1 and bias 0, as before each normalisation in Ziegler et al. 2019 (code)."""
    head = params["head"]
    return {**params, "head": {**head, "gain": jnp.ones_like(head["gain"]), "bias": jnp.zeros_like(head["bias"])}}


def shift_bias(params: types.Params, amount: jax.Array | float) -> types.Params:
    """Returns parameters whose scores are larger by ``amount``, a scalar or ``[H]``."""
    head = params["head"]
    return {**params, "head": {**head, "bias": head["bias"] + amount}}


def centre(params: types.Params, scores: jax.Array, *, where: jax.Array | None = None) -> types.Params:
    """Returns parameters with the bias shifted so that the responses that scored ``scores`` score 0 on average.

    The responses are demonstrations in InstructGPT 3.5, reference summaries in Stiennon et al. 2020, and a held-out set
    in Bai et al. 2022, B.2.

    >>> import jax, jax.numpy as jnp
    >>> from rlhf_jax import lm
    >>> cfg = lm.LMConfig.preset("tiny")
    >>> params = lm.with_head(jax.random.key(1), lm.init(jax.random.key(0), cfg), cfg)
    >>> centred = lm.heads.centre(params, jnp.array([1.0, 3.0]))
    >>> print(float(centred["head"]["bias"]))
    -2.0

    Args:
        params: Parameters of the reward model.
        scores: Scores by ``params``, of any shape; the last axis is H if there are several heads.
        where: bool, the scores to use; without the axis of the heads.

    Returns:
        Parameters with the shifted bias.
    """
    return shift_bias(params, -_moments(params, scores, where)[0])


def standardise(params: types.Params, scores: jax.Array, *, where: jax.Array | None = None) -> types.Params:
    """Returns parameters with gain and bias set to give the responses that scored ``scores`` mean 0, variance 1.

    Ziegler et al. 2019 use 256 samples of the reference policy. Scores that do not vary are only centred. The arguments
    are as in `centre`.
    """
    mean, std = _moments(params, scores, where)
    scale = jnp.where(std > 0, 1 / jnp.where(std > 0, std, 1.0), 1.0)
    head = params["head"]
    return {**params, "head": {**head, "gain": head["gain"] * scale, "bias": (head["bias"] - mean) * scale}}


def _moments(params: types.Params, scores: jax.Array, where: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Returns mean and standard deviation of the scores of each head."""
    several = params["head"]["gain"].ndim
    axes = tuple(range(scores.ndim - several))
    if where is not None and several:
        where = where[..., None]
    return jnp.mean(scores, axis=axes, where=where), jnp.std(scores, axis=axes, where=where)


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """Record of how the scores of a model were normalised; saved with the model by `lm.save`.

    ``raw score = (score - bias) / gain``. Differences of raw scores are log odds if the trained gain was absorbed
    (`absorb_gain`) before the scores were normalised.
    """

    rule: str
    """The responses used: demonstrations, reference outputs, policy samples, held-out."""
    gain: float | tuple[float, ...]
    """Gain of the head, or of each head."""
    bias: float | tuple[float, ...]

    def __post_init__(self) -> None:
        """Raises ValueError for a gain of 0 and for values that are not finite."""
        for number in (*np.ravel(self.gain).tolist(), *np.ravel(self.bias).tolist()):
            if not math.isfinite(number):
                raise ValueError(f"the normalisation on {self.rule} has the value {number}")
        if 0.0 in np.ravel(self.gain):
            raise ValueError(f"the normalisation on {self.rule} has a gain of 0")


def normalisation(params: types.Params, rule: str) -> Normalisation:
    """Returns the record of the current gain and bias of the head."""
    gain, bias = (np.asarray(params["head"][name], np.float64) for name in ("gain", "bias"))
    if gain.ndim:
        return Normalisation(rule, tuple(gain.tolist()), tuple(bias.tolist()))
    return Normalisation(rule, float(gain), float(bias))
