"""Claims about helpful and harmless assistants (Askell et al. 2021; Bai et al. 2022)."""
