"""Completions without labels, such as those of experiments/sample.py, as items for people to judge.

A record has a prompt and one completion, in any form of a demonstration (see `rlhf_jax.data.records`), or a prompt and
a list ``responses`` or ``completions``. An entry of a list is an answer or an object with ``text`` (or ``response``)
and, optionally, ``policy`` (or ``model``) and ``sampling``, which a record with one completion can have too. Records
with equal prompts belong together, also if they are in different files.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rlhf_jax.data import conversations, dialogues, errors, records
from rlhf_jax.data.stores import annotated
from rlhf_jax.feedback import judgements

Form = Literal["pairs", "ranking", "ratings", "by-count"]

_LISTS = ("responses", "completions")
_ANSWERS = ("response", "completion", "output", "answer")
_TEXTS = ("text", "response", "completion")
_LABELS = ("chosen", "rejected", "ranks", "scores")
_POLICIES = ("policy", "model")
_OF_SAMPLES = {"tokens", "stopped", "logprob", "index", "sample", "refused"}
"""Fields of the samples of experiments/sample.py, which belong to the completion."""


def recognises(fields: Mapping[str, Any]) -> bool:
    """Returns whether a record has completions without labels."""
    prompts = {*conversations.PROMPTS, *conversations.CONVERSATIONS} & fields.keys()
    answers = {*_LISTS, *_ANSWERS, *conversations.CONVERSATIONS} & fields.keys()
    return bool(prompts and answers) and not has_labels(fields)


def has_labels(fields: Mapping[str, Any]) -> bool:
    """Returns whether a record says which of its completions is better."""
    return not fields.keys().isdisjoint(_LABELS)


def parse(fields: Mapping[str, Any], *, location: str = "") -> annotated.Annotated:
    """Parses a record; see the module for its forms, and `rlhf_jax.data.records` for the errors."""
    fields = {name: value for name, value in fields.items() if value is not None}
    if {"index", "sample", "response"} <= fields.keys():
        fields = {name: value for name, value in fields.items() if name not in _OF_SAMPLES}
    key = next((name for name in _LISTS if isinstance(fields.get(name), list)), None)
    if key is not None:
        answers = fields.pop(key)
        prompt = records.parse_prompt(fields, location=location)
        completions = [_completion(each, key) for each in answers]
        return annotated.Annotated(**vars(prompt), completions=tuple(completions))
    writer = {name: fields.pop(name) for name in (*_POLICIES, "sampling") if name in fields}
    found = records.parse_demonstration(fields, location=location)
    others = {name: value for name, value in vars(found).items() if name != "response"}
    return annotated.Annotated(**others, completions=(_completion({"text": found.response, **writer}, "response"),))


def _completion(value: Any, key: str) -> judgements.Completion:
    policy, sampling = "", {}
    if isinstance(value, Mapping) and (text := conversations.first(value, *_TEXTS)) is not None:
        policy = str(value.get(conversations.first(value, *_POLICIES) or "", ""))
        sampling, value = value.get("sampling", {}), value[text]
        if not isinstance(sampling, Mapping):
            raise errors.DataError(f"'sampling' has type {type(sampling).__name__}; it must be an object")
    answer = value if isinstance(value, dialogues.Turn) else conversations.answer(value, key)
    return annotated.completion(answer, policy, sampling)


def group(
    found: Sequence[annotated.Annotated],
    *,
    form: Form = "pairs",
    pairs_per_prompt: int | None = None,
    seed: int = 0,
    counts: errors.DropCount,
) -> list[annotated.Annotated]:
    """Returns the items that people judge: for each prompt, pairs of its completions, one ranking, or single ratings.

    The metadata of an item is what the records of its prompt have in common. A completion that repeats another of its
    prompt, and a prompt with too few completions to compare, are skipped and counted.

    Args:
        found: Records, as `parse` returns them.
        form: "pairs", "ranking" (which is a pair if there are two completions), "ratings", or "by-count": a rating of
            one completion, a pair of two, and a ranking of more.
        pairs_per_prompt: Number of pairs that are drawn for each prompt; None for all of them.
        seed: Seed of the draws, which do not depend on other prompts.
        counts: Counts what is skipped, by reason.

    Returns:
        A record without a judgement for each item.
    """
    prompts: dict[str, list[annotated.Annotated]] = {}
    for record in found:
        prompts.setdefault(_prompt_key(record), []).append(record)
    items = []
    for key, group in prompts.items():
        completions = _different([each for record in group for each in record.completions], counts)
        shared = dict(set.intersection(*({*record.metadata.items()} for record in group)))
        metadata = {name: value for name, value in group[0].metadata.items() if name in shared}
        if form in ("pairs", "ranking") and len(completions) < 2:
            counts.note("prompt with fewer than two completions skipped")
            continue
        for chosen in _chosen(completions, form, pairs_per_prompt, f"{seed} {key}"):
            items.append(
                annotated.Annotated(
                    prompt=group[0].prompt,
                    tools=group[0].tools,
                    metadata=metadata,
                    location=group[0].location,
                    completions=tuple(chosen),
                )
            )
    return items


def _prompt_key(record: annotated.Annotated) -> str:
    turns = [[turn.role, turn.text, turn.extra] for turn in record.prompt]
    return json.dumps([turns, record.tools], sort_keys=True, default=str)


def _different(completions: Sequence[judgements.Completion], counts: errors.DropCount) -> list[judgements.Completion]:
    kept: dict[tuple[str, str], judgements.Completion] = {}
    for each in completions:
        key = dialogues.answer_key(dialogues.Turn(dialogues.ASSISTANT, each.text, each.extra))
        if key in kept:
            counts.note("completion that repeats another of its prompt skipped")
        kept.setdefault(key, each)
    return list(kept.values())


def _chosen(
    completions: Sequence[judgements.Completion], form: Form, pairs_per_prompt: int | None, seed: str
) -> list[Sequence[judgements.Completion]]:
    if form == "ratings":
        return [[each] for each in completions]
    if form in ("ranking", "by-count"):
        return [completions]
    pairs = list(itertools.combinations(range(len(completions)), 2))
    drawn = sorted(pairs, key=lambda pair: hashlib.sha256(f"{seed} {pair}".encode()).digest())[:pairs_per_prompt]
    return [[completions[i] for i in pair] for pair in sorted(drawn)]
