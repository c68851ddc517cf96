"""What a reward model has to beat: the shorter answer, and a logistic regression on TF-IDF features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from launch.settings import SettingError
from recipe import human_comparisons

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Inverse strengths of the L2 penalty that the regression chooses from, on splits of its own training pairs."""


def shorter_wins(pairs: Sequence[human_comparisons.Pair]) -> np.ndarray:
    """By how many characters the chosen answer is shorter: above 0 where the rule is right."""
    return np.array([len(pair.rejected) - len(pair.chosen) for pair in pairs], np.float64)


def need_sklearn() -> None:
    """Raise SettingError where scikit-learn is missing."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise SettingError(
            '--folds compares with scikit-learn, which is missing: pip install "rlhf_jax[baselines]"'
        ) from None


class TfidfChoice:
    """Bradley-Terry with a score that is linear in the TF-IDF features of an answer's words.

    The logistic regression of "the first is better" on the difference of two answers' features, each pair in both
    orders and without an intercept, so that no order of the two is favoured.
    """

    def __init__(self, pairs: Sequence[human_comparisons.Pair], *, seed: int) -> None:
        """Fit vocabulary, weights and, by log loss on 4 inner splits of ``pairs``, the strength of the penalty."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._vectorizer: Any = TfidfVectorizer(sublinear_tf=True, min_df=2)
        self._vectorizer.fit([answer for pair in pairs for answer in (pair.chosen, pair.rejected)])
        difference = self._difference(pairs)
        group_N = human_comparisons.conversation_ids(pairs)
        part = (np.random.default_rng(seed).permutation(int(group_N.max()) + 1) % 4)[group_N]
        losses = [
            np.mean([_log_loss(difference[part == p] @ _fit(difference[part != p], C)) for p in range(4)])
            for C in STRENGTHS
        ]
        self.strength = STRENGTHS[int(np.argmin(losses))]
        self._weights = _fit(difference, self.strength)

    def __call__(self, pairs: Sequence[human_comparisons.Pair]) -> np.ndarray:
        """By how much the chosen answer of each pair scores higher."""
        return np.asarray(self._difference(pairs) @ self._weights)

    def _difference(self, pairs: Sequence[human_comparisons.Pair]) -> Any:
        chosen, rejected = (
            self._vectorizer.transform([getattr(p, side) for p in pairs]) for side in ("chosen", "rejected")
        )
        return chosen - rejected


def _fit(difference: Any, strength: float) -> np.ndarray:
    from scipy import sparse
    from sklearn.linear_model import LogisticRegression

    n = difference.shape[0]
    model = LogisticRegression(C=strength, fit_intercept=False, max_iter=2000)
    model.fit(sparse.vstack([difference, -difference]), np.repeat([1, 0], n))
    return model.coef_[0]


def _log_loss(lead: np.ndarray) -> float:
    return float(np.logaddexp(0.0, -lead).mean())
