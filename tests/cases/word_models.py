"""Tiny random models whose tokens are words."""

import jax

from rlhf_jax import lm
from rlhf_jax.data import chat, tokenizers


def save(path, *, words, seed, scale=4.0, head=False, width=16, max_length=64, positions="rope"):
    """Saves a model with its tokenizer and returns the path; a larger ``scale`` of the weights makes it more certain.

    With ``head``, it is a reward model.
    """
    fmt = chat.chat_format(tokenizers.word_level(words))
    cfg = lm.LMConfig(
        vocab_size=len(fmt.tokenizer),
        n_layers=1,
        d_model=width,
        n_heads=2,
        d_mlp=2 * width,
        max_length=max_length,
        positions=positions,  # pyright: ignore[reportArgumentType]
        tie_embeddings=True,
    )
    params = jax.tree.map(lambda x: scale * x, lm.init(jax.random.key(seed), cfg))
    if head:
        params = lm.with_head(jax.random.key(seed + 1), params, cfg)
    lm.save(path, cfg, params, tokenizer=fmt.tokenizer, stop_ids=fmt.stop_ids)
    return str(path)
