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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """Adds items and judgements from files to a set of a store, which is created if it does not exist.

    The form of each file is recognised by its contents; docs/labeling.md lists the forms. A file that is imported again
    adds nothing, and if a file cannot be read, nothing is added. Annotators whom a file names become labelers of the
    store; they need no token unless they sign in to the page.
    """

    store: Positional[str]
    """File of the store."""
    files: Annotated[Positional[tuple[str, ...]], arg(metavar="FILE [FILE ...]")]
    """Files to read; * in a name matches several files."""
    set: str
    """Set to which the items are added."""
    as_: Annotated[completion_sets.Form | None, arg(name="as")] = None
    """What is made of completions without labels, by prompt. None makes pairs."""
    pairs_per_prompt: int | None = None
    """Number of pairs for each prompt, which are drawn at random. None makes all pairs."""
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
    """Maximum share of unusable records in a file, such as those with an empty answer."""


def run(settings: Import) -> None:
    """Reads all files, then adds what they contain, and prints the numbers of items and judgements."""
    if settings.pairs_per_prompt is not None and settings.pairs_per_prompt < 1:
        raise store_lib.StoreError(f"--pairs-per-prompt is {settings.pairs_per_prompt}; it must be at least 1")
    if not settings.set.strip() or not settings.labeler.strip():
        raise store_lib.StoreError("--set and --labeler must not be empty")
    if not 0 <= settings.max_dropped <= 1:
        raise store_lib.StoreError(f"--max-dropped is {settings.max_dropped}; it must be between 0 and 1")
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
    with store_lib.Store(settings.store) as opened:
        added = annotated.add(
            opened, found, set_name=settings.set, labeler=settings.labeler, gold=settings.gold, counts=counts
        )
    kind = "gold questions" if settings.gold else "items"
    text = f"{errors.counted(added.items, kind)} and {errors.counted(added.judgements, 'judgements')}"
    out = Console(soft_wrap=True, highlight=False)
    out.print(escape(f"added to set {settings.set!r} of {settings.store}: {text}"))
    out.print(escape(f"data: {errors.counted(len(found), 'records')}; {counts.report()}"))
