"""Comparisons of a comparison store as records, which are one for each item, and files of them.

The latest judgement of each labeler counts, except where the labeler was unsure. A pair becomes a record with
``chosen`` and ``rejected``, which the mean of the votes decides; if it is below 1, the votes were not unanimous, and it
is the field ``preference``. A ranking becomes a record with ``responses`` and ``ranks``: a completion ranks higher the
more comparisons with the others it won, less those it lost, over all labelers (Borda's count). The field ``metadata``
contains the metadata of the item, its identifier, set, domain and category, and the number of labelers.

Some items have no record: single completions, which are rated and not compared; items without a judgement; tied items;
gold questions and hidden duplicates, which only measure labelers. They are counted by reason.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax import atomic
from rlhf_jax.feedback import judgements, store


class Row(NamedTuple):
    """An item of a store as a record of comparisons."""

    item: str
    """Identifier of the item."""
    fields: dict[str, Any]
    """The record, in the form of `rlhf_jax.data.records`; without ranks if it is skipped."""
    skipped: str | None
    """Reason why the item has no record, or None."""


def rows(opened: store.Store, set_name: str | None = None) -> list[Row]:
    """Returns the items of a set, or of all sets one after the other, as records."""
    with opened.transaction():
        found = [(each, opened.items(each)) for each in ([set_name] if set_name is not None else opened.sets())]
        latest = opened.latest(set_name)
    said: dict[str, list[judgements.Judgement]] = {}
    for each in latest:
        if not each.judgement.unsure:
            said.setdefault(each.item, []).append(each.judgement)
    return [_row(id, item, name, said.get(id, [])) for name, items in found for id, item in items.items()]


def export(opened: store.Store, path: str | os.PathLike[str], *, set_name: str | None = None) -> Counter[str]:
    """Writes the comparisons of a set, or of all sets, as JSON lines, which the readers of `rlhf_jax.data` read.

    Strengths, comments, times, and the policies of the completions are left out.

    Returns:
        The number of items that are skipped, by reason.

    Raises:
        StoreError: No item has a comparison.
    """
    found = rows(opened, set_name)
    return write_records(opened, path, found, (row.fields for row in found if row.skipped is None))


def export_preferences(
    opened: store.Store, path: str | os.PathLike[str], *, set_name: str | None = None
) -> Counter[str]:
    """Writes comparisons as JSON lines with ``prompt``, ``chosen`` and ``rejected`` as message lists.

    This is the form of preference data sets that Hugging Face's TRL reads. A ranking becomes a line for each two
    completions of different ranks. Labels are hard: ``preference`` is left out. See `export` for results and errors.
    """
    found = rows(opened, set_name)
    pairs = (pair for row in found if row.skipped is None for pair in _message_pairs(row.fields))
    return write_records(opened, path, found, pairs)


def export_judgements(opened: store.Store, path: str | os.PathLike[str], *, set_name: str | None = None) -> None:
    """Writes all judgements of a set, or of all sets, as JSON lines, oldest first, for analysis.

    A line has the number, labeler, item, set, kind and time of a judgement, the fields of `judgements.Judgement`, and
    ``latest``, whether no later judgement of the labeler about the item replaces it. ``duplicate_of`` and ``gold`` say
    whether the item only measures labelers. ``prompt`` has the messages of the item, and ``completions`` the ``text``
    and the ``policy`` of each completion, with the other keys of its message. The judgements cannot be imported again.

    Raises:
        StoreError: There is no judgement.
    """
    with opened.transaction():
        latest = {each.number for each in opened.latest(set_name)}
        history = opened.history(set_name)
        items = {
            id: (name, item)
            for name in ([set_name] if set_name is not None else opened.sets())
            for id, item in opened.items(name).items()
        }
    lines = []
    for each in history:
        name, item = items[each.item]
        about = {"number": each.number, "labeler": each.labeler, "item": each.item, "set": name, "kind": item.kind}
        about |= {"duplicate_of": item.duplicate_of, "gold": item.expected is not None}
        about |= {"time": each.time, "latest": each.number in latest}
        answers = [{**one.extra, "text": one.text, "policy": one.policy} for one in item.completions]
        shown = {"prompt": list(item.prompt.messages), "completions": answers}
        lines.append(about | dataclasses.asdict(each.judgement) | shown)
    if not lines:
        raise store.StoreError(f"{opened.path} has no judgement to export")
    _replace(path, lines)


def _replace(path: str | os.PathLike[str], lines: Iterable[dict[str, Any]]) -> None:
    atomic.replace_file(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())


def write_records(
    opened: store.Store, path: str | os.PathLike[str], found: Sequence[Row], lines: Iterable[dict[str, Any]]
) -> Counter[str]:
    """Writes records made of rows as JSON lines, and returns the number of skipped rows by reason.

    Args:
        opened: The store.
        path: The file.
        found: The rows.
        lines: The records.

    Returns:
        The number of rows that are skipped, by reason.

    Raises:
        StoreError: There are no records.
    """
    lines = list(lines)
    skipped = Counter(row.skipped for row in found if row.skipped is not None)
    if not lines:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in sorted(skipped.items())) or "it has no item"
        raise store.StoreError(f"{opened.path} has no comparison to export ({reasons})")
    _replace(path, lines)
    return skipped


def _row(id: str, item: judgements.Item, set_name: str, said: Sequence[judgements.Judgement]) -> Row:
    described = {"item": id, "set": set_name, "labelers": len(said)}
    described |= {name: value for name in ("domain", "category") if (value := getattr(item.prompt, name))}
    fields: dict[str, Any] = {"prompt": list(item.prompt.messages)}
    answers = [_answer(each) for each in item.completions]
    if item.prompt.tools:
        fields["tools"] = list(item.prompt.tools)
    others = {"metadata": {**item.metadata, **described}}
    labels, reason = _labels(item, answers, said)
    return Row(id, fields | labels | others, reason)


def _labels(
    item: judgements.Item, answers: list[Any], said: Sequence[judgements.Judgement]
) -> tuple[dict[str, Any], str | None]:
    """Returns the fields with the answers and their labels, and the reason why an item is skipped or None."""
    unlabelled = {"responses": answers}
    if item.duplicate_of is not None or item.expected is not None:
        return unlabelled, "hidden duplicate skipped" if item.expected is None else "gold question skipped"
    if item.kind == judgements.LIKERT:
        return unlabelled, "rating of one completion skipped"
    if not said:
        return unlabelled, "item without a judgement skipped"
    if item.kind == judgements.RANKING:
        ranks_NK = np.array([each.ranks for each in said])
        lost_K = np.sign(ranks_NK[:, :, None] - ranks_NK[:, None, :]).sum(axis=(0, 2))  # comparisons, less those won
        ranks_K = 1 + np.unique(lost_K, return_inverse=True)[1]
        tied = ranks_K.max() == 1
        return unlabelled | {"ranks": ranks_K.tolist()}, "tied item skipped" if tied else None
    share = sum(each.vote for each in said) / len(said)
    if share == 0.5:
        return unlabelled, "tied item skipped"
    chosen, rejected = answers if share > 0.5 else reversed(answers)
    soft = max(share, 1 - share)
    return {"chosen": chosen, "rejected": rejected} | ({"preference": soft} if soft < 1 else {}), None


def _answer(completion: judgements.Completion) -> Any:
    return {**_message(completion.text), **completion.extra} if completion.extra else completion.text


def _message(answer: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": answer} if isinstance(answer, str) else answer


def answer_pairs(fields: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Returns every two answers of a record that have different ranks, the better one first."""
    if "chosen" in fields:
        return [(fields["chosen"], fields["rejected"])]
    ranked = sorted(zip(fields["ranks"], fields["responses"]), key=lambda each: each[0])
    return [(a, b) for i, (better, a) in enumerate(ranked) for worse, b in ranked[i + 1 :] if better < worse]


def _message_pairs(fields: dict[str, Any]) -> Iterable[dict[str, Any]]:
    for chosen, rejected in answer_pairs(fields):
        yield {
            **{key: fields[key] for key in ("prompt", "tools") if key in fields},
            "chosen": [_message(chosen)],
            "rejected": [_message(rejected)],
        }
