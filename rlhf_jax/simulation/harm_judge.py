"""A simulated judge of harmlessness in the built-in world, whose calibration is known.

The judge perceives the log-odds that a reply is the less harmful one,

    l = sign(d) v / 2 + sqrt(v) e,  v = strength * abs(d),

where d is the difference in gold harmlessness and e is standard normal. This is the log-likelihood ratio of the two
signs of d under the noise, so a judge that answers sigmoid(l) is calibrated: of the pairs for which it gives the
probability p, it is right about the share p. Two equally harmless replies get one half. A judge that answers
sigmoid(c l) with c > 1 is overconfident, as language models are after a chain of thought (Bai et al. 2022,
Constitutional AI, section 4.1), and is right about the same pairs.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from scipy import special

from rlhf_jax.feedback.judge import Answer
from rlhf_jax.simulation import gold, prompts

_QUESTION = re.compile(
    r"Conversation:\n(.*?)\n\nReply \(A\):\n(.*?)\n\nReply \(B\):\n(.*?)\n\n(.*?) Answer with A or B\.\nAnswer: \($",
    re.DOTALL,
)
_CHUNK = 512


class SimulatedJudge:
    """Answers the questions of `feedback.label`; the same question always gets the same answer."""

    def __init__(
        self,
        tables: gold.Tables,
        *,
        strength: float = 4.0,
        overconfidence: float = 1.0,
        position_bias: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Stores the arguments.

        Args:
            tables: Look-up tables of the world.
            strength: v of a pair whose gold harmlessness differs by 1. The judge is right about such a pair with
                probability ``Phi(sqrt(strength) / 2)``: 0.84 for a strength of 4.
            overconfidence: Factor c of the log-odds.
            position_bias: Log-odds of "A" for two equal replies.
            seed: Seed of the noise, which also depends on the prompt, the replies and the principle.
        """
        self._tables, self._strength, self._overconfidence = tables, strength, overconfidence
        self._position_bias, self._seed = position_bias, seed
        self._harmless = jax.jit(lambda *rows: jax.vmap(gold.utility, in_axes=(None, 0, 0, 0))(tables, *rows).harmless)
        self.name = json.dumps(["simulated judge", strength, overconfidence, position_bias, seed])

    def __call__(self, questions: Sequence[str]) -> Iterator[tuple[int, Answer]]:
        """Yields the answers in order."""
        read = [_read(text) for text in questions]
        distinct = list(dict.fromkeys((prompt, reply) for prompt, *replies, _ in read for reply in replies))
        harmless = dict(zip(distinct, self.harmlessness(*zip(*distinct))))
        for i, (prompt, first, second, principle) in enumerate(read):
            low, high = sorted((first, second))
            gap = float(harmless[prompt, low] - harmless[prompt, high])
            digest = hashlib.sha256(json.dumps([self._seed, principle, prompt, low, high]).encode()).digest()
            v = self._strength * abs(gap)
            log_odds = np.sign(gap) * v / 2 + np.sqrt(v) * np.random.default_rng(list(digest)).normal()
            towards_a = log_odds if first == low else -log_odds
            yield i, Answer(float(special.expit(self._overconfidence * towards_a + self._position_bias)))

    def harmlessness(self, texts: Sequence[str], replies: Sequence[str]) -> np.ndarray:
        """Returns the gold harmlessness of replies to prompts of one turn."""
        P, T = prompts.PROMPT_WIDTH, prompts.RESPONSE_WIDTH
        found = []
        for start in range(0, len(texts), _CHUNK):
            some = list(zip(texts[start : start + _CHUNK], replies[start : start + _CHUNK]))
            prompt_BP, reply_BT = np.zeros((_CHUNK, P), np.int32), np.zeros((_CHUNK, T), np.int32)
            mask_BT = np.zeros((_CHUNK, T), bool)
            for b, (text, reply) in enumerate(some):
                ids, answer = prompts.prompt_tokens([("user", text)]), prompts.answer_tokens(reply)[:T]
                prompt_BP[b, P - len(ids) :] = ids
                reply_BT[b, : len(answer)], mask_BT[b, : len(answer)] = answer, True
            found.append(np.asarray(self._harmless(prompt_BP, reply_BT, mask_BT))[: len(some)])
        return np.concatenate(found)


def _read(question: str) -> tuple[str, str, str, str]:
    """Returns the prompt, the replies and the principle of a question, after its examples."""
    found = _QUESTION.match(question[question.rindex("Conversation:\n") :])
    if found is None:
        raise ValueError(f"the judge cannot read the question {question!r}")
    prompt, first, second, principle = found.groups()
    return prompt, first, second, principle
