"""Claims about DPO and its comparison with PPO."""
