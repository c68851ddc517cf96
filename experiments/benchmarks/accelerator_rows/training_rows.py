"""Measures the train steps of SFT, DPO and a reward model, and their share of the measured matmul rate (MFU)."""

from __future__ import annotations

from typing import Any

import jax

from benchmarks import train_workloads
from benchmarks.accelerator_rows import row_context
from rlhf_jax import lm
from rlhf_jax.lm import kernels


def model(shapes: row_context.Shapes, **overrides: Any) -> lm.LMConfig:
    """Returns the preset ``pythia-1b`` in bfloat16, with the changes in ``shapes.model`` and ``overrides``."""
    return lm.LMConfig.preset("pythia-1b", **{"dtype": "bfloat16", **dict(shapes.model), **overrides})


def sft(context: row_context.Context) -> None:
    """Measures an SFT step on all tokens."""
    shapes, cfg = context.shapes, model(context.shapes)
    rows, length = shapes.sft_rows, shapes.sft_length
    step = train_workloads.supervised(cfg, rows=rows, length=length)
    flops = 3 * lm.costs.forward_flops(cfg, rows=rows, length=length)
    _record(context, "SFT step", step, cfg, rows=rows, length=length, flops=flops, at_least=0.5)


def dpo(context: row_context.Context) -> None:
    """Measures a DPO step, including the reference's forward pass. The first half of each row is the prompt."""
    shapes, cfg = context.shapes, model(context.shapes)
    pairs, length = shapes.pairs // 2, 2 * shapes.pair_length
    step = train_workloads.dpo(cfg, pairs=pairs, prompt=length // 2, length=length)
    flops = 4 * lm.costs.forward_flops(cfg, rows=2 * pairs, length=length, logits=length // 2)
    _record(context, "DPO step", step, cfg, rows=2 * pairs, length=length, flops=flops, at_least=0.5)


def reward(context: row_context.Context) -> None:
    """Measures a train step of a reward model."""
    cfg, pairs, length = model(context.shapes), context.shapes.pairs, context.shapes.pair_length
    step = train_workloads.reward(cfg, pairs=pairs, length=length)
    flops = 3 * lm.costs.forward_flops(cfg, rows=2 * pairs, length=length, logits=0)
    _record(context, "reward model step", step, cfg, rows=2 * pairs, length=length, flops=flops)


def _record(
    context: row_context.Context,
    measure: str,
    step: train_workloads.Repetition,
    cfg: lm.LMConfig,
    *,
    rows: int,
    length: int,
    flops: float,
    **aim: float,
) -> None:
    seconds, times = row_context.seconds(step, repeats=context.shapes.repeats)
    queries = jax.ShapeDtypeStruct((rows, cfg.n_heads, length, cfg.d_head), cfg.compute_dtype)
    kernel = kernels.choose(cfg, queries, backend=jax.default_backend())
    note = f"{1e3 * seconds:.3g} ms, {flops / seconds / 1e12:.3g} TFLOP/s, attention by {kernel}"
    share = context.share(flops / seconds, row_context.MATMUL, **aim)
    context.record(measure, rows * length / seconds, "tokens/s", note=note, flops=flops, **times, **share)
