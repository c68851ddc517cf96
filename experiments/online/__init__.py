"""Rounds of online RLHF for helpfulness and harmlessness (Bai et al. 2022)."""
