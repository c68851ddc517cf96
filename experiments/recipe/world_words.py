"""Answers in the words of the built-in world, whatever the tokens of the model that gave them."""

from __future__ import annotations

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import chat, tokenizers
from rlhf_jax.simulation import gold, lexicon, prompts

WIDTH = 2 * prompts.RESPONSE_WIDTH
"""Words of an answer that are read; the gold utility gives nothing for brevity long before."""
_CHUNK = 512
_IDS = {word: lexicon.IDS[word] for word in lexicon.WORDS}
_MARKS = re.escape("".join(lexicon.PUNCTUATION))
_WORD = re.compile(rf"[{_MARKS}]|[^\s{_MARKS}]+")


class Read(NamedTuple):
    """Answers as the gold utility reads them."""

    words_BT: np.ndarray
    """Ids of the world's words; an unknown word has the id of padding, which means nothing, and is masked in."""
    mask_BT: np.ndarray
    unknown_B: np.ndarray
    """Share of an answer's words that the world does not know."""


def is_world_tokenizer(fmt: chat.ChatFormat) -> bool:
    """Whether a tokenizer is the world's own, so that its ids are the world's words."""
    return fmt.template == tokenizers.CHAT_TEMPLATE and fmt.tokenizer.get_vocab() == lexicon.IDS


def read(fmt: chat.ChatFormat, tokens_BT: np.ndarray, mask_BT: np.ndarray) -> Read:
    """Decode answers and look their words up. An answer with a stop token ends with the world's end mark."""
    said = [row[mask].tolist() for row, mask in zip(tokens_BT, mask_BT)]
    words_BT, read_BT = np.full((len(said), WIDTH), lexicon.PAD_ID, np.int32), np.zeros((len(said), WIDTH), bool)
    unknown_B = np.zeros(len(said))
    for b, text in enumerate(fmt.tokenizer.backend_tokenizer.decode_batch(said, skip_special_tokens=True)):
        found = [_IDS.get(word) for word in _WORD.findall(text)]
        unknown_B[b] = found.count(None) / max(len(found), 1)
        ids = [lexicon.PAD_ID if i is None else i for i in found]
        ids = (ids + [lexicon.END_ID] * (not set(fmt.stop_ids).isdisjoint(said[b])))[:WIDTH]
        words_BT[b, : len(ids)], read_BT[b, : len(ids)] = ids, True
    return Read(words_BT, read_BT, unknown_B)


_judge = jax.jit(jax.vmap(gold.utility, in_axes=(None, 0, 0, 0)))


def judge(tables: gold.Tables, prompts_BP: np.ndarray, words_BT: np.ndarray, mask_BT: np.ndarray) -> gold.Utility:
    """Gold judgement of N answers, on the host, in chunks of one shape."""
    n, parts = len(prompts_BP), []
    for start in range(0, n, _CHUNK):
        rows = np.minimum(np.arange(start, start + _CHUNK), n - 1)
        judged = _judge(tables, *(jnp.asarray(x[rows]) for x in (prompts_BP, words_BT, mask_BT)))
        parts.append(jax.device_get(judged))
    return jax.tree.map(lambda *x: np.concatenate(x)[:n], *parts)
