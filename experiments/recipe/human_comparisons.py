"""Reads a file of human comparisons, groups them by conversation and trains a tokenizer on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from launch.settings import Data

from rlhf_jax.data import chat, dialogues, errors, readers, records, tokenizers

_ROLES = (dialogues.USER, dialogues.ASSISTANT)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A prompt and two answers, of which ``chosen`` is preferred."""

    prompt: tuple[dialogues.Turn, ...]
    chosen: str
    rejected: str


def read(data: Data, counts: errors.DropCount) -> list[records.Ranking]:
    """Reads the rankings and pairs of ``data.path``, which may have any format that `readers` supports.

    Raises DataError if the file cannot be read or has no usable record.
    """
    assert data.path is not None
    rankings, _ = readers.read_rankings(data.path, counts=counts)
    if not rankings:
        raise errors.DataError(f"{data.path} has no usable record ({counts.report()})")
    return rankings


def pairs(rankings: Iterable[records.Ranking]) -> list[Pair]:
    """Returns all pairs of answers to the same prompt whose ranks differ."""
    return [
        Pair(each.prompt, better, worse)
        for each in rankings
        for i, better in enumerate(each.responses)
        for j, worse in enumerate(each.responses)
        if each.ranks[i] < each.ranks[j]
    ]


def check_roles(rankings: Sequence[records.Ranking]) -> None:
    """Raises DataError if a turn is from neither the user nor the assistant, such as a system turn."""
    for each in rankings:
        for turn in each.prompt:
            if turn.role not in _ROLES:
                raise errors.DataError(
                    f"{each.location}: a turn has the role {turn.role!r}, but the chat format of --folds has only "
                    "user and assistant turns; remove these records"
                )


def conversation_ids(comparisons: Sequence[records.Prompt | records.Ranking | Pair]) -> np.ndarray:
    """Returns a conversation id, counted from 0, for each comparison.

    Comparisons with the same first user turn belong to the same conversation. They must be held out together, because
    the prompts of later turns contain the earlier turns. System turns are ignored, since many conversations share them.
    """
    ids: dict[str, int] = {}
    return np.array([ids.setdefault(_first_user_turn(each.prompt), len(ids)) for each in comparisons])


def _first_user_turn(prompt: tuple[dialogues.Turn, ...]) -> str:
    return next((turn.text for turn in prompt if turn.role == dialogues.USER), prompt[0].text)


def train_chat_format(rankings: Iterable[records.Ranking], vocab_size: int) -> chat.ChatFormat:
    """Trains a tokenizer on the dialogues of ``rankings`` and returns its chat format.

    The format has only user and assistant turns. Other turns are not used for training, and prompts that contain them
    are dropped later.
    """
    texts = [
        dialogues.format_dialogue((*(turn for turn in each.prompt if turn.role in _ROLES), _answer(text)))
        for each in rankings
        for text in each.responses
    ]
    return chat.chat_format(tokenizers.train_bpe(texts, vocab_size=vocab_size))


def encode_dialogues(fmt: chat.ChatFormat, rankings: Iterable[records.Ranking], *, end: int) -> list[list[int]]:
    """Tokenises prompts with their best answers, without a final ``end`` token, which packing adds."""
    encoded = []
    for each in rankings:
        ids, _ = chat.encode_dialogue(fmt, (*each.prompt, _answer(each.responses[0])))
        encoded.append(ids[:-1] if ids[-1] == end else ids)
    return encoded


def _answer(text: str) -> dialogues.Turn:
    return dialogues.Turn(dialogues.ASSISTANT, text)
