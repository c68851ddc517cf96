"""Encoding of texts: plain text, rendered chat templates, and texts that continue other texts."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_jax.data import errors

if TYPE_CHECKING:
    import tokenizers
    import transformers


def encode_texts(tokenizer: transformers.PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Encodes plain texts in one call. The result never contains a special token.

    Raises:
        DataError: If a word is not in the vocabulary of a word-level tokenizer without an unknown token.
    """
    return _encode(tokenizer, texts, split_special_tokens=True)


def encode_rendered(tokenizer: transformers.PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Encodes renderings of a chat template in one call, as ``apply_chat_template`` does: with control tokens.

    Raises:
        DataError: As for `encode_texts`.
    """
    return _encode(tokenizer, texts, split_special_tokens=False)


def encode_with_offsets(
    tokenizer: transformers.PreTrainedTokenizerFast, text: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """Returns the ids of `encode_rendered`, and the characters of the text that each token covers."""
    backend = tokenizer.backend_tokenizer
    with _word_errors(tokenizer, [text]), _plain_offsets(backend):
        encoding = backend.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets


def encode_continuation(tokenizer: transformers.PreTrainedTokenizerFast, text: str) -> list[int]:
    """Encodes a text that follows other text, so that a SentencePiece tokenizer inserts no space before it."""
    with _word_errors(tokenizer, [text]):
        return _without_prefixes(tokenizer).encode(text, add_special_tokens=False).ids


@functools.lru_cache(maxsize=4)
def _without_prefixes(tokenizer: transformers.PreTrainedTokenizerFast) -> tokenizers.Tokenizer:
    """Returns a tokenizer's backend or, if it inserts spaces before texts, a copy that inserts none."""
    import tokenizers

    backend = tokenizer.backend_tokenizer
    spec = json.loads(backend.to_str())
    parts = {name: _without_prefix(spec[name]) for name in ("normalizer", "pre_tokenizer")}
    changed = any(spec[name] != part for name, part in parts.items())
    return tokenizers.Tokenizer.from_str(json.dumps(spec | parts)) if changed else backend


def _encode(tokenizer: Any, texts: Sequence[str], *, split_special_tokens: bool) -> list[list[int]]:
    if not texts:
        return []
    with _word_errors(tokenizer, texts, plain=split_special_tokens):
        return tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=split_special_tokens,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]


@contextlib.contextmanager
def _plain_offsets(backend: Any) -> Iterator[None]:
    """Removes the post-processor in this context, because that of GPT-2 and Llama 3 trims spaces from offsets."""
    processor, backend.post_processor = backend.post_processor, None
    try:
        yield
    finally:
        backend.post_processor = processor


def _without_prefix(part: Any) -> Any:
    """Returns a normalizer or pre-tokenizer, as JSON, without the insertion of spaces; None if nothing else remains."""
    if not isinstance(part, dict):
        return part
    for steps in ("normalizers", "pretokenizers"):
        if steps in part:
            kept = [_without_prefix(step) for step in part[steps]]
            return part | {steps: [step for step in kept if step is not None]}
    if "prepend_scheme" in part:
        return part | {"prepend_scheme": "never"}
    if part.get("add_prefix_space"):
        return part | {"add_prefix_space": False}
    return None if part.get("type") == "Prepend" else part


@contextlib.contextmanager
def _word_errors(tokenizer: Any, texts: Sequence[str], *, plain: bool = False) -> Iterator[None]:
    """Raises DataError with the first unknown word if a word-level tokenizer fails, whose error does not name it.

    ``plain`` is whether the texts contain no control tokens.
    """
    try:
        yield
    except Exception as error:
        backend: tokenizers.Tokenizer = tokenizer.backend_tokenizer
        if type(backend.model).__name__ != "WordLevel" or backend.pre_tokenizer is None:
            raise
        added = [token.content for token in backend.get_added_tokens_decoder().values()]
        control = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)")
        for word in (word for text in texts for word in (text if plain else control.sub(" ", text)).split()):
            if any(backend.token_to_id(piece) is None for piece, _ in backend.pre_tokenizer.pre_tokenize_str(word)):
                raise errors.DataError(f"the word {word!r} is not in the tokenizer's vocabulary") from error
        raise
