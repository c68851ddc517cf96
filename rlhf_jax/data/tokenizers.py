"""Tokenizers in Hugging Face format, trained on text or built from a list of words.

The tokenizers from `train_bpe` and `word_level` have the same four special tokens (pad 0, end 1, user 2, assistant 3),
no beginning-of-sequence token, and the same chat template::

    <|user|>text<|end|><|assistant|>text<|end|> ...

``<|end|>`` ends every turn and is the EOS token. The pad token is different from the EOS token, because code
that masks pad tokens would otherwise mask the end of every answer, so a model would not learn to stop.

The Hugging Face packages are imported inside the functions, because importing them takes most of a second.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_jax.data import errors
from rlhf_jax.lm.hub import special_ids, tokenizer_files

if TYPE_CHECKING:
    import transformers

PAD = "<|pad|>"
END = "<|end|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
UNKNOWN = "<|unk|>"
SPECIAL_TOKENS = (PAD, END, USER, ASSISTANT)
"""Special tokens in the order of their ids, from 0."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ '<|user|>' + message['content'] + '<|end|>' }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '<|assistant|>' + message['content'] + '<|end|>' }}"
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
    """Trains a byte-level BPE tokenizer, which encodes any text and decodes it exactly.

    Args:
        texts: The training texts. Training is deterministic.
        vocab_size: Maximum number of tokens; at least the number of special tokens plus 256, for the bytes. Short texts
            yield fewer tokens; the actual number is ``len(tokenizer)``.
        special_tokens: Additional special tokens, whose ids follow the four standard special tokens.
        min_frequency: Minimum number of times that a pair of tokens must occur to be merged.

    Returns:
        The tokenizer, with the chat template of this module.

    Raises:
        DataError: If ``vocab_size`` is too small, or a special token is given twice.
    """
    import tokenizers

    specials = _unique([*SPECIAL_TOKENS, *special_tokens], "special token")
    if vocab_size < len(specials) + _BYTES:
        raise errors.DataError(
            f"vocab_size is {vocab_size}; it must be at least {len(specials) + _BYTES}, for {len(specials)} special "
            f"tokens and {_BYTES} bytes"
        )
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    # Without a prefix space, the first word of a text decodes as written.
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
    """Builds a tokenizer that splits texts at white space and has one token for each word.

    The ids are contiguous and start with the four special tokens. These are followed by ``<|unk|>`` if ``unknown`` is
    set, by the additional special tokens, and by the words in the given order.

    >>> from rlhf_jax.data import plain_text, tokenizers
    >>> tokenizer = tokenizers.word_level(["the", "cat", "sat"])
    >>> plain_text.encode_texts(tokenizer, ["the cat", "cat sat"])
    [[4, 5], [5, 6]]

    Args:
        words: Distinct words without white space and without ``<|`` or ``|>``, which are reserved for special tokens.
        special_tokens: Additional special tokens.
        unknown: Whether to encode words that are not in the list as ``<|unk|>``. If not, `plain_text.encode_texts`
            raises an error for such a word.

    Returns:
        The tokenizer, with the chat template of this module.

    Raises:
        DataError: If there are no words, a word is empty or contains white space, ``<|`` or ``|>``, or a word or a
            special token is given twice.
    """
    import tokenizers

    extra = [*([UNKNOWN] if unknown else []), *special_tokens]
    specials = _unique([*SPECIAL_TOKENS, *extra], "special token")
    words = _unique(words, "word")
    if not words:
        raise errors.DataError("words is empty; a word-level tokenizer needs at least one word")
    for word in words:
        if word.split() != [word] or "<|" in word or "|>" in word:
            raise errors.DataError(f"{word!r} is not a word: it is empty or contains white space, '<|' or '|>'")
    vocab = {token: i for i, token in enumerate([*specials, *words])}
    # If the unknown token is not in the vocabulary, unknown words raise an error instead of being dropped silently.
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=UNKNOWN))
    # The vocabulary contains the special tokens as words. Splitting at the brackets prevents a literal "<|end|>" in a
    # text from being encoded as the special token.
    brackets = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"<\||\|>"), behavior="isolated")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.WhitespaceSplit(), brackets])
    return _in_chat_form(backend, extra=extra)


def load(path: str | os.PathLike[str]) -> transformers.PreTrainedTokenizerFast:
    """Loads a tokenizer that ``save_pretrained`` or `rlhf_jax.lm.save` saved in a local directory.

    Nothing is downloaded. `rlhf_jax.lm.save` saves a chat template with generation marks beside one without them, which
    other libraries use; the loaded tokenizer has the marks. Its attribute ``stop_ids`` contains the ids that end an
    answer according to ``config.json`` and ``generation_config.json``, as far as it has them.

    Raises:
        DataError: If the directory has no ``tokenizer.json``, or its files cannot be read.
    """
    import transformers

    name = os.fspath(path)
    file = os.path.join(name, "tokenizer.json")
    if not os.path.isfile(file):
        raise errors.DataError(f"{name} has no tokenizer.json")
    with open(file, "rb") as opened:
        if opened.read(40).startswith(b"version https://git-lfs"):
            raise errors.DataError(f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` in {name}")
    try:
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(name, local_files_only=True)
    except Exception as error:  # the tokenizers package raises exceptions of many kinds
        raise errors.DataError(f"the tokenizer in {name} cannot be read: {error}") from error
    tokenizer.chat_template = tokenizer_files.restore_marks(tokenizer.chat_template)
    n = 1 + max(tokenizer.get_vocab().values())
    # A model's vocabulary can be larger than its tokenizer's.
    try:
        listed = special_ids.read_stop_ids(pathlib.Path(name), vocab_size=1 << 31)
    except ValueError as error:
        raise errors.DataError(str(error)) from error
    tokenizer.stop_ids = tuple(i for i in listed if i < n)  # type: ignore[attr-defined]
    return tokenizer


def _in_chat_form(backend: Any, *, extra: Sequence[str]) -> transformers.PreTrainedTokenizerFast:
    """Wraps a tokenizer of the ``tokenizers`` package and adds the special tokens and the chat template."""
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


def _unique(items: Iterable[str], kind: str) -> list[str]:
    items = list(items)
    seen: set[str] = set()
    for item in items:
        if item in seen:
            raise errors.DataError(f"the {kind} {item!r} is given twice")
        seen.add(item)
    return items
