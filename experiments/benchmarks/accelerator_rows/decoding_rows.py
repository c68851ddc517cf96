"""Measures decoding as a share of the memory bandwidth, and compares continuous with static batching."""

from __future__ import annotations

import statistics

from benchmarks import decode_workloads
from benchmarks.accelerator_rows import row_context, training_rows
from rlhf_jax import lm


def decode(context: row_context.Context) -> None:
    """Measures, for each batch size, a decoding step alone and a whole call, which includes the prefill."""
    shapes, cfg = context.shapes, training_rows.model(context.shapes)
    T = shapes.answer
    for batch in shapes.batches:
        call_seconds = decode_workloads.call_seconds(cfg, batch=batch, prompt=shapes.prompt, answer=T)
        first = call_seconds(T)
        whole, prefill = ([call_seconds(tokens) for _ in range(shapes.repeats)] for tokens in (T, 1))
        call, times = statistics.median(whole), {"seconds": whole, "prefill_s": prefill, "first_s": first}
        context.record(f"generation, batch {batch}", batch * T / call, "tokens/s", **times)
        if min(whole) <= max(prefill):
            context.record(f"decoding, batch {batch}", note="the prefill takes all of the measured time")
            continue
        step = (call - statistics.median(prefill)) / (T - 1)
        read = lm.costs.decode_bytes(
            cfg, batch=batch, columns=shapes.prompt + T / 2, itemsize=cfg.compute_dtype.itemsize
        )
        aim = {"at_least": 0.6} if batch <= 16 else {}
        share = context.share(read / step, row_context.BANDWIDTH, **aim)
        note = f"{1e3 * step:.3g} ms per step"
        context.record(f"decoding, batch {batch}", batch / step, "tokens/s", note=note, bytes=read, **share)


def stream(context: row_context.Context) -> None:
    """Measures sampling in consecutive batches and in refilled slots; one answer in eight is eight times as long."""
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
        seconds, times = row_context.seconds(call, repeats=min(shapes.repeats, 3))
        rates[name] = tokens / seconds
        context.record(f"{name} batching, 8x skew", rates[name], "tokens/s", **times)
    context.record("continuous / static", rates["continuous"] / rates["static"], "x")
