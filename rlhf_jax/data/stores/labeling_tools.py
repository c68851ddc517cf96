"""What the forms of labelling tools have in common: names of answers, judgements, and the items that are exported."""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_jax.data import conversations, errors
from rlhf_jax.data.stores import annotated
from rlhf_jax.feedback import judgements, store

_ANSWERS = "answer|completion|option|output|reply|response|summary|text"
_ANSWER = re.compile(rf"(?:{_ANSWERS})[ _-]?([1-9a-i]|left|right)?", re.IGNORECASE)
_TIES = ("tie", "equal")


def answer_names(fields: Mapping[str, Any]) -> list[str]:
    """Returns the names of the fields that hold answers, such as ``answer1`` and ``response_2``, in their order."""
    found = [((match[1] or "").lower(), name) for name in fields if (match := _ANSWER.fullmatch(name))]
    numbered = [name for number, name in sorted(found) if number]
    return numbered or sorted((name for _, name in found), key=lambda name: name.lower() == "text")[:1]


def split_answers(
    fields: Mapping[str, Any], names: Sequence[str]
) -> tuple[tuple[judgements.Completion, ...], dict[str, Any]]:
    """Returns the completions in the fields ``names``, and the other fields, the only one of which is the prompt.

    Raises:
        DataError: There are no names.
        UnusableRecord: An answer is empty, or two are equal.
    """
    if not names:
        listed = ", ".join(map(repr, fields)) or "none"
        raise errors.DataError(f"the record has no answers, such as 'answer1' and 'answer2'; its fields are {listed}")
    answers = [conversations.answer(fields[name], name) for name in names]
    rest = {name: value for name, value in fields.items() if name not in names}
    named = conversations.first(rest, *conversations.PROMPTS, *conversations.CONVERSATIONS)
    if named is None and len(rest) == 1:
        rest = dict(zip(["prompt"], rest.values()))
    completions = tuple(annotated.completion(answer) for answer in answers)
    if any(each in completions[:i] for i, each in enumerate(completions)):
        raise errors.UnusableRecord("same answer twice")
    return completions, rest


def named_judgement(value: str, names: Sequence[str]) -> judgements.Judgement | None:
    """Returns the judgement that prefers the answer of a pair that a label names, such as "answer1", "1", "A" or "tie".

    None is returned for a label that names neither.

    >>> from rlhf_jax.data.stores import labeling_tools
    >>> labeling_tools.named_judgement("Response 2", ["response_1", "response_2"]).preference
    0.0
    """
    if len(names) != 2:
        return None
    if value.strip().lower() in _TIES:
        return judgements.Judgement(tie=True)
    place = named_place(value, names)
    return None if place is None else judgements.Judgement(preference=1.0 - place)


def named_place(value: str, names: Sequence[str]) -> int | None:
    """Returns the index of the answer that a label names, by its name, number or letter; None for no answer."""
    plain = [_plain(name) for name in names]
    if (label := _plain(value)) in plain:
        return plain.index(label)
    ends = [match[1].lower() if (match := _ANSWER.fullmatch(name)) and match[1] else "" for name in names]
    if label in ends:
        return ends.index(label)
    numbers = [each.find(label) for each in ("123456789", "abcdefghi") if len(label) == 1 and label in each]
    return next((i for i in numbers if i < len(names)), None)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


class Exported(NamedTuple):
    """An item with the latest judgement of each labeler, both in the order in which the completions are shown."""

    id: str
    set_name: str
    item: judgements.Item
    said: list[store.Recorded]
    order: tuple[int, ...]
    """The index in the store's item of the completion at each place."""


def exported(opened: store.Store, set_name: str | None, skipped: Counter[str]) -> list[Exported]:
    """Returns the items of a set, or of all sets, without gold questions and hidden duplicates, which are counted.

    The order of the completions is drawn for each item, so that it does not tell who wrote them or which is preferred,
    as the order of imported pairs does.
    """
    with opened.transaction():
        sets = {each: opened.items(each) for each in ([set_name] if set_name is not None else opened.sets())}
        latest = opened.latest(set_name)
    said: dict[str, list[store.Recorded]] = {}
    for each in latest:
        said.setdefault(each.item, []).append(each)
    found = []
    for name, items in sets.items():
        for id, item in items.items():
            if item.expected is not None:
                skipped["gold question skipped"] += 1
            elif item.duplicate_of is not None:
                skipped["hidden duplicate skipped"] += 1
            else:
                found.append(_shown(id, name, item, said.get(id, [])))
    if not found:
        raise store.StoreError(f"{opened.path} has no item to export")
    return found


def _shown(id: str, set_name: str, item: judgements.Item, said: Sequence[store.Recorded]) -> Exported:
    order = judgements.shown_order(int(id, 16), len(item.completions))
    back = [order.index(i) for i in range(len(order))]
    changed = dataclasses.replace(item, completions=[item.completions[i] for i in order])
    judged = [each._replace(judgement=each.judgement.in_item_order(back)) for each in said]
    return Exported(id, set_name, changed, judged, order)


def in_item_order(record: annotated.Annotated, order: Any) -> annotated.Annotated:
    """Returns an exported record with its completions and judgements in the order of the item; see `Exported`.

    Raises:
        DataError: ``order`` is not an order of the completions.
    """
    n = len(record.completions)
    if not isinstance(order, list) or sorted(map(repr, order)) != sorted(map(repr, range(n))):
        raise errors.DataError(f"'order' is {order!r}; it must have each number from 0 to {n - 1} once")
    completions = tuple(record.completions[order.index(i)] for i in range(n))
    said = tuple(each._replace(judgement=each.judgement.in_item_order(order)) for each in record.said)
    return dataclasses.replace(record, completions=completions, said=said)


def is_writable(judgement: judgements.Judgement, skipped: Counter[str]) -> bool:
    """Returns whether labelling tools can store a judgement, or counts why they cannot."""
    reason = None
    if judgement.unsure:
        reason = "judgement of an unsure labeler not written"
    elif judgement.ranks is not None and len(set(judgement.ranks)) < len(judgement.ranks):
        reason = "ranking with ties not written"
    elif judgement.preference is not None and judgement.preference not in (0.0, 0.5, 1.0):
        reason = "preference other than 0, 0.5 and 1 not written"
    if reason is not None:
        skipped[reason] += 1
    return reason is None


def ranked(order: Sequence[int], ranks: Sequence[int] | None = None) -> judgements.Judgement:
    """Returns the judgement that ranks completions, whose indices are given best first, by default without ties."""
    ranks = range(1, len(order) + 1) if ranks is None else ranks
    of = [rank for _, rank in sorted(zip(order, ranks))]
    if len(of) > 2:
        return judgements.Judgement(ranks=tuple(of))
    return judgements.Judgement(tie=True) if of[0] == of[1] else judgements.Judgement(preference=float(of[0] < of[1]))


def best_first(ranks: Sequence[int]) -> list[int]:
    """Returns the indices of ranked completions, best first."""
    return sorted(range(len(ranks)), key=ranks.__getitem__)


def rating(value: Any) -> judgements.Judgement:
    """Returns the judgement of a rating; raises DataError unless it is a whole number from 1 to 7."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in range(1, 8):
        raise errors.DataError(f"the rating is {value!r}; it must be a whole number from 1 to 7")
    return judgements.Judgement(rating=int(value))


def iso_time(seconds: float) -> str:
    """Returns a time in the form of ISO 8601."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat()


def seconds_of(text: Any) -> float | None:
    """Returns a time in the form of ISO 8601 in seconds since 1970; None if it is no such time."""
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError, OverflowError, OSError):
        return None
