"""Claims about the over-optimisation of reward models."""
