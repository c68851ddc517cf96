"""Encoding of conversations as token ids, in a tokenizer's chat format.

The tokenizer's own chat template defines the format: the ids are those that ``tokenizer.apply_chat_template`` returns.
This package finds the tokens that the assistant writes, on which a model is trained (see `rendering`). A tokenizer
without a template gets that of its model family (see `templates`).
"""

from rlhf_jax.data.chat.encoders import (
    encode_answer,
    encode_answers,
    encode_dialogue,
    encode_prompt,
    encode_prompts,
    has_special_token,
    messages,
    try_answers,
    unused_keys,
)
from rlhf_jax.data.chat.formats import ChatFormat, chat_format

__all__ = [
    "ChatFormat",
    "chat_format",
    "encode_answer",
    "encode_answers",
    "encode_dialogue",
    "encode_prompt",
    "encode_prompts",
    "has_special_token",
    "messages",
    "try_answers",
    "unused_keys",
]
