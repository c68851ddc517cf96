"""Tokenizers built from text or from a list of words, in Hugging Face form, with one chat format.

Every tokenizer made here has the same four special tokens at the same ids, pad 0, end 1, user 2, assistant 3, no
beginning token, and one chat template::

    <|user|>text<|end|><|assistant|>text<|end|> ...

``<|end|>`` ends every turn and is the EOS; pad is a token of its own, or a model never learns to stop.

The Hugging Face imports stand inside the functions: they take most of a second, and only who makes or loads a
tokenizer should wait for them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_jax.data import errors

if TYPE_CHECKING:
    import transformers

PAD = "<|pad|>"
END = "<|end|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
UNKNOWN = "<|unk|>"
SPECIAL_TOKENS = (PAD, END, USER, ASSISTANT)
"""In the order of their ids, from 0."""

# What an assistant says, with the token that ends it, stands between the generation marks: it is what carries loss.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ '<|user|>' + message['content'] + '<|end|>' }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{%- else -%}"
    "{{ raise_exception('the role is user or assistant, not ' + message['role']) }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)

_BYTES = 256


def train_bpe(
    texts: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str] = (), min_frequency: int = 2
) -> transformers.PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; any text can be encoded, and decoding gives it back exactly.

    Args:
      texts: the training text; the same texts give the same vocabulary.
      vocab_size: ids wanted, at least the special tokens + 256 bytes. Little text yields fewer: read ``len`` of the
        result.
      special_tokens: further special tokens, with the ids after the four standard ones.
      min_frequency: a pair of tokens seen less often is not merged.

    Raises:
      DataError: ``vocab_size`` is too small, or a special token is there twice.
    """
    import tokenizers

    specials = _unique([*SPECIAL_TOKENS, *special_tokens], "special token")
    if vocab_size < len(specials) + _BYTES:
        raise errors.DataError(
            f"vocab_size = {vocab_size} is less than {len(specials)} special tokens + {_BYTES} bytes = "
            f"{len(specials) + _BYTES}"
        )
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    # No space is put in front: the first word of a text and its decoding stay as written. No post-processor either: it
    # would trim the spans that the assistant mask of a chat template is computed from.
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=specials,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _in_chat_form(backend, extra=special_tokens)


def word_level(
    words: Iterable[str], *, special_tokens: Sequence[str] = (), unknown: bool = False
) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer with one id a word, split at white space: nothing is trained, and ids are contiguous.

    Ids: the four special tokens from 0, ``<|unk|>`` if asked for, further special tokens, then the words as they come.

    Args:
      words: distinct words without white space, and without ``<|`` or ``|>``, which are kept for special tokens.
      special_tokens: further special tokens.
      unknown: encode a word that is not in the list as ``<|unk|>``. Otherwise it is an error, and
        `tokenising.encode_text` names the word.

    Raises:
      DataError: there is no word, or one is empty, doubled, or holds white space, ``<|`` or ``|>``.
    """
    import tokenizers

    extra = [*([UNKNOWN] if unknown else []), *special_tokens]
    specials = _unique([*SPECIAL_TOKENS, *extra], "special token")
    words = _unique(words, "word")
    if not words:
        raise errors.DataError("a word-level tokenizer needs at least one word")
    for word in words:
        if word.split() != [word] or "<|" in word or "|>" in word:
            raise errors.DataError(f"{word!r} is no word: it is empty or holds white space, '<|' or '|>'")
    vocab = {token: i for i, token in enumerate([*specials, *words])}
    # An unknown token that is not in the vocabulary makes an unknown word an error instead of a silent loss.
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=UNKNOWN))
    # The special tokens are words of this vocabulary too. Cutting at the brackets keeps a user's literal "<|end|>" from
    # being looked up as one.
    brackets = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"<\||\|>"), behavior="isolated")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.WhitespaceSplit(), brackets])
    return _in_chat_form(backend, extra=extra)


def load(path: str | os.PathLike[str]) -> transformers.PreTrainedTokenizerFast:
    """Load a tokenizer that was saved with ``save_pretrained`` into a local directory; nothing is downloaded.

    Raises:
      DataError: the directory holds no ``tokenizer.json``.
    """
    import transformers

    name = os.fspath(path)
    if not os.path.isfile(os.path.join(name, "tokenizer.json")):
        raise errors.DataError(f"{name} holds no tokenizer.json")
    return transformers.PreTrainedTokenizerFast.from_pretrained(name, local_files_only=True)


def _in_chat_form(backend: Any, *, extra: Sequence[str]) -> transformers.PreTrainedTokenizerFast:
    """Wrap a tokenizer of the ``tokenizers`` library, with the special tokens and the chat template."""
    import transformers

    backend.add_special_tokens([*SPECIAL_TOKENS, *extra])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN if UNKNOWN in extra else None,
        extra_special_tokens=[USER, ASSISTANT, *(token for token in extra if token != UNKNOWN)],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _unique(items: Iterable[str], what: str) -> list[str]:
    items = list(items)
    seen: set[str] = set()
    for item in items:
        if item in seen:
            raise errors.DataError(f"the {what} {item!r} is given twice")
        seen.add(item)
    return items
