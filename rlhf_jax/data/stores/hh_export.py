"""Export of a comparison store in the text form of hh-rlhf, whose conventions `rlhf_jax.data.dialogues` describes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rlhf_jax.data import conversations, dialogues, errors
from rlhf_jax.feedback import store, store_export

CHANGED = "pair with white space around a text removed, or with line ends changed"
"""Reason under which pairs are counted that the form cannot hold exactly as they are."""


def export(opened: store.Store, path: str | os.PathLike[str], *, set_name: str | None = None) -> Counter[str]:
    r"""Writes comparisons as JSON lines with ``chosen`` and ``rejected``, each a whole dialogue as one text.

    A ranking becomes a line for each two completions of different ranks, and labels are hard. A pair is skipped if it
    has tools, or a turn that has more than a text or is neither the user's nor the assistant's, or a text that has a
    paragraph which begins like a turn, such as ``"\n\nHuman:"``. White space around texts is removed, and ``"\r\n"``
    becomes ``"\n"``; such pairs are counted as `CHANGED`.

    Returns:
        The number of items that are skipped, and of pairs that are skipped or changed, by reason.

    Raises:
        StoreError: There is no comparison that the form can hold.
    """
    found = store_export.rows(opened, set_name)
    lines, counts = [], Counter[str]()
    for row in found:
        for chosen, rejected in store_export.answer_pairs(row.fields) if row.skipped is None else ():
            line = _line(row.fields, (chosen, rejected), counts)
            lines += [] if line is None else [line]
    if not lines and counts:
        raise store.StoreError(f"{opened.path} has no comparison for this form ({_reasons(counts)})")
    return store_export.write_records(opened, path, found, lines) + counts


def _reasons(counts: Counter[str]) -> str:
    return ", ".join(f"{reason}: {n}" for reason, n in sorted(counts.items()))


def _line(fields: dict[str, Any], answers: tuple[Any, Any], counts: Counter[str]) -> dict[str, str] | None:
    """Returns a pair as a line, or counts why that is impossible and returns None."""
    try:
        prompt = conversations.turns(fields["prompt"], "prompt")
        sides = [
            (*prompt, dialogues.answer_turn(conversations.answer(answer, name)))
            for name, answer in zip(("chosen", "rejected"), answers)
        ]
    except (errors.DataError, errors.UnusableRecord) as error:
        counts[f"pair skipped: {error}"] += 1
        return None
    plain = [[dialogues.Turn(turn.role, turn.text.replace("\r\n", "\n").strip()) for turn in side] for side in sides]
    if (reason := _reason(fields, sides, plain)) is not None:
        counts[f"pair skipped: {reason}"] += 1
        return None
    if any(turn.text != written.text for side, other in zip(sides, plain) for turn, written in zip(side, other)):
        counts[CHANGED] += 1
    chosen, rejected = map(dialogues.format_dialogue, plain)
    return {"chosen": chosen, "rejected": rejected}


def _reason(
    fields: dict[str, Any], sides: Sequence[Sequence[dialogues.Turn]], plain: Sequence[Sequence[dialogues.Turn]]
) -> str | None:
    if "tools" in fields or any(turn.extra for side in sides for turn in side):
        return "tools, or a turn with more than a text"
    if any(turn.role not in (dialogues.USER, dialogues.ASSISTANT) for side in sides for turn in side):
        return "turn of another role than user and assistant"
    chosen, rejected = (tuple(side) for side in plain)
    if any(_parsed(side) != side for side in (chosen, rejected)):
        return "text with a paragraph that begins like a turn, or first turn not the user's"
    return dialogues.drop_reason(chosen, rejected)


def _parsed(turns: Sequence[dialogues.Turn]) -> tuple[dialogues.Turn, ...] | None:
    try:
        return dialogues.parse_dialogue(dialogues.format_dialogue(turns))
    except errors.DataError:
        return None
