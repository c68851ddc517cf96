"""Conversations into token ids, and token ids into the padded rows that every stage shares.

The layout is one for all stages: prompts left-padded to P, answers right-padded to T, L = P + T. Rows are NumPy arrays:
tokens int32, masks bool.

What takes a tokenizer here takes one that this library made, with its one chat format; `chat` is for all others and
does the same.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rlhf_jax import types
from rlhf_jax.data import chat, dialogues, errors, texts, tokenizers

if TYPE_CHECKING:
    import transformers

Ids = Sequence[int]


class Rows(NamedTuple):
    """Token rows with loss on part of them."""

    tokens_BL: np.ndarray
    mask_BL: np.ndarray
    """True at real tokens."""
    loss_mask_BL: np.ndarray
    """True at the tokens to be learnt: the answer with its end token. Aligned with the tokens, nothing shifted."""


# ---------------------------------------------------------------------------------------------------- text to ids


messages = chat.messages
encode_texts = texts.encode_texts


def encode_text(tokenizer: transformers.PreTrainedTokenizerFast, text: str) -> list[int]:
    """Encode one plain text; see `encode_texts`."""
    return encode_texts(tokenizer, [text])[0]


def encode_prompt(tokenizer: transformers.PreTrainedTokenizerFast, turns: Sequence[dialogues.Turn]) -> list[int]:
    """Ids of a prompt: every turn as role token, text, end token; then the role token of the assistant.

    The same ids as ``apply_chat_template(messages(turns), add_generation_prompt=True)`` for text without literal
    special tokens.

    Raises:
      DataError: the tokenizer lacks a token of the chat format, or a word.
    """
    return chat.encode_prompt(_built_in_format(tokenizer), turns)


def encode_answer(tokenizer: transformers.PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of an answer: its text and the end token."""
    return encode_answers(tokenizer, [text])[0]


def encode_answers(tokenizer: transformers.PreTrainedTokenizerFast, answers: Sequence[str]) -> list[list[int]]:
    """Ids of many answers in one call, each ending in the end token."""
    return chat.encode_answers(_built_in_format(tokenizer), answers)


def encode_prompts(
    tokenizer: transformers.PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[dialogues.Turn]],
    *,
    width: int,
    counts: errors.DropCount,
) -> tuple[list[list[int]], np.ndarray]:
    """Encode many prompts, each in at most ``width`` tokens; see `chat.encode_prompts`."""
    return chat.encode_prompts(_built_in_format(tokenizer), prompts, width=width, counts=counts)


# ---------------------------------------------------------------------------------------------------- ids to rows


def pad_prompts(prompts: Sequence[Ids], *, width: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Left-pad prompts to ``width``.

    Returns:
      ``(tokens_BP, mask_BP)``.

    Raises:
      DataError: a prompt is empty or longer than ``width`` (`encode_prompts` shortens at turns).
    """
    tokens_BP, mask_BP = _blank(len(prompts), width, pad_id)
    for row, ids in enumerate(prompts):
        if not 0 < len(ids) <= width:
            raise errors.DataError(f"prompt {row} has {len(ids)} tokens, which is not between 1 and {width}")
        tokens_BP[row, width - len(ids) :] = ids
        mask_BP[row, width - len(ids) :] = True
    return tokens_BP, mask_BP


def pad_answers(
    answers: Sequence[Ids], *, width: int, pad_id: int, counts: errors.DropCount
) -> tuple[np.ndarray, np.ndarray]:
    """Right-pad answers to ``width``; a longer one is cut, is left without its end token, and is counted.

    Returns:
      ``(tokens_BT, mask_BT)``; ``"answer truncated"`` is counted in ``counts``.

    Raises:
      DataError: an answer has no token at all; or more are cut than ``counts`` allows.
    """
    stage = counts.stage()
    rows = _fill_answers(answers, width, pad_id, stage)
    counts.add(stage, records=len(answers), source="answers")
    return rows


def demonstration_rows(
    prompts: Sequence[Ids],
    answers: Sequence[Ids],
    *,
    prompt_width: int,
    response_width: int,
    pad_id: int,
    counts: errors.DropCount,
) -> Rows:
    """Rows for supervised fine-tuning: ``[B, P + T]``, loss on the answer with its end token and nowhere else.

    Args:
      prompts: ids as `encode_prompts` gives them.
      answers: one a prompt, ids as `encode_answers` gives them; see `pad_answers` for the long ones.
      prompt_width: P.
      response_width: T.
      pad_id: the id at padding, which no mask is derived from.
      counts: counts ``"answer truncated"``.

    Raises:
      DataError: unequal numbers of prompts and answers; see `pad_prompts` and `pad_answers`.
    """
    _same_length(prompts=prompts, answers=answers)
    tokens_BP, mask_BP = pad_prompts(prompts, width=prompt_width, pad_id=pad_id)
    tokens_BT, mask_BT = pad_answers(answers, width=response_width, pad_id=pad_id, counts=counts)
    return Rows(
        tokens_BL=np.concatenate([tokens_BP, tokens_BT], axis=1),
        mask_BL=np.concatenate([mask_BP, mask_BT], axis=1),
        loss_mask_BL=np.concatenate([np.zeros_like(mask_BP), mask_BT], axis=1),
    )


def ranking_rows(
    prompts: Sequence[Ids],
    answers: Sequence[Sequence[Ids]],
    ranks: Sequence[Sequence[int]],
    *,
    prompt_width: int,
    response_width: int,
    pad_id: int,
    counts: errors.DropCount,
    most: int | None = None,
) -> types.Comparisons:
    """Ranked answers, all those of a prompt in one batch element (InstructGPT, section 3.5).

    Args:
      prompts: ids, one list a prompt.
      answers: for each prompt two or more answers; places beyond a prompt's own hold padding with ``where_BK`` False
        and rank 0.
      ranks: for each answer its rank, 1 is best, equal ranks are ties.
      prompt_width: P.
      response_width: T.
      pad_id: the id at padding.
      counts: counts ``"answer truncated"``, once an answer.
      most: K; by default the largest number of answers that a prompt has.

    Returns:
      `types.Comparisons` of NumPy arrays, ``tokens_BKL`` with L = P + T.

    Raises:
      DataError: numbers that do not match, a prompt with fewer than two answers or more than K, a rank below 1;
        see `pad_prompts`.
    """
    _same_length(prompts=prompts, answers=answers, ranks=ranks)
    stage = counts.stage()
    widest = max(map(len, answers), default=2)
    B, K, L = len(prompts), widest if most is None else most, prompt_width + response_width
    if widest > K:
        raise errors.DataError(f"a prompt has {widest} answers, more than the {K} there is room for")
    tokens_BKL, mask_BKL = _blank((B, K), L, pad_id)
    ranks_BK = np.zeros((B, K), np.int32)
    tokens_BP, mask_BP = pad_prompts(prompts, width=prompt_width, pad_id=pad_id)
    for b, (answers_K, ranks_K) in enumerate(zip(answers, ranks)):
        n = len(answers_K)
        if n < 2 or len(ranks_K) != n or min(ranks_K) < 1:
            raise errors.DataError(f"prompt {b} has {n} answers with ranks {list(ranks_K)}")
        tokens_KT, mask_KT = _fill_answers(answers_K, response_width, pad_id, stage)
        tokens_BKL[b, :n, :prompt_width], mask_BKL[b, :n, :prompt_width] = tokens_BP[b], mask_BP[b]
        tokens_BKL[b, :n, prompt_width:], mask_BKL[b, :n, prompt_width:] = tokens_KT, mask_KT
        ranks_BK[b, :n] = ranks_K
    counts.add(stage, records=sum(map(len, answers)), source="answers")
    return types.Comparisons(
        tokens_BKL=tokens_BKL,  # pyright: ignore[reportArgumentType]
        mask_BKL=mask_BKL,  # pyright: ignore[reportArgumentType]
        ranks_BK=ranks_BK,  # pyright: ignore[reportArgumentType]
        where_BK=ranks_BK > 0,  # pyright: ignore[reportArgumentType]
    )


def comparison_rows(
    prompts: Sequence[Ids],
    chosen: Sequence[Ids],
    rejected: Sequence[Ids],
    *,
    prompt_width: int,
    response_width: int,
    pad_id: int,
    counts: errors.DropCount,
) -> types.Comparisons:
    """Pairs as `types.Comparisons` with K = 2: place 0 is the chosen answer, rank 1, place 1 the rejected one, rank 2.

    Two answers that are the same within T tokens say nothing: the pair is left out, and counted as dropped,
    ``"same answer within the width"``. Arguments and errors are those of `ranking_rows`.
    """
    _same_length(prompts=prompts, chosen=chosen, rejected=rejected)
    kept = [i for i in range(len(prompts)) if list(chosen[i][:response_width]) != list(rejected[i][:response_width])]
    stage = counts.stage()
    for _ in range(len(prompts) - len(kept)):
        stage.drop("same answer within the width")
    counts.add(stage, records=len(prompts), source="comparisons")
    return ranking_rows(
        [prompts[i] for i in kept],
        [(chosen[i], rejected[i]) for i in kept],
        [(1, 2)] * len(kept),
        prompt_width=prompt_width,
        response_width=response_width,
        pad_id=pad_id,
        counts=counts,
    )


def pack_text(documents: Sequence[Ids], *, width: int, eos_id: int) -> tuple[np.ndarray, int]:
    """Documents one after the other, each closed with ``eos_id``, cut into full rows for pretraining.

    Returns:
      ``(tokens_BL, remainder)``: int32 rows of ``width`` tokens, every one real, and the number of tokens at the end
      that did not fill a row and are in none.

    Raises:
      DataError: a document ends with ``eos_id`` already, so that it would stand there twice; or there are fewer tokens
        than one row.
    """
    pieces = []
    for i, ids in enumerate(documents):
        if len(ids) and ids[-1] == eos_id:
            raise errors.DataError(f"document {i} ends with the id {eos_id} already, and would get it twice")
        pieces.append(np.asarray([*ids, eos_id], np.int32))
    stream = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
    rows, remainder = divmod(len(stream), width)
    if rows == 0:
        raise errors.DataError(f"{len(stream)} tokens do not fill one row of {width}")
    return stream[: rows * width].reshape(rows, width), remainder


# ---------------------------------------------------------------------------------------------------------- parts


@functools.lru_cache(maxsize=8)
def _built_in_format(tokenizer: transformers.PreTrainedTokenizerFast) -> chat.ChatFormat:
    """The format of the tokenizers that this library makes, made once a tokenizer."""
    for token in (tokenizers.USER, tokenizers.ASSISTANT, tokenizers.END):
        if tokenizer.backend_tokenizer.token_to_id(token) is None:
            raise errors.DataError(f"the tokenizer has no {token!r}, which the chat format needs")
    return chat.chat_format(tokenizer, template=tokenizers.CHAT_TEMPLATE)


def _fill_answers(
    answers: Sequence[Ids], width: int, pad_id: int, stage: errors.DropCount
) -> tuple[np.ndarray, np.ndarray]:
    tokens_BT, mask_BT = _blank(len(answers), width, pad_id)
    for row, ids in enumerate(answers):
        if not len(ids):
            raise errors.DataError(f"answer {row} has no token, not even the end token")
        if len(ids) > width:
            stage.truncate("answer truncated")
        n = min(len(ids), width)
        tokens_BT[row, :n] = ids[:n]
        mask_BT[row, :n] = True
    return tokens_BT, mask_BT


def _blank(batch: int | tuple[int, ...], width: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    shape = (*np.atleast_1d(batch).tolist(), width)
    return np.full(shape, pad_id, np.int32), np.zeros(shape, np.bool_)


def _same_length(**lists: Sequence[object]) -> None:
    sizes = {name: len(items) for name, items in lists.items()}
    if len(set(sizes.values())) > 1:
        raise errors.DataError(f"unequal numbers: {', '.join(f'{n} {name}' for name, n in sizes.items())}")
