"""Claims about preference models: pretraining, imitation, turns, calibration, high scores and Elo."""
