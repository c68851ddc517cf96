"""Random rows as token ids and as text, and a tokenizer for them."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks import workload_sizes


def tokenizer(size: workload_sizes.Size) -> PreTrainedTokenizerFast:
    """Returns a tokenizer in which the word "w5" is token 5, and so on."""
    words = {"<pad>": workload_sizes.PAD, "<eos>": workload_sizes.EOS, "<unk>": 2}
    words |= {f"w{i}": i for i in range(workload_sizes.FIRST_WORD, size.vocab)}
    tokenizer_object = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer_object.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_object,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=size.positions,
    )


def ids(rng: np.random.Generator, size: workload_sizes.Size, length: int) -> list[int]:
    """Returns a row of random words as ids."""
    return rng.integers(workload_sizes.FIRST_WORD, size.vocab, length).tolist()


def text(rng: np.random.Generator, size: workload_sizes.Size, length: int) -> str:
    """Returns a row of random words as text."""
    return " ".join(f"w{i}" for i in ids(rng, size, length))
