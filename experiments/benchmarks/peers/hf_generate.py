"""Measures sampling of full-length answers by transformers, with a KV cache."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import numpy as np
import torch
from transformers import GenerationConfig, GPT2LMHeadModel

from benchmarks import measured_process, workload_sizes
from benchmarks.peers import torch_models


def main() -> None:
    """Measures the workload that the command line names."""
    options = measured_process.parse_options(__doc__)
    clock, shapes, size, B = (
        measured_process.Clock(options),
        options.workload.shapes,
        options.workload.size,
        options.workload.batch,
    )
    torch.manual_seed(0)
    device, dtype = ("cuda", torch.bfloat16) if options.accelerator else ("cpu", torch.float32)
    model = GPT2LMHeadModel(torch_models.config(size)).eval().to(device, dtype)
    generation_config = GenerationConfig(
        max_new_tokens=shapes.answer,
        min_new_tokens=shapes.answer,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        pad_token_id=workload_sizes.PAD,
        eos_token_id=None,
        use_cache=True,
    )
    rng = np.random.default_rng(0)

    def repetition() -> None:
        prompts = torch.tensor(rng.integers(workload_sizes.FIRST_WORD, size.vocab, (B, shapes.prompt)), device=device)
        with torch.inference_mode():
            rows = model.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=generation_config
            )
        assert rows.cpu().shape == (B, shapes.prompt + shapes.answer)

    clock.measure(repetition)
    clock.report(packages=torch_models.PACKAGES, tokens=B * shapes.answer)


if __name__ == "__main__":
    main()
