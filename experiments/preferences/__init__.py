"""What only reward_model.py, dpo.py and dpo_vs_ppo.py need."""
