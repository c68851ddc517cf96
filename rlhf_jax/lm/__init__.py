"""The language model: pure functions on a nested dict of arrays."""

from rlhf_jax.lm.cache import KVCache
from rlhf_jax.lm.cache import create as create_cache
from rlhf_jax.lm.config import LMConfig
from rlhf_jax.lm.heads import centre, scalar, shift_bias, standardise, with_head, without_head
from rlhf_jax.lm.hf import load, save
from rlhf_jax.lm.logprobs import (
    TokenStats,
    apply_fn,
    entropy,
    greedy_matches,
    response_logprobs,
    response_logprobs_with,
    response_stats,
    response_stats_with,
    response_values,
    response_values_with,
    score,
    score_with,
    selected_logprobs,
    token_logprobs,
    token_logprobs_with,
    values,
    values_with,
)
from rlhf_jax.lm.params import abstract, count, init, logical_axes
from rlhf_jax.lm.transformer import forward, logits

__all__ = [
    "KVCache",
    "LMConfig",
    "TokenStats",
    "abstract",
    "apply_fn",
    "centre",
    "count",
    "create_cache",
    "entropy",
    "forward",
    "greedy_matches",
    "init",
    "load",
    "logical_axes",
    "logits",
    "response_logprobs",
    "response_logprobs_with",
    "response_stats",
    "response_stats_with",
    "response_values",
    "response_values_with",
    "save",
    "scalar",
    "score",
    "score_with",
    "selected_logprobs",
    "shift_bias",
    "standardise",
    "token_logprobs",
    "token_logprobs_with",
    "values",
    "values_with",
    "with_head",
    "without_head",
]
