r"""Dialogues as lists of turns, and the text form of Anthropic's hh-rlhf data (Bai et al. 2022).

In that form, a dialogue is one string, ``"\n\nHuman: ...\n\nAssistant: ..."``. A record contains two dialogues,
``chosen`` and ``rejected``, which differ only in the last answer. A dialogue is split at its LAST assistant turn: the
prompt is everything before this turn, including earlier assistant turns.

``Human:`` and ``Assistant:`` start a turn only at the start of a paragraph; elsewhere, they are text. White space
around a turn belongs to the format and is removed. The line end ``"\r\n"`` is read as ``"\n"``.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.data import errors

USER = "user"
ASSISTANT = "assistant"

_ROLES = {"Human": USER, "Assistant": ASSISTANT}
_NAMES = {role: name for name, role in _ROLES.items()}
_TURN_START = re.compile(r"\n\n(Human|Assistant):")
_DIALOGUE_START = re.compile(r"\s*\n\nHuman:")


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of a dialogue.

    ``role`` is ``"user"``, ``"assistant"`` or another role that the chat template supports, such as ``"system"``. In
    the hh-rlhf form, ``text`` has no white space around it; in other forms, it is kept as written.
    """

    role: str
    text: str
    """The content; empty if the turn consists of tool calls alone."""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    """The other keys of the message, such as ``tool_calls``, ``tool_call_id``, ``name`` or ``reasoning_content``."""


Answer = str | Turn
"""An answer: its text, or the assistant's turn if that has more than a text, such as tool calls."""

_CALLS = ("tool_calls", "function_call")


def answer_turn(answer: Answer) -> Turn:
    """Returns an answer as a turn of the assistant.

    >>> from rlhf_jax.data import dialogues
    >>> dialogues.answer_turn("Yes.").role
    'assistant'
    """
    return Turn(ASSISTANT, answer) if isinstance(answer, str) else answer


def answer_text(answer: Answer) -> str:
    """Returns an answer as one text, for display and measurement: its text, and its tool calls as JSON."""
    if isinstance(answer, str):
        return answer
    calls = [json.dumps(answer.extra[key], ensure_ascii=False) for key in _CALLS if answer.extra.get(key)]
    return "\n".join([answer.text, *calls] if answer.text else calls)


def is_blank(turn: Turn) -> bool:
    """Returns whether a turn has neither a text other than white space nor a tool call."""
    return not turn.text.strip() and not any(turn.extra.get(key) for key in _CALLS)


def answer_key(answer: Answer) -> tuple[str, str]:
    """Returns what two answers must have in common to be the same answer; white space around texts is ignored."""
    turn = answer_turn(answer)
    return turn.text.strip(), json.dumps(turn.extra, sort_keys=True, default=repr) if turn.extra else ""


def is_dialogue(text: str) -> bool:
    """Returns whether a text starts like a dialogue in the hh-rlhf form."""
    return _DIALOGUE_START.match(text.replace("\r\n", "\n")) is not None


def parse_dialogue(text: str) -> tuple[Turn, ...]:
    r"""Parses a dialogue in the hh-rlhf form. Consecutive turns of the same role are allowed.

    >>> from rlhf_jax.data import dialogues
    >>> turns = dialogues.parse_dialogue("\n\nHuman: Hi!\n\nAssistant: Hello.")
    >>> [(turn.role, turn.text) for turn in turns]
    [('user', 'Hi!'), ('assistant', 'Hello.')]

    Raises:
        DataError: If there is text before the first human turn, or no assistant turn.
    """
    preamble, *rest = _TURN_START.split(text.replace("\r\n", "\n"))
    turns = tuple(Turn(_ROLES[name], body.strip()) for name, body in zip(rest[::2], rest[1::2]))
    if preamble.strip() or not turns or turns[0].role != USER:
        raise errors.DataError("the dialogue does not start with a human turn")
    if all(turn.role != ASSISTANT for turn in turns):
        raise errors.DataError("the dialogue has no assistant turn")
    return turns


def format_dialogue(turns: Sequence[Turn]) -> str:
    """Returns user and assistant turns as one text in the hh-rlhf form, which `parse_dialogue` converts back."""
    return "".join(f"\n\n{_NAMES[turn.role]}: {turn.text}" for turn in turns)


def split_answer(turns: Sequence[Turn]) -> tuple[tuple[Turn, ...], Answer]:
    """Splits a dialogue that ends in an assistant turn into ``(prompt, answer)``.

    The answer is a text, or the turn itself if it has other keys than its role and its text.

    Raises:
        DataError: If the dialogue does not end in an assistant turn.
    """
    if not turns or turns[-1].role != ASSISTANT:
        raise errors.DataError("the dialogue does not end in an assistant turn")
    return tuple(turns[:-1]), turns[-1] if turns[-1].extra else turns[-1].text


def drop_reason(chosen: tuple[Turn, ...], rejected: tuple[Turn, ...]) -> str | None:
    """Returns the reason why a pair of dialogues is not a usable comparison, or None if it is usable."""
    if chosen[-1].role != ASSISTANT or rejected[-1].role != ASSISTANT:
        return "does not end in an assistant turn"
    if chosen[:-1] != rejected[:-1]:
        return "prompts differ"
    if (reason := prompt_drop_reason(chosen[:-1])) is not None:
        return reason
    if not chosen[-1].text or not rejected[-1].text:
        return "empty answer"
    if chosen[-1].text == rejected[-1].text:
        return "same answer twice"
    return None


def prompt_drop_reason(prompt: Sequence[Turn]) -> str | None:
    """Returns the reason why turns are not a usable prompt, or None if they are usable.

    The last turn must have text, unless it is the result of a tool, and must be neither an assistant turn nor a system
    turn.
    """
    if all(turn.role == "system" or is_blank(turn) for turn in prompt):
        return "empty prompt"
    if prompt[-1].role == ASSISTANT:
        return "prompt ends in an assistant turn"
    empty = prompt[-1].role == "system" or (prompt[-1].role != "tool" and is_blank(prompt[-1]))
    return "empty prompt" if empty else None
