"""Rows of the comparison store: which rows answer a request, and their conversion to items and judgements."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sqlite3
from typing import Any

from rlhf_jax.feedback import judgements

OPEN_ASSIGNMENT = """
    SELECT items.*, open.seed, open.expires FROM open JOIN items ON items.id = open.item
    WHERE open.labeler = :who AND open.expires > :now AND items.set_name = :set
    ORDER BY open.rowid DESC LIMIT 1"""
PROGRESS = (
    "SELECT COUNT(DISTINCT j.item) FROM judgements j JOIN items ON items.id = j.item "
    "WHERE j.labeler = :who AND items.set_name = :set",
    """SELECT COUNT(*) FROM (
        SELECT 1 FROM judged LEFT JOIN judged original ON original.item = judged.duplicate_of
        WHERE judged.set_name = :set AND (:n IS NULL OR judged.labelers < :n)
        AND NOT EXISTS (SELECT 1 FROM judgements j WHERE j.item = judged.item AND j.labeler = :who)
        AND (judged.duplicate_of IS NULL OR :n IS NULL OR original.labelers < :n
            OR EXISTS (SELECT 1 FROM judgements j WHERE j.item = original.item AND j.labeler = :who))
        LIMIT :most)""",
)
"""Numbers of items that a labeler has judged, and that are left."""
_UNJUDGED = "NOT EXISTS (SELECT 1 FROM judgements j WHERE j.item = judged.item AND j.labeler = :who)"
_WITH_OPEN = """
    WITH asked AS MATERIALIZED (SELECT item, COUNT(*) AS number FROM open WHERE expires > :now GROUP BY item)
    SELECT judged.item, judged.labelers + IFNULL(asked.number, 0) AS asked"""
# An index has the items in the order of their judgements, and those with as many in the order of their identifiers,
# which is random, so that gold questions and duplicates are among the others. Open assignments count as judgements too,
# so the item with the fewest is among the first ones, of which there is one more than items with an assignment.
_NEXT_ITEM = f"""{_WITH_OPEN}, 0 AS recent FROM (
        SELECT * FROM judged WHERE set_name = :set AND (duplicate_of IS NOT NULL) = 0 AND {_UNJUDGED}
        ORDER BY labelers, item LIMIT 1 + (SELECT COUNT(*) FROM asked)) judged
    LEFT JOIN asked ON asked.item = judged.item
    WHERE :most IS NULL OR asked < :most ORDER BY asked, judged.item LIMIT 1"""
# The plus sign keeps SQLite from a search through the whole set.
_NEXT_DUPLICATE = f"""{_WITH_OPEN}, judged.duplicate_of IN
        (SELECT item FROM judgements WHERE labeler = :who ORDER BY number DESC LIMIT :gap) AS recent
    FROM judged LEFT JOIN asked ON asked.item = judged.item
    WHERE +set_name = :set AND duplicate_of IN (SELECT item FROM judgements WHERE labeler = :who) AND {_UNJUDGED}
    AND (:most IS NULL OR asked < :most) ORDER BY recent, asked, judged.item LIMIT 1"""


def next_item(db: sqlite3.Connection, names: dict[str, Any]) -> sqlite3.Row | None:
    """Returns the item that a labeler is asked next; see `store.Store.assign`."""
    found = [db.execute(query, names).fetchone() for query in (_NEXT_ITEM, _NEXT_DUPLICATE)]
    best = min((row for row in found if row), key=lambda row: (row["recent"], row["asked"], row["item"]), default=None)
    return best and db.execute("SELECT * FROM items WHERE id = ?", (best["item"],)).fetchone()


def items_of(db: sqlite3.Connection, set_name: str | None) -> list[sqlite3.Row]:
    """Returns the rows of the items of a set, or of all sets, in the order in which they were added."""
    query = "SELECT * FROM items WHERE :set IS NULL OR set_name = :set ORDER BY number"
    return db.execute(query, {"set": set_name}).fetchall()


def is_check(row: sqlite3.Row) -> bool:
    """Returns whether an item only measures the quality of labelers."""
    return row["duplicate_of"] is not None or row["expected"] is not None


def item(db: sqlite3.Connection, row: sqlite3.Row) -> judgements.Item:
    """Converts a row, with its prompt and completions, to an item."""
    prompt = db.execute("SELECT * FROM prompts WHERE id = ?", (row["prompt"],)).fetchone()
    completions = [
        db.execute("SELECT * FROM completions WHERE id = ?", (key,)).fetchone()
        for key in json.loads(row["completions"])
    ]
    return judgements.Item(
        prompt=judgements.Prompt(
            tuple(json.loads(prompt["messages"])),
            prompt["domain"],
            prompt["category"],
            tuple(json.loads(prompt["tools"])),
        ),
        completions=tuple(
            judgements.Completion(each["text"], each["policy"], json.loads(each["sampling"]), json.loads(each["extra"]))
            for each in completions
        ),
        duplicate_of=row["duplicate_of"],
        expected=None if row["expected"] is None else _restored(json.loads(row["expected"])),
        metadata=json.loads(row["metadata"]),
    )


def judgement(row: sqlite3.Row) -> judgements.Judgement:
    """Converts a row to a judgement."""
    values = {field.name: row[field.name] for field in dataclasses.fields(judgements.Judgement)}
    ranks = None if row["ranks"] is None else json.loads(row["ranks"])
    return _restored(values | {"ranks": ranks, "flags": json.loads(row["flags"])})


def _restored(values: dict[str, Any]) -> judgements.Judgement:
    ranks: Any = values.get("ranks")
    values["ranks"] = None if ranks is None else tuple(ranks)
    values["tie"], values["unsure"] = bool(values.get("tie")), bool(values.get("unsure"))
    return judgements.Judgement(**values)


def insert_item(db: sqlite3.Connection, item: judgements.Item, set_name: str) -> str:
    """Adds an item to a set, unless the set has it, and returns its identifier."""
    prompt = item.prompt
    prompt_id = _insert(db, "prompts", prompt.messages, prompt.tools, prompt.domain, prompt.category)
    completions = [
        _insert(db, "completions", prompt_id, each.text, each.extra, each.policy, each.sampling)
        for each in item.completions
    ]
    expected = None if item.expected is None else _given(item.expected)
    contents = (set_name, item.kind, prompt_id, completions, item.duplicate_of, expected, item.metadata)
    key = _digest(*_salt(db), "items", *contents)
    others = (item.duplicate_of, None if expected is None else to_json(expected), to_json(item.metadata))
    db.execute(
        "INSERT INTO items (id, set_name, kind, prompt, completions, duplicate_of, expected, metadata) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
        (key, set_name, item.kind, prompt_id, to_json(completions), *others),
    )
    return key


def _salt(db: sqlite3.Connection) -> list[str]:
    """Returns what identifiers of items depend on besides the item; nothing in stores of the first version."""
    return [row["value"] for row in db.execute("SELECT value FROM salt WHERE value != ''")]


def _insert(db: sqlite3.Connection, table: str, *values: Any) -> str:
    """Adds a row that is identified by its contents, unless it exists, and returns its identifier."""
    key = _digest(table, *values)
    row = [key, *(each if isinstance(each, str) else to_json(each) for each in values)]
    db.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))}) ON CONFLICT (id) DO NOTHING", row)
    return key


def _given(judgement: judgements.Judgement) -> dict[str, Any]:
    """Returns the fields of a judgement that differ from their defaults, so that a new field changes no identifier."""
    empty = dataclasses.asdict(judgements.Judgement())
    return {name: value for name, value in dataclasses.asdict(judgement).items() if value != empty[name]}


def to_json(value: Any) -> str:
    """Returns a value as JSON, with keys in their order, in which chat templates may write them."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _digest(*parts: Any) -> str:
    """Returns the same identifier for equal values, whatever the order of keys."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
