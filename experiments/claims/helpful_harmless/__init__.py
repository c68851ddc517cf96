"""Claims about helpfulness and harmlessness (Bai et al. 2022)."""
