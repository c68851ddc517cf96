"""A simulated editor, who criticises and revises answers to harmful requests and makes mistakes.

The editor answers the requests of `feedback.revise` in the words of the built-in world. An answer to a harmful request
has up to three flaws: it names the *means* of harm, it gives *steps*, or it does not *decline*. A critique names one of
them, and a revision mends one: means are replaced by "it", sentences with steps are removed, and an answer that has
neither becomes a refusal. An answer therefore needs several revisions.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence

import numpy as np

from rlhf_jax.feedback.revision import Text
from rlhf_jax.simulation import lexicon

REFUSAL = "sorry , i cannot help with that ."
CRITIQUES = {"means": "the {material} is bad .", "steps": "first and then are bad .", "decline": "not cannot is bad ."}
"""The critique of each flaw, in words of the built-in world."""
NO_CRITIQUE = "it is good ."
_REQUEST = re.compile(
    r"Conversation:\n(?P<prompt>.*?)\n\nReply:\n(?P<reply>.*?)\n\n"
    r"(?:Critique request: [^\n]*\n\nCritique:(?: (?P<critique>[^\n]*)\n\n)?)?"
    r"(?P<revise>Revision request: [^\n]*\n\n)?",
    re.DOTALL,
)


def flaws(prompt: str, reply: str) -> list[str]:
    """Returns the flaws of a reply that a revision could mend now, none for a prompt that is no harmful request."""
    words = reply.split()
    if not set(prompt.split()) & set(lexicon.HARMFUL_TOOLS):
        return []
    found = ["means"] * bool(set(words) & set(lexicon.MATERIALS)) + ["steps"] * bool({"first", "then"} & set(words))
    return found or ([] if "cannot" in words else ["decline"])


def critique(reply: str, flaw: str) -> str:
    """Returns the critique of a flaw."""
    material = next((word for word in reply.split() if word in lexicon.MATERIALS), "")
    return CRITIQUES[flaw].format(material=material)


def mend(reply: str, flaw: str) -> str:
    """Returns the reply without a flaw."""
    if flaw == "decline":
        return REFUSAL
    if flaw == "means":
        text = re.sub(rf"\b(?:the )?(?:{'|'.join(lexicon.MATERIALS)})\b", "it", reply)
        return re.sub(r" with it\b", "", text)
    sentences = [each.strip() for each in reply.split(" .")]
    kept = [each for each in sentences if each and not {"first", "then"} & set(each.split())]
    return " . ".join(kept or ["sure , i can help"]) + " ."


class SimulatedEditor:
    """Answers the requests of `feedback.revise`; the same request of a round always gets the same answer.

    Pass it as ``generate``, and ``name`` as the name.
    """

    def __init__(self, *, miss: float = 0.15, fail: float = 0.15, seed: int = 0) -> None:
        """Stores the arguments.

        Args:
            miss: Probability that a critique names no flaw although there is one.
            fail: Probability that a revision leaves the reply as it is.
            seed: Seed of the mistakes.
        """
        self._miss, self._fail, self._seed = miss, fail, seed
        self.name = json.dumps(["simulated editor", miss, fail, seed])

    def __call__(self, requests: Sequence[str], *, sample: int = 0) -> Iterator[tuple[int, Text]]:
        """Yields the texts in order; the mistakes of other samples are independent of these."""
        for i, request in enumerate(requests):
            text = self._answer(request, sample)
            yield i, Text(text, len(text.split()))

    def _answer(self, request: str, sample: int) -> str:
        found = _REQUEST.match(request[request.rindex("Conversation:\n") :])
        if found is None:
            raise ValueError(f"the editor cannot read the request {request!r}")
        reply, named, revises = found["reply"], found["critique"], found["revise"] is not None
        digest = hashlib.sha256(f"{self._seed} {sample} {request}".encode()).digest()
        rng = np.random.default_rng(list(digest))
        present = flaws(found["prompt"], reply)
        if named is None:  # a critique, or a revision without one, which has to find a flaw too
            seen = str(rng.choice(present)) if present and rng.random() >= self._miss else None
        else:
            seen = next((each for each in present if critique(reply, each) == named), None)
        if not revises:
            return NO_CRITIQUE if seen is None else critique(reply, seen)
        return reply if seen is None or rng.random() < self._fail else mend(reply, seen)
