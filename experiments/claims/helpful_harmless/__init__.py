"""Claims of Bai et al. 2022, Training a Helpful and Harmless Assistant."""
