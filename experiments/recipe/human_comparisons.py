"""Reads a file of human comparisons, splits them by conversation and trains a tokenizer on them."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import jax
import numpy as np
from launch.settings import Data

from rlhf_jax.data import batching, chat, dialogues, errors, readers, records, sources, tokenizers

_ROLES = (dialogues.USER, dialogues.ASSISTANT)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A prompt and two answers, of which ``chosen`` is preferred."""

    prompt: tuple[dialogues.Turn, ...]
    chosen: str
    rejected: str


Comparison = TypeVar("Comparison", records.Ranking, Pair)


def read(data: Data, counts: errors.DropCount) -> list[records.Ranking]:
    """Reads the rankings and pairs of ``data.path``, which may have any format that `readers` supports.

    Raises DataError if the file cannot be read or has no usable record.
    """
    assert data.path is not None
    rankings, _ = readers.read_rankings(data.path, counts=counts)
    if not rankings:
        raise errors.DataError(f"{data.path} has no usable record ({counts.report()})")
    return rankings


def read_prompts(
    data: Data, counts: errors.DropCount, key: jax.Array, *, warn: Callable[[str], None]
) -> tuple[list[records.Prompt], list[records.Prompt]]:
    """Returns the prompts of --data.prompts for RL, and the share --data.held-out of them for evaluation."""
    assert data.prompts is not None
    found, _ = readers.read_prompts(data.prompts, counts=counts)
    if not found:
        raise errors.DataError(f"{data.prompts} has no usable record ({counts.report()})")
    return split(dataclasses.replace(data, path=data.prompts), found, key, warn=warn)  # type: ignore[type-var]


def read_texts(data: Data, key: jax.Array) -> tuple[list[str], list[str]]:
    """Returns the documents of --data.pretraining, and the share --data.held-out of them for evaluation."""
    assert data.pretraining is not None
    texts: list[str] = []
    for path in sources.expand_paths(data.pretraining):
        if str(path).endswith(".txt"):
            try:
                text = pathlib.Path(path).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise errors.DataError(f"cannot read {path}: {error}") from error
            texts += filter(None, (part.strip() for part in re.split(r"\n\s*\n", text)))
            continue
        for record in sources.raw_records(str(path), fields="text"):
            if not isinstance(text := record.fields.get("text"), str):
                raise errors.DataError(f"{record.location}: the record has no field 'text' with a document")
            texts.append(text)
    try:
        parts = batching.split(len(texts), fraction=data.held_out, key=key)
    except ValueError as error:
        raise errors.DataError(
            f"{data.pretraining} has {errors.counted(len(texts), 'documents')}, too few for --data.held-out "
            f"{data.held_out}"
        ) from error
    train, held_out = ([texts[i] for i in part] for part in parts)
    return train, held_out


def pairs(rankings: Iterable[records.Ranking]) -> list[Pair]:
    """Returns all pairs of answers to the same prompt whose ranks differ, as texts."""
    return [
        Pair(each.prompt, dialogues.answer_text(better), dialogues.answer_text(worse))
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


def split(
    data: Data, comparisons: Sequence[Comparison], key: jax.Array, *, warn: Callable[[str], None]
) -> tuple[list[Comparison], list[Comparison]]:
    """Returns training comparisons and the share --data.held-out of comparisons, without dividing a conversation.

    ``warn`` is called with a message if the share cannot be had. Raises DataError if a part would be empty.
    """
    n, conversation_N = len(comparisons), conversation_ids(comparisons, warn=warn)
    try:
        parts = batching.split(n, fraction=data.held_out, key=key, group_N=conversation_N)
    except ValueError as error:
        raise errors.DataError(
            f"{data.path} has {errors.counted(n, 'comparisons')}, too few for --data.held-out "
            f"{data.held_out}; add records or change the share"
        ) from error
    held_out = len(parts[1])
    if abs(held_out - n * data.held_out) > max(1.0, 0.1 * n * data.held_out):
        warn(
            f"the share of held-out comparisons is {held_out / n:.1%} ({held_out} of {n}), although --data.held-out is "
            f"{data.held_out}, because conversations are not divided and the largest has "
            f"{errors.counted(np.bincount(conversation_N).max(), 'comparisons')}"
        )
    train, test = ([comparisons[i] for i in part] for part in parts)
    return train, test


def conversation_ids(
    comparisons: Sequence[records.Prompt | Pair], *, warn: Callable[[str], None] = lambda text: None
) -> np.ndarray:
    """Returns a conversation id, counted from 0, for each comparison; at least two comparisons have different ids.

    Comparisons belong to the same conversation if their turns are equal up to and including the first user turn, such
    as a system turn and a question. They must be held out together, because the prompts of later turns contain the
    earlier turns. If all comparisons begin alike, the id is that of the whole prompt, and if all prompts are equal,
    that of the comparison; ``warn`` is then called with a message.
    """
    ids = _number([_opening(each.prompt) for each in comparisons])
    if ids.any() or len(ids) < 2:
        return ids
    ids = _number([each.prompt for each in comparisons])
    start = f"all {len(ids)} comparisons have the same"
    if ids.any():
        warn(f"{start} first question, so they are divided by their whole prompts, which share earlier turns")
        return ids
    warn(f"{start} prompt, so they are divided as if they were different conversations: no prompt is held out")
    return np.arange(len(ids))


def _opening(prompt: tuple[dialogues.Turn, ...]) -> tuple[dialogues.Turn, ...]:
    roles = [turn.role for turn in prompt]
    return prompt[: 1 + (roles.index(dialogues.USER) if dialogues.USER in roles else 0)]


def _number(keys: Iterable[tuple[dialogues.Turn, ...]]) -> np.ndarray:
    """Numbers different keys from 0 in order of appearance."""
    ids: dict[tuple[dialogues.Turn, ...], int] = {}
    return np.array([ids.setdefault(key, len(ids)) for key in keys], int)


def fold_indices(group_N: np.ndarray, folds: int, *, seed: int) -> list[np.ndarray]:
    """Returns the indices of the test comparisons of each fold, none of which is empty.

    The groups in ``group_N``, of which there must be at least ``folds``, are shuffled and never divided. A group that
    is larger than a fold is a fold on its own; the sizes of the others are as equal as the groups allow.
    """
    groups = np.random.default_rng([seed, 17]).permutation(int(group_N.max()) + 1)
    sizes = np.bincount(group_N)[groups]
    if len(groups) < folds:
        raise ValueError(f"{len(groups)} groups cannot be divided into {folds} folds")
    fold_G, left = np.full(len(groups), -1), len(group_N)
    for alone, large in enumerate(np.argsort(-sizes, kind="stable")):
        if sizes[large] * (folds - alone) <= left:
            break
        fold_G[groups[large]], left = alone, left - sizes[large]
    rest = fold_G[groups] < 0
    groups, sizes = groups[rest], sizes[rest]
    fold_G[groups] = alone + (np.cumsum(sizes) - sizes) * (folds - alone) // left
    return [np.flatnonzero(fold_G[group_N] == fold) for fold in range(folds)]


def train_chat_format(rankings: Iterable[records.Ranking], vocab_size: int) -> chat.ChatFormat:
    """Trains a tokenizer on the dialogues of ``rankings`` and returns its chat format.

    The format has only user and assistant turns. Other turns are not used for training, and prompts that contain them
    are dropped later.
    """
    texts = [
        dialogues.format_dialogue((*(turn for turn in each.prompt if turn.role in _ROLES), _answer(answer)))
        for each in rankings
        for answer in map(dialogues.answer_text, each.responses)
    ]
    return chat.chat_format(tokenizers.train_bpe(texts, vocab_size=vocab_size))


def encode_dialogues(fmt: chat.ChatFormat, rankings: Iterable[records.Ranking], *, end: int) -> list[list[int]]:
    """Tokenises prompts with their best answers, without a final ``end`` token, which packing adds.

    Dialogues that the chat template rejects, which are dropped when their rows are made, are missing.
    """
    encoded = []
    for each in rankings:
        turns = (*each.prompt, dialogues.answer_turn(each.responses[0]))
        with contextlib.suppress(errors.DataError):
            ids, _ = chat.encode_dialogue(fmt, turns, train_on="last", tools=each.tools)
            encoded.append(ids[:-1] if ids[-1] == end else ids)
    return encoded


def _answer(text: str) -> dialogues.Turn:
    return dialogues.Turn(dialogues.ASSISTANT, text)
