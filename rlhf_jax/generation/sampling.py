"""Configuration of sampling, and the logit transforms that implement it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

_DIRECT, _BLOCK = 1024, 128
"""`draw` searches vocabularies of up to 1024 tokens directly, and larger vocabularies in blocks of 128 tokens."""

NO_TOKEN = -1
"""Placeholder before the first token of a response in the ``tail_BK`` of `ends`; no token has this id."""


@struct.dataclass
class Sampling:
    """The sampling distribution and the stop conditions.

    ``temperature`` is a pytree leaf, so changing it does not recompile; the other fields are static. The logits are
    divided by the temperature; then ``top_k``, ``top_p`` and ``min_p`` truncate the distribution, in this order.
    Samples from a truncated distribution do not follow the policy; see :func:`check_on_policy`. The constructor raises
    ``ValueError`` if a value is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from rlhf_jax import generation
        >>> sampling = generation.Sampling(temperature=0.7, top_k=2, max_new_tokens=16, stop_ids=(1,))
        >>> logprobs_V = generation.log_distribution(jnp.array([0.0, 1.0, 2.0]), sampling)
        >>> [round(float(x), 2) for x in logprobs_V]
        [-inf, -1.64, -0.21]
        >>> sampling.truncations
        ('top_k',)
    """

    temperature: jax.Array | float = 1.0
    """Positive number that divides the logits. Every scoring pass over the samples must use the same temperature."""
    top_k: int | None = struct.field(pytree_node=False, default=None)
    """Number of most likely tokens to keep. Tokens that tie with the last of them are also kept; None keeps all."""
    top_p: float | None = struct.field(pytree_node=False, default=None)
    """Probability in (0, 1]. The smallest set of most likely tokens with at least this total probability is kept; None
    keeps all tokens."""
    min_p: float | None = struct.field(pytree_node=False, default=None)
    """Ratio in (0, 1]. Tokens at least ``min_p`` times as likely as the most likely token are kept; None keeps all."""
    greedy: bool = struct.field(pytree_node=False, default=False)
    """Whether to choose the most likely token instead of sampling."""
    max_new_tokens: int = struct.field(pytree_node=False, default=128)
    """T, the maximum number of tokens in a response, including the stop token."""
    stop_ids: tuple[int, ...] = struct.field(pytree_node=False, default=())
    """Ids of the stop tokens. A response ends with the first stop token, which is part of the response."""
    stop_sequences: tuple[tuple[int, ...], ...] = struct.field(pytree_node=False, default=())
    """Token sequences that also end a response and are part of it; `stops.sequences` makes them from strings."""
    min_new_tokens: int = struct.field(pytree_node=False, default=0)
    """A stop token can be drawn only after this many tokens. A stop sequence ends a response only if the response,
    including the sequence, has at least this many tokens."""
    forbidden_ids: tuple[int, ...] = struct.field(pytree_node=False, default=())
    """Token ids that are never drawn."""
    pad_id: int = struct.field(pytree_node=False, default=0)
    """Token id in the columns after a response. It may also be the id of a real token, because padding is identified by
    the mask alone."""

    def __post_init__(self) -> None:
        """Checks the static fields, and the temperature if it is a Python number."""
        if isinstance(self.temperature, int | float) and not self.temperature > 0:
            raise ValueError(
                f"Sampling.temperature is {self.temperature}; it must be positive (use greedy=True for argmax)"
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
            raise ValueError("Sampling.stop_sequences contains an empty sequence, which would end every response")
        object.__setattr__(self, "stop_sequences", sequences)

    @property
    def truncated(self) -> bool:
        """Whether the sampling distribution can differ from the model's distribution at this temperature."""
        return bool(self.truncations)

    @property
    def truncations(self) -> tuple[str, ...]:
        """Names of the fields whose values can change the distribution, other than ``temperature``."""
        cuts = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        return (*cuts, *(name for name in ("greedy", "min_new_tokens", "forbidden_ids") if getattr(self, name)))

    @property
    def longest_stop(self) -> int:
        """Number of tokens in the longest stop sequence, or 1 if there are no stop sequences."""
        return max(map(len, self.stop_sequences), default=1)


def check_on_policy(sampling: Sampling) -> None:
    """Raises ``ValueError`` if samples might not follow the policy's distribution at the sampling temperature.

    REINFORCE and PPO estimate expectations under the policy. If the samples come from a truncated distribution,
    log-ratios and KL are biased.
    """
    if sampling.truncated:
        raise ValueError(
            f"with Sampling.{' and Sampling.'.join(sampling.truncations)}, samples do not follow the policy, and "
            "log-ratios and KL would be wrong; leave these fields unset, or use importance weights "
            "(correct_sampler of train.ppo.make_train_step)"
        )


def check_ids(sampling: Sampling, vocab_size: int) -> None:
    """Raises ``ValueError`` if a stop id, a forbidden id or the pad id is outside the vocabulary.

    Responses would never end at such a stop id.
    """
    named = {"stop_ids": sampling.stop_ids, "forbidden_ids": sampling.forbidden_ids, "pad_id": (sampling.pad_id,)}
    named["stop_sequences"] = sum(sampling.stop_sequences, ())
    for name, ids in named.items():
        for token in ids:
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"Sampling.{name} has the id {token}; the model has {vocab_size} ids, 0 to {vocab_size - 1} (if "
                    "tokens were added to the tokenizer, resize the model with lm.resize)"
                )


def log_distribution(logits: jax.Array, sampling: Sampling, *, step: jax.Array | int | None = None) -> jax.Array:
    """Returns the log-probabilities of the sampling distribution, ``[..., V]`` float32.

    Tokens that cannot be drawn have log-probability ``-inf``. ``step``, ``[...]`` or a scalar, is the number of tokens
    that the response already has; if it is None, ``min_new_tokens`` has no effect. Raises ``ValueError`` if an id in
    ``sampling`` is outside the vocabulary.
    """
    check_ids(sampling, logits.shape[-1])
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
    """Sets all but the k largest logits in the last axis to -inf; ties with the k-th largest are kept."""
    threshold = lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """Keeps the smallest set of largest logits with total probability at least p, and ties; sets the others to -inf.

    This is nucleus sampling (Holtzman et al. 2020).
    """
    descending = -jnp.sort(-logits, axis=-1)
    mass = jax.nn.softmax(descending)
    needed = jnp.cumsum(mass, axis=-1) - mass < p
    threshold = jnp.min(jnp.where(needed, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def keep_min_p(logits: jax.Array, share: float) -> jax.Array:
    """Sets to -inf the logits of all tokens that are less than ``share`` times as likely as the most likely token."""
    return jnp.where(logits >= jnp.max(logits, axis=-1, keepdims=True) + jnp.log(share), logits, -jnp.inf)


def draw(rng: jax.Array, logprobs_V: jax.Array) -> jax.Array:
    """Draws a token id by inverting the cumulative distribution at a uniform random number; ``rng`` is consumed.

    A token of probability 0 is never drawn. Probabilities are accurate to about 1e-7.
    """
    probs_V = jnp.exp(logprobs_V)
    uniform = jax.random.uniform(rng)
    if probs_V.size <= _DIRECT:
        cumulative_V = jnp.cumsum(probs_V)
        return _search(cumulative_V, uniform * cumulative_V[-1])
    # A search for the block and a search within it avoid a cumulative sum over the whole vocabulary.
    blocks_NM = jnp.pad(probs_V, (0, -probs_V.size % _BLOCK)).reshape(-1, _BLOCK)
    cumulative_N = jnp.cumsum(jnp.sum(blocks_NM, axis=1))
    level = uniform * cumulative_N[-1]
    block = _search(cumulative_N, level)
    before = jnp.where(block > 0, cumulative_N[jnp.maximum(block - 1, 0)], 0.0)
    return block * _BLOCK + _search(jnp.cumsum(blocks_NM[block]), level - before)


def _search(cumulative: jax.Array, level: jax.Array) -> jax.Array:
    """Returns the first index whose cumulative sum exceeds ``level``; the probability there is never 0."""
    total = cumulative[-1]
    # Without this limit, rounding could select an index after the last one with positive probability.
    level = jnp.minimum(level, jnp.nextafter(total, jnp.zeros_like(total)))
    return jnp.sum(cumulative <= level, dtype=jnp.int32)


def choose(
    rng_B: jax.Array, logits_BV: jax.Array, sampling: Sampling, *, step: jax.Array | int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Samples one token per row, or returns the most likely token if ``sampling.greedy`` is set.

    Args:
        rng_B: One key per row; consumed.
        logits_BV: Logits of the next token.
        sampling: Sampling distribution.
        step: Number of tokens that each response already has, a scalar or ``[B]``; needed for ``min_new_tokens``.

    Returns:
        ``(tokens_B, logprobs_B)``: int32 ids and their float32 log-probabilities under :func:`log_distribution`.
    """
    logprobs_BV = log_distribution(logits_BV, sampling, step=step)
    if sampling.greedy:
        tokens_B = jnp.argmax(logprobs_BV, axis=-1).astype(jnp.int32)
    else:
        tokens_B = jax.vmap(draw)(rng_B, logprobs_BV)
    return tokens_B, jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=1)[:, 0]


def ends(tail_BK: jax.Array, sampling: Sampling, *, length: jax.Array | int) -> jax.Array:
    """Returns ``[B]`` bool, True for responses that end with a stop id or a stop sequence.

    ``tail_BK`` contains the last K tokens of each response, with `NO_TOKEN` before the first token; K must be at least
    ``sampling.longest_stop``. ``length``, a scalar or ``[B]``, is the number of tokens in each response; responses of
    fewer than ``min_new_tokens`` tokens do not end.
    """
    stopped_B = jnp.zeros(tail_BK.shape[:1], bool)
    for sequence in (*((token,) for token in sampling.stop_ids), *sampling.stop_sequences):
        stopped_B |= jnp.all(tail_BK[:, tail_BK.shape[1] - len(sequence) :] == jnp.array([sequence]), axis=1)
    return stopped_B & (length >= sampling.min_new_tokens)


def _among(ids: tuple[int, ...], scores: jax.Array) -> np.ndarray:
    """Returns a bool mask of ``ids`` that broadcasts to ``[..., V]``."""
    vocab = scores.shape[-1]
    mask = np.zeros(vocab, bool)
    mask[list(ids)] = True
    return mask.reshape((1,) * (scores.ndim - 1) + (vocab,))
