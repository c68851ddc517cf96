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

PROMPTS = ("prompt", "instruction", "question", "query")
"""Names of a prompt; the first that a record has is used."""
CONVERSATIONS = ("messages", "conversations", "conversation")
"""Names of a message list; the first that a record has is used."""

_MEANT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
_SHARE_GPT = {"human": dialogues.USER, "user": dialogues.USER} | dict.fromkeys(
    ("gpt", "assistant", "chatgpt", "model"), dialogues.ASSISTANT
)
_SHARE_GPT |= {"system": "system"} | dict.fromkeys(("tool", "function", "function_response", "observation"), "tool")
_TEXT_PARTS = ("text", "input_text", "output_text")


def first(fields: Mapping[str, Any], *names: str) -> str | None:
    """Returns the first of ``names`` that a record has, or None."""
    return next((name for name in names if name in fields), None)


def prompt(fields: Mapping[str, Any]) -> Turns:
    """Returns the whole prompt of a record: its question, after its history and its system text."""
    key = first(fields, *PROMPTS, *CONVERSATIONS)
    if key is None:
        raise errors.MissingFieldError("prompt")
    for name in ("input", "context"):
        if fields.get(name):
            raise errors.DataError(
                f"the record has {name!r} beside {key!r}: join both texts in {key!r}, as the model is to read them, or "
                f"rename {name!r} if the model is not to read it"
            )
    asked = question(fields, key)
    if fields.get("history"):
        if len(asked) - _n_system(asked) != 1:
            raise errors.DataError(f"the record has 'history', but {key!r} is a conversation too; keep one of them")
        asked = (*asked[:-1], *_history(fields["history"]), asked[-1])
    return usable_prompt(with_system(fields, asked))


def question(fields: Mapping[str, Any], key: str = "prompt") -> Turns:
    """Returns the turns of the field ``key`` alone."""
    value = fields[key]
    if isinstance(value, list | Mapping):
        return turns(value, key)
    if not dialogues.is_dialogue(sources.require_text(value, key)):
        return (dialogues.Turn(dialogues.USER, value),)
    parsed = dialogues.parse_dialogue(value + "\n\nAssistant:")[:-1]
    # A last turn without text means that the text already ended with "Assistant:".
    return parsed[:-1] if parsed[-1] == dialogues.Turn(dialogues.ASSISTANT, "") else parsed


def with_system(fields: Mapping[str, Any], turns: Turns) -> Turns:
    """Returns turns after a system turn with the text of the field ``system`` or ``system_prompt``, if there is one."""
    for key in ("system", "system_prompt"):
        if not (value := fields.get(key)) or not sources.require_text(value, key).strip():
            continue
        if not _n_system(turns):
            turns = (dialogues.Turn("system", value), *turns)
        elif turns[0].text.strip() != value.strip():
            raise errors.UnusableRecord("system texts differ")
    return turns


def _n_system(turns: Turns) -> int:
    return int(bool(turns) and turns[0].role == "system")


def _history(value: Any) -> Turns:
    """Parses earlier turns: a list of ``[question, answer]`` pairs or of messages."""
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        return turns(value, "history")
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise errors.DataError(
            "'history' must be a list of [question, answer] pairs or of messages; convert it, or rename the field if "
            "the model is not to read it"
        )
    return tuple(
        dialogues.Turn(role, sources.require_text(text, f"item {n} of history"))
        for n, pair in enumerate(value, start=1)
        for role, text in zip((dialogues.USER, dialogues.ASSISTANT), pair)
    )


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
        raise errors.DataError(
            f"{key!r} contains {len(before) + 1} messages; it must contain only the answer, and the prompt all "
            "messages before it"
        )
    return last


def split_answer(turns: Turns) -> tuple[Turns, dialogues.Answer]:
    """Splits a conversation into its prompt and its answer; raises UnusableRecord if it does not end in an answer."""
    if not turns:
        raise errors.UnusableRecord("empty answer")
    last = turns[-1]
    if last.role != dialogues.ASSISTANT:
        raise errors.UnusableRecord("does not end in an assistant turn")
    if "weight" in last.extra:
        if last.extra["weight"] == 0:
            raise errors.UnusableRecord("the weight of the answer is 0")
        extra = {name: value for name, value in last.extra.items() if name != "weight"}
        turns = (*turns[:-1], dialogues.Turn(last.role, last.text, extra))
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
    names = [name for name in ("role", "content", "from", "value") if isinstance(value, Mapping) and name in value]
    if len(names) >= 2 and all(isinstance(value[name], list) for name in names[:2]):
        value = _rows(value, key, *names[:2])
    elif isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        form = "a list of messages" if key in CONVERSATIONS else "a string or a list of messages"
        raise errors.DataError(f"{key!r} has type {type(value).__name__}; it must be {form}")
    return tuple(_turn(message, f"message {n} of {key!r}") for n, message in enumerate(value, start=1))


def _rows(columns: Mapping[str, Any], key: str, role: str, content: str) -> list[dict[str, Any]]:
    """Returns the messages of one object with a list for each field, the form in which TFDS and Hugging Face store."""
    n, other = len(columns[role]), len(columns[content])
    if n != other:
        raise errors.DataError(f"{key!r} has {n} roles and {other} contents; the numbers must be equal")
    lists = {name: column for name, column in columns.items() if isinstance(column, list) and len(column) == n}
    return [{name: column[i] for name, column in lists.items()} for i in range(n)]


def _turn(message: Any, where: str) -> dialogues.Turn:
    if not isinstance(message, Mapping):
        raise errors.DataError(
            f"{where} has type {type(message).__name__}; it must be an object with a role and a content"
        )
    share_gpt = "role" not in message and "from" in message
    role_key, content_key = ("from", "value") if share_gpt else ("role", "content")
    extra = {
        name: value for name, value in message.items() if name not in (role_key, content_key) and value is not None
    }
    calls = not dialogues.is_blank(dialogues.Turn("", "", extra))
    for name in (role_key,) if calls else (role_key, content_key):
        if name not in message:
            raise errors.DataError(f"{where} has no {name!r}")
    plain = where.replace("'", "")
    for name, value in extra.items():
        _require_valid(value, f"{name} of {plain}")
    if extra.get("weight", 1) not in (0, 1):
        raise errors.DataError(f"the weight of {plain} is {extra['weight']!r}; it must be 0 or 1")
    role = sources.require_text(message[role_key], f"{role_key} of {plain}")
    content = message.get(content_key)
    if content is None and not calls:
        raise errors.UnusableRecord("content is null")
    text = "" if content is None else _text(content, f"{content_key} of {plain}")
    if not share_gpt:
        return dialogues.Turn(role, text, extra)
    if role == "function_call":
        return dialogues.Turn(dialogues.ASSISTANT, "", {**extra, "tool_calls": _calls(text, where)})
    if role not in _SHARE_GPT:
        raise errors.DataError(f"{where} is from {role!r}; it must be from one of {', '.join(_SHARE_GPT)}")
    return dialogues.Turn(_SHARE_GPT[role], text, extra)


def _calls(text: str, where: str) -> list[dict[str, Any]]:
    """Converts a function call in the ShareGPT form, an object or a list of them as JSON, to tool calls."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise errors.DataError(f"{where} is a function_call, but not an object with a name, as JSON")
    return [{"type": "function", "function": call} for call in calls]


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


# --------------------------------------------------------------------------------------------------- media and tools


def refuse_media(fields: Mapping[str, Any]) -> None:
    """Raises UnusableRecord if a record contains images, sounds or videos."""
    for name in ("image", "images", "audio", "audios", "video", "videos"):
        if isinstance(fields.get(name), list | Mapping | bytes) and fields[name]:
            raise errors.UnusableRecord(f"{name} beside the prompt")


def tools(fields: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Returns the objects in the field ``tools``, which is a list of objects, or JSON that contains one."""
    value = fields.get("tools")
    try:
        value = json.loads(value) if isinstance(value, str) and value.strip() else value
        listed: Any = [json.loads(item) if isinstance(item, str) else item for item in value] if value else []
    except (ValueError, TypeError, RecursionError):
        listed = None
    if listed is None or not all(isinstance(item, Mapping) for item in listed):
        raise errors.DataError(
            "'tools' must be a list of objects that describe functions, or a JSON string of one; change it, or rename "
            "the field if it contains something else"
        )
    _require_valid(listed, "tools")
    return tuple(listed)
