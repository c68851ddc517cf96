"""Feedback of a language model: preference labels, and critiques and revisions of responses.

The module `store` keeps the judgements of people.
"""

from rlhf_jax.feedback.judge import (
    Answer,
    Example,
    Judge,
    Labels,
    ModelJudge,
    Pair,
    agreement,
    is_tie,
    label,
    question,
)
from rlhf_jax.feedback.model_writer import ModelWriter
from rlhf_jax.feedback.principles import HARMLESSNESS, Principle
from rlhf_jax.feedback.revision import (
    Revised,
    RevisionExample,
    Revisions,
    Text,
    Writer,
    critique_request,
    revise,
    revision_request,
    sampled_principles,
)

__all__ = [
    "HARMLESSNESS",
    "Answer",
    "Example",
    "Judge",
    "Labels",
    "ModelJudge",
    "ModelWriter",
    "Pair",
    "Principle",
    "Revised",
    "RevisionExample",
    "Revisions",
    "Text",
    "Writer",
    "agreement",
    "critique_request",
    "is_tie",
    "label",
    "question",
    "revise",
    "revision_request",
    "sampled_principles",
]
