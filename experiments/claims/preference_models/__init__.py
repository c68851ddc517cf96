"""Claims about preference models: pretraining, imitation, turns, calibration and high scores."""
