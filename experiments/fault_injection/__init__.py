"""Fault injection for torture.py: interrupts tiny runs, corrupts their checkpoints and checks the restored states."""
