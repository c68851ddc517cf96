"""Rows of accelerator.py: what is measured on one GPU or TPU, and the processes that measure it."""
