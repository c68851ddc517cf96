"""Tasks of Label Studio, with annotations by its tags Pairwise, Ranker, Rating and Choices.

A task is a JSON object with ``data`` and ``annotations``, as in Label Studio's export format JSON. In ``data``, the
answers have names such as ``answer1`` and ``answer2``, or are the list of objects with ``id``, ``title`` and ``body``
that a Ranker ranks; the prompt has one of the names in `rlhf_jax.data.records` or is the only other field.

==========  ============================================  =====================================================
annotation  value                                         judgement
==========  ============================================  =====================================================
pairwise    ``{"selected": "left"}`` or ``"right"``       preference for the first or the second answer
choices     ``{"choices": ["tie"]}`` or ``["equal"]``     tie; other choices are ignored
ranker      ``{"ranker": [ID, ...]}``, best first         ranks
rating      ``{"rating": 5}``, from 1 to 7                rating of a single answer
==========  ============================================  =====================================================

Annotations that were cancelled or that select nothing are counted and not kept. The labeler is ``completed_by``: an
email address if the export has one, otherwise a number.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax import atomic
from rlhf_jax.data import conversations, dialogues, errors, records
from rlhf_jax.data.stores import annotated, labeling_tools
from rlhf_jax.feedback import judgements, store


def recognises(fields: Mapping[str, Any]) -> bool:
    """Returns whether a record has the form of a task."""
    return isinstance(fields.get("data"), Mapping)


def parse(fields: Mapping[str, Any], *, location: str = "") -> annotated.Annotated:
    """Parses a task; see the module for its form, and `rlhf_jax.data.records` for the errors."""
    if not recognises(fields):
        raise errors.DataError("the record has no object 'data'; it is no task of Label Studio")
    data = {name: value for name, value in fields["data"].items() if value is not None}
    item = whole = order = None
    if isinstance(data.get("item"), str) and "messages" in data:  # an export of this module
        item, whole, order = data.pop("item"), data.pop("completions", None), data.pop("order", None)
        data["prompt"] = data.pop("messages")
        data.pop("set", None)
    names, data = _answers(data)
    completions, rest = labeling_tools.split_answers(data, names)
    if whole is not None:
        completions = _whole(whole, len(names))
    prompt = records.parse_prompt(rest, location=location)
    annotations = fields.get("annotations") or []
    if not isinstance(annotations, list):
        raise errors.DataError(f"'annotations' has type {type(annotations).__name__}; it must be a list")
    said, notes = [], []
    for n, annotation in enumerate(annotations, start=1):
        try:
            found = _said(annotation, names)
        except errors.DataError as error:
            raise errors.DataError(f"annotation {n}: {error}") from None
        (notes if isinstance(found, str) else said).append(found)
    notes, said = tuple(notes), tuple(said)
    found = annotated.Annotated(**vars(prompt), completions=completions, said=said, notes=notes, item=item)
    return found if item is None else labeling_tools.in_item_order(found, order)


def _answers(data: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Returns the names of the answers, and the data with a field for each of them."""
    lists = [
        name
        for name, value in data.items()
        if name not in (*conversations.PROMPTS, *conversations.CONVERSATIONS, "tools")
        and isinstance(value, list)
        and value
        and all(isinstance(each, Mapping) and "id" in each for each in value)
    ]
    if len(lists) != 1:
        return labeling_tools.answer_names(data), dict(data)
    listed = {str(each["id"]): each.get("body", each.get("title")) for each in data[lists[0]]}
    if len(listed) < len(data[lists[0]]) or listed.keys() & data.keys():
        raise errors.DataError(f"the entries of {lists[0]!r} must have different values of 'id'")
    return list(listed), {name: value for name, value in data.items() if name != lists[0]} | listed


def _whole(value: Any, n: int) -> tuple[judgements.Completion, ...]:
    """Returns the completions of an export, with the keys of their messages."""
    if not isinstance(value, list) or len(value) != n or not all(isinstance(each, Mapping) for each in value):
        raise errors.DataError(f"'completions' must be a list of {n} objects, one for each answer")
    turns = conversations.turns([{"role": dialogues.ASSISTANT} | dict(each) for each in value], "completions")
    return tuple(judgements.Completion(turn.text, extra=turn.extra) for turn in turns)


def _said(annotation: Any, names: Sequence[str]) -> annotated.Said | str:
    """Returns the judgement of an annotation, or the reason why it has none."""
    if not isinstance(annotation, Mapping) or not isinstance(annotation.get("result"), list):
        raise errors.DataError("it must be an object with a list 'result'")
    if annotation.get("was_cancelled"):
        return "cancelled annotation not kept"
    found = [judgement for each in annotation["result"] if (judgement := _judgement(each, names)) is not None]
    if not found:
        return "annotation without a comparison not kept"
    if any(each != found[0] for each in found):
        raise errors.DataError("its results contradict each other")
    judgement, seconds = found[0], annotation.get("lead_time")
    if isinstance(seconds, int | float) and 0 <= seconds < math.inf:
        judgement = dataclasses.replace(judgement, seconds=float(seconds))
    time = labeling_tools.seconds_of(annotation.get("created_at"))
    return annotated.Said(judgement, _labeler(annotation.get("completed_by")), time)


def _labeler(value: Any) -> str | None:
    if isinstance(value, Mapping):
        value = value.get("email") or value.get("id")
    return None if value in (None, "") else str(value)


def _judgement(result: Any, names: Sequence[str]) -> judgements.Judgement | None:
    """Returns the judgement of one result, or None if it is about something else."""
    if not isinstance(result, Mapping) or not isinstance(result.get("value"), Mapping):
        raise errors.DataError("its results must be objects with an object 'value'")
    kind, value = result.get("type"), result["value"]
    if kind == "pairwise" and len(names) == 2:
        if (selected := value.get("selected")) not in ("left", "right"):
            raise errors.DataError(f"the selected answer is {selected!r}; it must be 'left' or 'right'")
        return judgements.Judgement(preference=float(selected == "left"))
    if kind == "choices" and len(names) == 2 and isinstance(choices := value.get("choices"), list):
        named = [labeling_tools.named_judgement(each, names) for each in choices if isinstance(each, str)]
        return next((each for each in named if each is not None and each.tie), None)
    if kind == "ranker" and len(names) > 1 and isinstance(order := value.get("ranker"), list):
        order = [str(each) for each in order]
        if sorted(order) != sorted(names):
            raise errors.DataError(f"the ranking {order} does not have each of the answers {list(names)} once")
        return labeling_tools.ranked([names.index(each) for each in order])
    if kind == "rating" and len(names) == 1:
        return labeling_tools.rating(value.get("rating"))
    return None


def export(opened: store.Store, path: str | os.PathLike[str], *, set_name: str | None = None) -> Counter[str]:
    """Writes the items of a set, or of all sets, as tasks, with the latest judgement of each labeler as annotations.

    A task shows ``prompt`` and ``answer1`` (and ``answer2``) or, for a ranking, the list ``answers``, in an order that
    is drawn for each item. The other fields of ``data`` say what `parse` needs to restore the item. The names of
    policies are not among them, so that labelers cannot see them. A strength becomes a preference; comments and flags
    are left out.

    Returns:
        The number of items and judgements that are skipped, by reason.

    Raises:
        StoreError: There is no item to export.
    """
    skipped: Counter[str] = Counter()
    tasks = [
        {"data": _data(row), "annotations": [_annotation(each) for each in row.said if _writable(each, skipped)]}
        for row in labeling_tools.exported(opened, set_name, skipped)
    ]
    atomic.replace_file(path, (json.dumps(tasks, ensure_ascii=False, indent=1) + "\n").encode())
    return skipped


def _writable(recorded: store.Recorded, skipped: Counter[str]) -> bool:
    return labeling_tools.is_writable(recorded.judgement, skipped)


def _data(row: labeling_tools.Exported) -> dict[str, Any]:
    item = row.item
    messages = list(item.prompt.messages)
    shown = [dialogues.answer_text(dialogues.Turn("", each.text, each.extra)) for each in item.completions]
    data: dict[str, Any] = {"prompt": _shown(messages)}
    if item.kind == judgements.RANKING:
        data["answers"] = [
            {"id": f"answer{n}", "title": f"Answer {n}", "body": text} for n, text in enumerate(shown, 1)
        ]
    else:
        data |= {f"answer{n}": text for n, text in enumerate(shown, 1)}
    data |= {"item": row.id, "set": row.set_name, "order": list(row.order), "messages": messages}
    if any(each.extra for each in item.completions):
        data["completions"] = [{**each.extra, "content": each.text} for each in item.completions]
    others = {"tools": item.prompt.tools, "metadata": item.metadata}
    others |= {"domain": item.prompt.domain, "category": item.prompt.category}
    return data | {name: value for name, value in others.items() if value}


def _shown(messages: Sequence[Mapping[str, Any]]) -> str:
    """Returns a prompt as one text: the question if there is nothing else, otherwise each turn after its role."""
    if len(messages) == 1 and messages[0].keys() == {"role", "content"} and messages[0]["role"] == dialogues.USER:
        return str(messages[0]["content"])
    others = [{name: value for name, value in each.items() if name not in ("role", "content")} for each in messages]
    turns = [
        f"{each['role']}: {each.get('content') or ''}{json.dumps(other, ensure_ascii=False) if other else ''}"
        for each, other in zip(messages, others)
    ]
    return "\n\n".join(turns)


def _annotation(recorded: store.Recorded) -> dict[str, Any]:
    judgement = recorded.judgement
    if judgement.rating is not None:
        kind, value = "rating", {"rating": judgement.rating}
    elif judgement.ranks is not None:
        order = labeling_tools.best_first(judgement.ranks)
        kind, value = "ranker", {"ranker": [f"answer{i + 1}" for i in order]}
    elif judgement.vote == 0.5:
        kind, value = "choices", {"choices": ["tie"]}
    else:
        kind, value = "pairwise", {"selected": "left" if judgement.vote else "right"}
    to = {"pairwise": "comparison", "ranker": "answers", "rating": "answer1", "choices": "prompt"}[kind]
    name = {"pairwise": "comparison", "ranker": "ranking", "rating": "rating", "choices": "tie"}[kind]
    result = {"id": str(recorded.number), "from_name": name, "to_name": to, "type": kind, "value": value}
    return {
        "result": [result],
        "was_cancelled": False,
        "completed_by": {"email": recorded.labeler},
        "created_at": labeling_tools.iso_time(recorded.time),
        **({} if judgement.seconds is None else {"lead_time": judgement.seconds}),
    }
