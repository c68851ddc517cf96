r"""Parsing of the conversations in a record: message lists, prompts, answers and tools.

A message list is ``[{"role": "user", "content": "..."}, ...]``. Its messages become `dialogues.Turn`; all their other
keys are kept in ``Turn.extra``, except those that are null.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rlhf_jax.data import dialogues, errors, sources

Turns = tuple[dialogues.Turn, ...]

_MEANT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = ("text", "input_text", "output_text")


def prompt(fields: Mapping[str, Any]) -> Turns:
    """Returns the turns of the field ``prompt``."""
    if "prompt" not in fields:
        raise errors.MissingFieldError("prompt")
    value = fields["prompt"]
    if isinstance(value, list | Mapping):
        parsed = turns(value, "prompt")
    elif dialogues.is_dialogue(sources.require_text(value, "prompt")):
        parsed = dialogues.parse_dialogue(value + "\n\nAssistant:")[:-1]
        if parsed[-1] == dialogues.Turn(dialogues.ASSISTANT, ""):  # the text already ended with "Assistant:"
            parsed = parsed[:-1]
    else:
        parsed = (dialogues.Turn(dialogues.USER, value),)
    return usable_prompt(parsed)


def usable_prompt(turns: Turns) -> Turns:
    """Returns the turns, or raises UnusableRecord if they are not a usable prompt."""
    if (reason := dialogues.prompt_drop_reason(turns)) is not None:
        raise errors.UnusableRecord(reason)
    return turns


def answer(value: Any, key: str) -> dialogues.Answer:
    """Parses an answer: a text, a message, or a list that contains only the answer's message."""
    if value is None:
        raise errors.UnusableRecord("an answer is null")
    if not isinstance(value, list | Mapping):
        return sources.require_text(value, key)
    before, last = split_answer(turns(value, key))
    if before:
        raise errors.DataError(f"{key!r} contains {len(before) + 1} messages; it must contain only the answer")
    return last


def split_answer(turns: Turns) -> tuple[Turns, dialogues.Answer]:
    """Splits a conversation into its prompt and its answer; raises UnusableRecord if it does not end in an answer."""
    if not turns:
        raise errors.UnusableRecord("empty answer")
    if turns[-1].role != dialogues.ASSISTANT:
        raise errors.UnusableRecord("ends in a human turn")
    return dialogues.split_answer(turns)


def repeats(prompt: Turns, dialogue_prompt: Turns) -> bool:
    """Returns whether ``prompt`` equals ``dialogue_prompt``, or consists only of its first or last question.

    Roles and texts are compared. White space around the texts is ignored, because only some forms keep it.
    """
    asked, others = _spoken(prompt), _spoken(dialogue_prompt)
    questions = [turn for turn in others if turn[0] == dialogues.USER]
    return asked == others or any(asked == [question] for question in (*questions[:1], *questions[-1:]))


def same(a: Turns, b: Turns) -> bool:
    """Returns whether two contexts are the same: their roles, texts, calls and thoughts.

    Other keys, such as a time or the name of the model that wrote a turn, may differ.
    """
    return len(a) == len(b) and all(
        (x.role, x.text) == (y.role, y.text) and all(x.extra.get(key) == y.extra.get(key) for key in _MEANT)
        for x, y in zip(a, b)
    )


def _spoken(turns: Turns) -> list[tuple[str, str]]:
    return [(turn.role, turn.text.replace("\r\n", "\n").strip()) for turn in turns]


# ---------------------------------------------------------------------------------------------------------- messages


def turns(value: Any, key: str) -> Turns:
    """Parses the message list of the field ``key``."""
    if isinstance(value, Mapping) and isinstance(value.get("role"), list) and isinstance(value.get("content"), list):
        value = _rows(value, key)
    elif isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        form = "a list of messages" if key == "messages" else "a string or a list of messages"
        raise errors.DataError(f"{key!r} has type {type(value).__name__}; it must be {form}")
    return tuple(_turn(message, f"message {n} of {key!r}") for n, message in enumerate(value, start=1))


def _rows(columns: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """Returns the messages of one object with a list for each field, the form in which TFDS and Hugging Face store."""
    n, other = len(columns["role"]), len(columns["content"])
    if n != other:
        raise errors.DataError(f"{key!r} has {n} roles and {other} contents; the numbers must be equal")
    lists = {name: column for name, column in columns.items() if isinstance(column, list) and len(column) == n}
    return [{name: column[i] for name, column in lists.items()} for i in range(n)]


def _turn(message: Any, where: str) -> dialogues.Turn:
    if not isinstance(message, Mapping):
        raise errors.DataError(f"{where} has type {type(message).__name__}; it must be an object")
    extra = {name: value for name, value in message.items() if name not in ("role", "content") and value is not None}
    calls = not dialogues.is_blank(dialogues.Turn("", "", extra))
    for name in ("role",) if calls else ("role", "content"):
        if name not in message:
            raise errors.DataError(f"{where} has no {name!r}")
    where = where.replace("'", "")
    for name, value in extra.items():
        _require_valid(value, f"{name} of {where}")
    role, content = sources.require_text(message["role"], f"role of {where}"), message.get("content")
    if content is not None:
        return dialogues.Turn(role, _text(content, f"content of {where}"), extra)
    if not calls:
        raise errors.UnusableRecord("content is null")
    return dialogues.Turn(role, "", extra)


def _text(content: Any, where: str) -> str:
    """Returns a content, which is a text or a list of text parts, as one text."""
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        return sources.require_text(content, where)
    for part in content:
        if part.get("type") not in _TEXT_PARTS:
            raise errors.UnusableRecord(f"content has a part of type {part.get('type')!r}")
    return "".join(sources.require_text(part.get("text"), f"text in the {where}") for part in content)


def _require_valid(value: Any, where: str) -> None:
    """Raises an error if a JSON value contains an invalid character."""
    if isinstance(value, str):
        sources.require_text(value, where)
    for item in (*value, *value.values()) if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        _require_valid(item, where)


# ------------------------------------------------------------------------------------------------------------- tools


def tools(fields: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Returns the objects in the field ``tools``, which is a list of objects, or JSON that contains one."""
    value = fields.get("tools")
    try:
        value = json.loads(value) if isinstance(value, str) and value.strip() else value
        listed = [json.loads(item) if isinstance(item, str) else item for item in value] if value else []
    except (ValueError, TypeError, RecursionError):
        listed = [None]
    if not all(isinstance(item, Mapping) for item in listed):
        raise errors.DataError(
            "'tools' must be a list of objects that describe functions, or a JSON string of one; change it, or rename "
            "the field if it contains something else"
        )
    _require_valid(listed, "tools")
    return tuple(listed)
