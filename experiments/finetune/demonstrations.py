"""Reads demonstrations and encodes them as rows for supervised fine-tuning, padded or packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from launch.run_settings import SettingError
from recipe import human_comparisons

from rlhf_jax.data import batching, chat, dialogues, errors, packing, readers, records, sources, tokenizers
from rlhf_jax.train import sft

TrainOn = Literal["last", "all", "everything"]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Conversations as token ids, each with a mask of the tokens to learn."""

    ids: list[list[int]]
    learnt: list[list[bool]]
    records: list[records.Demonstration]

    def at(self, indices: Sequence[int] | np.ndarray) -> Encoded:
        """Returns the conversations with these indices."""
        return Encoded(*([values[i] for i in indices] for values in (self.ids, self.learnt, self.records)))  # pyright: ignore[reportArgumentType]


def read(path: str, counts: errors.DropCount) -> tuple[list[records.Demonstration], bool]:
    """Reads all demonstrations of a file or, if its first record is a comparison, prompts with their preferred answers.

    Returns:
        ``(demonstrations, preferred)``; ``preferred`` is whether the answers are those of comparisons.

    Raises:
        DataError: The file cannot be read, or has no usable record.
    """
    first = next(iter(sources.raw_records(path)), None)
    preferred = first is not None and ({"chosen", "rejected"} <= set(first.fields) or "responses" in first.fields)
    found: list[records.Demonstration] = []
    if preferred:
        rankings, _ = readers.read_rankings(path, counts=counts)
        for each in rankings:
            shared = {field.name: getattr(each, field.name) for field in dataclasses.fields(records.Prompt)}
            found.append(records.Demonstration(response=each.responses[0], **shared))
    else:
        found, _ = readers.read_demonstrations(path, counts=counts)
    if not found:
        raise errors.DataError(f"{path} has no usable record ({counts.report()})")
    return found, preferred


def train_chat_format(found: Sequence[records.Demonstration], vocab_size: int) -> chat.ChatFormat:
    """Trains a tokenizer on demonstrations; the format has only user and assistant turns."""
    texts = [
        dialogues.format_dialogue((*each.prompt, dialogues.Turn(dialogues.ASSISTANT, each.response)))
        for each in found
        if isinstance(each.response, str)
    ]
    return chat.chat_format(tokenizers.train_bpe(texts, vocab_size=vocab_size))


def encode(
    fmt: chat.ChatFormat,
    found: Sequence[records.Demonstration],
    *,
    width: int | None,
    max_width: int,
    train_on: TrainOn,
    counts: errors.DropCount,
) -> tuple[Encoded, int]:
    """Encodes conversations as at most ``width`` tokens each.

    Longer conversations first lose their oldest turns, then the end of their answer. They are counted, as are
    conversations that the chat template rejects and those of which no token to learn is left, which are dropped.

    Args:
        fmt: The chat format.
        found: Demonstrations.
        width: Maximum number of tokens. None is the width that holds 99 % of the conversations, at most ``max_width``.
        max_width: Maximum length of the model.
        train_on: The tokens to learn: the ``last`` answer, ``all`` answers, or ``everything``, prompts too.
        counts: Counts dropped and truncated records.

    Returns:
        ``(encoded, width)``.
    """
    stage = counts.stage()
    whole: list[tuple[int, list[int], list[bool]]] = []
    for i, record in enumerate(found):
        try:
            ids, learnt = _dialogue(fmt, record, record.prompt, train_on)
        except errors.DataError:
            stage.drop("refused by the chat template")
            continue
        whole.append((i, ids, learnt))
    width = width or _fitting_width([len(ids) for _, ids, _ in whole], max_width)
    kept: list[tuple[int, list[int], list[bool]]] = []
    for i, ids, learnt in whole:
        if len(ids) > width:
            ids, learnt = _shortened(fmt, found[i], ids, learnt, width, train_on)
            stage.truncate("answer truncated" if len(ids) > width else "prompt turns dropped")
            ids, learnt = ids[:width], learnt[:width]
        if any(learnt[1:]):
            kept.append((i, ids, learnt))
        else:
            stage.drop("prompt too long")
    if (n := stage.dropped.get("prompt too long", 0)) > counts.max_dropped * len(found):
        raise errors.DataError(
            f"{n} of {errors.counted(len(found), 'conversations')} leave no room for an answer within {width} "
            "tokens; raise --data.width"
        )
    counts.add(stage, records=len(found), source="demonstrations")
    if not kept:
        raise errors.DataError(f"no demonstration is usable ({counts.report()})")
    return Encoded([x[1] for x in kept], [x[2] for x in kept], [found[x[0]] for x in kept]), width


def _dialogue(
    fmt: chat.ChatFormat, record: records.Demonstration, prompt: Any, train_on: TrainOn
) -> tuple[list[int], list[bool]]:
    turns = (*prompt, dialogues.answer_turn(record.response))
    ids, learnt = chat.encode_dialogue(fmt, turns, train_on="last" if train_on == "last" else "all", tools=record.tools)
    return ids, [True] * len(ids) if train_on == "everything" else learnt


def _shortened(
    fmt: chat.ChatFormat,
    record: records.Demonstration,
    ids: list[int],
    learnt: list[bool],
    width: int,
    train_on: TrainOn,
) -> tuple[list[int], list[bool]]:
    """Removes the oldest turns, except system turns, until the conversation fits or one question is left."""
    users = [i for i, turn in enumerate(record.prompt) if turn.role == dialogues.USER]
    first = next((i for i, turn in enumerate(record.prompt) if turn.role in (dialogues.USER, dialogues.ASSISTANT)), 0)
    for start in users[1:]:
        ids, learnt = _dialogue(fmt, record, (*record.prompt[:first], *record.prompt[start:]), train_on)
        if len(ids) <= width:
            break
    return ids, learnt


def _fitting_width(lengths: Sequence[int], max_width: int) -> int:
    if not lengths:
        raise errors.DataError("the chat template rejects every record")
    return min(max_width, -(-int(np.quantile(lengths, 0.99, method="higher")) // 32) * 32)


def split(encoded: Encoded, fraction: float, key: jax.Array, *, flag: str) -> tuple[Encoded, Encoded]:
    """Returns training and held-out conversations, without dividing conversations with the same first question."""
    if fraction == 0:
        return encoded, encoded.at([])
    try:
        parts = batching.split(
            len(encoded.ids),
            fraction=fraction,
            key=key,
            group_N=human_comparisons.conversation_ids(encoded.records),
        )
    except ValueError as error:
        raise cannot_split(len(encoded.ids), fraction, flag=flag, things="conversations") from error
    return encoded.at(parts[0]), encoded.at(parts[1])


def cannot_split(n: int, fraction: float, *, flag: str, things: str) -> SettingError:
    """Returns the error for ``n`` things of which a fraction cannot be held out, because one part would be empty."""
    if 1 < n == round(n * fraction):
        return SettingError(f"{flag} is {fraction:g}, which leaves none of {n} {things} to train on; lower it")
    return SettingError(
        f"{flag} is {fraction:g}, but the file has too few {things} to hold any out; add {things} or set it to 0"
    )


def rows(encoded: Encoded, *, width: int, pad_id: int, packed: bool) -> sft.TokenBatch:
    """Returns the conversations as rows of ``width`` tokens: one per row or, if ``packed``, several."""
    if packed:
        made = packing.pack(encoded.ids, encoded.learnt, width=width, pad_id=pad_id, counts=errors.DropCount())
        return sft.TokenBatch(made.tokens_BL, made.mask_BL, made.loss_mask_BL, made.segments_BL)
    shape = len(encoded.ids), width
    tokens_BL = np.full(shape, pad_id, np.int32)
    mask_BL, loss_mask_BL = np.zeros(shape, bool), np.zeros(shape, bool)
    for row, (ids, learnt) in enumerate(zip(encoded.ids, encoded.learnt)):
        tokens_BL[row, : len(ids)], mask_BL[row, : len(ids)], loss_mask_BL[row, : len(ids)] = ids, True, learnt
    return sft.TokenBatch(tokens_BL, mask_BL, loss_mask_BL)
