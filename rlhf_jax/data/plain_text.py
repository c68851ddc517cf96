"""Encoding of plain text, so that what a user types never becomes a control token.

A *control token* is a special token of the tokenizer, or another token to which a chat format gives a meaning. If a
text contains the spelling of one, the spelling is encoded as ordinary characters.

Some tokenizers encode a text differently depending on its place: SentencePiece puts a space before the first word of
an input, and in older files before the first word after every special token. `TextEncoder` therefore receives a place
with each text.
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
"""Places of a text: at the start of the input, directly after a control token, and in the middle of other text."""


def encode_texts(tokenizer: transformers.PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Encodes plain texts in one call. The result never contains a special token.

    Raises:
        DataError: If a word-level tokenizer without an unknown token lacks a word; the message names the word.
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
    """Encodes texts at their places; made by `text_encoder`."""

    backends: tuple[tokenizers.Tokenizer, ...]
    """A copy of the tokenizer for each of the three places, without control tokens."""
    control_ids: frozenset[int]
    control_pattern: re.Pattern[str]
    """Matches the spelling of a control token."""

    def __call__(self, texts: Iterable[tuple[int, str]]) -> dict[tuple[int, str], list[int]]:
        """Returns the ids of every distinct ``(place, text)``, with one tokenizer call for each place.

        Raises:
            DataError: As `encode_texts` does.
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
        """Encodes a text cut inside the spellings of control tokens, which some vocabularies hold as words."""
        cuts = [match.start() + 1 for match in self.control_pattern.finditer(text)]
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            ids += self.backends[MIDDLE if i else place].encode(piece, add_special_tokens=False).ids
        if not self.control_ids.isdisjoint(ids):
            raise errors.DataError(f"the tokenizer encodes the text {text[:80]!r} as a control token")
        return ids


def text_encoder(tokenizer: transformers.PreTrainedTokenizerFast, control: Iterable[str]) -> TextEncoder:
    """Returns an encoder of plain text for a tokenizer; ``control`` holds the spellings of its control tokens."""
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
        # Parsing a large vocabulary takes a second, and most tokenizers add no prefix and need one copy only.
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
    """Returns a normalizer or pre-tokenizer, as JSON, without the space it puts before the first or before every text.

    ``dropped_schemes`` lists the values of ``prepend_scheme`` to switch off.
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
    """Raises DataError with the first unknown word of a word-level tokenizer, whose own exception does not name it."""
    if type(backend.model).__name__ != "WordLevel" or backend.pre_tokenizer is None:
        return
    for word in (word for text in texts for word in text.split()):
        if any(backend.token_to_id(piece) is None for piece, _ in backend.pre_tokenizer.pre_tokenize_str(word)):
            raise errors.DataError(f"the word {word!r} is not in the tokenizer's vocabulary") from error
