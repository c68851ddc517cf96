"""Encoding of conversations as token ids, in a tokenizer's chat format."""

from rlhf_jax.data.chat.formats import (
    ChatFormat,
    chat_format,
    encode_answer,
    encode_answers,
    encode_dialogue,
    encode_prompt,
    encode_prompts,
    messages,
)

__all__ = [
    "ChatFormat",
    "chat_format",
    "encode_answer",
    "encode_answers",
    "encode_dialogue",
    "encode_prompt",
    "encode_prompts",
    "messages",
]
