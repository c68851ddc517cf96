"""What people are asked to judge, and what they answer: items and judgements, which `store` keeps.

An item consists of a prompt and its completions. The number of completions determines what is asked: with one, a
rating of 1 to 7 (Likert); with two, which is better; with three to nine, a ranking.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

PAIR, RANKING, LIKERT = "pair", "ranking", "likert"
MAX_COMPLETIONS = 9

FLAGS = (
    "fails_instruction",
    "inappropriate_for_customer_assistant",
    "hallucination",
    "satisfies_constraint",
    "sexual_content",
    "violent_content",
    "encourages_violence_or_self_harm",
    "denigrates_protected_class",
    "harmful_advice",
    "expresses_opinion",
    "expresses_moral_judgment",
)
"""What a labeler can say about a completion in addition to its rating (Ouyang et al. 2022, table 3)."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The conversation to which completions respond."""

    messages: Sequence[Mapping[str, Any]]
    """Messages with ``role`` and ``content``, the last of which is to be answered."""
    domain: str = ""
    """What labelers look for, such as "helpful" or "harmless"."""
    category: str = ""
    """Kind of prompt, such as "brainstorming"."""
    tools: Sequence[Mapping[str, Any]] = ()
    """The functions that the assistant may call."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """A response to a prompt, and how it was made."""

    text: str
    policy: str = ""
    """Name of the model that wrote it."""
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Settings with which it was sampled, such as the temperature; values of JSON."""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The other keys of its message, such as ``tool_calls``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a labeler answers about an item, whose completions are numbered in the order of the item.

    About a pair, exactly one of ``strength``, ``preference``, ``tie`` and ``unsure`` is given; about a ranking, exactly
    one of ``ranks`` and ``unsure``; about a single completion, exactly one of ``rating`` and ``unsure``.
    """

    strength: int | None = None
    """Preference from 1, the first is strongly better, to 8, the second is strongly better (Bai et al. 2022)."""
    preference: float | None = None
    """Probability that the first is better, in [0, 1], such as the label of a judge or of a file."""
    ranks: Sequence[int] | None = None
    """Rank of each completion, at least 1. A lower rank is better; equal ranks are ties."""
    rating: int | None = None
    """Overall quality, from 1 to 7."""
    flags: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    """Answers about a single completion, by name in `FLAGS`; names without an answer are missing."""
    tie: bool = False
    unsure: bool = False
    comment: str = ""
    seconds: float | None = None
    """Time that the labeler took, in seconds."""

    @property
    def vote(self) -> float:
        """Probability that the first completion of a pair is better, one half for a tie; NaN without a preference."""
        if self.strength is not None:
            return float(self.strength <= 4)
        return 0.5 if self.tie else math.nan if self.preference is None else self.preference

    def in_item_order(self, order: Sequence[int]) -> Judgement:
        """Converts a judgement of completions in the order in which they were shown to the order of the item.

        >>> from rlhf_jax.feedback import judgements
        >>> judgements.Judgement(strength=1).in_item_order((1, 0)).strength
        8
        """
        changes: dict[str, Any] = {}
        if self.ranks is not None:
            changes["ranks"] = tuple(rank for _, rank in sorted(zip(order, self.ranks, strict=True)))
        if tuple(order) == (1, 0):
            if self.strength is not None:
                changes["strength"] = 9 - self.strength
            if self.preference is not None:
                changes["preference"] = 1 - self.preference
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """What is judged: a prompt with one to nine completions."""

    prompt: Prompt
    completions: Sequence[Completion]
    duplicate_of: str | None = None
    """Identifier of the item that this item repeats, to measure how often labelers agree with themselves."""
    expected: Judgement | None = None
    """The known answer of a gold question, to measure the quality of labelers."""
    metadata: Mapping[str, str | int | float | bool] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> str:
        """`LIKERT` for one completion, `PAIR` for two, `RANKING` for more."""
        return {1: LIKERT, 2: PAIR}.get(len(self.completions), RANKING)

    def check(self) -> None:
        """Raises ValueError if the item cannot be judged."""
        n = len(self.completions)
        if not 1 <= n <= MAX_COMPLETIONS:
            raise ValueError(f"an item has {n} completions; it must have 1 to {MAX_COMPLETIONS}")
        if not self.prompt.messages or not all("role" in message for message in self.prompt.messages):
            raise ValueError("a prompt must have at least one message, and each message a role")
        texts = [(each.text, each.extra) for each in self.completions]
        if any(each in texts[:i] for i, each in enumerate(texts)):
            raise ValueError("an item has two equal completions")
        if self.expected is not None:
            check(self.expected, kind=self.kind, n=n)


def check(judgement: Judgement, *, kind: str, n: int) -> None:
    """Raises ValueError if a judgement is no answer about an item of a kind with n completions."""
    given = {name for name in ("strength", "preference", "ranks", "rating") if getattr(judgement, name) is not None}
    given |= {name for name in ("tie", "unsure") if getattr(judgement, name)}
    possible = {PAIR: ("strength", "preference", "tie"), RANKING: ("ranks",), LIKERT: ("rating",)}[kind]
    possible = (*possible, "unsure")
    if len(given) != 1 or not given <= set(possible):
        raise ValueError(
            f"a judgement of a {kind} item has {', '.join(sorted(given)) or 'no answer'}; it must have exactly one of "
            f"{', '.join(possible)}"
        )
    for name, most in (("strength", 8), ("rating", 7)):
        value = getattr(judgement, name)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise ValueError(f"{name} is {value!r}; it must be a whole number from 1 to {most}")
    if judgement.preference is not None and not 0 <= judgement.preference <= 1:
        raise ValueError(f"preference is {judgement.preference!r}; it must be a probability from 0 to 1")
    ranks = judgement.ranks
    if ranks is not None and (len(ranks) != n or any(type(rank) is not int or rank < 1 for rank in ranks)):
        raise ValueError(f"ranks are {list(ranks)!r}; they must be {n} whole numbers, at least 1")
    if unknown := set(judgement.flags) - set(FLAGS) if kind == LIKERT else set(judgement.flags):
        raise ValueError(f"a judgement of a {kind} item cannot have the flag {min(unknown)!r}")
    if judgement.seconds is not None and not 0 <= judgement.seconds < math.inf:
        raise ValueError(f"seconds is {judgement.seconds!r}; it must be at least 0 and finite")


def shown_order(seed: int, n: int) -> tuple[int, ...]:
    """Returns the order in which n completions are shown: the index of the completion at each place.

    The order depends on nothing but its arguments, and not on a version of a library, because it is needed to analyse
    judgements years later.
    """
    return tuple(sorted(range(n), key=lambda i: hashlib.sha256(f"{seed} {i}".encode()).digest()))
