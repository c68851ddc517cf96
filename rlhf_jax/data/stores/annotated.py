"""Annotated prompts: completions of a prompt with what people say about them, as read from a file for a store."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_jax.data import dialogues, errors, records
from rlhf_jax.feedback import judgements, store

IMPORT = "import"
"""Labeler of judgements whose file names nobody."""


class Said(NamedTuple):
    """A judgement in a file."""

    judgement: judgements.Judgement
    labeler: str | None = None
    """Name of the labeler, or None if the file names nobody."""
    time: float | None = None
    """Seconds since 1970, or None if the file does not say."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annotated(records.Prompt):
    """A prompt with one to nine completions and what people say about them."""

    completions: tuple[judgements.Completion, ...]
    said: tuple[Said, ...] = ()
    notes: tuple[str, ...] = ()
    """Reasons under which contents that are not kept are counted."""
    item: str | None = None
    """Identifier of the item of which the record is an export."""

    def as_item(self) -> judgements.Item:
        """Returns the item; the metadata ``domain`` and ``category`` become those of the prompt.

        Raises:
            DataError: There are more completions than an item can have.
        """
        if len(self.completions) > judgements.MAX_COMPLETIONS:
            raise errors.DataError(
                f"{self.location}: the record has {len(self.completions)} answers; an item of a comparison store has "
                f"at most {judgements.MAX_COMPLETIONS}"
            )
        metadata = dict(self.metadata)
        domain, category = (str(metadata.pop(name, "")) for name in ("domain", "category"))
        prompt = judgements.Prompt([_message(turn) for turn in self.prompt], domain, category, self.tools)
        return judgements.Item(prompt=prompt, completions=self.completions, metadata=metadata)


class Added(NamedTuple):
    """What `add` has added to a store."""

    ids: list[str]
    """Identifier of the item of each record."""
    items: int
    """Number of new items."""
    judgements: int
    """Number of new judgements."""


def add(
    opened: store.Store,
    found: Sequence[Annotated],
    *,
    set_name: str,
    labeler: str = IMPORT,
    gold: bool = False,
    counts: errors.DropCount,
) -> Added:
    """Adds records to a set of a store, all or none. Records that are added again change nothing.

    Labelers whom the store does not have are added to it. An exported record whose item is in the set already adds its
    judgements to this item. A judgement that agrees with the latest one of its labeler about the item is not added.

    Args:
        opened: The store.
        found: The records.
        set_name: The set.
        labeler: Labeler of the judgements whose file names nobody.
        gold: Whether the labels become the expected answers of gold questions instead of judgements. Records without a
            label or with labels that disagree are skipped.
        counts: Counts what is skipped or not kept, by reason.

    Returns:
        The identifiers, and the numbers of new items and judgements.

    Raises:
        DataError: A record does not fit an item.
        StoreError: A labeler was revoked.
    """
    pairs = [(record, record.as_item()) for record in found]
    if gold:
        pairs = [(record, item) for record, plain in pairs if (item := _gold(record, plain, counts)) is not None]
    for record, item in pairs:
        try:
            item.check()
            for said in record.said:
                judgements.check(said.judgement, kind=item.kind, n=len(item.completions))
        except ValueError as error:
            raise errors.DataError(f"{record.location}: {error}") from None
    with opened.transaction(write=True):
        sizes = _sizes(opened, set_name)
        ids = _add_items(opened, pairs, set_name)
        if not gold:
            _add_judgements(opened, ids, [record for record, _ in pairs], set_name, labeler)
        after = _sizes(opened, set_name)
    seen: set[Any] = set()
    for id, (record, _) in zip(ids, pairs):
        new = {(id, said.labeler, _answer(said.judgement)) for said in record.said} or {(id,)}
        if new <= seen:
            counts.note("record that repeats another not kept")
        seen |= new
        for note in record.notes:
            counts.note(note)
    return Added(ids, after[0] - sizes[0], after[1] - sizes[1])


def _add_items(opened: store.Store, pairs: Sequence[tuple[Annotated, judgements.Item]], set_name: str) -> list[str]:
    """Adds items, except those of which a record is an export, and returns the identifiers of all."""
    known = opened.items(set_name)
    ids = []
    for record, item in pairs:
        if (
            record.item is not None
            and record.item in known
            and item.expected is None
            and _texts(known[record.item]) == _texts(item)
        ):
            ids.append(record.item)
        else:
            ids += opened.add([item], set_name=set_name)
    return ids


def _texts(item: judgements.Item) -> list[Any]:
    return [(each.text, each.extra) for each in item.completions]


def _add_judgements(
    opened: store.Store, ids: Sequence[str], found: Sequence[Annotated], set_name: str, labeler: str
) -> None:
    """Records judgements that differ from the latest one of their labeler, whose strength they would replace."""
    latest = {(each.item, each.labeler): _answer(each.judgement) for each in opened.latest(set_name)}
    names = {each.name for each in opened.labelers()}
    for id, record in zip(ids, found):
        for said in record.said:
            name, answer = said.labeler or labeler, _answer(said.judgement)
            if latest.get((id, name)) == answer:
                continue
            if name not in names:
                try:
                    opened.add_labeler(name)
                except store.StoreError as error:
                    raise errors.DataError(f"{record.location}: {error}") from None
                names.add(name)
            opened.record(name, id, said.judgement, key=_key(id, said.judgement), now=said.time)
            latest[id, name] = answer


def _answer(judgement: judgements.Judgement) -> tuple[Any, ...]:
    """Returns what a judgement has in common with those that say the same, whatever its strength."""
    if judgement.ranks is not None:
        levels = sorted(set(judgement.ranks))
        return tuple(levels.index(rank) for rank in judgement.ranks)
    return (judgement.rating, None if judgement.unsure or judgement.rating is not None else judgement.vote)


def _gold(record: Annotated, item: judgements.Item, counts: errors.DropCount) -> judgements.Item | None:
    """Returns an item with the label of a record as its expected answer, or None if there is no such label."""
    answers = [dataclasses.replace(said.judgement, seconds=None, comment="") for said in record.said]
    if not answers or any(each != answers[0] for each in answers):
        counts.note("record whose labels disagree skipped" if answers else "record without a label skipped")
        return None
    return dataclasses.replace(item, expected=answers[0])


def _key(id: str, judgement: judgements.Judgement) -> str:
    parts = [id, judgement.ranks, judgement.preference]
    others = (judgement.rating, "tie" if judgement.tie else None, judgement.seconds)
    parts += [value for value in others if value is not None]
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()


def _sizes(opened: store.Store, set_name: str) -> tuple[int, int]:
    return len(opened.items(set_name)), len(opened.history(set_name))


def with_defaults(found: Annotated, *, domain: str = "", category: str = "", policy: str = "") -> Annotated:
    """Returns a record with values for what its file does not say.

    Args:
        found: The record.
        domain: Domain of the prompt; empty for none.
        category: Category of the prompt; empty for none.
        policy: What wrote the completions; empty if that is unknown.

    Returns:
        The record.
    """
    defaults = {name: value for name, value in (("domain", domain), ("category", category)) if value}
    completions = [dataclasses.replace(each, policy=each.policy or policy) for each in found.completions]
    return dataclasses.replace(found, metadata=defaults | dict(found.metadata), completions=tuple(completions))


def from_ranking(ranking: records.Ranking) -> Annotated:
    """Converts a pair or ranking. A pair without ``preference`` has the preference 1 for its chosen answer."""
    metadata, notes = dict(ranking.metadata), ()
    soft = metadata.get("preference")
    if len(ranking.responses) > 2:
        judgement = judgements.Judgement(ranks=ranking.ranks)
    elif isinstance(soft, float) and 0 <= soft <= 1:
        judgement = judgements.Judgement(preference=metadata.pop("preference"))  # type: ignore[arg-type]
    else:
        judgement = judgements.Judgement(preference=1.0)
    if ranking.scores is not None or ranking.margin is not None:
        notes = ("scores or margin not kept",)
    return Annotated(
        prompt=ranking.prompt,
        tools=ranking.tools,
        metadata=metadata,
        unused=ranking.unused,
        location=ranking.location,
        completions=tuple(map(completion, ranking.responses)),
        said=(Said(judgement),),
        notes=notes,
    )


def completion(
    answer: dialogues.Answer, policy: str = "", sampling: Mapping[str, Any] | None = None
) -> judgements.Completion:
    """Returns an answer as a completion; raises UnusableRecord if it is empty."""
    turn = dialogues.answer_turn(answer)
    if dialogues.is_blank(turn):
        raise errors.UnusableRecord("empty answer")
    return judgements.Completion(turn.text, policy, sampling or {}, turn.extra)


def _message(turn: dialogues.Turn) -> dict[str, object]:
    return {**turn.extra, "role": turn.role, "content": turn.text}
