"""InstructGPT's recipe, which most commands share: data, training stages, optimisers, sampling and evaluation."""
