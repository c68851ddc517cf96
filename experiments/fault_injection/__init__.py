"""Runs that are killed and checkpoints that are damaged, and what must come of them."""
