"""Reports of a run: progress and tables in the terminal, and a self-contained HTML page with plots."""

from rlhf_jax.report.page import render, write_report

__all__ = ["render", "write_report"]
