"""Sessions of the labelling page: who is signed in, in the store, so that a restart signs nobody out."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time

from rlhf_jax.feedback import store

MAX_SESSIONS = 10
"""Number of sessions of a person, the latest ones."""
LIFETIME = 14 * 86400.0
"""Number of seconds after which a person signs in again."""


def start(opened: store.Store, labeler: str, *, now: float | None = None) -> str:
    """Signs a labeler in, and returns the secret of the session, of which the store keeps a hash only."""
    now = time.time() if now is None else now
    secret = secrets.token_urlsafe(32)
    with opened.transaction(write=True) as db:
        db.execute("DELETE FROM sessions WHERE expires <= ?", (now,))
        db.execute(
            "DELETE FROM sessions WHERE hash IN (SELECT s.hash FROM sessions s JOIN labelers ON labelers.number = "
            "s.labeler WHERE labelers.name = ? ORDER BY s.expires DESC LIMIT -1 OFFSET ?)",
            (labeler, MAX_SESSIONS - 1),
        )
        db.execute(
            "INSERT INTO sessions SELECT ?, number, ? FROM labelers WHERE name = ? AND NOT revoked",
            (_hash(secret), now + LIFETIME, labeler),
        )
    return secret


def find(opened: store.Store, secret: str, *, now: float | None = None) -> store.Labeler | None:
    """Returns who has a session, or None if it is unknown, over or that of a revoked labeler."""
    with opened.transaction() as db:
        row = db.execute(
            "SELECT name, role FROM sessions s JOIN labelers ON labelers.number = s.labeler "
            "WHERE s.hash = ? AND s.expires > ? AND NOT revoked",
            (_hash(secret), time.time() if now is None else now),
        ).fetchone()
    return None if row is None else store.Labeler(row["name"], row["role"], False)


def end(opened: store.Store, secret: str) -> None:
    """Signs out: the secret is worth nothing from now on."""
    with opened.transaction(write=True) as db:
        db.execute("DELETE FROM sessions WHERE hash = ?", (_hash(secret),))


def form_token(secret: str) -> str:
    """Returns what each form of a session contains, so that another site cannot send it."""
    return hmac.new(secret.encode(), b"form", hashlib.sha256).hexdigest()


def equal(first: str, second: str) -> bool:
    """Returns whether two secrets are equal, in a time that does not tell how much of them is."""
    return hmac.compare_digest(first.encode("utf-8", "replace"), second.encode("utf-8", "replace"))


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
