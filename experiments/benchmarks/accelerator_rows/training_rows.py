"""Measures train steps of SFT, DPO and a reward model as shares of the rate of matrix products (MFU)."""

from __future__ import annotations

from typing import Any

from benchmarks import train_workloads
from benchmarks.accelerator_rows import limit_rows, row_context
from rlhf_jax import lm


def model(shapes: row_context.Shapes, **overrides: Any) -> lm.LMConfig:
    """Returns the preset ``pythia-1b`` in bfloat16, with the changes in ``shapes.model`` and ``overrides``."""
    return lm.LMConfig.preset("pythia-1b", **{"dtype": "bfloat16", **dict(shapes.model), **overrides})


def sft(context: row_context.Context) -> None:
    """Measures an SFT step on all tokens."""
    shapes, cfg = context.shapes, model(context.shapes)
    rows, length = shapes.sft_rows, shapes.sft_length
    step = train_workloads.supervised(cfg, rows=rows, length=length)
    flops = 3 * lm.costs.forward_flops(cfg, rows=rows, length=length)
    _record(context, "SFT step", step, tokens=rows * length, flops=flops, at_least=0.5)


def dpo(context: row_context.Context) -> None:
    """Measures a DPO step, including the reference's forward pass. The first half of each row is the prompt."""
    shapes, cfg = context.shapes, model(context.shapes)
    pairs, length = shapes.pairs // 2, 2 * shapes.pair_length
    step = train_workloads.dpo(cfg, pairs=pairs, prompt=length // 2, length=length)
    flops = 4 * lm.costs.forward_flops(cfg, rows=2 * pairs, length=length, logits=length // 2)
    _record(context, "DPO step", step, tokens=2 * pairs * length, flops=flops, at_least=0.5)


def reward(context: row_context.Context) -> None:
    """Measures a train step of a reward model."""
    shapes, cfg = context.shapes, model(context.shapes)
    step = train_workloads.reward(cfg, pairs=shapes.pairs, length=shapes.pair_length)
    flops = 3 * lm.costs.forward_flops(cfg, rows=2 * shapes.pairs, length=shapes.pair_length, logits=0)
    _record(context, "reward model step", step, tokens=2 * shapes.pairs * shapes.pair_length, flops=flops)


def _record(
    context: row_context.Context,
    measure: str,
    step: train_workloads.Repetition,
    *,
    tokens: int,
    flops: float,
    **aim: float,
) -> None:
    seconds, first = row_context.seconds(step, repeats=context.shapes.repeats)
    share = context.share(flops / seconds, limit_rows.MATMUL)
    context.record(measure, tokens / seconds, "tokens/s", seconds=seconds, first_s=first, flops=flops, **share, **aim)
