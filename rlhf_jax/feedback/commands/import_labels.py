"""The command ``import``, which adds items and judgements from files to a comparison store."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from rich.console import Console
from rich.markup import escape
from tyro.conf import Positional, arg

from rlhf_jax.data import errors
from rlhf_jax.data.stores import annotated, comparison_import, completion_sets
from rlhf_jax.feedback import store as store_lib
from rlhf_jax.feedback.commands import given_files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """Adds items and judgements from files to a set of a store, which is created if it does not exist.

    The form of each file is recognised by its contents; docs/labeling.md lists the forms. A file that is imported again
    adds nothing, and if a file cannot be read, nothing is added. Annotators whom a file names become labelers of the
    store; they need no token unless they sign in to the page.
    """

    store: Annotated[Positional[str], arg(metavar="STORE")]
    """File of the store, in a folder that exists."""
    files: Annotated[Positional[tuple[str, ...]], arg(metavar="FILE [FILE ...]", help_behavior_hint="(required)")]
    """Files to read; * in a name matches several files."""
    set: str
    """Set to which the items are added."""
    as_: Annotated[completion_sets.Form | None, arg(name="as")] = None
    """What is made of completions without labels, by prompt. by-count makes a rating of one completion, a pair of two
    and a ranking of three to nine. None makes pairs."""
    pairs_per_prompt: int | None = None
    """Number of pairs for each prompt, at least 1, which are drawn at random. None makes all pairs."""
    seed: int = 0
    """Seed of the draws."""
    gold: bool = False
    """Whether the labels are the expected answers of gold questions, instead of judgements."""
    labeler: str = annotated.IMPORT
    """Labeler of the judgements of files that name nobody."""
    domain: str = ""
    """Domain of prompts whose file names none, such as helpful or harmless."""
    category: str = ""
    """Category of prompts whose file names none."""
    policy: str = ""
    """What wrote the completions of files that do not say."""
    question: str | None = None
    """Question of Argilla whose responses are judgements, if several compare or rate the answers."""
    max_dropped: float = 0.01
    """Maximum share, from 0 to 1, of unusable records in a file, such as those with an empty answer."""


def run(settings: Import) -> None:
    """Reads all files, then adds what they contain, and prints the numbers of items and judgements."""
    if settings.pairs_per_prompt is not None and settings.pairs_per_prompt < 1:
        raise store_lib.StoreError(f"--pairs-per-prompt is {settings.pairs_per_prompt}; it must be at least 1")
    for flag, name in (("name of --set", settings.set), ("name of --labeler", settings.labeler)):
        store_lib.check_name(flag, name)
    if not 0 <= settings.max_dropped <= 1:
        raise store_lib.StoreError(f"--max-dropped is {settings.max_dropped}; it must be between 0 and 1")
    new = given_files.is_new(settings.store)
    counts = errors.DropCount(max_dropped=settings.max_dropped, flag="--max-dropped")
    found, _ = comparison_import.read(
        list(settings.files),
        form=settings.as_,
        pairs_per_prompt=settings.pairs_per_prompt,
        seed=settings.seed,
        question=settings.question,
        counts=counts,
    )
    defaults = {name: getattr(settings, name) for name in ("domain", "category", "policy")}
    found = [annotated.with_defaults(each, **defaults) for each in found]
    if not found:
        raise errors.DataError(f"{settings.files[0]}: no record is left to add ({counts.report()})")
    if settings.gold and not any(each.said for each in found):
        raise errors.DataError(f"{settings.files[0]}: no record has a label, which --gold needs as the expected answer")
    with store_lib.Store(settings.store) as opened:
        added = annotated.add(
            opened, found, set_name=settings.set, labeler=settings.labeler, gold=settings.gold, counts=counts
        )
    if settings.gold and not added.ids:
        raise errors.DataError(f"{settings.files[0]}: no record is left to be a gold question ({counts.report()})")
    kind = "gold questions" if settings.gold else "items"
    text = f"{errors.counted(added.items, kind)} and {errors.counted(added.judgements, 'judgements')}"
    out = Console(soft_wrap=True, highlight=False)
    out.print(escape(f"added to set {settings.set!r} of {'the new store ' * new}{settings.store}: {text}"))
    out.print(escape(f"data: {errors.counted(len(found), 'records')}; {counts.report()}"))
