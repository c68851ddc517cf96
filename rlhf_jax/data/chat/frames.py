"""What a chat template writes around the texts of turns: its *frame*, found by rendering it with stand-ins for them.

A frame depends on the roles of a dialogue, not on what is said, so one rendering serves all dialogues with the same
roles. Control tokens are looked for in the frame alone. Texts are put into its gaps and never looked at, so that what
somebody typed cannot become a control token.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_jax.data import dialogues, errors, texts
from rlhf_jax.data.chat import templates

MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
"""The mark before what the assistant says."""

# Characters that no template uses; the em spaces show whether it strips what stands around a text.
_STAND_IN = "\u2003\ue000{}\ue001\u2003"
_FOUND = re.compile("(\u2003?)\ue000([0-9]+)\ue001(\u2003?)")
_WHITE = "".join(map(chr, (*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F)))
_WHITE += "\u205f\u3000"
"""White space as the tokenizers library knows it."""


class Slot(NamedTuple):
    """A gap for the text of a turn, and whether the template strips it on either side."""

    turn: int
    left: bool
    right: bool

    def fill(self, text: str) -> str:
        """The text as the template writes it."""
        text = text.lstrip() if self.left else text
        return text.rstrip() if self.right else text


class Piece(NamedTuple):
    """What is encoded in one go: fixed text and gaps, with no control token in between."""

    place: int
    """Where it stands: START, AFTER or MIDDLE of `texts`."""
    parts: tuple[str | Slot, ...]
    left: str
    """White space that the control token before it takes away."""
    right: str

    def fill(self, contents: Sequence[str]) -> tuple[int, str]:
        """The place and the text, for the texts of the turns."""
        text = "".join([part if isinstance(part, str) else part.fill(contents[part.turn]) for part in self.parts])
        return self.place, text.lstrip(self.left).rstrip(self.right)


class Item(NamedTuple):
    """A control token (its id) or a piece."""

    what: int | Piece
    turn: int
    """The turn whose answer this belongs to, by the generation marks; -1 outside of them."""


Frame = tuple[Item, ...]


class Tokens(NamedTuple):
    """The control tokens of a format."""

    ids: Mapping[str, int]
    left: frozenset[str]
    """Those that take away the white space before them."""
    right: frozenset[str]
    """Those that take away the white space behind them."""
    pattern: re.Pattern[str]


def control_tokens(tokenizer: Any, template: str) -> Tokens:
    """The special tokens of a tokenizer, and what else it has that stands in the template (Qwen3's ``<think>``).

    White space that is a token of its own, as in GPT-NeoX, is text wherever it stands.
    """
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    there = {t.content: (i, t) for i, t in added.items() if t.special or (t.content.strip() and t.content in template)}
    longest_first = sorted(there, key=len, reverse=True)
    return Tokens(
        ids={content: i for content, (i, _) in there.items()},
        left=frozenset(content for content, (_, token) in there.items() if token.lstrip),
        right=frozenset(content for content, (_, token) in there.items() if token.rstrip),
        pattern=re.compile("|".join(map(re.escape, longest_first)) or r"(?!)"),
    )


def render(
    tokenizer: Any, template: str, messages: Sequence[Mapping[str, str]], *, prompt: bool
) -> tuple[str, list[tuple[int, int]]]:
    """The text that a template writes, and where the generation marks stand in it.

    ``prompt``: whether the beginning of an answer follows. Raises DataError with what the template says, where it
    refuses the messages.
    """
    import jinja2
    from transformers.utils import chat_template_utils

    try:
        rendered: Any = chat_template_utils.render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            chat_template=template,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=MARKED.search(template) is not None,
            **{**tokenizer.special_tokens_map, **templates.OPTIONS},
        )
    except jinja2.exceptions.TemplateError as error:
        raise errors.DataError(f"the chat template refuses the turns: {error}") from error
    (text,), spans = rendered
    return text, [span for each in spans for span in each]


def make_frame(tokenizer: Any, template: str, tokens: Tokens, roles: Sequence[str], *, prompt: bool) -> Frame:
    """The frame of dialogues with these roles.

    Raises:
      DataError: the template refuses the roles, or does not write every text exactly once and in order.
    """
    messages = [{"role": role, "content": _STAND_IN.format(i)} for i, role in enumerate(roles)]
    text, spans = render(tokenizer, template, messages, prompt=prompt)
    slots = list(_FOUND.finditer(text))
    if [int(slot[2]) for slot in slots] != list(range(len(roles))):
        raise errors.DataError(
            f"the chat template does not write the texts of {', '.join(roles)} once each and in their order"
        )
    answer_of = functools.partial(_answer_of, spans=spans, slots=slots, roles=roles)
    events: list[tuple[int, int, str, Any]] = [(slot.start(), slot.end(), "slot", slot) for slot in slots]
    events += [(found.start(), found.end(), "token", found[0]) for found in tokens.pattern.finditer(text)]
    events += [(edge, edge, "cut", None) for span in spans for edge in span]
    builder = _Builder(tokens)
    at = 0
    for start, end, kind, what in sorted(events, key=lambda event: event[:2]):
        builder.fixed(text[at:start])
        if kind == "slot":
            builder.parts.append(Slot(int(what[2]), left=not what[1], right=not what[3]))
        elif kind == "token":
            builder.token(what, answer_of(start), before=answer_of(max(start - 1, 0)))
        else:
            builder.cut(answer_of(max(start - 1, 0)))
        at = end
    builder.fixed(text[at:])
    builder.flush(answer_of(len(text) - 1))
    return tuple(builder.items)


class _Builder:
    """Collects a frame from left to right."""

    def __init__(self, tokens: Tokens) -> None:
        self.items: list[Item] = []
        self.parts: list[str | Slot] = []
        self._tokens, self._place, self._left = tokens, texts.START, ""

    def fixed(self, text: str) -> None:
        if text:
            self.parts.append(text)

    def flush(self, turn: int, *, right: str = "") -> None:
        if any(not isinstance(part, str) for part in self.parts) or self._fixed_text():
            self.items.append(Item(Piece(self._place, tuple(self.parts), self._left, right), turn))
        self.parts = []

    def token(self, content: str, turn: int, *, before: int) -> None:
        self.flush(before, right=_WHITE if content in self._tokens.left else "")
        self.items.append(Item(self._tokens.ids[content], turn))
        self._place, self._left = texts.AFTER, _WHITE if content in self._tokens.right else ""

    def cut(self, turn: int) -> None:
        if all(isinstance(part, str) for part in self.parts) and not self._fixed_text():
            self.parts = []  # only white space that the control token takes away: nothing begins here yet
            return
        self.flush(turn)
        self._place, self._left = texts.MIDDLE, ""

    def _fixed_text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str)).lstrip(self._left)


def _answer_of(
    at: int, *, spans: Sequence[tuple[int, int]], slots: Sequence[re.Match[str]], roles: Sequence[str]
) -> int:
    """The assistant turn whose marks hold a position of the text; -1 if none do."""
    for start, end in spans:
        if start <= at < end:
            inside = [int(slot[2]) for slot in slots if start <= slot.start() and slot.end() <= end]
            return inside[0] if len(inside) == 1 and roles[inside[0]] == dialogues.ASSISTANT else -1
    return -1
