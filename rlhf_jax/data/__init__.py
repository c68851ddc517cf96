"""Readers, tokenizers and the rows that stages train on."""
