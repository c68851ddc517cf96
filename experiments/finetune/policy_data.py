"""Reads the prompts on which a policy is trained, and the rows of PPO-ptx's pretraining loss."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from launch import initial_model
from recipe import human_comparisons, tasks

from finetune import answers, comparisons, demonstrations
from rlhf_jax.data import batching, chat, errors, packing, padding, plain_text, readers, records, sources
from rlhf_jax.types import TokenBatch

MOST_HELD_OUT = 256
"""Maximum number of prompts on which a policy is evaluated."""
_FEW = 16
"""Number of training prompts below which there is a warning if more prompts are held out."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Left-padded prompts with their records."""

    tokens_BP: np.ndarray
    mask_BP: np.ndarray
    records: list[records.Prompt]
    asked_B: np.ndarray
    """Number of each prompt's conversation. Numbers about prompts of the same conversation are not independent."""

    def __len__(self) -> int:
        """Returns the number of prompts."""
        return len(self.records)

    def at(self, rows: Sequence[int] | np.ndarray) -> Prompts:
        """Returns the prompts with these indices."""
        rows = np.asarray(rows, np.int64)
        return Prompts(self.tokens_BP[rows], self.mask_BP[rows], [self.records[i] for i in rows], self.asked_B[rows])


def read_prompts(
    model: initial_model.InitialModel,
    path: str,
    *,
    width: int | None,
    max_new_tokens: int,
    counts: errors.DropCount,
) -> tuple[Prompts, str | None]:
    """Reads and encodes the prompts of a file, and returns them with a warning if many exceed ``width``.

    Prompts with equal tokens but different columns, which a reward function gets, differ in the id in their first
    column, which is padding and thus has no effect. All but the first of them are dropped only if the model's maximum
    length leaves no column for padding.

    Args:
        model: The policy.
        path: The file.
        width: Maximum number of tokens of a prompt; None is the width that holds 99 % of them.
        max_new_tokens: Maximum number of tokens of an answer.
        counts: Counts unusable prompts; those that do not fit do not count towards its limit.

    Raises:
        SettingError: The model is too short for a prompt and its answer.
        DataError: Too many prompts are unusable, or none is left.
    """
    found, _ = readers.read_prompts(path, counts=counts)
    limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "flag": "--policy"}
    encoded = answers.encode_prompts(model, found, width=None, counts=errors.DropCount(max_dropped=1.0), **limits)
    lengths_N = np.array([len(ids) for ids in encoded.ids])
    note = None if width is None else comparisons.cut_warning("prompts", "--prompt-width", lengths_N, width)
    if width is None:
        limit = model.cfg.max_length - max_new_tokens
        width = min(limit, -(-int(np.quantile(lengths_N, 0.99, method="higher")) // 8) * 8)
    fitting = errors.DropCount(max_dropped=1.0)
    encoded = answers.encode_prompts(model, found, width=width, counts=fitting, **limits)
    number_N = _numbers(encoded)
    length_N = np.array([len(ids) for ids in encoded.ids])
    if ((number_N > 0) & (length_N == width)).any() and width + max_new_tokens < model.cfg.max_length:
        width += 1
    kept = np.flatnonzero((number_N == 0) | (length_N < width))
    for _ in range(len(number_N) - len(kept)):
        fitting.drop("same tokens as another prompt with other columns")
    counts.max_dropped = 1.0
    counts.add(fitting, records=len(found), source=path)
    chosen = [encoded.records[i] for i in kept]
    tokens_BP, mask_BP = padding.pad_prompts([encoded.ids[i] for i in kept], width=width, pad_id=model.fmt.pad_id)
    tokens_BP[:, 0] = np.where(mask_BP[:, 0], tokens_BP[:, 0], number_N[kept])
    return Prompts(tokens_BP, mask_BP, chosen, human_comparisons.conversation_ids(chosen)), note


def _numbers(encoded: answers.Prompts) -> np.ndarray:
    """Returns the number of each record, counted from 0, among the different records with the same tokens."""
    found: dict[tuple[int, ...], dict[str, int]] = {}
    numbers = []
    for ids, record in zip(encoded.ids, encoded.records):
        same = found.setdefault(tuple(ids), {})
        numbers.append(same.setdefault(repr((record.prompt, sorted(record.metadata.items()))), len(same)))
    return np.array(numbers, np.int32)


def split(prompts: Prompts, fraction: float, key: jax.Array) -> tuple[Prompts, Prompts]:
    """Returns training and held-out prompts, without dividing conversations with the same first question."""
    if fraction == 0:
        return prompts, prompts.at([])
    fraction = min(fraction, MOST_HELD_OUT / len(prompts))
    try:
        parts = batching.split(len(prompts), fraction=fraction, key=key, group_N=prompts.asked_B)
    except ValueError as error:
        raise demonstrations.cannot_split(len(prompts), fraction, flag="--held-out", things="prompts") from error
    return prompts.at(parts[0]), prompts.at(parts[1])


def few_left(train: Prompts, held_out: Prompts) -> list[str]:
    """Returns a warning if very few prompts are left to train on, because most are held out."""
    n = len(train) + len(held_out)
    if len(train) >= min(_FEW, len(held_out)):
        return []
    return [f"{len(held_out)} of {n} prompts are held out, so the policy is trained on {len(train)}; lower --held-out"]


def read_ptx(fmt: chat.ChatFormat, path: str, *, width: int) -> TokenBatch:
    """Reads the rows of PPO-ptx: text, in which all tokens are learnt, or demonstrations, of which answers are learnt.

    Raises:
        DataError: The file is unusable or too short for a row.
    """
    if (texts := _texts(path)) is not None:
        ids = plain_text.encode_texts(fmt.tokenizer, texts)
        if (n := sum(len(each) + 1 for each in ids)) < width:
            raise errors.DataError(
                f"--ptx {path} has {errors.counted(n, 'tokens')}, fewer than a row, which has {width}; add text"
            )
        return tasks.text_batch(packing.pack_documents(ids, width=width, eos_id=tasks.document_end(fmt))[0])
    counts = errors.DropCount(max_dropped=1.0)
    found, _ = demonstrations.read(path, counts)
    encoded, _ = demonstrations.encode(fmt, found, width=width, max_width=width, train_on="last", counts=counts)
    return demonstrations.rows(encoded, width=width, pad_id=fmt.pad_id, packed=True)


def _texts(path: str) -> list[str] | None:
    """Returns the texts of a .txt file or of records with a field ``text``; None for other records."""
    if path.endswith(".txt"):
        try:
            return [pathlib.Path(file).read_text(encoding="utf-8") for file in sources.expand_paths(path)]
        except (OSError, UnicodeDecodeError) as error:
            raise errors.DataError(f"--ptx {path} cannot be read: {error}") from error
    texts = []
    for raw in sources.raw_records(path, fields="text, or the fields of demonstrations"):
        if raw.flaw is not None or "text" not in raw.fields:
            return None
        try:
            texts.append(sources.require_text(raw.fields["text"], "text"))
        except (errors.UnusableRecord, errors.DataError) as error:
            raise errors.DataError(f"{raw.location}: {error}") from None
    return texts
