"""Text of models and people as HTML: everything is escaped, and invisible control characters are shown."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from markupsafe import Markup, escape

# Control characters, such as the escape character of terminal colours, and the characters that change the direction of
# the text around them. The direction marks that ordinary right-to-left text contains, and joiners, are not among them.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufff9-\ufffb]"
)
_FENCE = re.compile(r"^[ \t]*(`{3,}(?!`)|~{3,}(?!~))[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$\n?|\Z)", re.MULTILINE | re.DOTALL)


class Part(NamedTuple):
    """A piece of a text."""

    is_code: bool
    text: Markup


def visible(text: str) -> Markup:
    """Returns a text as HTML, in which control characters are replaced by their names, such as ``U+202E``."""
    pieces, start = [], 0
    for match in _HIDDEN.finditer(text := text.replace("\r\n", "\n")):
        name = f"U+{ord(match[0]):04X}"
        pieces += [escape(text[start : match.start()]), Markup('<span class="control">{}</span>').format(name)]
        start = match.end()
    return Markup("").join([*pieces, escape(text[start:])])


def parts(text: str) -> list[Part]:
    """Splits a text at the fences of Markdown into prose and code."""
    found, start = [], 0
    for match in _FENCE.finditer(text):
        found += [Part(False, visible(text[start : match.start()])), Part(True, visible(match[2]))]
        start = match.end()
    found.append(Part(False, visible(text[start:])))
    return [part for part in found if part.text.strip()] or [Part(False, Markup(""))]


def content(message: dict[str, Any]) -> str:
    """Returns what a message says: its text, and its other keys, such as ``tool_calls``, as JSON."""
    text = message.get("content") or ""
    if not isinstance(text, str):
        text = json.dumps(text, ensure_ascii=False, indent=2)
    others = {name: value for name, value in message.items() if name not in ("role", "content")}
    if others:
        text += f"\n```json\n{json.dumps(others, ensure_ascii=False, indent=2)}\n```\n"
    return text
