"""Fault injection for torture.py: kills tiny runs, corrupts their checkpoints and checks the restored states."""
