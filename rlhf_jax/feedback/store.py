"""The comparison store: prompts, completions and what people say about them, in one SQLite file.

A store contains several sets of items, such as "round 1". Rows are never changed or deleted, only added: a corrected
judgement is a new one, and readers see the latest of each labeler about each item. Several processes may use a store at
once; one writes at a time, and the others wait. A judgement is on the disk when `Store.record` returns.

    with store.Store("comparisons.sqlite") as opened:
        [item] = opened.add([judgements.Item(prompt=..., completions=...)], set_name="round 1")
        token = opened.add_labeler("Ada")
        assignment = opened.assign("Ada", set_name="round 1")
        opened.record("Ada", item, judgements.Judgement(strength=2), key="...")
        print(opened.preferences("round 1"))

`store_export` writes the comparisons of a store to a file, and the readers of `rlhf_jax.data` read a store itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import hmac
import json
import os
import secrets
import sqlite3
import threading
import time
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.feedback import judgements, store_rows, store_schema
from rlhf_jax.feedback.store_schema import StoreError, StoreUnavailableError

ROLES = ("labeler", "owner")
DUPLICATE_GAP = 10
"""A hidden duplicate follows at least this many other judgements of a labeler, unless nothing else is left."""

_JOINERS = "\u200c\u200d"
"""Characters that are not shown but determine the form of their neighbours, as in Persian and Hindi."""


class KeyUsedError(StoreError):
    """Raised for a judgement whose key its labeler has used for another one."""


class Labeler(NamedTuple):
    """A person who judges, or the owner of the store."""

    name: str
    role: str
    revoked: bool


class Assignment(NamedTuple):
    """An item that a labeler is asked to judge."""

    id: str
    """Identifier of the item."""
    item: judgements.Item
    seed: int
    """Seed of the order in which the completions are shown; always the same for an item and a labeler."""
    expires: float
    """Time, in seconds since 1970, after which others are asked instead."""

    @property
    def order(self) -> tuple[int, ...]:
        """The index of the completion that is shown at each place; see `judgements.Judgement.in_item_order`."""
        return judgements.shown_order(self.seed, len(self.item.completions))


class Progress(NamedTuple):
    """Numbers of items of a set, from the view of one labeler."""

    judged: int
    left: int
    """Without items that have enough judgements."""


class Recorded(NamedTuple):
    """A judgement in the store."""

    number: int
    """Position among all judgements; a later judgement has a higher number."""
    labeler: str
    item: str
    judgement: judgements.Judgement
    time: float
    """Seconds since 1970."""


class Preferences(NamedTuple):
    """Which completion of each of N pairs M labelers prefer."""

    items: list[str]
    """Identifiers of the pairs."""
    labelers: list[str]
    votes_NM: np.ndarray
    """float64, 1 if a labeler prefers the first completion, 0 for the second, 0.5 for a tie, and a probability if that
    was recorded; NaN if the labeler is unsure or was not asked."""

    @property
    def share_N(self) -> np.ndarray:
        """Mean of the votes on each pair, in [0, 1]; NaN without votes."""
        voted_NM = ~np.isnan(self.votes_NM)
        number_N = voted_NM.sum(axis=1)
        sum_N = np.where(voted_NM, self.votes_NM, 0.0).sum(axis=1)
        return np.where(number_N > 0, sum_N / np.maximum(number_N, 1), np.nan)

    @property
    def label_N(self) -> np.ndarray:
        """Majority: 1 if the first completion is better, 0 if the second is, 0.5 for a tie; NaN without votes."""
        return (np.sign(self.share_N - 0.5) + 1) / 2


class Store:
    """An open comparison store, and a context manager that closes it.

    A store may be shared by threads. Its methods raise `StoreError`, a ValueError, for unknown labelers and items.
    """

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False, timeout: float = 30.0) -> None:
        """Opens a store, or creates it.

        Args:
            path: The file, on a local disk. SQLite keeps recent changes in a second file, PATH-wal, until the last
                process closes the store; copy both, or close the store first.
            read_only: Whether the file must exist and is not changed.
            timeout: Number of seconds to wait for another process that is writing.

        Raises:
            StoreError: The file cannot be opened, is not a comparison store, or was written by a newer version.
        """
        self.path = os.fspath(path)
        self._lock = threading.RLock()
        self._db = store_schema.connect(path, read_only=read_only, timeout=timeout)

    def __enter__(self) -> Store:
        """Returns the store."""
        return self

    def __exit__(self, *_: Any) -> None:
        """Closes the store."""
        self.close()

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def transaction(self, *, write: bool = False, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """Makes the calls in a ``with`` block one transaction: they see one state, and are stored as a whole.

        ``write`` is whether one of them writes. If it is not ``durable``, a loss of power can undo it, unless a durable
        one followed; the end of the process cannot. Yields the connection.
        """
        with self._lock:
            if self._db.in_transaction:  # of a method that calls another
                yield self._db
                return
            try:
                self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                self._db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                yield self._db
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                raise StoreUnavailableError(f"{self.path}: {error}") from error
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    # ------------------------------------------------------------------------------------------------------- items

    def add(self, items: Iterable[judgements.Item], *, set_name: str) -> list[str]:
        """Adds items to a set, all or none, and returns their identifiers.

        An identifier is a digest of the set and of everything in the item. An item that is in the set already is not
        added again, so that a script can be repeated.

        Raises:
            ValueError: An item cannot be judged, or repeats an unknown item, or the name of the set is empty, has white
                space at an end, or has a line break or another character that is not shown.
        """
        items = list(items)
        check_name("name of the set", set_name)
        for item in items:
            item.check()
        with self.transaction(write=True) as db:
            for item in items:
                if item.duplicate_of is not None:
                    self._item_row(db, item.duplicate_of)
            return [store_rows.insert_item(db, item, set_name) for item in items]

    def sets(self) -> list[str]:
        """Returns the names of the sets, in the order in which they were created."""
        with self.transaction() as db:
            found = db.execute("SELECT set_name FROM items GROUP BY set_name ORDER BY MIN(number)")
            return [row["set_name"] for row in found]

    def require_set(self, name: str) -> None:
        """Raises StoreError if the store has no set of this name."""
        if name not in (sets := self.sets()):
            raise StoreError(f"{self.path} has no set {name!r}; its sets are {', '.join(map(repr, sets)) or 'none'}")

    def items(self, set_name: str | None = None) -> dict[str, judgements.Item]:
        """Returns the items of a set, or of all sets, by identifier, in the order in which they were added."""
        with self.transaction() as db:
            return {row["id"]: store_rows.item(db, row) for row in store_rows.items_of(db, set_name)}

    def item(self, id: str) -> judgements.Item:
        """Returns one item."""
        with self.transaction() as db:
            return store_rows.item(db, self._item_row(db, id))

    def _item_row(self, db: sqlite3.Connection, id: str) -> sqlite3.Row:
        if (row := db.execute("SELECT * FROM items WHERE id = ?", (id,)).fetchone()) is None:
            raise StoreError(f"{self.path} has no item {id!r}")
        return row

    # ----------------------------------------------------------------------------------------------------- labelers

    def add_labeler(self, name: str, *, role: str = "labeler") -> str:
        """Adds a person and returns a token with which `authenticate` recognises them.

        Only a salted hash of the token is stored. The hash is a fast one: a token has 256 random bits, and unlike a
        password cannot be found by trying, at whatever speed.

        Args:
            name: Name of the person, which their judgements bear.
            role: "labeler" or "owner".

        Raises:
            StoreError: The name is taken, or is invalid as that of a set is (see `add`), or the role is unknown.
        """
        check_name("name of the labeler", name)
        if role not in ROLES:
            raise StoreError(f"the role {role!r} is unknown; the roles are {' and '.join(ROLES)}")
        token, salt = secrets.token_urlsafe(32), secrets.token_bytes(16)
        with self.transaction(write=True) as db:
            if db.execute("SELECT 1 FROM labelers WHERE name = ?", (name,)).fetchone():
                raise StoreError(
                    f"{self.path} has a labeler {name!r} already; the command assign --renew renews a token"
                )
            db.execute(
                "INSERT INTO labelers (name, role, salt, token_hash) VALUES (?, ?, ?, ?)",
                (name, role, salt, _token_hash(token, salt)),
            )
        return token

    def renew(self, name: str) -> str:
        """Returns a new token of a person, also of one who was revoked, and keeps their judgements and role.

        The old token becomes invalid, and the sessions of the person on the labelling page end. Raises StoreError if
        the person is unknown.
        """
        token, salt = secrets.token_urlsafe(32), secrets.token_bytes(16)
        with self.transaction(write=True) as db:
            number = self._labeler(db, name)["number"]
            db.execute(
                "UPDATE labelers SET salt = ?, token_hash = ?, revoked = 0 WHERE number = ?",
                (salt, _token_hash(token, salt), number),
            )
            db.execute("DELETE FROM sessions WHERE labeler = ?", (number,))
        return token

    def labelers(self) -> list[Labeler]:
        """Returns the people, in the order in which they were added."""
        with self.transaction() as db:
            found = db.execute("SELECT name, role, revoked FROM labelers ORDER BY number")
            return [Labeler(row["name"], row["role"], bool(row["revoked"])) for row in found]

    def authenticate(self, token: str) -> Labeler | None:
        """Returns the person with a token, or None if it is unknown or revoked."""
        with self.transaction() as db:
            rows = db.execute("SELECT * FROM labelers").fetchall()
        # All hashes are compared, so that the time does not tell which of them is near.
        matches = [hmac.compare_digest(_token_hash(token, row["salt"]), row["token_hash"]) for row in rows]
        found = next((row for row, match in zip(rows, matches) if match and not row["revoked"]), None)
        return None if found is None else Labeler(found["name"], found["role"], False)

    def revoke(self, name: str) -> None:
        """Makes the token of a person invalid; their judgements stay, and `renew` makes a new token."""
        with self.transaction(write=True) as db:
            db.execute("UPDATE labelers SET revoked = 1 WHERE number = ?", (self._labeler(db, name)["number"],))

    def _labeler(self, db: sqlite3.Connection, name: str, *, active: bool = False) -> sqlite3.Row:
        row = db.execute("SELECT * FROM labelers WHERE name = ?", (name,)).fetchone()
        if row is None or (active and row["revoked"]):
            raise StoreError(f"{self.path}: the labeler {name!r} {'is unknown' if row is None else 'was revoked'}")
        return row

    # -------------------------------------------------------------------------------------------------- assignments

    def assign(
        self,
        labeler: str,
        *,
        set_name: str,
        item: str | None = None,
        lease: float = 1800.0,
        max_judgements: int | None = None,
        now: float | None = None,
    ) -> Assignment | None:
        """Assigns a labeler the next item: their open assignment, otherwise a random item of the fewest judgements.

        A labeler never receives an item that they have judged, and a hidden duplicate only if they have judged the
        item that it repeats (see `DUPLICATE_GAP`). An open assignment of another labeler counts as a judgement.

        Args:
            labeler: Name of the labeler.
            set_name: The set.
            item: Identifier of an item of the set to assign instead, whatever is open or judged.
            lease: Number of seconds after which an assignment without a judgement expires.
            max_judgements: Items with this number of judgements are not assigned; None for no limit. With 1, no two
                labelers work on the same item.
            now: The time, in seconds since 1970; None for the time of the clock.

        Returns:
            The assignment, or None if no item is left.
        """
        now = time.time() if now is None else now
        # The judgement that follows is durable, and with it what is stored here.
        with self.transaction(write=True, durable=False) as db:
            who = self._labeler(db, labeler, active=True)["number"]
            names = {"who": who, "set": set_name, "now": now, "gap": DUPLICATE_GAP, "most": max_judgements}
            if item is not None:
                row = self._item_row(db, item)
            elif (row := db.execute(store_rows.OPEN_ASSIGNMENT, names).fetchone()) is not None:
                return Assignment(row["id"], store_rows.item(db, row), row["seed"], row["expires"])
            elif (row := store_rows.next_item(db, names)) is None:
                return None
            before = self.assigned(labeler, row["id"])
            seed = secrets.randbits(32) if before is None else before.seed
            db.execute(
                "INSERT INTO assignments (labeler, item, seed, time, expires) VALUES (?, ?, ?, ?, ?)",
                (who, row["id"], seed, now, now + lease),
            )
            return Assignment(row["id"], store_rows.item(db, row), seed, now + lease)

    def assigned(self, labeler: str, item: str) -> Assignment | None:
        """Returns the latest assignment of an item to a labeler, also if it has expired or been judged, or None."""
        with self.transaction() as db:
            row = db.execute(
                "SELECT items.*, a.seed, a.expires FROM assignments a JOIN items ON items.id = a.item "
                "WHERE a.labeler = ? AND a.item = ? ORDER BY a.number DESC LIMIT 1",
                (self._labeler(db, labeler)["number"], item),
            ).fetchone()
            return row and Assignment(row["id"], store_rows.item(db, row), row["seed"], row["expires"])

    def progress(self, labeler: str, *, set_name: str, max_judgements: int | None = None, most: int = 1000) -> Progress:
        """Returns how many items of a set a labeler has judged and could still judge.

        Args:
            labeler: Name of the labeler.
            set_name: The set.
            max_judgements: See `assign`.
            most: Items that are left are counted up to this number.

        Returns:
            The numbers of items.
        """
        with self.transaction() as db:
            names = {"set": set_name, "who": self._labeler(db, labeler)["number"], "n": max_judgements, "most": most}
            return Progress(*(db.execute(query, names).fetchone()[0] for query in store_rows.PROGRESS))

    def orders(self, set_name: str | None = None) -> dict[tuple[str, str], tuple[int, ...]]:
        """Returns the order in which completions were shown, by labeler and item, for all assignments of a set.

        ``set_name`` is None for all sets. An order is the index of the completion at each place, as in `Assignment`.
        """
        with self.transaction() as db:
            rows = db.execute(
                "SELECT labelers.name, items.id, items.completions, a.seed FROM assignments a "
                "JOIN items ON items.id = a.item JOIN labelers ON labelers.number = a.labeler "
                "WHERE :set IS NULL OR items.set_name = :set ORDER BY a.number",
                {"set": set_name},
            )
            return {
                (row["name"], row["id"]): judgements.shown_order(row["seed"], len(json.loads(row["completions"])))
                for row in rows
            }

    # --------------------------------------------------------------------------------------------------- judgements

    def record(
        self,
        labeler: str,
        item: str,
        judgement: judgements.Judgement,
        *,
        key: str,
        now: float | None = None,
    ) -> int:
        """Records a judgement, which replaces earlier ones of the labeler about the item for readers.

        Args:
            labeler: Name of the labeler.
            item: Identifier of the item.
            judgement: The judgement, in the order of the item.
            key: Any text that the client chooses once per judgement, such as a UUID. A judgement that arrives again
                with the same key, because the client did not receive the answer, is stored once.
            now: The time, in seconds since 1970; None for the time of the clock.

        Returns:
            The number of the judgement.

        Raises:
            ValueError: The judgement does not fit the item, the labeler or item is unknown, or the labeler has used the
                key for another judgement.
        """
        with self.transaction(write=True) as db:
            who, row = self._labeler(db, labeler, active=True)["number"], self._item_row(db, item)
            judgements.check(judgement, kind=row["kind"], n=len(json.loads(row["completions"])))
            values = dataclasses.asdict(judgement) | {"labeler": who, "item": item, "key": key}
            values["flags"] = store_rows.to_json(dict(sorted(judgement.flags.items())))
            values["ranks"] = None if judgement.ranks is None else store_rows.to_json(judgement.ranks)
            old = db.execute("SELECT * FROM judgements WHERE labeler = ? AND key = ?", (who, key)).fetchone()
            if old is not None:
                if any(old[name] != value for name, value in values.items()):
                    raise KeyUsedError(f"{labeler!r} has used the key {key!r} for another judgement")
                return old["number"]
            values["time"] = time.time() if now is None else now
            marks = ", ".join(f":{name}" for name in values)
            number = db.execute(f"INSERT INTO judgements ({', '.join(values)}) VALUES ({marks})", values).lastrowid
            assert number is not None
            return number

    def latest(
        self, set_name: str | None = None, *, labeler: str | None = None, item: str | None = None
    ) -> list[Recorded]:
        """Returns the latest judgement of each labeler about each item of a set, or of all sets, oldest first.

        With ``labeler`` or ``item``, returns those of one labeler or about one item.
        """
        latest = "NOT EXISTS (SELECT 1 FROM judgements k WHERE k.item = j.item AND k.labeler = j.labeler "
        return self._recorded(latest + "AND k.number > j.number)", set_name, labeler, item)

    def history(
        self, set_name: str | None = None, *, labeler: str | None = None, item: str | None = None
    ) -> list[Recorded]:
        """Returns all judgements, oldest first, with those that were corrected later; see `latest`."""
        return self._recorded("TRUE", set_name, labeler, item)

    def _recorded(self, condition: str, set_name: str | None, labeler: str | None, item: str | None) -> list[Recorded]:
        names = {"set": set_name, "who": labeler, "item": item}
        given = {"set": "items.set_name = :set", "who": "labelers.name = :who", "item": "j.item = :item"}
        conditions = " AND ".join([condition, *(text for name, text in given.items() if names[name] is not None)])
        with self.transaction() as db:
            rows = db.execute(
                "SELECT j.*, labelers.name FROM judgements j JOIN items ON items.id = j.item "
                f"JOIN labelers ON labelers.number = j.labeler WHERE {conditions} ORDER BY j.number",
                names,
            )
            return [
                Recorded(row["number"], row["name"], row["item"], store_rows.judgement(row), row["time"])
                for row in rows
            ]

    def preferences(self, set_name: str | None = None) -> Preferences:
        """Returns the latest votes on the pairs of a set, or of all sets, without duplicates and gold questions."""
        with self.transaction() as db:
            rows = store_rows.items_of(db, set_name)
            found = self.latest(set_name)
        pairs = [row["id"] for row in rows if row["kind"] == judgements.PAIR and not store_rows.is_check(row)]
        items = {id: n for n, id in enumerate(pairs)}
        found = [each for each in found if each.item in items]
        names = {name: m for m, name in enumerate(sorted({each.labeler for each in found}))}
        votes_NM = np.full((len(items), len(names)), np.nan)
        for each in found:
            votes_NM[items[each.item], names[each.labeler]] = each.judgement.vote
        return Preferences(list(items), list(names), votes_NM)


def _token_hash(token: str, salt: bytes) -> bytes:
    return hashlib.blake2b(token.encode(), key=salt).digest()


def check_name(kind: str, name: str) -> None:
    """Raises StoreError, which says of what ``kind`` a name is, if it is empty or may look like another one."""
    reason = None
    if not name.strip():
        reason = "is empty"
    elif name != name.strip():
        reason = "begins or ends with white space"
    elif any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in _JOINERS for c in name):
        reason = "has a line break or another character that is not shown"
    if reason is not None:
        raise StoreError(f"the {kind} {name!r} {reason}; choose another name")
