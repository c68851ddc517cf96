"""Import of comparisons from files into a comparison store."""

from __future__ import annotations

import hashlib

from rlhf_jax.data import dialogues, errors, readers, records, sources
from rlhf_jax.feedback import judgements, store

_OF_EXPORTS = {"item", "set", "labelers"}
"""Metadata that `rlhf_jax.feedback.store_export` adds to each record."""


def import_pairs(
    opened: store.Store,
    source: sources.Source,
    *,
    set_name: str,
    labeler: str = "import",
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
    rankings, counts = readers.read_rankings(source, counts=counts)
    items = [_item(ranking) for ranking in rankings]
    for ranking in rankings:
        if ranking.scores is not None or ranking.margin is not None:
            counts.note("scores or margin not kept")
    with opened.transaction(write=True):
        if labeler not in [each.name for each in opened.labelers()]:
            opened.add_labeler(labeler)
        ids = opened.add(items, set_name=set_name)
        for id, ranking in zip(ids, rankings):
            judgement = _judgement(ranking)
            key = hashlib.sha256(f"{id} {judgement.ranks} {judgement.preference}".encode()).hexdigest()
            opened.record(labeler, id, judgement, key=key)
    for _ in range(len(ids) - len(set(ids))):
        counts.note("record that repeats another not kept")
    return ids, counts


def _item(ranking: records.Ranking) -> judgements.Item:
    if len(ranking.responses) > judgements.MAX_COMPLETIONS:
        raise errors.DataError(
            f"{ranking.location}: the record has {len(ranking.responses)} answers; an item of a comparison store has "
            f"at most {judgements.MAX_COMPLETIONS}"
        )
    metadata = dict(ranking.metadata)
    if metadata.keys() >= _OF_EXPORTS:
        metadata = {name: value for name, value in metadata.items() if name not in _OF_EXPORTS}
    if _soft_label(ranking) is not None:
        del metadata["preference"]
    domain, category = (str(metadata.pop(name, "")) for name in ("domain", "category"))
    return judgements.Item(
        prompt=judgements.Prompt([_message(turn) for turn in ranking.prompt], domain, category, ranking.tools),
        completions=[_completion(answer) for answer in ranking.responses],
        metadata=metadata,
    )


def _judgement(ranking: records.Ranking) -> judgements.Judgement:
    if len(ranking.responses) > 2:
        return judgements.Judgement(ranks=ranking.ranks)
    soft = _soft_label(ranking)
    return judgements.Judgement(preference=1.0 if soft is None else soft)


def _soft_label(ranking: records.Ranking) -> float | None:
    preference = ranking.metadata.get("preference")
    if len(ranking.responses) == 2 and isinstance(preference, float) and 0 <= preference <= 1:
        return preference
    return None


def _message(turn: dialogues.Turn) -> dict[str, object]:
    return {**turn.extra, "role": turn.role, "content": turn.text}


def _completion(answer: dialogues.Answer) -> judgements.Completion:
    turn = dialogues.answer_turn(answer)
    return judgements.Completion(turn.text, extra=turn.extra)
