"""Rows of accelerator.py, each a group of measurements on one GPU or TPU, and the code that runs and tabulates them."""
