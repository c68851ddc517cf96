"""Claims of Ouyang et al. (2022), "Training language models to follow instructions with human feedback"."""
