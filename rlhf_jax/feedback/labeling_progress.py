"""Progress of the labelers of a comparison store, and the choice of hidden duplicates."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping
from typing import NamedTuple

from rlhf_jax.feedback import judgements, store


class Work(NamedTuple):
    """The work of a labeler on a set."""

    judged: int
    """Number of items that the labeler has judged."""
    open: int
    """Number of assignments that have neither a judgement nor expired."""


def by_labeler(opened: store.Store, *, now: float | None = None) -> dict[tuple[str, str], Work]:
    """Returns the work of each labeler on each set, by the names of both; pairs without work are missing.

    ``now`` is the time at which assignments are open, in seconds since 1970; None means the time of the clock.
    """
    query = """
        SELECT name, set_name, SUM(judged) AS judged, SUM(open) AS open FROM (
            SELECT labeler, item, 1 AS judged, 0 AS open FROM judgements GROUP BY labeler, item
            UNION ALL
            SELECT labeler, item, 0, 1 FROM open WHERE expires > :now)
        JOIN items ON items.id = item JOIN labelers ON labelers.number = labeler
        GROUP BY labelers.number, set_name"""
    with opened.transaction() as db:
        rows = db.execute(query, {"now": time.time() if now is None else now}).fetchall()
    return {(row["name"], row["set_name"]): Work(row["judged"], row["open"]) for row in rows}


def remaining(opened: store.Store, set_name: str, *, judgements_per_item: int) -> int:
    """Returns the number of items of a set that fewer labelers have judged than ``judgements_per_item``.

    Hidden duplicates do not count.
    """
    query = """
        SELECT COUNT(*) FROM judged WHERE set_name = :set AND duplicate_of IS NULL AND labelers < :least"""
    with opened.transaction() as db:
        (n,) = db.execute(query, {"set": set_name, "least": judgements_per_item}).fetchone()
    return n


def duplicates(items: Mapping[str, judgements.Item], *, share: float, seed: int = 0) -> list[judgements.Item]:
    """Returns the hidden duplicates that a set lacks so that it has one of a share of its items.

    Gold questions are not repeated. The choice depends on nothing but the arguments. It prefers the same items when the
    set grows, and counts the duplicates that the set has.

    >>> from rlhf_jax.feedback import judgements, labeling_progress
    >>> prompt = judgements.Prompt([{"role": "user", "content": "Name a number."}])
    >>> items = {str(n): judgements.Item(prompt=prompt, completions=[judgements.Completion(str(n))]) for n in range(20)}
    >>> len(labeling_progress.duplicates(items, share=0.1))
    2

    Args:
        items: The items of the set, by identifier.
        share: Number of duplicates as a share of the other items, from 0 to 1, rounded to the nearest whole number.
        seed: Seed of the choice.

    Returns:
        The duplicates, to be added to the set.

    Raises:
        StoreError: The share is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise store.StoreError(f"the share of duplicates is {share}; it must be between 0 and 1")
    repeated = {item.duplicate_of for item in items.values() if item.duplicate_of is not None}
    originals = [id for id, item in items.items() if item.duplicate_of is None and item.expected is None]
    wanted = round(share * len(originals)) - len(repeated)
    free = sorted((id for id in originals if id not in repeated), key=lambda id: _rank(seed, id))
    return [dataclasses.replace(items[id], duplicate_of=id) for id in free[: max(wanted, 0)]]


def _rank(seed: int, id: str) -> bytes:
    return hashlib.sha256(f"{seed} {id}".encode()).digest()
