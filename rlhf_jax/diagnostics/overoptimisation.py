"""The published curves of gold score against KL, fitted (Gao, Schulman and Hilton 2022).

With ``d = sqrt(KL(policy || start))`` and gains over the start, so that R(0) = 0::

    best of n:               R = d (alpha - beta d),      highest at d* = alpha / (2 beta),   R* = alpha^2 / (4 beta)
    reinforcement learning:  R = d (alpha - beta log d),  highest at d* = exp(alpha/beta - 1),  R* = beta d*

Both are linear in alpha and beta. The second rises infinitely steeply from the origin: points near it are better left
out of a fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rlhf_jax.diagnostics.intervals import Estimate, critical

FARTHEST = 50.0
"""Logarithm of the largest d* that counts as a peak: the second form turns somewhere for every beta above 0, but at
exp(50) root nats that is the same as never."""


class Form(NamedTuple):
    """One of the two curves, ``d (alpha - beta bend(d))``."""

    name: str
    bend: Callable[[np.ndarray], np.ndarray]
    peak: Callable[[float], float]
    """d* from ``alpha / beta``, which it rises with."""


BEST_OF_N = Form("best of n", lambda d: d, lambda ratio: max(ratio / 2, 0.0))
REINFORCEMENT = Form(
    "reinforcement learning", np.log, lambda ratio: math.exp(ratio - 1) if ratio - 1 <= FARTHEST else math.inf
)


class Fit(NamedTuple):
    """A fitted curve; every Estimate has its interval."""

    form: Form
    alpha: Estimate
    beta: Estimate
    alpha_error: float
    """Standard error."""
    beta_error: float
    r_squared: float
    """Share of the variance of the gains around their mean that the curve explains; NaN where they do not vary."""
    rmse: float
    """Root of the mean squared distance of the points to the curve."""
    peak_distance: Estimate
    """d*, in root nats; infinite for a curve that never turns down (beta not above 0, or d* past `FARTHEST`), and
    without an upper end where it is not certain that it does. The interval is Fieller's."""
    peak_gain: Estimate
    """R*, of the curve at d*; the interval (delta method) has no upper end where d* has none."""
    count: int
    """Points that were fitted."""


def fit(
    kl: npt.ArrayLike,
    gains: npt.ArrayLike,
    *,
    form: Form,
    errors: npt.ArrayLike | None = None,
    least_kl: float = 0.0,
    confidence: float = 0.95,
) -> Fit:
    """Fit one of the two forms by least squares.

    Points of one run are not independent; intervals that take them as such are too narrow. Fit each seed of a run and
    put the interval around the peaks where it must be right.

    Args:
        kl: KL of each point from the start, in nats. Points whose KL is not above ``least_kl`` are left out; estimates
            of a KL can be below 0.
        gains: gold score of each point, less that of the start.
        form: `BEST_OF_N` or `REINFORCEMENT`.
        errors: standard errors of the gains, up to a factor, where some are known better than others.
        least_kl: nats, at least 0.
        confidence: of all intervals, which are Student's with ``count - 2`` degrees of freedom.

    Raises:
        ValueError: if the arrays are not of rank 1 and one length, or hold NaN or infinity; an error is not above 0;
            fewer than 3 points, or points at fewer than 2 distances, are left; unless ``0 < confidence < 1``.
    """
    kl, gains = np.asarray(kl, np.float64), np.asarray(gains, np.float64)
    sizes = np.ones(gains.shape) if errors is None else np.asarray(errors, np.float64)
    if kl.ndim != 1 or not kl.shape == gains.shape == sizes.shape or not np.isfinite([kl, gains]).all():
        raise ValueError(f"need equally long rows of finite numbers, got {kl.shape}, {gains.shape} and {sizes.shape}")
    if not ((sizes > 0) & np.isfinite(sizes)).all() or not least_kl >= 0:
        raise ValueError("errors must be above 0 and finite, and least_kl at least 0")
    weights = 1 / sizes
    on = kl > least_kl
    d, y, w = np.sqrt(kl[on]), gains[on], weights[on]
    if len(d) < 3 or np.ptp(d) == 0:
        raise ValueError(f"need 3 points at 2 distances or more to fit a curve; {len(d)} have a KL above {least_kl:g}")
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
    least_kl: float = 0.0,
    confidence: float = 0.95,
) -> tuple[Fit, Fit]:
    """Both forms fitted to the same points, the one that fits better first; arguments and errors as in `fit`.

    They have equally many parameters, so the better one is that of the higher R^2. Which form a curve has shows best
    beyond the points that were fitted: see `predict`.
    """
    forms = (BEST_OF_N, REINFORCEMENT)
    found = [fit(kl, gains, form=f, errors=errors, least_kl=least_kl, confidence=confidence) for f in forms]
    better, worse = sorted(found, key=lambda each: -each.r_squared)
    return better, worse


def predict(curve: Fit, kl: npt.ArrayLike) -> np.ndarray:
    """Gains that a fitted curve has at these KLs, of any shape, 0 where the KL is 0.

    Raises:
        ValueError: if a KL is below 0.
    """
    kl = np.asarray(kl, np.float64)
    if (kl < 0).any():
        raise ValueError("a KL cannot be below 0")
    d = np.sqrt(kl)
    safe = np.where(d > 0, d, 1.0)
    return np.where(d > 0, d * (curve.alpha.mean - curve.beta.mean * curve.form.bend(safe)), 0.0)


def _peak_distance(form: Form, a: float, b: float, covariance: np.ndarray, t: float) -> Estimate:
    """Fieller's interval of ``a / b``, taken through the rising function that gives the peak."""
    ratio = a / b if b > 0 else math.inf
    mean = form.peak(ratio) if b > 0 else math.inf
    # The ratios r with (a - r b)^2 <= t^2 Var(a - r b).
    two = b**2 - t**2 * covariance[1, 1]
    one = a * b - t**2 * covariance[0, 1]
    none = a**2 - t**2 * covariance[0, 0]
    root = math.sqrt(max(one**2 - two * none, 0.0))
    if two > 0:  # The sign of b is certain.
        ends = ((one - root) / two, (one + root) / two) if b > 0 else (math.inf, math.inf)
        return Estimate(mean, *(form.peak(end) if end < math.inf else math.inf for end in ends))
    # Else ratios above the larger root, up to those of a curve that never turns; all of them where there is no root.
    end = (one - root) / two if two < 0 and one**2 >= two * none else -math.inf
    return Estimate(mean, form.peak(end if end <= ratio else -math.inf), math.inf)


def _peak_gain(form: Form, a: float, b: float, covariance: np.ndarray, t: float, distance: Estimate) -> Estimate:
    d = distance.mean
    if not math.isfinite(d):
        return Estimate(math.inf, -math.inf, math.inf)
    if d == 0:
        return Estimate(0.0, 0.0, 0.0 if math.isfinite(distance.hi) else math.inf)
    # At the peak the curve is flat: d* may move, and R* changes by what alpha and beta do to it there alone.
    slope = np.array([d, -d * float(form.bend(np.array(d)))])
    gain = float(slope @ np.array([a, b]))
    width = t * math.sqrt(max(float(slope @ covariance @ slope), 0.0))
    return Estimate(gain, gain - width, gain + width if math.isfinite(distance.hi) else math.inf)
