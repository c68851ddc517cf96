"""Conversations with a live policy, which answers each message with two samples (Bai et al. 2022, section 2.2).

The better one, or, when people look for harm, the worse one, becomes part of the conversation. Each pair is an item of
the store, with the conversation and the turn among its metadata, and from these items a conversation is read again.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rlhf_jax.feedback import judgements, store

Policy = Callable[[Sequence[dict[str, Any]], int], str]
"""Returns sample ``i`` of the answer to a list of messages; samples with other numbers are independent."""

MAX_MESSAGE = 10_000
"""Number of characters of a message."""
TRIES = 4
"""Number of samples that may equal the first one."""


class Conversation(NamedTuple):
    """A conversation of a labeler with the policy."""

    id: str
    messages: tuple[dict[str, Any], ...]
    """The messages so far, in which the chosen answers are those of the assistant."""
    turn: int
    """Number of the message that comes next."""
    waiting: store.Assignment | None
    """The two answers between which the labeler has yet to choose, or None."""


def new_id() -> str:
    """Returns the identifier of a new conversation."""
    return secrets.token_urlsafe(12)


def find(opened: store.Store, labeler: str, set_name: str, id: str | None, *, worse: bool) -> Conversation:
    """Returns a conversation, or the latest one of a labeler; a new one if there is none.

    Args:
        opened: The store.
        labeler: Name of the labeler.
        set_name: The set of the items of conversations.
        id: Identifier of the conversation; None for the latest.
        worse: Whether conversations continue with the worse answer.

    Returns:
        The conversation.

    Raises:
        ValueError: The conversation belongs to another labeler.
    """
    with opened.transaction() as db:
        rows = db.execute(
            "SELECT items.id, labelers.name, json_extract(items.metadata, '$.conversation') AS conversation "
            "FROM assignments a JOIN items ON items.id = a.item JOIN labelers ON labelers.number = a.labeler "
            "WHERE items.set_name = ? AND (? IS NULL OR conversation = ?) AND (? IS NOT NULL OR labelers.name = ?) "
            "ORDER BY a.number DESC LIMIT 1",
            (set_name, id, id, id, labeler),
        ).fetchall()
        if not rows:
            if id is not None and not (8 <= len(id) <= 64 and id.replace("-", "").replace("_", "").isalnum()):
                raise ValueError("There is no such conversation.")
            return Conversation(id or new_id(), (), 0, None)
        [row] = rows
        if row["name"] != labeler:
            raise ValueError("There is no such conversation.")
        assignment = opened.assigned(labeler, row["id"])
        said = opened.latest(labeler=labeler, item=row["id"])
    assert assignment is not None
    messages, turn = tuple(dict(each) for each in assignment.item.prompt.messages), assignment.item.metadata["turn"]
    if not said:
        return Conversation(row["conversation"], messages, int(turn), assignment)
    chosen = assignment.item.completions[_chosen(said[-1].judgement, assignment.order, worse=worse)]
    answer = {"role": "assistant", "content": chosen.text}
    return Conversation(row["conversation"], (*messages, answer), int(turn) + 1, None)


def say(
    opened: store.Store,
    labeler: str,
    chat: Conversation,
    message: str,
    *,
    turn: str,
    policy: Policy,
    set_name: str,
    describe: Callable[[str], judgements.Completion],
    domain: str,
) -> None:
    """Adds a message to a conversation, and two answers of the policy as an item that its labeler judges.

    A message that arrives twice is answered once, because its ``turn`` is over.

    Args:
        opened: The store.
        labeler: Name of the labeler.
        chat: The conversation.
        message: The message.
        turn: Number of the message in the form, to recognise one that arrives twice.
        policy: The policy that answers.
        set_name: The set of the items of conversations.
        describe: Returns the completion with a text of the policy.
        domain: What labelers look for, as in `judgements.Prompt`.

    Raises:
        ValueError: The message is empty or too long, an answer has yet to be chosen, or all samples are equal.
    """
    message = message.replace("\r\n", "\n").strip()
    if not message or len(message) > MAX_MESSAGE:
        raise ValueError(f"A message has 1 to {MAX_MESSAGE} characters.")
    if turn != str(chat.turn) or chat.waiting is not None:
        return
    messages = (*chat.messages, {"role": "user", "content": message})
    texts = [policy(messages, 0)]
    for sample in range(1, 1 + TRIES):
        if (text := policy(messages, sample)) != texts[0]:
            texts.append(text)
            break
    else:
        raise ValueError("The assistant has only one answer to this message; write another one.")
    prompt = judgements.Prompt(messages, domain)
    metadata = {"conversation": chat.id, "turn": chat.turn}
    item = judgements.Item(prompt=prompt, completions=tuple(map(describe, texts)), metadata=metadata)
    with opened.transaction(write=True):
        current = find(opened, labeler, set_name, chat.id, worse=False)
        if current.turn == chat.turn and current.waiting is None:
            [id] = opened.add([item], set_name=set_name)
            opened.assign(labeler, set_name=set_name, item=id)


def _chosen(said: judgements.Judgement, order: Sequence[int], *, worse: bool) -> int:
    """Returns the completion with which a conversation continues: without a preference, the first that was shown."""
    vote = 1 - said.vote if worse else said.vote
    return order[0] if vote != vote or vote == 0.5 else int(vote < 0.5)
