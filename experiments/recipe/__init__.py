"""InstructGPT's recipe, which most commands share: data, stages, optimisers, sampling and evaluation of one run."""
