"""Preference labels: from a language model as judge."""

from rlhf_jax.feedback.judge import (
    Answer,
    Example,
    Judge,
    Labels,
    ModelJudge,
    Pair,
    agreement,
    label,
    question,
)

__all__ = [
    "Answer",
    "Example",
    "Judge",
    "Labels",
    "ModelJudge",
    "Pair",
    "agreement",
    "label",
    "question",
]
