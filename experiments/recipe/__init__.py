"""The stages that all experiments share: data, supervised training, reward models, PPO and evaluation."""
