"""Random rows as ids and as text, and a tokenizer whose word i is "wi"."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks import sizes


def tokenizer(size: sizes.Size) -> PreTrainedTokenizerFast:
    """One token a word."""
    words = {"<pad>": sizes.PAD, "<eos>": sizes.EOS, "<unk>": 2}
    words |= {f"w{i}": i for i in range(sizes.FIRST_WORD, size.vocab)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=size.positions,
    )


def ids(rng: np.random.Generator, size: sizes.Size, length: int) -> list[int]:
    """A row of random words as ids."""
    return rng.integers(sizes.FIRST_WORD, size.vocab, length).tolist()


def text(rng: np.random.Generator, size: sizes.Size, length: int) -> str:
    """A row of random words as text."""
    return " ".join(f"w{i}" for i in ids(rng, size, length))
