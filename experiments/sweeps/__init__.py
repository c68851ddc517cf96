"""Many RL runs from the same SFT model and reward model, and their comparison at equal KL."""
