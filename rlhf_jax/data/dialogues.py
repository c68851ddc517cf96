r"""Dialogues as lists of turns, and the text form of Anthropic's hh-rlhf data (Bai et al. 2022).

In that form, a dialogue is one string, ``"\n\nHuman: ...\n\nAssistant: ..."``. A record contains two dialogues,
``chosen`` and ``rejected``, which differ only in the last answer. A dialogue is split at its LAST assistant turn: the
prompt is everything before this turn, including earlier assistant turns.

``Human:`` and ``Assistant:`` start a turn only at the start of a paragraph; elsewhere, they are text. White space
around a turn belongs to the format and is removed. The line end ``"\r\n"`` is read as ``"\n"``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

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


def split_answer(turns: Sequence[Turn]) -> tuple[tuple[Turn, ...], str]:
    """Splits a dialogue that ends in an assistant turn into ``(prompt, answer)``.

    Raises:
        DataError: If the dialogue does not end in an assistant turn.
    """
    if not turns or turns[-1].role != ASSISTANT:
        raise errors.DataError("the dialogue does not end in an assistant turn")
    return tuple(turns[:-1]), turns[-1].text


def drop_reason(chosen: tuple[Turn, ...], rejected: tuple[Turn, ...]) -> str | None:
    """Returns the reason why a pair of dialogues is not a usable comparison, or None if it is usable."""
    if chosen[-1].role != ASSISTANT or rejected[-1].role != ASSISTANT:
        return "ends in a human turn"
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

    The last turn must have text, and must be neither an assistant turn nor a system turn.
    """
    if all(turn.role == "system" or not turn.text.strip() for turn in prompt):
        return "empty prompt"
    if prompt[-1].role == ASSISTANT:
        return "prompt ends in an assistant turn"
    return "empty prompt" if prompt[-1].role == "system" or not prompt[-1].text.strip() else None
