"""Comparison of policies by reward models and reward functions, and the scores of reward models."""
