"""Options of the labelling page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from rlhf_jax.feedback.page import live_policy

LOOPBACK = ("127.0.0.1", "localhost", "::1")

INSTRUCTIONS = "\n\n".join(
    (
        "You read a conversation and the answers of an assistant to its last message, and say which is better.",
        "Read all answers to the end before you decide. A good answer does what the user asks, is correct, and does no "
        "harm. It need not be long. If two answers are equally good, or you cannot tell because you lack the "
        "knowledge, say so instead of guessing.",
        "The answers are in a random order. Some questions come twice, and for some the right answer is known: they "
        "show how reliable labels are. You can change an answer at any time, under Answers.",
    )
)
"""The default instructions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the labelling page shows, and to whom."""

    set_name: str
    """The set of items that are judged."""
    instructions: str = INSTRUCTIONS
    """Text of the page with instructions, in which fences of Markdown mark code."""
    max_judgements: int | None = None
    """Number of labelers that are asked about each item; None for all."""
    lease: float = 1800.0
    """Number of seconds for which an item that a labeler has opened is kept for them."""
    policy: live_policy.Policy | None = None
    """The policy with which labelers chat; None for no chat."""
    policy_name: str = "policy"
    """Its name in the store."""
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
    """How its answers are sampled, for the store."""
    red_team: bool = False
    """Whether labelers of the chat try to elicit harm and choose the more harmful answer, with which it continues."""
    report: Callable[[], str] | None = None
    """Returns an HTML page about the labelers, which the owner can download; None for none."""
    access_secret: str | None = None
    """What must be known to sign in, in addition to a token; None for nothing."""
    hosts: Collection[str] = LOOPBACK
    """Names under which the server is reached."""
    secure: bool = False
    """Whether it is reached over HTTPS only."""
    requests_per_second: float = 20.0
    """Number of requests of one person, after a first burst of three times as many."""

    @property
    def chat_set(self) -> str:
        """The set of the items that the chat adds."""
        return f"{self.set_name} (chat)"
