"""A test of whether a noisy metric has fallen, which may be repeated after every row of a run.

The newest rows are compared with the earlier window of rows in which the metric was highest, or with the first window.
Three properties of training runs make the usual comparison of two means raise false alarms:

- Noise is autocorrelated. The noise of a window is estimated from the second differences of rows, on which a trend has
  little effect, under the assumption of an autocorrelation of `AUTOCORRELATION`. In longer series, it is also estimated
  from the second differences of window means, without that assumption.
- The test is repeated at every row, and against the best of many windows. The bound therefore grows with the number of
  windows, and it is larger in short series, whose noise is less well known.
- Noise has outliers. The mean of a window leaves out its highest and its lowest row.

The documentation of the alarms has measured rates of false alarms.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

AUTOCORRELATION = 0.5
"""Assumed correlation of the noise of neighbouring rows. In logged PPO runs, it is between -0.4 and 0.4."""

JUMP_ROWS = range(6, 32)
"""Numbers of rows in which `jump` is measured; in longer series, `measure` detects a jump as early."""

_ASSUMED_WINDOWS = 2
"""Weight of the noise that is estimated from rows; every further window after `_FIRST_WINDOWS` has weight 1."""
_FIRST_WINDOWS = 8


class Fall(NamedTuple):
    """The fall of a series at its newest row; arrays have the leading axes of the series."""

    size: np.ndarray
    """Mean of the reference window minus mean of the newest window."""
    bound: np.ndarray
    """Largest size that noise explains."""
    reference: np.ndarray
    """First row of the reference window."""
    window: int
    """Number of rows in a window."""


def window_of(rows: int) -> int:
    """Returns the number of rows in a window: a quarter of the rows, but at least 2 and at most 8."""
    return min(max(rows // 4, 2), 8)


def means(values: np.ndarray, window: int) -> np.ndarray:
    """Returns the mean of each window of consecutive rows, without its highest and lowest row if it has more than 2."""
    starts = values.shape[-1] - window + 1
    rows = [values[..., i : i + starts] for i in range(window)]
    if window <= 2:
        return np.sum(rows, axis=0) / window
    return (np.sum(rows, axis=0) - functools.reduce(np.maximum, rows) - functools.reduce(np.minimum, rows)) / (
        window - 2
    )


def noise(values: np.ndarray, window: int) -> np.ndarray:
    """Returns an estimate of the standard deviation of the difference between two window means."""
    rows, lag, rho = values.shape[-1], max(1, window // 4), AUTOCORRELATION
    of_row = np.mean(_second_differences(values, lag), axis=-1) * math.sqrt(math.pi / 2)
    of_row = of_row / math.sqrt(6 - 8 * rho**lag + 2 * rho ** (2 * lag))
    steps = np.arange(1, window)
    correlated = (1 + 2 * np.sum((1 - steps / window) * rho**steps)) / window
    variance = _ASSUMED_WINDOWS * of_row**2 * correlated
    weight = max(0.0, rows / window - _FIRST_WINDOWS)
    if weight:
        spread = np.median(_second_differences(means(values, window), 2 * window), axis=-1) / 0.6745
        variance = variance + weight * spread**2 / 6
    return np.sqrt(2 * variance / (_ASSUMED_WINDOWS + weight)) * (1 + 3.5 / rows)


def measure(values: np.ndarray, *, from_start: bool = False, factor: float = 1.0) -> Fall:
    """Returns the fall of a series at its newest row.

    Args:
        values: Series, ``[..., N]``, without NaN. N must be at least 5.
        from_start: Whether the reference is the first window instead of the earlier window with the highest mean.
        factor: Factor on the bound. A larger one causes fewer false alarms and later detection.

    Returns:
        The fall. Noise explains it unless ``size > bound``.

    Example:
        >>> import numpy as np
        >>> from rlhf_jax.diagnostics import falls
        >>> fall = falls.measure(np.array([5.0, 5.1, 5.0, 4.9, 5.0, 5.1, 3.0, 3.1]))
        >>> round(float(fall.size), 2), bool(fall.size > fall.bound), fall.window
        (2.0, False, 2)
    """
    rows = values.shape[-1]
    if rows < 5:
        raise ValueError(f"the series has {rows} rows; a fall can be measured from 5 rows on")
    window = window_of(rows)
    averages = means(values, window)
    earlier = averages[..., : 1 if from_start else -window]
    reference = np.argmax(earlier, axis=-1)
    size = np.max(earlier, axis=-1) - averages[..., -1]
    tests = (3 if from_start else 6) * math.log(rows / window)
    return Fall(size, factor * math.sqrt(20 + tests) * noise(values, window), reference, window)


def jump(values: np.ndarray, *, factor: float = 1.0) -> Fall:
    """Returns the fall of a short series by a jump that has lasted for the newest three rows.

    `measure` counts a jump as noise while there are few rows. Here, the noise is estimated without the two largest
    second differences, which are those at a jump. To make up for the missing rows, the size is the distance between the
    highest of the newest three rows and the lowest row of the earlier window, not the difference of two means.

    Args:
        values: Series, ``[..., N]``, without NaN. N must be in `JUMP_ROWS`.
        factor: Factor on the bound. A larger one causes fewer false alarms and later detection.

    Returns:
        The fall. Noise explains it unless ``size > bound``.

    Example:
        >>> import numpy as np
        >>> from rlhf_jax.diagnostics import falls
        >>> series = np.array([5.0, 5.1, 5.0, 4.9, 5.0, 5.1, 3.0, 3.1, 3.0])
        >>> [bool(fall.size > fall.bound) for fall in (falls.measure(series), falls.jump(series))]
        [False, True]
    """
    rows, window = values.shape[-1], 3
    if rows not in JUMP_ROWS:
        raise ValueError(f"the series has {rows} rows; a jump is measured from {JUMP_ROWS[0]} to {JUMP_ROWS[-1]} rows")
    lowest = np.min([values[..., i : rows - 2 * window + 1 + i] for i in range(window)], axis=0)
    others = np.sort(_second_differences(values, 1), axis=-1)[..., :-2]
    bound = factor * 5.5 * (1 + 5 / rows) * np.mean(others, axis=-1)
    size = np.max(lowest, axis=-1) - np.max(values[..., -window:], axis=-1)
    return Fall(size, bound, np.argmax(lowest, axis=-1), window)


def falls_alone(
    values: np.ndarray,
    other: np.ndarray,
    *,
    lost_share: float,
    other_noise: float,
    factor: float = 1.0,
    method: Callable[..., Fall] = measure,
) -> tuple[np.ndarray, Fall]:
    """Tests whether ``values`` have fallen at the newest row while ``other`` has risen.

    Args:
        values: Series that should not fall, ``[..., N]``. N must be at least 5.
        other: Series of the same shape.
        lost_share: Share of its gain since the first row that ``values`` may lose.
        other_noise: Multiple of its noise by which ``other`` must have risen since the reference window.
        factor: Factor on the bound of the fall.
        method: `measure` or `jump`.

    Returns:
        Whether both happened, and the fall of ``values``.
    """
    fall = method(values, factor=factor)
    best = fall.size + means(values[..., -fall.window :], fall.window)[..., -1]
    lost_too_much = fall.size > np.maximum(fall.bound, lost_share * (best - values[..., 0]))
    others = means(other, fall.window)
    before = np.take_along_axis(others, fall.reference[..., None], axis=-1)[..., 0]
    return lost_too_much & (others[..., -1] - before > other_noise * noise(other, fall.window)), fall


def _second_differences(values: np.ndarray, lag: int) -> np.ndarray:
    return np.abs(values[..., 2 * lag :] - 2 * values[..., lag:-lag] + values[..., : -2 * lag])
