"""Modules of benchmark.py and accelerator.py: this library's workloads, the same workloads in peer libraries, and
tables that compare them."""
