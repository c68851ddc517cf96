"""Encoding of conversations into token ids, in the chat format of any tokenizer."""

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
