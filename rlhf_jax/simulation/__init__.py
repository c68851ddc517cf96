"""A small written world with a known gold utility, and simulated labelers."""
