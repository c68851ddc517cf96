"""Measurements of models and of reward models, on the host with NumPy and SciPy."""

from rlhf_jax.diagnostics import alarms
from rlhf_jax.diagnostics.best_of_n import best_of_n_kl, best_of_n_mean
from rlhf_jax.diagnostics.calibration import (
    CalibrationCurve,
    calibration_curve,
    calibration_slope,
    calibration_temperature,
    expected_calibration_error,
)
from rlhf_jax.diagnostics.diversity import distinct_n, self_overlap, token_entropy
from rlhf_jax.diagnostics.intervals import (
    Estimate,
    bootstrap_mean,
    mean_interval,
    pairwise_accuracy,
    ratio_interval,
    wilson,
    win_outcomes,
    win_rate,
)

__all__ = [
    "CalibrationCurve",
    "Estimate",
    "alarms",
    "best_of_n_kl",
    "best_of_n_mean",
    "bootstrap_mean",
    "calibration_curve",
    "calibration_slope",
    "calibration_temperature",
    "distinct_n",
    "expected_calibration_error",
    "mean_interval",
    "pairwise_accuracy",
    "ratio_interval",
    "self_overlap",
    "token_entropy",
    "wilson",
    "win_outcomes",
    "win_rate",
]
