"""Many runs from the same SFT model and reward model, compared at equal KL."""
