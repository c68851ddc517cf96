"""Fault injection for torture.py: killing tiny runs and corrupting their checkpoints, and checking what is restored."""
