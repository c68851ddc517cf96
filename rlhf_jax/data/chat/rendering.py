"""Rendering of chat templates as frames.

A *frame* is everything that a template writes around the texts of the turns. It is computed by rendering the template
with placeholders instead of the texts. A frame depends only on the roles of the turns and on whether the *generation
prompt*, the text that begins an answer, follows them, so dialogues with the same roles share a frame. Control tokens
are recognised only in the frame, so a text never becomes a control token, whatever a user types.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_jax.data import dialogues, errors, plain_text
from rlhf_jax.data.chat import templates

MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
"""Matches ``{% generation %}``. A template encloses the tokens that contribute to the loss (an answer and its stop
token) in the *generation marks* ``{% generation %}`` and ``{% endgeneration %}``."""

# Characters that no template uses; the em spaces show whether the template strips the text.
_PLACEHOLDER = "\u2003\ue000{}\ue001\u2003"
_PLACEHOLDER_PATTERN = re.compile("(\u2003?)\ue000([0-9]+)\ue001(\u2003?)")
_WHITE = "".join(map(chr, (*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F)))
_WHITE += "\u205f\u3000"
"""The characters that the tokenizers package treats as white space."""


class Slot(NamedTuple):
    """The position of a turn's text in a frame, and the sides on which the template strips white space from it."""

    turn: int
    strip_left: bool
    strip_right: bool

    def fill(self, text: str) -> str:
        """Returns the text as the template writes it."""
        text = text.lstrip() if self.strip_left else text
        return text.rstrip() if self.strip_right else text


class Piece(NamedTuple):
    """Fixed text and slots that are encoded together, because no control token separates them."""

    place: int
    """``plain_text.START``, ``plain_text.AFTER`` or ``plain_text.MIDDLE``."""
    parts: tuple[str | Slot, ...]
    strip_left: str
    """White-space characters that the preceding control token removes from the start of the piece; empty if none."""
    strip_right: str
    """White-space characters that the following control token removes from the end of the piece; empty if none."""

    def fill(self, contents: Sequence[str]) -> tuple[int, str]:
        """Returns the place and the text of the piece, given the texts of the turns."""
        text = "".join([part if isinstance(part, str) else part.fill(contents[part.turn]) for part in self.parts])
        return self.place, text.lstrip(self.strip_left).rstrip(self.strip_right)


class Item(NamedTuple):
    """A control token or a piece of text."""

    content: int | Piece
    """The id of the control token, or the piece."""
    turn: int
    """Index of the turn whose generation marks contain the item; -1 outside all marks."""


Frame = tuple[Item, ...]


class ControlTokens(NamedTuple):
    """The control tokens of a chat format."""

    ids: Mapping[str, int]
    strip_left: frozenset[str]
    """Tokens that remove the white space before them."""
    strip_right: frozenset[str]
    """Tokens that remove the white space after them."""
    pattern: re.Pattern[str]
    """Matches the spelling of any control token."""


def control_tokens(tokenizer: Any, template: str) -> ControlTokens:
    """Returns a tokenizer's special tokens, and its other added tokens that the template contains, such as ``<think>``.

    Added tokens that consist of white space, as in GPT-NeoX, are not control tokens.
    """
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    tokens = {t.content: (i, t) for i, t in added.items() if t.special or (t.content.strip() and t.content in template)}
    longest_first = sorted(tokens, key=len, reverse=True)
    return ControlTokens(
        ids={content: i for content, (i, _) in tokens.items()},
        strip_left=frozenset(content for content, (_, token) in tokens.items() if token.lstrip),
        strip_right=frozenset(content for content, (_, token) in tokens.items() if token.rstrip),
        pattern=re.compile("|".join(map(re.escape, longest_first)) or r"(?!)"),
    )


def render(
    tokenizer: Any, template: str, messages: Sequence[Mapping[str, str]], *, prompt: bool
) -> tuple[str, list[tuple[int, int]]]:
    """Renders a template.

    Args:
        tokenizer: Tokenizer whose special tokens the template can use.
        template: The chat template.
        messages: ``role``/``content`` dictionaries.
        prompt: Whether to add the generation prompt, which begins an answer.

    Returns:
        ``(text, spans)``. Each span is ``(start, end)``, the part of ``text`` inside a pair of generation marks.

    Raises:
        DataError: If the template rejects the messages.
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
        raise errors.DataError(f"the chat template rejects the turns: {error}") from error
    (text,), spans = rendered
    return text, [span for group in spans for span in group]


def make_frame(tokenizer: Any, template: str, control: ControlTokens, roles: Sequence[str], *, prompt: bool) -> Frame:
    """Returns the frame of dialogues with the given roles.

    Args:
        tokenizer: Tokenizer whose special tokens the template can use.
        template: The chat template.
        control: Control tokens from `control_tokens`.
        roles: Role of each turn.
        prompt: Whether the generation prompt follows the turns.

    Returns:
        The frame.

    Raises:
        DataError: If the template rejects the roles, or does not write every text exactly once and in order.
    """
    messages = [{"role": role, "content": _PLACEHOLDER.format(i)} for i, role in enumerate(roles)]
    text, spans = render(tokenizer, template, messages, prompt=prompt)
    slots = list(_PLACEHOLDER_PATTERN.finditer(text))
    if [int(slot[2]) for slot in slots] != list(range(len(roles))):
        raise errors.DataError(
            f"the chat template does not write the text of each turn ({', '.join(roles)}) exactly once and in order"
        )
    answer_at = functools.partial(_answer_at, spans=spans, slots=slots, roles=roles)
    events: list[tuple[int, int, str, Any]] = [(slot.start(), slot.end(), "slot", slot) for slot in slots]
    events += [(match.start(), match.end(), "token", match[0]) for match in control.pattern.finditer(text)]
    events += [(edge, edge, "edge", None) for span in spans for edge in span]
    builder = _FrameBuilder(control)
    position = 0
    for start, end, kind, value in sorted(events, key=lambda event: event[:2]):
        builder.add_text(text[position:start])
        if kind == "slot":
            builder.parts.append(Slot(int(value[2]), strip_left=not value[1], strip_right=not value[3]))
        elif kind == "token":
            builder.add_token(value, answer_at(start), turn_before=answer_at(max(start - 1, 0)))
        else:
            builder.add_edge(answer_at(max(start - 1, 0)))
        position = end
    builder.add_text(text[position:])
    builder.flush(answer_at(len(text) - 1))
    return tuple(builder.items)


class _FrameBuilder:
    """Collects the items of a frame from left to right. An *edge* is the position of a generation mark."""

    def __init__(self, control: ControlTokens) -> None:
        self.items: list[Item] = []
        self.parts: list[str | Slot] = []
        self._control, self._place, self._strip_left = control, plain_text.START, ""

    def add_text(self, text: str) -> None:
        if text:
            self.parts.append(text)

    def flush(self, turn: int, *, strip_right: str = "") -> None:
        if any(not isinstance(part, str) for part in self.parts) or self._fixed_text():
            self.items.append(Item(Piece(self._place, tuple(self.parts), self._strip_left, strip_right), turn))
        self.parts = []

    def add_token(self, content: str, turn: int, *, turn_before: int) -> None:
        self.flush(turn_before, strip_right=_WHITE if content in self._control.strip_left else "")
        self.items.append(Item(self._control.ids[content], turn))
        self._place = plain_text.AFTER
        self._strip_left = _WHITE if content in self._control.strip_right else ""

    def add_edge(self, turn: int) -> None:
        if all(isinstance(part, str) for part in self.parts) and not self._fixed_text():
            self.parts = []  # the parts are only white space that the last control token removes, so no piece has begun
            return
        self.flush(turn)
        self._place, self._strip_left = plain_text.MIDDLE, ""

    def _fixed_text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str)).lstrip(self._strip_left)


def _answer_at(
    position: int, *, spans: Sequence[tuple[int, int]], slots: Sequence[re.Match[str]], roles: Sequence[str]
) -> int:
    """Returns the index of the assistant turn whose generation marks contain ``position``; -1 if there is none."""
    for start, end in spans:
        if start <= position < end:
            inside = [int(slot[2]) for slot in slots if start <= slot.start() and slot.end() <= end]
            return inside[0] if len(inside) == 1 and roles[inside[0]] == dialogues.ASSISTANT else -1
    return -1
