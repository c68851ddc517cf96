"""Records of Argilla, in the nested form of ``Dataset.records.to_json`` and in the flat form of its Hub data sets.

The nested form has ``fields``, ``metadata`` and ``responses``, an object with a list of ``{"value": ..., "user_id":
...}`` for each question. In the flat form, fields and metadata are fields of the record, and the responses to a
question Q are the lists ``Q.responses``, ``Q.responses.users`` and ``Q.responses.status``. Among the fields, the
answers have names such as ``response_1`` and ``response_2``; the prompt has one of the names in
`rlhf_jax.data.records` or is the only other field.

========================  ========================================================  ================================
question                  value                                                     judgement
========================  ========================================================  ================================
RankingQuestion           names of all answers, best first, or objects with         ranks, or a preference or tie of
                          ``value`` and ``rank``                                    two answers
LabelQuestion             name, number or letter of one of two answers, or "tie"    preference or tie
RatingQuestion            whole number from 1 to 7 about a single answer            rating
========================  ========================================================  ================================

Drafts and discarded responses are counted and not kept, and so are responses to other questions.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax import atomic
from rlhf_jax.data import dialogues, errors, records
from rlhf_jax.data.stores import annotated, labeling_tools
from rlhf_jax.feedback import judgements, store

_RESPONSES = ".responses"
_ORDER = "rlhf_jax_order"
"""Metadata with the order of the answers, by which the exports of this module are recognised."""


def recognises(fields: Mapping[str, Any]) -> bool:
    """Returns whether a record has one of the two forms."""
    flat = "_server_id" in fields or any(name.endswith(_RESPONSES) for name in fields)
    return flat or isinstance(fields.get("fields"), Mapping)


def parse(fields: Mapping[str, Any], *, location: str = "", question: str | None = None) -> annotated.Annotated:
    """Parses a record; see the module for its forms, and `rlhf_jax.data.records` for the errors.

    Args:
        fields: The record.
        location: Place in the source.
        question: The question whose responses are judgements; None if only one compares or rates the answers.

    Returns:
        The record.

    Raises:
        DataError: The record has another form, or several questions compare the answers.
    """
    if not recognises(fields):
        raise errors.DataError("the record has no object 'fields'; it is no record of Argilla")
    shown, responses = _nested(fields) if isinstance(fields.get("fields"), Mapping) else _flat(fields)
    metadata = dict(shown.pop("metadata", None) or {})
    order = metadata.pop(_ORDER, shown.pop(_ORDER, None))
    names = labeling_tools.answer_names(shown)
    completions, rest = labeling_tools.split_answers(shown, names)
    prompt = records.parse_prompt(rest | {"metadata": metadata}, location=location)
    said, notes = _said(responses, names, question)
    if order is None:
        return annotated.Annotated(**vars(prompt), completions=completions, said=said, notes=notes)
    found = annotated.Annotated(
        **vars(prompt), completions=completions, said=said, notes=notes, item=str(fields.get("id"))
    )
    return labeling_tools.in_item_order(found, [int(each) for each in re.findall(r"\d+", str(order))])


def _nested(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Returns the fields with the metadata, and the responses to each question."""
    shown = {name: value for name, value in fields["fields"].items() if value is not None}
    responses = fields.get("responses") or {}
    metadata = fields.get("metadata") or {}
    if not isinstance(responses, Mapping) or not all(isinstance(each, list) for each in responses.values()):
        raise errors.DataError("'responses' must be an object with a list for each question")
    if not isinstance(metadata, Mapping):
        raise errors.DataError(f"'metadata' has type {type(metadata).__name__}; it must be an object")
    return shown | {"metadata": metadata}, dict(responses)


def _flat(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Returns the fields and the responses as `_nested` does."""
    shown = {
        name: value
        for name, value in fields.items()
        if value is not None
        and name not in ("id", "_server_id")
        and _RESPONSES not in name
        and ".suggestion" not in name
    }
    responses: dict[str, list[Any]] = {}
    for name in (each for each in fields if each.endswith(_RESPONSES)):
        values = fields[name] or []
        users, statuses = (fields.get(f"{name}.{each}") or [None] * len(values) for each in ("users", "status"))
        if not all(isinstance(each, list) and len(each) == len(values) for each in (values, users, statuses)):
            raise errors.DataError(f"the lists of {name!r}, its users and its status differ in length")
        responses[name.removesuffix(_RESPONSES)] = [
            {"value": value, "user_id": user, "status": status}
            for value, user, status in zip(values, users, statuses)
            if value is not None
        ]
    return shown, responses


def _said(
    responses: Mapping[str, list[Any]], names: Sequence[str], question: str | None
) -> tuple[tuple[annotated.Said, ...], tuple[str, ...]]:
    """Returns the judgements, and the reasons why other responses are not kept."""
    found: dict[str, list[annotated.Said]] = {}
    notes = []
    for name, listed in responses.items():
        for each in listed:
            if not isinstance(each, Mapping) or "value" not in each:
                raise errors.DataError(f"the responses to {name!r} must be objects with a 'value'")
            if (status := each.get("status")) in ("draft", "discarded"):
                notes.append(f"{status} response not kept")
            elif question in (None, name) and (judgement := _judgement(each["value"], names)) is not None:
                user = each.get("user_id")
                found.setdefault(name, []).append(annotated.Said(judgement, None if user is None else str(user)))
            else:
                notes.append(f"response to {name!r} not kept")
    if len(found) > 1:
        listed = ", ".join(map(repr, found))
        raise errors.DataError(f"several questions compare or rate the answers ({listed}); choose one of them")
    return tuple(next(iter(found.values()), ())), tuple(notes)


def _judgement(value: Any, names: Sequence[str]) -> judgements.Judgement | None:
    """Returns the judgement of a response, or None if it is about something else."""
    if isinstance(value, str):
        return labeling_tools.named_judgement(value, names)
    if isinstance(value, int) and not isinstance(value, bool) and len(names) == 1:
        return labeling_tools.rating(value)
    if not isinstance(value, list) or len(names) < 2 or len(value) != len(names):
        return None
    entries = [each if isinstance(each, Mapping) else {"value": each} for each in value]
    places = [labeling_tools.named_place(str(each.get("value")), names) for each in entries]
    if None in places or len(set(places)) < len(places):
        return None
    ranks = [each.get("rank") for each in entries]
    given = all(type(rank) is int and rank >= 1 for rank in ranks)
    return labeling_tools.ranked(places, ranks if given else None)  # type: ignore[arg-type]


def export(opened: store.Store, path: str | os.PathLike[str], *, set_name: str | None = None) -> Counter[str]:
    """Writes the items of a set, or of all sets, as a JSON array of records, with the latest judgement of each labeler.

    The fields are ``prompt``, a text or, if a prompt has several turns, a chat in all records, and ``response_1`` and
    so on, in an order that is drawn for each item. The questions are ``preference`` for pairs (a label: "response_1",
    "response_2" or "tie"), ``ranking`` and ``rating``. The names of policies are left out, so that labelers cannot see
    them. A strength becomes a preference; comments, flags and times are left out. The responses have the names of
    labelers in place of the identifiers of Argilla's users.

    Returns:
        The number of items and judgements that are skipped, by reason.

    Raises:
        StoreError: There is no item to export.
    """
    skipped: Counter[str] = Counter()
    rows = labeling_tools.exported(opened, set_name, skipped)
    kept = [row for row in rows if _has_only_texts(row.item)]
    if len(kept) < len(rows):
        skipped["item with tools, or a message with more than a text, skipped"] += len(rows) - len(kept)
    if not kept:
        raise store.StoreError(f"{opened.path} has no item that Argilla can hold")
    chat = not all(_is_text(row.item.prompt.messages) for row in kept)
    lines = [_record(row, chat, skipped) for row in kept]
    atomic.replace_file(path, (json.dumps(lines, ensure_ascii=False, indent=1) + "\n").encode())
    return skipped


def _has_only_texts(item: judgements.Item) -> bool:
    messages = all(
        each.keys() == {"role", "content"} and isinstance(each["content"], str) for each in item.prompt.messages
    )
    return messages and not item.prompt.tools and not any(each.extra for each in item.completions)


def _is_text(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Returns whether a prompt is read as it was if it is written as one text."""
    first = messages[0]
    return len(messages) == 1 and first["role"] == dialogues.USER and not dialogues.is_dialogue(first["content"])


def _record(row: labeling_tools.Exported, chat: bool, skipped: Counter[str]) -> dict[str, Any]:
    item = row.item
    messages = list(item.prompt.messages)
    metadata = {name: value for name in ("domain", "category") if (value := getattr(item.prompt, name))}
    question = {judgements.PAIR: "preference", judgements.RANKING: "ranking", judgements.LIKERT: "rating"}[item.kind]
    order = " ".join(map(str, row.order))
    responses = [
        {"value": _value(each.judgement), "user_id": each.labeler, "status": "submitted"}
        for each in row.said
        if labeling_tools.is_writable(each.judgement, skipped)
    ]
    return {
        "id": row.id,
        "fields": {"prompt": messages if chat else messages[0]["content"]}
        | {f"response_{n}": each.text for n, each in enumerate(item.completions, 1)},
        "metadata": {**item.metadata, **metadata, _ORDER: order},
        "suggestions": {},
        "responses": {question: responses} if responses else {},
        "vectors": {},
    }


def _value(judgement: judgements.Judgement) -> Any:
    if judgement.rating is not None:
        return judgement.rating
    if judgement.ranks is not None:
        return [f"response_{i + 1}" for i in labeling_tools.best_first(judgement.ranks)]
    return {1.0: "response_1", 0.5: "tie", 0.0: "response_2"}[judgement.vote]
