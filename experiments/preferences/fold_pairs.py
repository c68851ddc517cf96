"""Pairs of answers for the cross-validation: encoding, packing, and comparisons that need no labels.

A comparison without a label is that of an assistant turn with a turn of another conversation, for preference-model
pretraining (PMP). Which answer of a pair was preferred is not used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from recipe import human_comparisons

from preferences.reward_settings import CrossValidation
from rlhf_jax import types
from rlhf_jax.data import chat, dialogues, errors, packing


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Pairs as token ids: N prompts, N chosen answers and N rejected answers."""

    prompts: list[list[int]]
    answers: tuple[list[list[int]], list[list[int]]]

    def __len__(self) -> int:
        """Returns the number of pairs."""
        return len(self.prompts)


def encode(fmt: chat.ChatFormat, pairs: Sequence[human_comparisons.Pair], settings: CrossValidation) -> Encoded:
    """Tokenises pairs. A long prompt keeps its last tokens; a long answer keeps its first tokens and its end-of-turn
    token."""
    counts = errors.DropCount(max_dropped=1.0)
    turns = [pair.prompt for pair in pairs]
    prompts, kept = chat.encode_prompts(fmt, turns, width=1 << 30, counts=counts)
    assert len(kept) == len(pairs)
    T = settings.response_width

    def truncate(ids: list[int]) -> list[int]:
        return ids if len(ids) <= T else [*ids[: T - 1], ids[-1]]

    chosen, rejected = (
        list(map(truncate, chat.encode_answers(fmt, turns, [getattr(pair, side) for pair in pairs])))
        for side in ("chosen", "rejected")
    )
    return Encoded([ids[-settings.prompt_width :] for ids in prompts], (chosen, rejected))


def pack_pairs(
    pairs: Encoded,
    rows: np.ndarray,
    *,
    width: int,
    pad_id: int,
    n_rows: int | None = None,
    dropped: float = 0.0,
    rng: np.random.Generator | None = None,
) -> types.PackedComparisons:
    """Packs the pairs with indices ``rows`` into ``n_rows`` rows (None: as many as needed) of ``width`` tokens.

    With ``rng``, each token of a sequence except the last is dropped with probability ``dropped``.
    """
    sequences = []
    for i in rows:
        for answers in pairs.answers:
            ids = np.array(pairs.prompts[i] + answers[i], np.int32)
            if rng is not None:
                ids = ids[np.append(rng.random(len(ids) - 1) >= dropped, True)]
            sequences.append(ids)
    batch = packing.pack(sequences, width=width, pad_id=pad_id, counts=errors.DropCount(), rows=n_rows)  # type: ignore[arg-type]
    n = len(rows)
    return types.PackedComparisons(
        batch.tokens_BL,  # type: ignore[arg-type]
        batch.segments_BL,  # type: ignore[arg-type]
        jax.tree.map(lambda x: x.reshape(n, 2), batch.places),
        np.tile(np.array([1, 2], np.int32), (n, 1)),  # type: ignore[arg-type]
        np.ones((n, 2), bool),  # type: ignore[arg-type]
    )


def rows_for(batches: Sequence[tuple[Encoded, np.ndarray]], width: int) -> int:
    """Returns a number of packed rows that holds each batch, a multiple of 8, so that folds can share programs."""
    most = 0
    for pairs, rows in batches:
        lengths = [len(pairs.prompts[i]) + len(side[i]) for i in rows for side in pairs.answers]
        most = max(most, 1 + max(row for row, _ in packing.best_fit(lengths, width=width)))
    # Best-fit packing may need one more row after tokens are dropped.
    return -(-(most + 1) // 8) * 8


def chunks(n: int, size: int) -> list[np.ndarray]:
    """Splits ``range(n)`` into chunks of equal size; the last chunk repeats the last index."""
    return [np.minimum(np.arange(start, start + size), n - 1) for start in range(0, n, size)]


def assistant_turns(
    pairs: Sequence[human_comparisons.Pair],
) -> list[tuple[tuple[dialogues.Turn, ...], str, int]]:
    """Returns all assistant turns of the dialogues, each once, as ``(preceding turns, text, conversation)``.

    Of the answers to the last turn of a pair, both the chosen and the rejected one are assistant turns.
    """
    found: dict[tuple[tuple[dialogues.Turn, ...], str], int] = {}
    for pair, conversation in zip(pairs, human_comparisons.conversation_ids(pairs).tolist()):
        for i, turn in enumerate(pair.prompt):
            if turn.role == dialogues.ASSISTANT:
                found.setdefault((pair.prompt[:i], turn.text), conversation)
        for answer in (pair.chosen, pair.rejected):
            found.setdefault((pair.prompt, answer), conversation)
    return [(*turn, conversation) for turn, conversation in found.items() if turn[0] and turn[1].strip()]


def compare_turns(
    pairs: Sequence[human_comparisons.Pair], n: int, rng: np.random.Generator
) -> list[human_comparisons.Pair]:
    """Returns ``n`` comparisons of an assistant turn, as ``chosen``, with a turn of another conversation.

    The turns are shuffled; if there are fewer than ``n``, each is compared with several others.

    Args:
        pairs: Pairs of at least two conversations.
        n: Number of comparisons.
        rng: Random generator, whose state advances.
    """
    turns = assistant_turns(pairs)
    conversation_N = np.array([conversation for *_, conversation in turns])
    if len(np.unique(conversation_N)) < 2:
        raise ValueError("comparisons without labels need turns of at least two conversations")
    order = np.concatenate([rng.permutation(len(turns)) for _ in range(-(-n // len(turns)))])[:n]
    made = []
    for i in order.tolist():
        prompt, text, conversation = turns[i]
        other = int(rng.integers(len(turns)))
        while conversation_N[other] == conversation:
            other = int(rng.integers(len(turns)))
        made.append(human_comparisons.Pair(prompt, text, turns[other][1]))
    return made


def mark(pairs: Encoded, *, good_id: int, bad_id: int, prompt_width: int) -> Encoded:
    """Returns the binarised form of pairs, twice as many (Askell et al. 2021).

    The pair ``A > B`` becomes "A marked GOOD > A marked BAD" and "B marked BAD > B marked GOOD", as in
    `comparison_transforms.add_control_tokens`. The mark is a control token before the answer. Prompts lose their first
    token if they would be longer than ``prompt_width`` with the mark.

    Args:
        pairs: The pairs.
        good_id: Id of the control token GOOD.
        bad_id: Id of the control token BAD.
        prompt_width: Maximum number of tokens of a prompt with the mark.
    """
    prompts = [ids[max(0, len(ids) - prompt_width + 1) :] for ids in pairs.prompts for _ in range(2)]
    better, worse = [], []
    for chosen, rejected in zip(*pairs.answers):
        better += [[good_id, *chosen], [bad_id, *rejected]]
        worse += [[bad_id, *chosen], [good_id, *rejected]]
    return Encoded(prompts, (better, worse))
