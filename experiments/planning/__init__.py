"""Compiling a train step for chips that are not here, and reading what it needs."""
