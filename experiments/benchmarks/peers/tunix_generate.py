"""Measures sampling of full-length answers by Tunix's Sampler."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import numpy as np
from tunix.generate import sampler

from benchmarks import measured_process, workload_sizes
from benchmarks.peers import random_text, tunix_models


def main() -> None:
    """Measures the workload that the command line names."""
    options = measured_process.parse_options(__doc__)
    clock, shapes, size, B = (
        measured_process.Clock(options),
        options.workload.shapes,
        options.workload.size,
        options.workload.batch,
    )
    P, T = shapes.prompt, shapes.answer
    cache = sampler.CacheConfig(
        cache_size=P + T, num_layers=size.layers, num_kv_heads=size.heads, head_dim=size.width // size.heads
    )
    sample = sampler.Sampler(tunix_models.make(size, bfloat16=options.accelerator), random_text.tokenizer(size), cache)
    rng, calls = np.random.default_rng(0), iter(range(10**9))

    def repetition() -> None:
        prompts = [random_text.text(rng, size, P) for _ in range(B)]
        out = sample(
            prompts,
            max_generation_steps=T,
            max_prompt_length=P,
            temperature=1.0,
            top_p=1.0,
            seed=next(calls),
            forbidden_tokens=(workload_sizes.PAD, workload_sizes.EOS),
        )
        assert all(len(row) == T for row in out.tokens)

    clock.measure(repetition)
    clock.report(packages=tunix_models.PACKAGES, tokens=B * T)


if __name__ == "__main__":
    main()
