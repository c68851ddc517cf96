"""Tables of the comparison store, their migrations, and opening of its file."""

from __future__ import annotations

import os
import pathlib
import sqlite3
import time

APPLICATION_ID = 0x726C6866
"""Number in the header of the file by which a comparison store is recognised: "rlhf" in ASCII."""

_APPEND_ONLY = ("prompts", "completions", "items", "assignments", "judgements")

_VERSION_1 = (
    """CREATE TABLE prompts (
        id TEXT PRIMARY KEY,
        messages TEXT NOT NULL,
        tools TEXT NOT NULL,
        domain TEXT NOT NULL,
        category TEXT NOT NULL)""",
    """CREATE TABLE completions (
        id TEXT PRIMARY KEY,
        prompt TEXT NOT NULL REFERENCES prompts (id),
        text TEXT NOT NULL,
        extra TEXT NOT NULL,
        policy TEXT NOT NULL,
        sampling TEXT NOT NULL)""",
    """CREATE TABLE items (
        number INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        set_name TEXT NOT NULL,
        kind TEXT NOT NULL CHECK (kind IN ('pair', 'ranking', 'likert')),
        prompt TEXT NOT NULL REFERENCES prompts (id),
        completions TEXT NOT NULL,
        duplicate_of TEXT REFERENCES items (id),
        expected TEXT,
        metadata TEXT NOT NULL)""",
    "CREATE INDEX items_of_set ON items (set_name, number)",
    """CREATE TABLE labelers (
        number INTEGER PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        role TEXT NOT NULL CHECK (role IN ('labeler', 'owner')),
        salt BLOB NOT NULL,
        token_hash BLOB NOT NULL,
        revoked INTEGER NOT NULL DEFAULT 0 CHECK (revoked IN (0, 1)))""",
    """CREATE TABLE assignments (
        number INTEGER PRIMARY KEY,
        labeler INTEGER NOT NULL REFERENCES labelers (number),
        item TEXT NOT NULL REFERENCES items (id),
        seed INTEGER NOT NULL,
        time REAL NOT NULL,
        expires REAL NOT NULL)""",
    "CREATE INDEX assignments_of_item ON assignments (item, expires)",
    "CREATE INDEX assignments_of_labeler ON assignments (labeler, expires)",
    """CREATE TABLE judgements (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        labeler INTEGER NOT NULL REFERENCES labelers (number),
        item TEXT NOT NULL REFERENCES items (id),
        key TEXT NOT NULL,
        strength INTEGER CHECK (strength BETWEEN 1 AND 8),
        preference REAL CHECK (preference BETWEEN 0 AND 1),
        ranks TEXT,
        rating INTEGER CHECK (rating BETWEEN 1 AND 7),
        flags TEXT NOT NULL,
        tie INTEGER NOT NULL CHECK (tie IN (0, 1)),
        unsure INTEGER NOT NULL CHECK (unsure IN (0, 1)),
        comment TEXT NOT NULL,
        seconds REAL,
        time REAL NOT NULL,
        UNIQUE (labeler, key))""",
    "CREATE INDEX judgements_of_item ON judgements (item, labeler, number)",
    *(
        f"CREATE TRIGGER {table}_no_{verb} BEFORE {verb} ON {table} "
        f"BEGIN SELECT RAISE(ABORT, 'rows of {table} are never changed; add a new row'); END"
        for table in _APPEND_ONLY
        for verb in ("UPDATE", "DELETE")
    ),
)

_VERSION_2 = (
    # How many labelers have judged each item, so that the next item is found without counting.
    """CREATE TABLE judged (
        item TEXT PRIMARY KEY REFERENCES items (id),
        set_name TEXT NOT NULL,
        duplicate_of TEXT,
        labelers INTEGER NOT NULL)""",
    "CREATE INDEX judged_least ON judged (set_name, duplicate_of IS NOT NULL, labelers, item)",
    "CREATE INDEX judged_duplicates ON judged (duplicate_of) WHERE duplicate_of IS NOT NULL",
    "CREATE INDEX judgements_of_labeler ON judgements (labeler, number)",
    """INSERT INTO judged SELECT id, set_name, duplicate_of,
        (SELECT COUNT(DISTINCT labeler) FROM judgements WHERE item = items.id) FROM items""",
    """CREATE TRIGGER items_judged AFTER INSERT ON items BEGIN
        INSERT INTO judged VALUES (NEW.id, NEW.set_name, NEW.duplicate_of, 0); END""",
    """CREATE TRIGGER judgements_judged AFTER INSERT ON judgements
        WHEN NOT EXISTS
            (SELECT 1 FROM judgements WHERE item = NEW.item AND labeler = NEW.labeler AND number < NEW.number)
        BEGIN UPDATE judged SET labelers = labelers + 1 WHERE item = NEW.item; END""",
    # The assignments that have not been judged yet, some of which have expired.
    """CREATE TABLE open (
        labeler INTEGER NOT NULL,
        item TEXT NOT NULL,
        seed INTEGER NOT NULL,
        expires REAL NOT NULL,
        PRIMARY KEY (labeler, item))""",
    """INSERT OR REPLACE INTO open SELECT labeler, item, seed, expires FROM assignments a
        WHERE NOT EXISTS (SELECT 1 FROM judgements j WHERE j.item = a.item AND j.labeler = a.labeler)
        ORDER BY number""",
    """CREATE TRIGGER assignments_open AFTER INSERT ON assignments
        WHEN NOT EXISTS (SELECT 1 FROM judgements WHERE item = NEW.item AND labeler = NEW.labeler)
        BEGIN INSERT OR REPLACE INTO open VALUES (NEW.labeler, NEW.item, NEW.seed, NEW.expires); END""",
    """CREATE TRIGGER judgements_open AFTER INSERT ON judgements
        BEGIN DELETE FROM open WHERE labeler = NEW.labeler AND item = NEW.item; END""",
    # A secret part of new identifiers, without which a labeler could tell from the identifier of an item whether it is
    # a gold question. A store that has items keeps their identifiers.
    "CREATE TABLE salt (value TEXT NOT NULL)",
    "INSERT INTO salt SELECT CASE WHEN EXISTS (SELECT 1 FROM items) THEN '' ELSE hex(randomblob(16)) END",
    # Sessions of the labelling page.
    """CREATE TABLE sessions (
        hash BLOB PRIMARY KEY,
        labeler INTEGER NOT NULL REFERENCES labelers (number),
        expires REAL NOT NULL)""",
)

MIGRATIONS: tuple[tuple[str, ...], ...] = (_VERSION_1, _VERSION_2)
"""The statements that lead from each version of the tables to the next. A released version is never edited."""


class StoreError(ValueError):
    """Raised for a file or a request that the comparison store cannot handle."""


class StoreUnavailableError(StoreError):
    """Raised if the store cannot be read or written for now, because it is locked or the disk is full."""


def connect(path: str | os.PathLike[str], *, read_only: bool, timeout: float) -> sqlite3.Connection:
    """Opens a store, and creates or migrates its tables unless it is read only.

    Args:
        path: The file.
        read_only: Whether the file must exist and is not changed.
        timeout: Number of seconds to wait for another process that is writing.

    Returns:
        The connection, in autocommit mode. It may be used in several threads, by one at a time.

    Raises:
        StoreError: The file cannot be opened, is something else, or was written by a newer version.
    """
    path = pathlib.Path(path).absolute()
    db = None
    try:
        if not read_only:
            path.parent.mkdir(parents=True, exist_ok=True)
        db = _open(path, "mode=ro" if read_only else "mode=rwc", timeout)
        try:
            version = _version(db, path)
        except sqlite3.OperationalError:
            # SQLite creates a shared-memory file beside a store even to read it, which fails on a read-only disk.
            # Nobody writes there, so the file can be opened as immutable, unless changes remain in its log.
            if not read_only or path.with_name(path.name + "-wal").exists():
                raise
            db.close()
            db = _open(path, "mode=ro&immutable=1", timeout)
            version = _version(db, path)
        if read_only and version < len(MIGRATIONS):
            raise StoreError(f"{path} has tables of version {version}; open it for writing once to migrate it")
        if not read_only:
            _use_log(db, path, timeout)
            _migrate(db, path)
    except (sqlite3.Error, OSError) as error:
        if db is not None:
            db.close()
        raise StoreError(f"{path} cannot be opened as a comparison store ({error})") from None
    except BaseException:
        if db is not None:
            db.close()
        raise
    return db


def _open(path: pathlib.Path, query: str, timeout: float) -> sqlite3.Connection:
    db = sqlite3.connect(
        f"{path.as_uri()}?{query}", uri=True, timeout=timeout, isolation_level=None, check_same_thread=False
    )
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA foreign_keys = ON")
    return db


def _version(db: sqlite3.Connection, path: pathlib.Path) -> int:
    """Returns the version of the tables, 0 for an empty file; raises StoreError for a file that cannot be used."""
    (identity,), (version,) = (db.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version"))
    (tables,) = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    if identity != APPLICATION_ID and (identity or version or tables):
        raise StoreError(f"{path} is an SQLite database, but not a comparison store")
    if version > len(MIGRATIONS):
        raise StoreError(
            f"{path} has tables of version {version}, but this version of rlhf_jax knows only versions up to "
            f"{len(MIGRATIONS)}; install the version that wrote it, or a later one"
        )
    return version


def _use_log(db: sqlite3.Connection, path: pathlib.Path, timeout: float) -> None:
    """Switches to write-ahead logging, in which readers and a writer do not wait for each other."""
    end = time.monotonic() + timeout
    while db.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                raise StoreError(f"{path} is on a file system without shared memory; put the store on a local disk")
        except sqlite3.OperationalError:  # SQLite does not wait for another process that does the same
            if time.monotonic() > end:
                raise
            time.sleep(0.01)


def _migrate(db: sqlite3.Connection, path: pathlib.Path) -> None:
    if _version(db, path) == len(MIGRATIONS):
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        for statements in MIGRATIONS[_version(db, path) :]:  # another process may have migrated it by now
            for statement in statements:
                db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        db.execute("COMMIT")
    except BaseException:
        db.execute("ROLLBACK")
        raise
