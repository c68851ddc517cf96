"""Training: one file a stage, one step a stage, one loop for all."""
