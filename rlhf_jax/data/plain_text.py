"""Encoding of plain text without ever producing control tokens, whatever a user types.

A *control token* is a special token of the tokenizer, or another token that has a meaning in a chat format. If a text
contains the spelling of a control token, the spelling is encoded as ordinary characters.

Some tokenizers encode a text differently depending on its place. For example, SentencePiece inserts a space before the
first word of an input; with older tokenizer files, it also inserts one after every special token. `TextEncoder`
therefore requires the place of each text.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_jax.data import errors

if TYPE_CHECKING:
    import tokenizers
    import transformers

START, AFTER, MIDDLE = range(3)
"""Places of a text: at the start of the input, directly after a control token, and after other text."""


def encode_texts(tokenizer: transformers.PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Encodes plain texts in one call. The result never contains a special token.

    Raises:
        DataError: If a word is not in the vocabulary of a word-level tokenizer without an unknown token.
    """
    if not texts:
        return []
    try:
        encoded = tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )
    except Exception as error:
        _raise_for_unknown_word(error, tokenizer.backend_tokenizer, texts)
        raise
    return encoded["input_ids"]


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
    """Encoder of texts with given places; created by `text_encoder`."""

    backends: tuple[tokenizers.Tokenizer, ...]
    """For each of the three places, a copy of the tokenizer that encodes control tokens as text."""
    control_ids: frozenset[int]
    control_pattern: re.Pattern[str]
    """Matches the spelling of any control token."""

    def __call__(self, texts: Iterable[tuple[int, str]]) -> dict[tuple[int, str], list[int]]:
        """Returns the ids of each distinct ``(place, text)``. All texts of one place are encoded together.

        Raises:
            DataError: If a word is unknown (see `encode_texts`), or a text cannot be encoded without control tokens.
        """
        ids_of: dict[tuple[int, str], list[int]] = {}
        distinct = dict.fromkeys(texts)
        for place, backend in enumerate(self.backends):
            here = [text for at, text in distinct if at == place]
            try:
                encoded = backend.encode_batch_fast(here, add_special_tokens=False) if here else []
            except Exception as error:
                _raise_for_unknown_word(error, backend, here)
                raise
            for text, encoding in zip(here, encoded):
                ids = encoding.ids
                if self.control_pattern.search(text) and not self.control_ids.isdisjoint(ids):
                    ids = self._encode_in_pieces(place, text)
                ids_of[place, text] = ids
        return ids_of

    def _encode_in_pieces(self, place: int, text: str) -> list[int]:
        """Encodes a text in pieces, split after the first character of each spelling of a control token."""
        cuts = [match.start() + 1 for match in self.control_pattern.finditer(text)]
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            ids += self.backends[MIDDLE if i else place].encode(piece, add_special_tokens=False).ids
        if not self.control_ids.isdisjoint(ids):
            raise errors.DataError(f"the tokenizer encodes the text {text[:80]!r} as a control token")
        return ids


def text_encoder(tokenizer: transformers.PreTrainedTokenizerFast, control: Iterable[str]) -> TextEncoder:
    """Returns the plain-text encoder of a tokenizer whose control tokens have the spellings ``control``."""
    import tokenizers

    control = set(control)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["truncation"] = spec["padding"] = None
    for token in spec["added_tokens"]:
        token["special"] = token["special"] or token["content"] in control
    copies: list[tuple[dict[str, Any], tokenizers.Tokenizer]] = []
    for dropped_schemes in ((), ("first",), ("first", "always")):
        parts = {name: _without_prefix(spec[name], dropped_schemes) for name in ("normalizer", "pre_tokenizer")}
        equal = [backend for other_parts, backend in copies if other_parts == parts]
        # Parsing a large vocabulary takes a second, and most tokenizers need only one copy because they add no prefix.
        backend = equal[0] if equal else tokenizers.Tokenizer.from_str(json.dumps(spec | parts))
        backend.encode_special_tokens = True
        copies.append((parts, backend))
    longest_first = sorted(control, key=len, reverse=True)
    return TextEncoder(
        backends=tuple(backend for _, backend in copies),
        control_ids=frozenset(i for token in control if (i := copies[0][1].token_to_id(token)) is not None),
        control_pattern=re.compile("|".join(map(re.escape, longest_first)) or r"(?!)"),
    )


def _without_prefix(part: Any, dropped_schemes: Sequence[str]) -> Any:
    """Returns a normalizer or pre-tokenizer, as JSON, that inserts no space before texts; None if it did nothing else.

    The part is changed only if its ``prepend_scheme`` (``first``: at the start of an input, ``always``: also after
    special tokens) is in ``dropped_schemes``. A part that inserts spaces without a scheme counts as ``always``.
    """
    if not isinstance(part, dict):
        return part
    for steps in ("normalizers", "pretokenizers"):
        if steps in part:
            kept = [_without_prefix(step, dropped_schemes) for step in part[steps]]
            return part | {steps: [step for step in kept if step is not None]}
    if part.get("prepend_scheme") in dropped_schemes:
        return part | {"prepend_scheme": "never"}
    if "always" in dropped_schemes and part.get("add_prefix_space"):
        return part | {"add_prefix_space": False}
    return None if "always" in dropped_schemes and part.get("type") == "Prepend" else part


def _raise_for_unknown_word(error: Exception, backend: tokenizers.Tokenizer, texts: Sequence[str]) -> None:
    """Raises DataError with the first unknown word if the tokenizer is word-level; ``error`` does not name the word."""
    if type(backend.model).__name__ != "WordLevel" or backend.pre_tokenizer is None:
        return
    for word in (word for text in texts for word in text.split()):
        if any(backend.token_to_id(piece) is None for piece, _ in backend.pre_tokenizer.pre_tokenize_str(word)):
            raise errors.DataError(f"the word {word!r} is not in the tokenizer's vocabulary") from error
