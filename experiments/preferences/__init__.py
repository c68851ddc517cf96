"""Learning from preferences: the modules that reward_model.py, dpo.py and dpo_vs_ppo.py share."""
