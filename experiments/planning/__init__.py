"""Modules of plan.py, which compiles a train step for chips that need not be present and measures its memory, FLOPs and
collectives."""
