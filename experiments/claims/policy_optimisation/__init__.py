"""Claims about PPO, its implementation details, and related RL methods."""
