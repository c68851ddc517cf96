"""The command ``assign``, which adds people to a comparison store and shows their work."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tyro.conf import Positional, arg

from rlhf_jax.data import errors
from rlhf_jax.feedback import labeling_progress
from rlhf_jax.feedback import store as store_lib
from rlhf_jax.feedback.commands import given_files
from rlhf_jax.report import console

_Names = Annotated[tuple[str, ...], arg(metavar="NAME [NAME ...]", help_behavior_hint="(default: nobody)")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assign:
    """Adds people who judge, renews or revokes their tokens, adds hidden duplicates, or shows the work of everybody.

    A token is shown once, because the store has only its hash; a person signs in to the labelling page with it. The
    page assigns items to people while they judge.
    """

    store: Annotated[Positional[str], arg(metavar="STORE")]
    """File of the store, which is created if --labelers adds people."""
    labelers: _Names = ()
    """People to add, who receive one token each."""
    role: Literal["labeler", "owner"] = "labeler"
    """Role of the people to add."""
    tokens_file: str | None = None
    """New file for the tokens, which only you can read, instead of printing them: a JSON object on each line."""
    renew: _Names = ()
    """People who receive a new token, also if theirs was revoked. The old one becomes invalid and they are signed out;
    their judgements stay."""
    revoke: _Names = ()
    """People whose tokens become invalid; their judgements stay."""
    duplicates: float | None = None
    """Share of the items of --set, from 0 to 1, that each labeler judges twice, to measure how often people agree with
    themselves."""
    set: str | None = None
    """Set that receives duplicates, or that is shown. None shows all sets."""
    seed: int = 0
    """Seed of the choice of duplicates."""
    list: bool = False
    """Whether to show each person's numbers of judgements and open assignments, and the number of items left."""
    judgements: int = 1
    """Number of judgements, at least 1, with which --list counts an item as judged."""


def run(settings: Assign) -> None:
    """Runs what the settings ask for, in the order of the settings."""
    _check(settings)
    out = Console(soft_wrap=True, highlight=False)
    changes = bool(settings.labelers or settings.renew or settings.revoke or settings.duplicates is not None)
    new = given_files.is_new(settings.store)
    if new and not settings.labelers:
        raise store_lib.StoreError(f"{settings.store} does not exist; import items or add people to create it")
    with store_lib.Store(settings.store, read_only=not changes) as opened:
        if settings.set is not None:
            opened.require_set(settings.set)
        with opened.transaction(write=changes):
            tokens = {name: opened.add_labeler(name, role=settings.role) for name in settings.labelers}
            tokens |= {name: opened.renew(name) for name in settings.renew}
            for name in settings.revoke:
                opened.revoke(name)
            added = _add_duplicates(opened, settings)
            if settings.tokens_file is not None:  # before the transaction ends, so that no token is lost
                _write(settings.tokens_file, tokens)
        if new:
            out.print(escape(f"new store: {settings.store}"))
        _print_tokens(out, settings, tokens)
        if settings.revoke:
            out.print(escape(f"revoked: {', '.join(settings.revoke)}"))
        if added is not None:
            out.print(escape(f"added to set {settings.set!r}: {errors.counted(added, 'hidden duplicates')}"))
        if settings.list:
            sets = opened.sets() if settings.set is None else [settings.set]
            out.print(people_table(opened, sets))
            out.print(sets_table(opened, sets, judgements=settings.judgements))


def _check(settings: Assign) -> None:
    """Raises StoreError for settings that ask for nothing or have no effect."""
    reason = None
    people = settings.labelers or settings.renew
    if not (people or settings.revoke or settings.duplicates is not None or settings.list):
        reason = "nothing to do; set --labelers, --renew, --revoke, --duplicates or --list"
    elif settings.tokens_file is not None and not people:
        reason = "--tokens-file has no effect without --labelers or --renew; leave it out"
    elif settings.tokens_file is not None and os.path.lexists(settings.tokens_file):
        reason = f"{settings.tokens_file} exists, and tokens are written to a new file only; choose another file"
    elif both := {*settings.labelers, *settings.revoke} & {*settings.renew}:
        reason = f"{min(both)!r} is named by --renew and also by --labelers or --revoke; leave one out"
    elif settings.role != Assign.role and not settings.labelers:
        reason = "--role has no effect without --labelers; leave it out"
    elif settings.duplicates is not None and settings.set is None:
        reason = "--duplicates needs --set"
    elif settings.set is not None and settings.duplicates is None and not settings.list:
        reason = "--set has no effect without --duplicates or --list; leave it out"
    elif settings.seed != Assign.seed and settings.duplicates is None:
        reason = "--seed has no effect without --duplicates; leave it out"
    elif settings.judgements != Assign.judgements and not settings.list:
        reason = "--judgements has no effect without --list; leave it out"
    elif settings.judgements < 1:
        reason = f"--judgements is {settings.judgements}; it must be at least 1"
    if reason is not None:
        raise store_lib.StoreError(reason)


def _add_duplicates(opened: store_lib.Store, settings: Assign) -> int | None:
    if settings.duplicates is None or settings.set is None:
        return None
    items = opened.items(settings.set)
    chosen = labeling_progress.duplicates(items, share=settings.duplicates, seed=settings.seed)
    return len(opened.add(chosen, set_name=settings.set))


def _write(path: str, tokens: Mapping[str, str]) -> None:
    """Writes the tokens to a new file that only its owner can read."""
    lines = "".join(json.dumps({"labeler": name, "token": token}) + "\n" for name, token in tokens.items())
    with (
        given_files.writing(path),
        open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file,
    ):
        file.write(lines)


def _print_tokens(out: Console, settings: Assign, tokens: Mapping[str, str]) -> None:
    if not tokens:
        return
    if settings.tokens_file is not None:
        out.print(escape(f"wrote {errors.counted(len(tokens), 'tokens')} to {settings.tokens_file}"))
    else:
        for name, token in tokens.items():
            out.print(escape(f"{name}: {token}"))
    out.print(
        escape(
            "The store has only a hash of each token, so none can be shown again. A person signs in with the token on "
            f"the page of: python -m rlhf_jax.feedback serve {settings.store}"
        )
    )


def people_table(opened: store_lib.Store, sets: Sequence[str]) -> Table:
    """Returns a table of the people, with their numbers of judged items and open assignments in each set."""
    work = labeling_progress.by_labeler(opened)
    table = console.NumbersTable("person", "role", "set", "judged", "open")
    for person in opened.labelers():
        role = f"{person.role}, revoked" if person.revoked else person.role
        rows = [(name, work[person.name, name]) for name in sets if (person.name, name) in work]
        for name, each in rows or [("", labeling_progress.Work(0, 0))]:
            table.add_row(escape(person.name), role, escape(name), str(each.judged), str(each.open))
    return table


def sets_table(opened: store_lib.Store, sets: Sequence[str], *, judgements: int) -> Table:
    """Returns a table of the sets, with the number of items that have fewer than a number of judgements."""
    table = console.NumbersTable(
        "set", "items", "duplicates", f"with fewer than {errors.counted(judgements, 'judgements')}"
    )
    for name in sets:
        items = opened.items(name).values()
        copies = sum(item.duplicate_of is not None for item in items)
        left = labeling_progress.remaining(opened, name, judgements_per_item=judgements)
        table.add_row(escape(name), str(len(items) - copies), str(copies), str(left))
    return table
