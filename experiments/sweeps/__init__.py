"""Runs many RL methods from the same SFT model and reward model, and compares them at equal KL."""
