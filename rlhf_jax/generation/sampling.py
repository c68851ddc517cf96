"""What to draw from: one spec, and the transforms of logits that it names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax


@struct.dataclass
class Sampling:
    """How tokens are drawn. ``temperature`` is a pytree leaf, so a sweep over it is one program; the rest is static.

    The temperature divides the logits, and every scoring pass over what was drawn must use the same one. ``top_k``,
    ``top_p`` and ``min_p`` truncate the distribution after that, in this order: what is then drawn no longer follows
    the model's own probabilities. Raises ``ValueError`` for values out of range.
    """

    temperature: jax.Array | float = 1.0
    top_k: int | None = struct.field(pytree_node=False, default=None)
    """Keep the k most likely tokens (and any that tie with the k-th)."""
    top_p: float | None = struct.field(pytree_node=False, default=None)
    """Keep the fewest most likely tokens whose mass reaches p."""
    min_p: float | None = struct.field(pytree_node=False, default=None)
    """Keep tokens at least this share as likely as the most likely one."""
    greedy: bool = struct.field(pytree_node=False, default=False)
    """Take the most likely token instead of drawing one."""
    max_new_tokens: int = struct.field(pytree_node=False, default=128)
    """T: how many tokens a response may have, the stop token among them."""
    stop_ids: tuple[int, ...] = struct.field(pytree_node=False, default=())
    """Any of these ends a response and is its last token."""
    pad_id: int = struct.field(pytree_node=False, default=0)
    """What stands behind the end of a response; told from a token by the mask, never by its id."""

    def __post_init__(self) -> None:
        """Check what is static, and the temperature where it is a plain number."""
        if isinstance(self.temperature, int | float) and not self.temperature > 0:
            raise ValueError(
                f"Sampling.temperature is {self.temperature}; it must be positive (greedy=True for argmax)"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"Sampling.top_k is {self.top_k}; it must be at least 1")
        for name in ("top_p", "min_p"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"Sampling.{name} is {share}; it must be in (0, 1]")
        if self.max_new_tokens < 1:
            raise ValueError(f"Sampling.max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        object.__setattr__(self, "stop_ids", tuple(int(token) for token in self.stop_ids))

    @property
    def truncated(self) -> bool:
        """Whether what is drawn differs from the model's own distribution at this temperature."""
        return self.greedy or any(x is not None for x in (self.top_k, self.top_p, self.min_p))


def log_distribution(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Log-probabilities of what ``sampling`` draws from: ``[..., V]`` float32, ``-inf`` where cut off."""
    scaled = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None:
        scaled = keep_top_k(scaled, sampling.top_k)
    if sampling.top_p is not None:
        scaled = keep_top_p(scaled, sampling.top_p)
    if sampling.min_p is not None:
        scaled = keep_min_p(scaled, sampling.min_p)
    return jax.nn.log_softmax(scaled)


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Set all but the k largest of ``[..., V]`` to -inf."""
    threshold = lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """Set to -inf all but the fewest largest of ``[..., V]`` whose probability adds up to p (Holtzman et al. 2020)."""
    descending = -jnp.sort(-logits, axis=-1)
    mass = jax.nn.softmax(descending)
    needed = jnp.cumsum(mass, axis=-1) - mass < p
    threshold = jnp.min(jnp.where(needed, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def keep_min_p(logits: jax.Array, share: float) -> jax.Array:
    """Set to -inf what is less than ``share`` times as likely as the most likely of ``[..., V]``."""
    return jnp.where(logits >= jnp.max(logits, axis=-1, keepdims=True) + jnp.log(share), logits, -jnp.inf)


def draw(rng: jax.Array, logprobs_V: jax.Array) -> jax.Array:
    """Draw one token id by inverting the cumulative distribution at one uniform number; ``rng`` is consumed.

    A token of probability 0 is never drawn. Probabilities are resolved to about 1e-7.
    """
    cumulative_V = jnp.cumsum(jnp.exp(logprobs_V))
    total = cumulative_V[-1]
    # Strictly below the total, else rounding could step past the last token that has any mass.
    level = jnp.minimum(jax.random.uniform(rng) * total, jnp.nextafter(total, jnp.zeros_like(total)))
    return jnp.sum(cumulative_V <= level, dtype=jnp.int32)


def choose(rng_B: jax.Array, logits_BV: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """Choose a token a row, with its log-probability: ids ``[B]`` int32 and ``[B]`` float32."""
    logprobs_BV = log_distribution(logits_BV, sampling)
    if sampling.greedy:
        tokens_B = jnp.argmax(logprobs_BV, axis=-1).astype(jnp.int32)
    else:
        tokens_B = jax.vmap(draw)(rng_B, logprobs_BV)
    return tokens_B, jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=1)[:, 0]
