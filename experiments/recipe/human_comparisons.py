"""A file of human comparisons: reading it, what in it belongs together, and the tokenizer that is made for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from launch.settings import Data

from rlhf_jax.data import chat, dialogues, errors, readers, records, tokenizers

_SPEAKERS = (dialogues.USER, dialogues.ASSISTANT)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the first preferred."""

    prompt: tuple[dialogues.Turn, ...]
    chosen: str
    rejected: str


def read(data: Data, counts: errors.DropCount) -> list[records.Ranking]:
    """The rankings and pairs of ``data.path``, in any form and from any kind of file that `readers` knows.

    Raises DataError for a file that cannot be used, one without a record that can be included.
    """
    assert data.path is not None
    found, _ = readers.read_rankings(data.path, counts=counts)
    if not found:
        raise errors.DataError(f"{data.path}: no record is left to learn from ({counts.report()})")
    return found


def pairs(found: Iterable[records.Ranking]) -> list[Pair]:
    """Every two answers of a prompt that differ in rank, the better first, in the order of the records."""
    return [
        Pair(each.prompt, better, worse)
        for each in found
        for i, better in enumerate(each.responses)
        for j, worse in enumerate(each.responses)
        if each.ranks[i] < each.ranks[j]
    ]


def only_two_speak(found: Sequence[records.Ranking]) -> None:
    """Raise DataError for a turn that the chat format made for a file does not have, such as the system's."""
    for each in found:
        for turn in each.prompt:
            if turn.role not in _SPEAKERS:
                raise errors.DataError(
                    f"{each.location}: a turn has the role {turn.role!r}; --folds trains a tokenizer of its own, whose "
                    "chat format has a user and an assistant"
                )


def conversations(found: Sequence[records.Ranking | Pair]) -> np.ndarray:
    """A number from 0 for each comparison, one for all that open with the same human turn.

    Files hold several turns of one conversation as comparisons of their own, the earlier within the prompts of the
    later: to be held out they have to go together. System turns, which many conversations share, do not count.
    """
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(_opening(each.prompt), len(numbers)) for each in found])


def _opening(prompt: tuple[dialogues.Turn, ...]) -> str:
    return next((turn.text for turn in prompt if turn.role == dialogues.USER), prompt[0].text)


def trained_format(found: Iterable[records.Ranking], vocab_size: int) -> chat.ChatFormat:
    """The chat format of a tokenizer made for the file, from its training dialogues.

    It has a user and an assistant; what others say in prompts is left out, as those prompts will be.
    """
    texts = [
        dialogues.format_dialogue((*(turn for turn in each.prompt if turn.role in _SPEAKERS), _answer(text)))
        for each in found
        for text in each.responses
    ]
    return chat.chat_format(tokenizers.train_bpe(texts, vocab_size=vocab_size))


def whole_dialogues(fmt: chat.ChatFormat, found: Iterable[records.Ranking], *, end: int) -> list[list[int]]:
    """Prompts with their best answers; ``end``, the token that ends a document, is left to the packing."""
    whole = []
    for each in found:
        ids, _ = chat.encode_dialogue(fmt, (*each.prompt, _answer(each.responses[0])))
        whole.append(ids[:-1] if ids[-1] == end else ids)
    return whole


def _answer(text: str) -> dialogues.Turn:
    return dialogues.Turn(dialogues.ASSISTANT, text)
