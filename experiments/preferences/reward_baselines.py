"""Baselines for a reward model: preferring the shorter answer, and a logistic regression on TF-IDF features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from launch.settings import SettingError
from recipe import human_comparisons

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Candidate inverse strengths of the L2 penalty; the regression selects one by cross-validation on its training
pairs."""


def shorter_wins(pairs: Sequence[human_comparisons.Pair]) -> np.ndarray:
    """Returns the length of each rejected answer minus the length of the chosen answer, in characters."""
    return np.array([len(pair.rejected) - len(pair.chosen) for pair in pairs], np.float64)


def need_sklearn() -> None:
    """Raises SettingError if scikit-learn is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise SettingError(
            "--folds needs scikit-learn for its baselines; install it with: pip install -e '.[baselines]'"
        ) from None


class TfidfChoice:
    """A Bradley-Terry model whose score is linear in the TF-IDF features of an answer.

    The weights are fitted by logistic regression on the difference of the two answers' features. Each pair is used in
    both orders and there is no intercept, so that neither order is favoured.
    """

    def __init__(self, pairs: Sequence[human_comparisons.Pair], *, seed: int) -> None:
        """Fits the vocabulary and the weights; selects the penalty by log loss on up to 4 inner folds of ``pairs``."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._vectorizer: Any = TfidfVectorizer(sublinear_tf=True, min_df=2)
        self._vectorizer.fit([answer for pair in pairs for answer in (pair.chosen, pair.rejected)])
        difference = self._difference(pairs)
        group_N = human_comparisons.conversation_ids(pairs)
        splits = human_comparisons.fold_indices(group_N, min(4, int(group_N.max()) + 1), seed=seed)
        rest = [np.setdiff1d(np.arange(len(pairs)), test) for test in splits]
        losses = [
            np.mean([_log_loss(difference[test] @ _fit(difference[train], C)) for train, test in zip(rest, splits)])
            for C in STRENGTHS
        ]
        self.strength = STRENGTHS[int(np.argmin(losses))]
        self._weights = _fit(difference, self.strength)

    def __call__(self, pairs: Sequence[human_comparisons.Pair]) -> np.ndarray:
        """Returns the score of each chosen answer minus the score of the rejected answer."""
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


def _log_loss(margin_N: np.ndarray) -> float:
    return float(np.logaddexp(0.0, -margin_N).mean())
