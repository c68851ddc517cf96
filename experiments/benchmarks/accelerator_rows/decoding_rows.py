"""Decoding at several batch sizes, as shares of the bandwidth, and continuous compared with static batching."""

from __future__ import annotations

import statistics

from benchmarks import decode_workloads
from benchmarks.accelerator_rows import limit_rows, row_context, training_rows
from rlhf_jax import lm


def decode(context: row_context.Context) -> None:
    """The time of a decoding step, without the prefill, for each batch size."""
    shapes, cfg = context.shapes, training_rows.model(context.shapes)
    for batch in shapes.batches:
        step_seconds = decode_workloads.token_seconds(cfg, batch=batch, prompt=shapes.prompt, answer=shapes.answer)
        step_seconds()
        seconds = statistics.median(step_seconds() for _ in range(shapes.repeats))
        columns = shapes.prompt + shapes.answer / 2
        read = lm.costs.decode_bytes(cfg, batch=batch, columns=columns, itemsize=cfg.compute_dtype.itemsize)
        aim = {"at_least": 0.6} if batch <= 16 else {}
        share = context.share(read / seconds, limit_rows.BANDWIDTH)
        context.record(
            f"decoding, batch {batch}", batch / seconds, "tokens/s", seconds=seconds, bytes=read, **share, **aim
        )


def generate(context: row_context.Context) -> None:
    """Whole calls, prefill included, which `torch_rows.generate` repeats with transformers."""
    shapes, cfg = context.shapes, training_rows.model(context.shapes)
    for batch in shapes.batches[1:3]:
        call = decode_workloads.generate(cfg, batch=batch, prompt=shapes.prompt, answer=shapes.answer)
        seconds, first = row_context.seconds(call, repeats=shapes.repeats)
        context.record(f"generation, batch {batch}", batch * shapes.answer / seconds, "tokens/s", first_s=first)


def stream(context: row_context.Context) -> None:
    """Answers of which every eighth is eight times as long, in refilled slots and in consecutive batches."""
    shapes, cfg = context.shapes, training_rows.model(context.shapes)
    tokens = float(decode_workloads.skewed_lengths(shapes.stream_prompts, shapes.stream_short).sum())
    rates = {}
    for name, refilled in (("static", False), ("continuous", True)):
        call = decode_workloads.stream(
            cfg,
            prompts=shapes.stream_prompts,
            slots=shapes.stream_slots,
            prompt=shapes.prompt,
            short=shapes.stream_short,
            refilled=refilled,
        )
        seconds, first = row_context.seconds(call, repeats=min(shapes.repeats, 3))
        rates[name] = tokens / seconds
        context.record(f"{name} batching, 8x skew", rates[name], "tokens/s", seconds=seconds, first_s=first)
    context.record("continuous / static", rates["continuous"] / rates["static"], "x")
