"""Import of comparisons, annotations and completions from files into a comparison store."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from rlhf_jax.data import errors, readers, records, sources
from rlhf_jax.data.stores import annotated, argilla, completion_sets, label_studio
from rlhf_jax.feedback import store

_OF_EXPORTS = {"item", "set", "labelers"}
"""Metadata that `rlhf_jax.feedback.store_export` adds to each record."""


def import_pairs(
    opened: store.Store,
    source: sources.Source,
    *,
    set_name: str,
    labeler: str = annotated.IMPORT,
    counts: errors.DropCount | None = None,
) -> tuple[list[str], errors.DropCount]:
    """Adds pairs and rankings in any form that `readers.read_rankings` reads, each with one judgement.

    A pair without ``preference`` has the preference 1 for its chosen answer. The fields ``domain`` and ``category`` of
    a record belong to its prompt, and its other metadata to the item. Scores, margins and repetitions of a record are
    not kept, which is counted. A file that is imported again adds nothing.

    Args:
        opened: The store.
        source: A path, a list of paths, or `sources.Tfds`.
        set_name: The set of the items.
        labeler: Name under which the judgements are recorded; it is added to the store unless it exists.
        counts: Counts dropped records and limits their share; None creates a ``DropCount()``.

    Returns:
        ``(ids, counts)``: the identifiers of the items, in the order of the records.

    Raises:
        DataError: The source cannot be read, too many records are dropped, or one has more answers than an item.
    """
    found, counts = readers.read(source, parse_ranking, counts=counts, fields="chosen and rejected")
    added = annotated.add(opened, found, set_name=set_name, labeler=labeler, counts=counts)
    return added.ids, counts


def parse_ranking(fields: Any, *, location: str = "") -> annotated.Annotated:
    """Parses a pair or ranking as a record with one judgement; see `rlhf_jax.data.records` for forms and errors."""
    ranking = records.parse_ranking(fields, location=location)
    if ranking.metadata.keys() >= _OF_EXPORTS:
        kept = {name: value for name, value in ranking.metadata.items() if name not in _OF_EXPORTS}
        ranking = dataclasses.replace(ranking, metadata=kept)
    return annotated.from_ranking(ranking)


def read(
    paths: sources.Path | list[sources.Path],
    *,
    form: completion_sets.Form | None = None,
    pairs_per_prompt: int | None = None,
    seed: int = 0,
    question: str | None = None,
    counts: errors.DropCount | None = None,
) -> tuple[list[annotated.Annotated], errors.DropCount]:
    """Reads files for a store, each in the form that its first record has.

    The forms are those of `readers.read_rankings`, of `label_studio`, of `argilla` and of `completion_sets`, whose
    records from all files are grouped by prompt and come last. A file can have both pairs or rankings and completions
    without labels, which are then counted.

    Args:
        paths: A path or a list of paths; see `sources`.
        form: What is made of completions without labels; see `completion_sets.group`. None means "pairs".
        pairs_per_prompt: See `completion_sets.group`.
        seed: See `completion_sets.group`.
        question: See `argilla.parse`.
        counts: Counts dropped records and limits their share; None creates a ``DropCount()``.

    Returns:
        ``(records, counts)``, ready for `annotated.add`.

    Raises:
        DataError: A file cannot be read, a record has the wrong form, or too many records are dropped; or an argument
            has no effect on these files.
    """
    counts = errors.DropCount() if counts is None else counts
    labelled: list[annotated.Annotated] = []
    completions: list[annotated.Annotated] = []
    used = False
    for path in sources.expand_paths(paths):
        parse = _parser(path)
        if parse is argilla.parse:
            used, parse = True, partial(argilla.parse, question=question)
        plain = parse in (parse_ranking, completion_sets.parse)
        found, _ = readers.read(
            path,
            partial(_parse_plain, default=parse) if plain else parse,
            counts=counts,
            fields="chosen and rejected, or prompt and responses",
        )
        unlabelled = [each for each in found if plain and not each.said]
        if 0 < len(unlabelled) < len(found):
            for _ in unlabelled:
                counts.note("record without a label in a file with labels")
        labelled += [each for each in found if not plain or each.said]
        completions += unlabelled
    if question is not None and not used:
        raise errors.DataError(f"the question {question!r} has no effect: no file has records of Argilla")
    if not completions and (form is not None or pairs_per_prompt is not None):
        raise errors.DataError("a form of items and pairs per prompt have no effect: no file has completions alone")
    if pairs_per_prompt is not None and form not in (None, "pairs"):
        raise errors.DataError(f"pairs per prompt have no effect on items of the form {form!r}")
    items = completion_sets.group(
        completions, form=form or "pairs", pairs_per_prompt=pairs_per_prompt, seed=seed, counts=counts
    )
    return labelled + items, counts


def _parse_plain(
    fields: Mapping[str, Any], *, location: str = "", default: Callable[..., annotated.Annotated]
) -> annotated.Annotated:
    """Parses a record with or without labels, and with ``default`` if it has neither labels nor completions."""
    present = {name: value for name, value in fields.items() if value is not None}
    if completion_sets.recognises(present):
        default = completion_sets.parse
    elif completion_sets.has_labels(present):
        default = parse_ranking
    return default(fields, location=location)


def _parser(path: sources.Path) -> Callable[..., annotated.Annotated]:
    """Returns the parser for the first record of a file."""
    raw = next((each for each in sources.raw_records(path) if each.skipped is None and each.flaw is None), None)
    fields = {} if raw is None else {name: value for name, value in raw.fields.items() if value is not None}
    for module in (label_studio, argilla, completion_sets):
        if module.recognises(fields if module is not argilla or raw is None else raw.fields):
            return module.parse
    return parse_ranking
