"""Plain text into token ids, in which no control token ever appears.

A *control token* is a special token of the tokenizer, or whatever else a chat format gives a meaning to. Where a text
holds the letters of one, because somebody typed them, they are encoded as the letters they are.

Where a text stands matters to some tokenizers: SentencePiece puts a space in front of the first word of an input, in
older files in front of the first word behind every special token. `TextEncoder` is told the place.
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
"""Places of a text: at the start of the input, right behind a control token, in the middle of other text."""

_UNKNOWN = "the word {!r} is not in the tokenizer's vocabulary"


def encode_texts(tokenizer: transformers.PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Encode plain texts in one call, with no special token in the result whatever the texts hold.

    Raises:
      DataError: a word-level tokenizer without an unknown token met a word it does not have; the word is named.
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
        word = _unknown_word(tokenizer.backend_tokenizer, texts)
        if word is None:
            raise
        raise errors.DataError(_UNKNOWN.format(word)) from error
    return encoded["input_ids"]


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
    """Encodes texts at their places; made by `text_encoder`."""

    backends: tuple[tokenizers.Tokenizer, ...]
    """A copy of the tokenizer for each of the three places, which knows no control tokens."""
    control_ids: frozenset[int]
    literal: re.Pattern[str]
    """Finds the letters of a control token."""

    def __call__(self, texts: Iterable[tuple[int, str]]) -> dict[tuple[int, str], list[int]]:
        """The ids of every distinct ``(place, text)``, in one call a place; raises DataError as `encode_texts` does."""
        found: dict[tuple[int, str], list[int]] = {}
        wanted = dict.fromkeys(texts)
        for place, backend in enumerate(self.backends):
            here = [text for at, text in wanted if at == place]
            try:
                encoded = backend.encode_batch_fast(here, add_special_tokens=False) if here else []
            except Exception as error:
                word = _unknown_word(backend, here)
                if word is None:
                    raise
                raise errors.DataError(_UNKNOWN.format(word)) from error
            for text, encoding in zip(here, encoded):
                ids = encoding.ids
                if self.literal.search(text) and not self.control_ids.isdisjoint(ids):
                    ids = self._broken_up(place, text)
                found[place, text] = ids
        return found

    def _broken_up(self, place: int, text: str) -> list[int]:
        """For vocabularies that hold the letters of a control token as an ordinary word: cut within the letters."""
        cuts = [match.start() + 1 for match in self.literal.finditer(text)]
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            ids += self.backends[MIDDLE if i else place].encode(piece, add_special_tokens=False).ids
        if not self.control_ids.isdisjoint(ids):
            raise errors.DataError(f"the tokenizer makes a control token of the text {text[:80]!r}")
        return ids


def text_encoder(tokenizer: transformers.PreTrainedTokenizerFast, control: Iterable[str]) -> TextEncoder:
    """An encoder of plain text for a tokenizer; ``control`` are the contents of its control tokens."""
    import tokenizers

    control = set(control)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["truncation"] = spec["padding"] = None
    for token in spec["added_tokens"]:
        token["special"] = token["special"] or token["content"] in control
    made: list[tuple[dict[str, Any], tokenizers.Tokenizer]] = []
    for dropped in ((), ("first",), ("first", "always")):
        parts = {name: _without_prefix(spec[name], dropped) for name in ("normalizer", "pre_tokenizer")}
        same = [backend for other, backend in made if other == parts]
        # Reading a large vocabulary takes a second; most tokenizers put nothing in front and need one copy.
        backend = same[0] if same else tokenizers.Tokenizer.from_str(json.dumps(spec | parts))
        backend.encode_special_tokens = True
        made.append((parts, backend))
    longest_first = sorted(control, key=len, reverse=True)
    return TextEncoder(
        backends=tuple(backend for _, backend in made),
        control_ids=frozenset(i for token in control if (i := made[0][1].token_to_id(token)) is not None),
        literal=re.compile("|".join(map(re.escape, longest_first)) or r"(?!)"),
    )


def _without_prefix(part: Any, dropped: Sequence[str]) -> Any:
    """A normalizer or pre-tokenizer as JSON, without the space it puts before the first text or before every one."""
    if not isinstance(part, dict):
        return part
    for steps in ("normalizers", "pretokenizers"):
        if steps in part:
            kept = [_without_prefix(each, dropped) for each in part[steps]]
            return part | {steps: [each for each in kept if each is not None]}
    if part.get("prepend_scheme") in dropped:
        return part | {"prepend_scheme": "never"}
    if "always" in dropped and part.get("add_prefix_space"):
        return part | {"add_prefix_space": False}
    return None if "always" in dropped and part.get("type") == "Prepend" else part


def _unknown_word(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> str | None:
    """The first word without an id, for a word-level tokenizer, whose library raises a bare Exception without it."""
    if type(backend.model).__name__ != "WordLevel" or backend.pre_tokenizer is None:
        return None
    for word in (word for text in texts for word in text.split()):
        if any(backend.token_to_id(piece) is None for piece, _ in backend.pre_tokenizer.pre_tokenize_str(word)):
            return word
    return None
