"""Benchmarks for benchmark.py: this library's workloads, the same in peer libraries, and the tables that compare
them."""
