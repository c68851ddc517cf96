"""Pure functions that implement a language model with parameters in a nested dict of arrays.

Functions of tokens, such as `token_logprobs` and `score`, accept as ``cfg`` an `LMConfig` for the model of this
library or a `rlhf_jax.types.ApplyFn` for any other model.
"""

from rlhf_jax.lm import costs, heads, lora
from rlhf_jax.lm.alignment import apply_fn, token_map
from rlhf_jax.lm.cache import KVCache
from rlhf_jax.lm.cache import create as create_cache
from rlhf_jax.lm.config import LMConfig
from rlhf_jax.lm.distributions import TopK, token_kl, token_listed_logprobs, token_top_k
from rlhf_jax.lm.embedding import check_ids, resize
from rlhf_jax.lm.heads import with_head, without_head
from rlhf_jax.lm.hub import peft
from rlhf_jax.lm.hub.directory import has_head, load, load_config, load_normalisation, load_stop_ids, save
from rlhf_jax.lm.logprobs import (
    TokenStats,
    entropy,
    greedy_matches,
    score,
    selected_logprobs,
    token_logprobs,
    token_stats,
    values,
)
from rlhf_jax.lm.packed import packed_means, packed_scores, packed_sums
from rlhf_jax.lm.params import abstract, count, first_layers, init, logical_axes
from rlhf_jax.lm.transformer import forward, logits

__all__ = [
    "KVCache",
    "LMConfig",
    "TokenStats",
    "TopK",
    "abstract",
    "apply_fn",
    "check_ids",
    "costs",
    "count",
    "create_cache",
    "entropy",
    "first_layers",
    "forward",
    "greedy_matches",
    "has_head",
    "heads",
    "init",
    "load",
    "load_config",
    "load_normalisation",
    "load_stop_ids",
    "logical_axes",
    "logits",
    "lora",
    "packed_means",
    "packed_scores",
    "packed_sums",
    "peft",
    "resize",
    "save",
    "score",
    "selected_logprobs",
    "token_kl",
    "token_listed_logprobs",
    "token_logprobs",
    "token_map",
    "token_stats",
    "token_top_k",
    "values",
    "with_head",
    "without_head",
]
