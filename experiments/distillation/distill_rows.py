"""Rows of text for distillation: dialogues, and pretraining text after the start of a user turn."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from finetune import demonstrations
from launch.run_settings import SettingError
from launch.settings import Data
from recipe import human_comparisons, tasks

from distillation import distill_settings
from distillation.distill_settings import OwnDistillSettings
from rlhf_jax import types
from rlhf_jax.data import chat, errors, packing, plain_text

_MARK = "TEXT"


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows as token ids, of which the first ``n_train`` are for training and the others are held out."""

    ids: list[list[int]]
    n_train: int
    clusters: list[int]
    """For each held-out row, the number of its conversation or of the document in which it starts; rows with the same
    number are not independent."""

    def digest(self) -> str:
        """Returns a SHA-256 of the token ids, on which the chat template and its options have an effect."""
        found = hashlib.sha256()
        for ids in self.ids:
            found.update(np.asarray([len(ids), *ids], "<i8").tobytes())
        return found.hexdigest()


class Made(NamedTuple):
    """The rows of a file of dialogues and a file of pretraining text."""

    rows: Rows
    width: int
    """Maximum number of tokens in a row."""
    notes: list[str]
    """Warnings about the data."""
    remark: str
    """A line to print about the data; none if empty."""


def user_turn(fmt: chat.ChatFormat) -> list[int]:
    """Returns the ids with which a user turn starts, such as those of "Human:" and what a template writes before it."""
    text = fmt.renderer.render([{"role": "user", "content": _MARK}], prompt=False)
    return plain_text.encode_rendered(fmt.tokenizer, [text[: text.index(_MARK)]])[0]


def text_rows(fmt: chat.ChatFormat, texts: Sequence[str], *, width: int) -> tuple[list[list[int]], list[int]]:
    """Returns rows of ``width`` tokens: the start of a user turn, followed by pretraining text (Bai et al. 2022, A.1).

    The documents are concatenated with the end token between them. Tokens that do not fill a row are left out.

    Returns:
        The rows, and for each row the index of the document in which it starts.
    """
    start = user_turn(fmt)
    if width <= len(start):
        raise SettingError(f"--data.width is {width}; it must be above {len(start)}, the start of a user turn")
    end, documents = tasks.document_end(fmt), plain_text.encode_texts(fmt.tokenizer, texts)
    documents = [ids[:-1] if ids and ids[-1] == end else ids for ids in documents]
    size, ends_N = width - len(start), np.cumsum([len(ids) + 1 for ids in documents])
    if not documents or ends_N[-1] < size:
        return [], []
    packed_BL, _ = packing.pack_documents(documents, width=size, eos_id=end)
    first_B = np.searchsorted(ends_N, size * np.arange(len(packed_BL)), side="right")
    return [[*start, *row] for row in packed_BL.tolist()], first_B.tolist()


def dialogues(
    settings: OwnDistillSettings, fmt: chat.ChatFormat, counts: errors.DropCount, key: jax.Array, *, max_width: int
) -> tuple[demonstrations.Encoded, demonstrations.Encoded, int, bool]:
    """Reads and encodes the dialogues of --data.path.

    Args:
        settings: The settings of the command.
        fmt: The chat format of the student.
        counts: Counts unusable records.
        key: Decides which conversations are held out.
        max_width: Maximum number of tokens in a row.

    Returns:
        ``(train, held_out, width, preferred)``; ``preferred`` is whether the answers are those of comparisons.
    """
    data = settings.data
    assert data.path is not None
    found, preferred = demonstrations.read(data.path, counts)
    encoded, width = demonstrations.encode(
        fmt, found, width=data.width, max_width=max_width, train_on="everything", counts=counts
    )
    held_out = distill_settings.kept(settings).held_out
    return *demonstrations.split(encoded, held_out, key, flag="--data.held-out"), width, preferred


def make(
    settings: OwnDistillSettings, fmt: chat.ChatFormat, counts: errors.DropCount, key: jax.Array, *, max_width: int
) -> Made:
    """Reads the data and returns all rows, in the order of the teacher's file.

    Args:
        settings: The settings of the command.
        fmt: The chat format of the student.
        counts: Counts unusable records.
        key: Decides which rows are held out.
        max_width: Maximum number of tokens in a row.
    """
    train, held_out, width, preferred = dialogues(settings, fmt, counts, key, max_width=max_width)
    parts, notes = ([train.ids, held_out.ids], [])
    clusters = human_comparisons.conversation_ids(held_out.records).tolist() if held_out.ids else []
    if settings.data.pretraining is not None:
        mix, texts = distill_settings.kept(settings).mix, _texts(settings, jax.random.fold_in(key, 1))
        for part, (mine, documents) in enumerate(zip((train.ids, held_out.ids), texts)):
            wanted = round(len(mine) * mix / (1 - mix))
            rows, first = text_rows(fmt, documents, width=width) if wanted else ([], [])
            rows, first = rows[:wanted], first[:wanted]
            if len(rows) < wanted:
                name = ("training", "held-out")[part]
                share = len(rows) / (len(rows) + len(mine))
                notes.append(
                    f"{share:.1%} of the {name} rows are pretraining text instead of --mix {mix:g}: "
                    f"--data.pretraining has text for {errors.counted(len(rows), 'rows')} of {wanted}"
                )
            parts[part] = mine + rows
            if part == 1:
                used = max(clusters, default=-1) + 1
                clusters += [used + document for document in first]
    remark = "the file has comparisons; their preferred answers end the dialogues" if preferred else ""
    return Made(Rows(parts[0] + parts[1], len(parts[0]), clusters), width, notes, remark)


def _texts(settings: OwnDistillSettings, key: jax.Array) -> tuple[list[str], list[str]]:
    """Returns the training and held-out documents of --data.pretraining."""
    path, held_out = settings.data.pretraining, distill_settings.kept(settings).held_out
    if held_out == 0:
        whole = human_comparisons.read_texts(Data(pretraining=path, held_out=0.5), key)
        return whole[0] + whole[1], []
    return human_comparisons.read_texts(Data(pretraining=path, held_out=held_out), key)


def padded(rows: Sequence[Sequence[int]], *, width: int, pad_id: int) -> types.TokenBatch:
    """Returns right-padded rows; the loss is on all tokens except the first, which the student cannot predict."""
    tokens_BL = np.full((len(rows), width), pad_id, np.int32)
    mask_BL = np.zeros(tokens_BL.shape, bool)
    for row, ids in enumerate(rows):
        tokens_BL[row, : len(ids)], mask_BL[row, : len(ids)] = ids, True
    loss_mask_BL = mask_BL.copy()
    loss_mask_BL[:, 0] = False
    return types.TokenBatch(tokens_BL, mask_BL, loss_mask_BL)  # type: ignore[arg-type]
