"""What to draw from and when to stop: one spec, and the transforms of logits that it names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

_DIRECT, _BLOCK = 1024, 128
"""Vocabularies up to the first are searched at once, larger ones in blocks of the second."""

NOTHING = -1
"""An id that no token has: what stands before the first token of a response."""


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
    stop_sequences: tuple[tuple[int, ...], ...] = struct.field(pytree_node=False, default=())
    """Any of these ends a response, which it is the end of; see `stops.sequences` for strings."""
    min_new_tokens: int = struct.field(pytree_node=False, default=0)
    """Before so many tokens no stop id is drawn, and no stop sequence ends a response."""
    forbidden_ids: tuple[int, ...] = struct.field(pytree_node=False, default=())
    """Never drawn."""
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
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"Sampling.min_new_tokens is {self.min_new_tokens}; it must be in [0, {self.max_new_tokens}]"
            )
        for name in ("stop_ids", "forbidden_ids"):
            object.__setattr__(self, name, tuple(int(token) for token in getattr(self, name)))
        sequences = tuple(tuple(int(token) for token in sequence) for sequence in self.stop_sequences)
        if () in sequences:
            raise ValueError("Sampling.stop_sequences holds an empty sequence, which would stop everything")
        object.__setattr__(self, "stop_sequences", sequences)

    @property
    def truncated(self) -> bool:
        """Whether what is drawn differs from the model's own distribution at this temperature."""
        return bool(self.truncations)

    @property
    def truncations(self) -> tuple[str, ...]:
        """The fields that make it differ."""
        given = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        return (*given, *(name for name in ("greedy", "min_new_tokens", "forbidden_ids") if getattr(self, name)))

    @property
    def longest_stop(self) -> int:
        """How many last tokens decide whether a response ends."""
        return max(map(len, self.stop_sequences), default=1)


def check_on_policy(sampling: Sampling) -> None:
    """Raise ``ValueError`` where the samples would not follow the policy that a policy gradient takes them from.

    The gradient of REINFORCE and PPO is an expectation over the policy's own distribution; what top-k or top-p cut
    off is drawn from another, and every ratio and every KL of it is off.
    """
    if sampling.truncated:
        raise ValueError(
            f"Sampling.{' and Sampling.'.join(sampling.truncations)} draw from another distribution than the policy's "
            "own, so that log-ratios and KL would be wrong; leave them out, or correct for it with importance weights"
        )


def log_distribution(logits: jax.Array, sampling: Sampling, *, step: jax.Array | int | None = None) -> jax.Array:
    """Log-probabilities of what ``sampling`` draws from: ``[..., V]`` float32, ``-inf`` where cut off.

    ``step``, ``[...]`` or a scalar, is how many tokens the response has already; without it ``min_new_tokens`` does
    nothing.
    """
    scaled = logits.astype(jnp.float32) / sampling.temperature
    if sampling.forbidden_ids:
        scaled = jnp.where(_among(sampling.forbidden_ids, scaled), -jnp.inf, scaled)
    if sampling.min_new_tokens and sampling.stop_ids and step is not None:
        early = jnp.expand_dims(jnp.broadcast_to(step < sampling.min_new_tokens, scaled.shape[:-1]), -1)
        scaled = jnp.where(early & _among(sampling.stop_ids, scaled), -jnp.inf, scaled)
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
    probs_V = jnp.exp(logprobs_V)
    uniform = jax.random.uniform(rng)
    if probs_V.size <= _DIRECT:
        cumulative_V = jnp.cumsum(probs_V)
        return _search(cumulative_V, uniform * cumulative_V[-1])
    # Two short searches instead of a cumulative sum over the vocabulary: for the block, then within it.
    blocks_NM = jnp.pad(probs_V, (0, -probs_V.size % _BLOCK)).reshape(-1, _BLOCK)
    cumulative_N = jnp.cumsum(jnp.sum(blocks_NM, axis=1))
    level = uniform * cumulative_N[-1]
    block = _search(cumulative_N, level)
    before = jnp.where(block > 0, cumulative_N[jnp.maximum(block - 1, 0)], 0.0)
    return block * _BLOCK + _search(jnp.cumsum(blocks_NM[block]), level - before)


def _search(cumulative: jax.Array, level: jax.Array) -> jax.Array:
    """The first index whose running sum exceeds ``level``; never one that adds nothing."""
    total = cumulative[-1]
    # Strictly below the total, else rounding could step past the last token that has any mass.
    level = jnp.minimum(level, jnp.nextafter(total, jnp.zeros_like(total)))
    return jnp.sum(cumulative <= level, dtype=jnp.int32)


def choose(
    rng_B: jax.Array, logits_BV: jax.Array, sampling: Sampling, *, step: jax.Array | int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Choose a token a row, with its log-probability: ids ``[B]`` int32 and ``[B]`` float32."""
    logprobs_BV = log_distribution(logits_BV, sampling, step=step)
    if sampling.greedy:
        tokens_B = jnp.argmax(logprobs_BV, axis=-1).astype(jnp.int32)
    else:
        tokens_B = jax.vmap(draw)(rng_B, logprobs_BV)
    return tokens_B, jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=1)[:, 0]


def ends(tail_BK: jax.Array, sampling: Sampling, *, length: jax.Array | int) -> jax.Array:
    """``[B]`` bool: whether a response whose last K tokens are these ends here, K at least ``longest_stop``.

    ``length``, a scalar or ``[B]``, counts its tokens; `NOTHING` stands where it has fewer than K.
    """
    stopped_B = jnp.zeros(tail_BK.shape[:1], bool)
    for sequence in (*((token,) for token in sampling.stop_ids), *sampling.stop_sequences):
        stopped_B |= jnp.all(tail_BK[:, tail_BK.shape[1] - len(sequence) :] == jnp.array([sequence]), axis=1)
    return stopped_B & (length >= sampling.min_new_tokens)


def _among(ids: tuple[int, ...], scores: jax.Array) -> np.ndarray:
    """``[..., V]`` bool of as many axes as ``scores``; raises ``ValueError`` for an id outside the vocabulary."""
    vocab = scores.shape[-1]
    if min(ids) < 0 or max(ids) >= vocab:
        raise ValueError(f"Sampling names the id {max(ids) if max(ids) >= vocab else min(ids)}; ids go to {vocab - 1}")
    found = np.zeros(vocab, bool)
    found[list(ids)] = True
    return found.reshape((1,) * (scores.ndim - 1) + (vocab,))
