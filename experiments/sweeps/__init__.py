"""Runs RL methods that share one SFT model and one reward model, and compares them at equal KL."""
