"""Scalar heads, which compute the scores of a reward model or the values of a critic, and their normalisation.

``params["head"]`` has one of two forms:

* ``{"kernel_D", "bias", "gain"}`` for a single head, with scalar bias and gain.
* ``{"kernel_HD", "bias", "gain"}`` for several heads on one trunk, such as an ensemble or one head per criterion. Bias
  and gain have shape ``[H]``.

`scalar` returns shape ``[...]`` for a single head and ``[..., H]`` for several heads. A language model has no head, and
`lm.forward` ignores any head.
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
    """Returns ``params`` with a new head that has bias 0 and gain 1, as in the code of Ziegler et al. 2019.

    The result shares the arrays of the trunk. An existing head is replaced.

    Args:
        rng: Random key, consumed.
        params: Parameters of the model.
        cfg: Architecture.
        zero: Whether to initialise the kernel to 0, as for a critic that starts from the policy's trunk. Otherwise, it
            is drawn from a Gaussian with standard deviation 1 / sqrt(D + 1), where D is ``d_model``.
        heads: Number of heads, 2 or more; None for a single head.

    Returns:
        Parameters that include ``"head"``.
    """
    return {**params, **lm_params.draw(rng, lm_params.head_table(cfg, zero=zero, heads=heads))}


def without_head(params: types.Params) -> types.Params:
    """Returns ``params`` without the head."""
    return {name: node for name, node in params.items() if name != "head"}


def count_heads(params: types.Params) -> int | None:
    """Returns the number of heads H, or None for a single head."""
    return params["head"]["kernel_HD"].shape[0] if "kernel_HD" in params["head"] else None


def scalar(params: types.Params, hidden_BLD: jax.Array) -> jax.Array:
    """Returns float32 ``gain * (hidden . kernel) + bias``: ``[..., D] -> [...]``, or ``[..., H]`` for several heads.

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
    """Returns the result of `scalar` for a critic; raises ValueError if there are several heads."""
    if "head" in params and count_heads(params) is not None:
        raise ValueError(
            f"a critic must have one head, but params have {count_heads(params)}: combine them with lm.heads.combine"
        )
    return scalar(params, hidden_BLD)


def combine(params: types.Params, weights_H: jax.Array) -> types.Params:
    """Returns parameters with a single head, whose score is the weighted sum of the scores of several heads.

    Weights of 1 / H average an ensemble; a one-hot vector selects a head.

    Raises:
        ValueError: There is only one head, or ``weights_H`` does not contain one weight per head.
    """
    heads = count_heads(params)
    if heads is None or weights_H.shape != (heads,):
        needed = "params have only one head" if heads is None else f"one weight is needed for each of {heads} heads"
        raise ValueError(f"weights_H has shape {weights_H.shape}; {needed}")
    head = params["head"]
    scaled_H = weights_H * head["gain"]
    one = {
        "kernel_D": jnp.sum(scaled_H[:, None] * head["kernel_HD"], axis=0),
        "bias": jnp.sum(weights_H * head["bias"]),
        "gain": jnp.ones_like(head["gain"][0]),
    }
    return {**params, "head": one}


def absorb_gain(params: types.Params) -> types.Params:
    """Returns parameters with the gain multiplied into the kernel and reset to 1, which leaves the scores unchanged.

    Afterwards, the gain reflects only later normalisations.
    """
    head, name = params["head"], "kernel_HD" if "kernel_HD" in params["head"] else "kernel_D"
    gain = head["gain"][:, None] if head["gain"].ndim else head["gain"]
    return {**params, "head": {**head, name: gain * head[name], "gain": jnp.ones_like(head["gain"])}}


def reset(params: types.Params) -> types.Params:
    """Returns parameters with gain 1 and bias 0, as in the code of Ziegler et al. 2019 before normalisation."""
    head = params["head"]
    return {**params, "head": {**head, "gain": jnp.ones_like(head["gain"]), "bias": jnp.zeros_like(head["bias"])}}


def shift_bias(params: types.Params, amount: jax.Array | float) -> types.Params:
    """Returns parameters whose scores are higher by ``amount``, which is a scalar or ``[H]``."""
    head = params["head"]
    return {**params, "head": {**head, "bias": head["bias"] + amount}}


def centre(params: types.Params, scores: jax.Array, *, where: jax.Array | None = None) -> types.Params:
    """Returns parameters with the bias shifted so that the mean of ``scores`` becomes 0.

    InstructGPT (section 3.5) uses the scores of demonstrations, Stiennon et al. 2020 those of reference summaries, and
    Bai et al. 2022 (*Training a Helpful and Harmless Assistant*, B.2) those of a held-out set.

    >>> import jax, jax.numpy as jnp
    >>> from rlhf_jax import lm
    >>> cfg = lm.LMConfig.preset("tiny")
    >>> params = lm.with_head(jax.random.key(1), lm.init(jax.random.key(0), cfg), cfg)
    >>> centred = lm.heads.centre(params, jnp.array([1.0, 3.0]))
    >>> print(float(centred["head"]["bias"]))
    -2.0

    Args:
        params: Parameters of the reward model.
        scores: Scores computed with ``params``, of any shape; the last axis is H if there are several heads.
        where: bool, True at the scores to use, with the shape of ``scores`` but without H; by default, all are used.

    Returns:
        Parameters with the shifted bias.
    """
    return shift_bias(params, -_moments(params, scores, where)[0])


def standardise(params: types.Params, scores: jax.Array, *, where: jax.Array | None = None) -> types.Params:
    """Returns parameters with gain and bias changed so that the mean of ``scores`` becomes 0 and their variance 1.

    Ziegler et al. 2019 use the scores of 256 samples from the reference policy. If all scores are equal, only the mean
    changes. The arguments are the same as in `centre`.
    """
    mean, std = _moments(params, scores, where)
    scale = jnp.where(std > 0, 1 / jnp.where(std > 0, std, 1.0), 1.0)
    head = params["head"]
    return {**params, "head": {**head, "gain": head["gain"] * scale, "bias": (head["bias"] - mean) * scale}}


def _moments(params: types.Params, scores: jax.Array, where: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Returns the mean and standard deviation of each head's scores."""
    several = params["head"]["gain"].ndim
    axes = tuple(range(scores.ndim - several))
    if where is not None and several:
        where = where[..., None]
    return jnp.mean(scores, axis=axes, where=where), jnp.std(scores, axis=axes, where=where)


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """Record of how the scores of a reward model were normalised; `lm.save` can store it with the model.

    The raw score is ``(score - bias) / gain``. For a model trained with the Bradley-Terry loss, differences
    between raw scores are log-odds of preferences if `absorb_gain` was applied before the scores were normalised.
    """

    rule: str
    """Responses whose scores were used, such as "demonstrations" or "policy samples"."""
    gain: float | tuple[float, ...]
    """Gain of the head, or of each of several heads."""
    bias: float | tuple[float, ...]

    def __post_init__(self) -> None:
        """Raises ValueError if a gain is 0 or a value is not finite."""
        for number in (*np.ravel(self.gain).tolist(), *np.ravel(self.bias).tolist()):
            if not math.isfinite(number):
                raise ValueError(f"the normalisation on {self.rule} contains {number}; gain and bias must be finite")
        if 0.0 in np.ravel(self.gain):
            raise ValueError(f"the normalisation on {self.rule} has a gain of 0; gains must not be 0")


def normalisation(params: types.Params, rule: str) -> Normalisation:
    """Returns a `Normalisation` with the current gain and bias of the head."""
    gain, bias = (np.asarray(params["head"][name], np.float64) for name in ("gain", "bias"))
    if gain.ndim:
        return Normalisation(rule, tuple(gain.tolist()), tuple(bias.tolist()))
    return Normalisation(rule, float(gain), float(bias))
