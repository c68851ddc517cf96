"""Supervised losses, whose targets are tokens or a teacher's distribution over tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax import kl, masking

_LOG1MEXP_CEILING = -1e-6


def next_token(logprobs: jax.Array) -> jax.Array:
    """Returns ``-log p`` of each target token; any shape, unreduced.

    This is the loss for supervised fine-tuning and for the pretraining term of PPO-ptx (InstructGPT Eq 2). In
    fine-tuning, average it with `masking.masked_mean` over the response tokens, including the stop token.
    """
    return -masking.as_float32(logprobs)


def top_k_logprobs(logits: jax.Array, *, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns ``(logprobs[..., K], ids[..., K])`` of the k most likely tokens, from a teacher's logits ``[..., V]``."""
    return jax.lax.top_k(jax.nn.log_softmax(masking.as_float32(logits)), k)


def gather_logprobs(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns the log-probabilities ``[..., K]`` that logits ``[..., V]`` assign to token ids ``[..., K]``.

    Ids outside [0, V) have the log-probability NaN.
    """
    logits = masking.as_float32(logits)
    inside = (ids >= 0) & (ids < logits.shape[-1])
    # Subtracting the normaliser after gathering avoids a second vocabulary-sized array.
    chosen = jnp.take_along_axis(logits, jnp.where(inside, ids, 0), axis=-1)
    return jnp.where(inside, chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True), jnp.nan)


def distill(logprobs: jax.Array, teacher_logprobs: jax.Array) -> jax.Array:
    """Computes ``KL(teacher || student)`` over K + 1 classes: K tokens and the rest of the vocabulary.

    For a teacher p and a student q, the loss is ``sum_k p_k (log p_k - log q_k)`` over all classes; the probability of
    the rest is 1 minus that of the K tokens. Bai 2022 (HH-RLHF, A.1) use it with K = 50 for context distillation, in
    which only the teacher sees the context.

    Args:
        logprobs: ``[..., K]``, the student's log-probabilities *at the teacher's ids*, as from `gather_logprobs`,
            normalised over the whole vocabulary.
        teacher_logprobs: ``[..., K]``, the teacher's log-probabilities, also normalised over the whole vocabulary.

    Returns:
        ``[...]``, in nats, unreduced; 0 with zero gradient if the student equals the teacher.
    """
    masking.check_same_shape(logprobs=logprobs, teacher_logprobs=teacher_logprobs)
    teacher = jax.lax.stop_gradient(_with_rest(teacher_logprobs))
    return kl.categorical(teacher, _with_rest(logprobs))


def distill_cross_entropy(logprobs: jax.Array, teacher_logprobs: jax.Array) -> jax.Array:
    """Returns ``-sum_k p_k log q_k`` over the classes of `distill`, equal to `distill` plus the teacher's entropy."""
    masking.check_same_shape(logprobs=logprobs, teacher_logprobs=teacher_logprobs)
    probs = jax.lax.stop_gradient(jnp.exp(_with_rest(teacher_logprobs)))
    return -jnp.sum(jnp.where(probs > 0, probs * _with_rest(logprobs), 0.0), axis=-1)


def log1mexp(x: jax.Array) -> jax.Array:
    """Returns ``log(1 - exp(x))`` for ``x <= 0``, the log-probability of the complement.

    Rounding can make a log-probability 0 or positive, for which the formula yields -inf or NaN. For x above -1e-6, the
    value and gradient are therefore those at -1e-6, so that gradients stay finite and keep their sign.
    """
    x = masking.as_float32(x)
    x = x + jax.lax.stop_gradient(jnp.minimum(x, _LOG1MEXP_CEILING) - x)
    return jnp.log(-jnp.expm1(x))


def _with_rest(logprobs: jax.Array) -> jax.Array:
    """Appends the log-probability of all other tokens together."""
    logprobs = masking.as_float32(logprobs)
    rest = log1mexp(jax.nn.logsumexp(logprobs, axis=-1, keepdims=True))
    return jnp.concatenate([logprobs, rest], axis=-1)
