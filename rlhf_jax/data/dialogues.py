r"""Reader of whole-dialogue comparisons, the form of Anthropic's hh-rlhf files (Bai et al. 2022).

A file holds one JSON object a line (JSONL; compressed where the name ends in ``.gz``) with ``chosen`` and
``rejected``: two dialogues ``"\n\nHuman: ...\n\nAssistant: ..."`` that share everything but the last answer. A dialogue
is split at its LAST assistant turn: all before is the prompt, however many assistant turns it holds.

Only a name that opens a paragraph starts a turn; ``Human:`` inside a paragraph is text. White space around a turn
belongs to the format, not to the text, and is removed; so is the carriage return of a line end ``"\r\n"``.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.data import errors, files

USER = "user"
ASSISTANT = "assistant"

_ROLES = {"Human": USER, "Assistant": ASSISTANT}
_NAMES = {role: name for name, role in _ROLES.items()}
_TURN_START = re.compile(r"\n\n(Human|Assistant):")
_START = re.compile(r"\s*\n\nHuman:")


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of a dialogue: ``role`` is ``"user"``, ``"assistant"`` or, in front, ``"system"``.

    The hh-rlhf form leaves no white space around ``text``; other forms give it as written.
    """

    role: str
    text: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt, the first preferred, and the line of the file (from 1) that they came from."""

    prompt: tuple[Turn, ...]
    chosen: str
    rejected: str
    line: int


def is_dialogue(text: str) -> bool:
    """Whether a text is of the hh-rlhf form, as far as its start tells."""
    return _START.match(text.replace("\r\n", "\n")) is not None


def parse_dialogue(text: str) -> tuple[Turn, ...]:
    """The turns of one dialogue, in order; two turns of one role may follow each other, as they do in the real files.

    Raises:
      DataError: there is text before the first human turn, or no assistant turn at all.
    """
    before, *rest = _TURN_START.split(text.replace("\r\n", "\n"))
    turns = tuple(Turn(_ROLES[name], body.strip()) for name, body in zip(rest[::2], rest[1::2]))
    if before.strip() or not turns or turns[0].role != USER:
        raise errors.DataError("the dialogue does not start with a human turn")
    if all(turn.role != ASSISTANT for turn in turns):
        raise errors.DataError("the dialogue has no assistant turn")
    return turns


def format_dialogue(turns: Sequence[Turn]) -> str:
    """The inverse of `parse_dialogue`: turns as one text of the hh-rlhf form."""
    return "".join(f"\n\n{_NAMES[turn.role]}: {turn.text}" for turn in turns)


def split_answer(turns: Sequence[Turn]) -> tuple[tuple[Turn, ...], str]:
    """Split a dialogue at its last assistant turn into ``(prompt, answer)``.

    Raises:
      DataError: the dialogue does not end in an assistant turn.
    """
    if not turns or turns[-1].role != ASSISTANT:
        raise errors.DataError("the dialogue does not end in an assistant turn")
    return tuple(turns[:-1]), turns[-1].text


def read_comparisons(
    path: str | os.PathLike[str], *, counts: errors.DropCount | None = None
) -> tuple[list[Comparison], errors.DropCount]:
    """Read a file of comparisons, and count the records left out.

    Left out and counted by reason: ``"prompts differ"``, ``"empty answer"`` (either of the two),
    ``"same answer twice"`` (it says nothing), ``"ends in a human turn"``, and the prompts of `unasked`.

    Args:
      path: a JSONL file, compressed with gzip if the name ends in ``.gz``.
      counts: where to count, and how many drops to allow; a fresh ``DropCount()`` with its limit of 1 % by default.

    Returns:
      ``(comparisons, counts)``, the comparisons in the order of the file.

    Raises:
      DataError: the file is missing, a directory, unreadable, damaged or empty; a line is not a JSON object with
        the strings ``chosen`` and ``rejected``; a dialogue has no assistant turn or does not start with a human one;
        too large a share is left out.
    """
    counts = errors.DropCount() if counts is None else counts
    stage = counts.stage()
    comparisons = []
    n = 0
    for n, raw in enumerate(files.lines(path), start=1):
        try:
            record = files.parse_line(raw, fields="chosen and rejected")
            chosen, rejected = (dialogue_field(record, key) for key in ("chosen", "rejected"))
        except errors.DataError as error:
            raise errors.DataError(f"{errors.at(path, n)}: {error}") from None
        reason = flaw(chosen, rejected)
        if reason is not None:
            stage.drop(reason)
            continue
        prompt, answer = split_answer(chosen)
        comparisons.append(Comparison(prompt, answer, split_answer(rejected)[1], n))
    if n == 0:
        raise errors.DataError(f"{os.fspath(path)} is empty")
    counts.add(stage, records=n, source=os.fspath(path))
    return comparisons, counts


def flaw(chosen: tuple[Turn, ...], rejected: tuple[Turn, ...]) -> str | None:
    """Why a pair of dialogues is no comparison, or None when it is one."""
    if chosen[-1].role != ASSISTANT or rejected[-1].role != ASSISTANT:
        return "ends in a human turn"
    if chosen[:-1] != rejected[:-1]:
        return "prompts differ"
    if (reason := unasked(chosen[:-1])) is not None:
        return reason
    if not chosen[-1].text or not rejected[-1].text:
        return "empty answer"
    if chosen[-1].text == rejected[-1].text:
        return "same answer twice"
    return None


def unasked(prompt: Sequence[Turn]) -> str | None:
    """Why turns are no prompt, or None when they are one: the last must say something and not be the assistant's."""
    if all(turn.role == "system" or not turn.text.strip() for turn in prompt):
        return "empty prompt"
    if prompt[-1].role == ASSISTANT:
        return "prompt ends in an assistant turn"
    return "empty prompt" if prompt[-1].role == "system" or not prompt[-1].text.strip() else None


def dialogue_field(record: Mapping[str, Any], key: str) -> tuple[Turn, ...]:
    """The dialogue that a field of a record holds.

    Raises:
      DataError: there is none; see `parse_dialogue`.
    """
    if key not in record:
        raise errors.DataError(f"the record has no {key!r}")
    text = files.text(record[key], key)
    try:
        return parse_dialogue(text)
    except errors.DataError as error:
        raise errors.DataError(f"in {key!r}, {error}") from None
