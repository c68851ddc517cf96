"""A built-in world of text prompts with a known gold utility, and simulated demonstrators and labelers."""
