"""A built-in world of written prompts with a known gold utility, and simulated demonstrators and labelers."""
