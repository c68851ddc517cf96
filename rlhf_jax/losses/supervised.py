"""Supervised losses, whose targets are tokens or another model's distribution over them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax import kl, masking

_LOG1MEXP_CEILING = -1e-6


def next_token(logprobs: jax.Array) -> jax.Array:
    """Returns ``-log p`` of each target token; any shape, unreduced.

    This is the loss of supervised fine-tuning and of the pretraining data in PPO-ptx, which has a separate coefficient
    (InstructGPT Eq 2). Average it with `masking.masked_mean` over response tokens, the stop token included.
    """
    return -masking.as_float32(logprobs)


def top_k_logprobs(logits: jax.Array, *, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns ``(logprobs[..., K], ids[..., K])`` of the k most likely tokens, from a teacher's logits ``[..., V]``."""
    return jax.lax.top_k(jax.nn.log_softmax(masking.as_float32(logits)), k)


def gather_logprobs(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns the log-probabilities ``[..., K]`` that logits ``[..., V]`` assign to token ids ``[..., K]``."""
    logits = masking.as_float32(logits)
    # The normaliser is subtracted after gathering, which avoids a second array of the size of the vocabulary.
    return jnp.take_along_axis(logits, ids, axis=-1) - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def distill(logprobs: jax.Array, teacher_logprobs: jax.Array) -> jax.Array:
    """Computes ``KL(teacher || student)`` over K + 1 classes: K tokens and the rest of the vocabulary.

    ``sum_k p_k (log p_k - log q_k)`` with ``p_rest = 1 - sum_k p_k``: context distillation as in Bai 2022 (A.1), where
    K = 50, the teacher sees the prompt and the student does not.

    Args:
        logprobs: ``[..., K]``, the student's log-probabilities *at the teacher's ids* (from `gather_logprobs` or a
            chunked scorer), normalised over the whole vocabulary.
        teacher_logprobs: ``[..., K]``, likewise normalised over the whole vocabulary.

    Returns:
        ``[...]``, in nats, unreduced; 0 with zero gradient if the student equals the teacher.
    """
    masking.check_same_shape(logprobs=logprobs, teacher_logprobs=teacher_logprobs)
    teacher = jax.lax.stop_gradient(_with_rest(teacher_logprobs))
    return kl.categorical(teacher, _with_rest(logprobs))


def distill_cross_entropy(logprobs: jax.Array, teacher_logprobs: jax.Array) -> jax.Array:
    """Returns ``-sum_k p_k log q_k`` over the K + 1 classes of `distill`: `distill` plus the teacher's entropy."""
    masking.check_same_shape(logprobs=logprobs, teacher_logprobs=teacher_logprobs)
    probs = jax.lax.stop_gradient(jnp.exp(_with_rest(teacher_logprobs)))
    return -jnp.sum(jnp.where(probs > 0, probs * _with_rest(logprobs), 0.0), axis=-1)


def log1mexp(x: jax.Array) -> jax.Array:
    """Returns ``log(1 - exp(x))`` for ``x <= 0``: the log-probability of the complement.

    Rounding can make a log-probability 0 or positive, for which the result would be -inf or NaN. Above -1e-6 the value
    and the slope are those at -1e-6, so gradients stay finite and keep their sign.
    """
    x = masking.as_float32(x)
    x = x + jax.lax.stop_gradient(jnp.minimum(x, _LOG1MEXP_CEILING) - x)
    return jnp.log(-jnp.expm1(x))


def _with_rest(logprobs: jax.Array) -> jax.Array:
    """Appends the log-probability of all tokens that are not listed."""
    logprobs = masking.as_float32(logprobs)
    rest = log1mexp(jax.nn.logsumexp(logprobs, axis=-1, keepdims=True))
    return jnp.concatenate([logprobs, rest], axis=-1)
