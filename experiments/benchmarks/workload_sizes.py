"""The models and workloads of the benchmarks, and their FLOPs. This module imports no JAX, because the interpreters
of the peer libraries import it too."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

PAD, EOS, FIRST_WORD = 0, 1, 3
"""Token ids of padding and of the end of text, and the smallest id in a random row."""


@dataclasses.dataclass(frozen=True)
class Size:
    """The sizes of a GPT-2 with tied embeddings."""

    layers: int
    width: int
    heads: int
    vocab: int
    positions: int
    gated_mlp: int
    """Width of a gated MLP with about the same number of parameters, for peers without a plain MLP."""

    @property
    def trunk_params(self) -> int:
        """The number of parameters in the layers' kernels."""
        return 12 * self.layers * self.width**2

    @property
    def matmul_params(self) -> int:
        """The number of parameters that each token is multiplied by: the layers' kernels and the unembedding."""
        return self.trunk_params + self.vocab * self.width


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The shapes of all workloads."""

    rows: int = 8
    """Rows per supervised step, or pairs per preference step."""
    length: int = 256
    dpo_prompt: int = 64
    prompt: int = 64
    answer: int = 64
    batch_s: int = 64
    """Number of prompts per batch for model S."""
    batch_m: int = 8
    ppo_samples: int = 64
    ppo_prompt: int = 32
    ppo_answer: int = 32
    ppo_epochs: int = 4
    ppo_minibatches: int = 4
    stream_prompts: int = 512
    stream_slots: int = 64
    short: int = 32
    """Tokens per short answer in the workloads ``stream`` and ``static``; every eighth answer is 8 times as long."""
    matmul: int = 2048


SIZES = {
    "s": Size(layers=4, width=256, heads=4, vocab=4096, positions=512, gated_mlp=688),
    "m": Size(layers=12, width=768, heads=12, vocab=8192, positions=1024, gated_mlp=2048),
}
SHAPES = Shapes()

QUICK_SIZES = {
    "s": Size(layers=2, width=32, heads=2, vocab=64, positions=128, gated_mlp=96),
    "m": Size(layers=2, width=64, heads=2, vocab=64, positions=128, gated_mlp=160),
}
QUICK_SHAPES = Shapes(
    rows=2,
    length=16,
    dpo_prompt=4,
    prompt=8,
    answer=8,
    batch_s=4,
    batch_m=2,
    ppo_samples=8,
    ppo_prompt=8,
    ppo_answer=8,
    ppo_epochs=2,
    ppo_minibatches=2,
    stream_prompts=16,
    stream_slots=4,
    short=2,
    matmul=64,
)


class Workload(NamedTuple):
    """A workload with a name such as ``sft-s`` or ``decode-m-16``."""

    name: str
    kind: str
    size_name: str
    size: Size
    shapes: Shapes
    batch: int
    """Number of rows decoded together: the number in the name, or the default for the size."""


def parse(name: str, *, quick: bool = False) -> Workload:
    """Parses the name of a workload; raises ``ValueError`` if the size is unknown or the batch is not a number."""
    kind, size_name, batch = (*name.split("-"), "")[:3]
    sizes, shapes = (QUICK_SIZES, QUICK_SHAPES) if quick else (SIZES, SHAPES)
    if size_name not in sizes or (batch and not batch.isdigit()):
        raise ValueError(f"{name!r} is not a workload; examples of names are sft-s and decode-m-16")
    default_batch = shapes.batch_s if size_name == "s" else shapes.batch_m
    return Workload(name, kind, size_name, sizes[size_name], shapes, int(batch) if batch else default_batch)


def training_flops(size: Size, *, rows: int, length: int, params: int | None = None) -> float:
    """Returns the FLOPs of a forward and a backward pass, without rematerialisation.

    Each token costs 6 FLOPs per matmul parameter, plus ``12 * layers * width * length`` for attention to all tokens
    of the row (PaLM, appendix B).
    """
    per_token = 6 * (size.matmul_params if params is None else params) + 12 * size.layers * size.width * length
    return float(rows * length * per_token)


class DecodeCost(NamedTuple):
    """The minimum number of bytes read and of FLOPs in a decoding step."""

    bytes: float
    flops: float


def decode_cost(size: Size, *, batch: int, prompt: int, answer: int, bytes_each: int) -> DecodeCost:
    """Returns the bytes of parameters and cache that must be read, and the FLOPs, for one token per row.

    The length of the cache is averaged over the steps of an answer.
    """
    columns = prompt + answer / 2
    cached = 2 * size.layers * batch * columns * size.width
    attention = 4 * size.layers * size.width * columns
    return DecodeCost(
        bytes=bytes_each * (size.matmul_params + cached),
        flops=batch * (2 * size.matmul_params + attention),
    )
