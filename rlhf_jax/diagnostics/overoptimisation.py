"""Fits the gold score as a function of the KL, using the two functional forms of Gao, Schulman and Hilton (2022).

R is the gain in gold score over the initial policy, ``d = sqrt(KL(policy || initial policy))``, and R* is the highest
gain, which is reached at d*::

    best of n:               R = d (alpha - beta d),      highest at d* = alpha / (2 beta),   R* = alpha^2 / (4 beta)
    reinforcement learning:  R = d (alpha - beta log d),  highest at d* = exp(alpha/beta - 1),  R* = beta d*

Both forms are linear in the fitted parameters alpha and beta. The slope of the second form is infinite at the origin,
so exclude points near the origin from a fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rlhf_jax.diagnostics.intervals import Estimate, critical

MAX_LOG_PEAK = 50.0
"""Logarithm of the largest d* that counts as a peak. The second form has a maximum for every beta above 0, but no
run can reach a maximum beyond exp(50) root nats."""


class Form(NamedTuple):
    """One of the two functional forms, ``d (alpha - beta bend(d))``."""

    name: str
    bend: Callable[[np.ndarray], np.ndarray]
    peak: Callable[[float], float]
    """d* as an increasing function of ``alpha / beta``."""


BEST_OF_N = Form("best of n", lambda d: d, lambda ratio: max(ratio / 2, 0.0))
REINFORCEMENT = Form(
    "reinforcement learning", np.log, lambda ratio: math.exp(ratio - 1) if ratio - 1 <= MAX_LOG_PEAK else math.inf
)


class Fit(NamedTuple):
    """A fitted curve, with an interval for each estimate."""

    form: Form
    alpha: Estimate
    beta: Estimate
    alpha_error: float
    """Standard error of alpha."""
    beta_error: float
    """Standard error of beta."""
    r_squared: float
    """Share of the variance of the gains that the curve explains; NaN if the gains do not vary."""
    rmse: float
    """Root mean squared residual."""
    peak_distance: Estimate
    """d* in root nats, with Fieller's interval. d* is infinite for a curve without a maximum (beta not above 0, or log
    d* above `MAX_LOG_PEAK`). The upper bound is finite only if the interval of beta is above 0."""
    peak_gain: Estimate
    """R*, the gain at d*, with an interval by the delta method. Its upper bound is infinite whenever that of d* is."""
    count: int
    """Number of fitted points."""


def fit(
    kl: npt.ArrayLike,
    gains: npt.ArrayLike,
    *,
    form: Form,
    errors: npt.ArrayLike | None = None,
    min_kl: float = 0.0,
    confidence: float = 0.95,
) -> Fit:
    """Fits one of the two forms, ``R = d (alpha - beta bend(d))``, by weighted least squares.

    The points of a single run are not independent, so the intervals of its fit are too narrow. For valid intervals, fit
    each seed separately and compute `mean_interval` of the peaks.

    Args:
        kl: ``[N]``, KL of each point from the initial policy, in nats. Estimates may be negative; points whose KL is
            not above ``min_kl`` are excluded.
        gains: ``[N]``, gold score of each point minus the gold score of the initial policy.
        form: `BEST_OF_N` or `REINFORCEMENT`.
        errors: ``[N]``, standard errors of the gains, up to a common factor; equal by default.
        min_kl: Exclusion threshold in nats, at least 0.
        confidence: Coverage of all intervals, which use Student's t with ``count - 2`` degrees of freedom.

    Returns:
        The fitted curve.

    Raises:
        ValueError: If the arrays are not of rank 1, differ in length, or contain NaN or infinity; if an error is not
            above 0, ``min_kl`` is below 0 or ``confidence`` is not in (0, 1); or if fewer than 3 points or fewer than
            2 different KLs are above ``min_kl``.

    Example:
        >>> import numpy as np
        >>> from rlhf_jax.diagnostics import overoptimisation
        >>> kl = np.array([1.0, 4.0, 9.0, 16.0])
        >>> curve = overoptimisation.fit(kl, np.sqrt(kl) - kl / 4, form=overoptimisation.BEST_OF_N)
        >>> print(round(curve.peak_distance.mean, 3), round(curve.peak_gain.mean, 3))
        2.0 1.0
    """
    kl, gains = np.asarray(kl, np.float64), np.asarray(gains, np.float64)
    sizes = np.ones(gains.shape) if errors is None else np.asarray(errors, np.float64)
    if kl.ndim != 1 or not kl.shape == gains.shape == sizes.shape or not np.isfinite([kl, gains]).all():
        raise ValueError(f"need equally long arrays of finite numbers, got {kl.shape}, {gains.shape}, {sizes.shape}")
    if not ((sizes > 0) & np.isfinite(sizes)).all() or not min_kl >= 0:
        raise ValueError("errors must be above 0 and finite, and min_kl at least 0")
    weights = 1 / sizes
    used = kl > min_kl
    d, y, w = np.sqrt(kl[used]), gains[used], weights[used]
    if len(d) < 3 or np.ptp(d) == 0:
        raise ValueError(f"need 3 points and 2 different KLs above {min_kl:g}, got {len(d)} and {len(np.unique(d))}")
    columns = np.stack([d, -d * form.bend(d)], axis=1)
    scaled = columns * w[:, None]
    (a, b), *_ = np.linalg.lstsq(scaled, y * w, rcond=None)
    residuals = y - columns @ np.array([a, b])
    freedom = len(d) - 2
    covariance = np.linalg.inv(scaled.T @ scaled) * float(np.sum((residuals * w) ** 2)) / freedom
    t = critical(confidence, freedom=freedom)
    alpha_error, beta_error = map(float, np.sqrt(np.diag(covariance)))
    spread = float(np.sum((w * (y - np.average(y, weights=w**2))) ** 2))
    distance = Estimate(*map(float, _peak_distance(form, float(a), float(b), covariance, t)))
    return Fit(
        form=form,
        alpha=Estimate(float(a), float(a) - t * alpha_error, float(a) + t * alpha_error),
        beta=Estimate(float(b), float(b) - t * beta_error, float(b) + t * beta_error),
        alpha_error=alpha_error,
        beta_error=beta_error,
        r_squared=1 - float(np.sum((residuals * w) ** 2)) / spread if spread > 0 else math.nan,
        rmse=math.sqrt(float(np.mean(residuals**2))),
        peak_distance=distance,
        peak_gain=_peak_gain(form, float(a), float(b), covariance, t, distance),
        count=len(d),
    )


def fit_both(
    kl: npt.ArrayLike,
    gains: npt.ArrayLike,
    *,
    errors: npt.ArrayLike | None = None,
    min_kl: float = 0.0,
    confidence: float = 0.95,
) -> tuple[Fit, Fit]:
    """Fits both forms to the same points and returns the better fit first.

    Both forms have two parameters, so the one with the higher R^2 fits better. Predictions beyond the fitted points
    (`predict`) distinguish the forms more reliably.

    Args:
        kl: ``[N]``, as in `fit`.
        gains: ``[N]``, as in `fit`.
        errors: ``[N]``, as in `fit`.
        min_kl: Exclusion threshold in nats, as in `fit`.
        confidence: Coverage of all intervals.

    Returns:
        The better and the worse fit.

    Raises:
        ValueError: As in `fit`.
    """
    forms = (BEST_OF_N, REINFORCEMENT)
    fits = [fit(kl, gains, form=f, errors=errors, min_kl=min_kl, confidence=confidence) for f in forms]
    better, worse = sorted(fits, key=lambda curve: -curve.r_squared)
    return better, worse


def predict(curve: Fit, kl: npt.ArrayLike) -> np.ndarray:
    """Returns the gains that a fitted curve predicts for KLs of any shape; 0 where the KL is 0.

    Raises ValueError if a KL is below 0.
    """
    kl = np.asarray(kl, np.float64)
    if (kl < 0).any():
        raise ValueError("a KL cannot be below 0")
    d = np.sqrt(kl)
    safe = np.where(d > 0, d, 1.0)
    return np.where(d > 0, d * (curve.alpha.mean - curve.beta.mean * curve.form.bend(safe)), 0.0)


def _peak_distance(form: Form, a: float, b: float, covariance: np.ndarray, t: float) -> Estimate:
    """Returns d* with Fieller's interval of ``a / b``, mapped to distances by the increasing function ``form.peak``."""
    ratio = a / b if b > 0 else math.inf
    mean = form.peak(ratio) if b > 0 else math.inf
    # The interval contains the ratios r with (a - r b)^2 <= t^2 Var(a - r b), a quadratic inequality in r.
    quadratic = b**2 - t**2 * covariance[1, 1]
    half_linear = a * b - t**2 * covariance[0, 1]
    constant = a**2 - t**2 * covariance[0, 0]
    root = math.sqrt(max(half_linear**2 - quadratic * constant, 0.0))
    if quadratic > 0:  # The interval of b does not contain 0.
        ends = ((half_linear - root) / quadratic, (half_linear + root) / quadratic) if b > 0 else (math.inf, math.inf)
        return Estimate(mean, *(form.peak(end) if end < math.inf else math.inf for end in ends))
    # Otherwise the interval contains all ratios above the larger root, including curves without a maximum, or all
    # ratios if the quadratic has no root.
    has_root = quadratic < 0 and half_linear**2 >= quadratic * constant
    end = (half_linear - root) / quadratic if has_root else -math.inf
    return Estimate(mean, form.peak(end if end <= ratio else -math.inf), math.inf)


def _peak_gain(form: Form, a: float, b: float, covariance: np.ndarray, t: float, distance: Estimate) -> Estimate:
    d = distance.mean
    if not math.isfinite(d):
        return Estimate(math.inf, -math.inf, math.inf)
    if d == 0:
        return Estimate(0.0, 0.0, 0.0 if math.isfinite(distance.hi) else math.inf)
    # The curve is flat at its peak, so to first order R* changes with alpha and beta as if d* were fixed.
    slope = np.array([d, -d * float(form.bend(np.array(d)))])
    gain = float(slope @ np.array([a, b]))
    width = t * math.sqrt(max(float(slope @ covariance @ slope), 0.0))
    return Estimate(gain, gain - width, gain + width if math.isfinite(distance.hi) else math.inf)
