"""Modules for learning from preferences, which reward_model.py, dpo.py and dpo_vs_ppo.py use."""
