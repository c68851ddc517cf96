"""Converts answers, from any tokenizer, to the vocabulary of the built-in world."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import types
from rlhf_jax.data import chat, tokenizers
from rlhf_jax.simulation import gold, lexicon, prompts

WIDTH = 2 * prompts.RESPONSE_WIDTH
"""Number of words to which answers are truncated. The brevity term of the gold utility reaches 0 well below this
length."""
_CHUNK = 512
_IDS = {word: lexicon.IDS[word] for word in lexicon.WORDS}
_MARKS = re.escape("".join(lexicon.PUNCTUATION))
_WORD = re.compile(rf"[{_MARKS}]|[^\s{_MARKS}]+")


class Read(NamedTuple):
    """Answers in the format that the gold utility requires."""

    words_BT: np.ndarray
    """Ids of the world's words. Unknown words have the padding id, but are True in ``mask_BT``."""
    mask_BT: np.ndarray
    unknown_B: np.ndarray
    """Share of an answer's words that are not in the world's vocabulary."""


def is_world_tokenizer(fmt: chat.ChatFormat) -> bool:
    """Returns whether the tokenizer is the built-in world's, whose ids are the world's words."""
    return fmt.template == tokenizers.CHAT_TEMPLATE and fmt.tokenizer.get_vocab() == lexicon.IDS


def make_watch(tables: gold.Tables, *, prompt_width: int) -> Callable[[types.Rollout], dict[str, jax.Array]]:
    """Returns the function `ppo.Models.watch` that logs the gold utility of rollouts in the world's words."""
    utility = jax.vmap(gold.utility, in_axes=(None, 0, 0, 0))

    def watch(rollout: types.Rollout) -> dict[str, jax.Array]:
        prompts_BP, answers_BT = rollout.tokens_BL[:, :prompt_width], rollout.tokens_BL[:, prompt_width:]
        return {"gold": utility(tables, prompts_BP, answers_BT, rollout.response_mask_BT).total}

    return watch


def read(fmt: chat.ChatFormat, tokens_BT: np.ndarray, mask_BT: np.ndarray) -> Read:
    """Decodes answers and looks up their words. Answers with a stop token end with the world's end token."""
    answers = [row[mask].tolist() for row, mask in zip(tokens_BT, mask_BT)]
    words_BT, read_BT = np.full((len(answers), WIDTH), lexicon.PAD_ID, np.int32), np.zeros((len(answers), WIDTH), bool)
    unknown_B = np.zeros(len(answers))
    for b, text in enumerate(fmt.tokenizer.backend_tokenizer.decode_batch(answers, skip_special_tokens=True)):
        words = [_IDS.get(word) for word in _WORD.findall(text)]
        unknown_B[b] = words.count(None) / max(len(words), 1)
        ids = [lexicon.PAD_ID if i is None else i for i in words]
        ids = (ids + [lexicon.END_ID] * (not set(fmt.stop_ids).isdisjoint(answers[b])))[:WIDTH]
        words_BT[b, : len(ids)], read_BT[b, : len(ids)] = ids, True
    return Read(words_BT, read_BT, unknown_B)


_utility = jax.jit(jax.vmap(gold.utility, in_axes=(None, 0, 0, 0)))


def gold_utility(
    tables: gold.Tables, prompts_BP: np.ndarray, words_BT: np.ndarray, mask_BT: np.ndarray
) -> gold.Utility:
    """Computes the gold utility of answers in chunks of a fixed size; returns NumPy arrays."""
    n, parts = len(prompts_BP), []
    for start in range(0, n, _CHUNK):
        rows = np.minimum(np.arange(start, start + _CHUNK), n - 1)
        utility = _utility(tables, *(jnp.asarray(x[rows]) for x in (prompts_BP, words_BT, mask_BT)))
        parts.append(jax.device_get(utility))
    return jax.tree.map(lambda *x: np.concatenate(x)[:n], *parts)
