"""A small world of things whose attributes are drawn at random."""

from __future__ import annotations

import dataclasses

import numpy as np

from rlhf_jax.simulation import lexicon

COLOR, PLACE, USE, SIZE = range(4)
"""Columns of `World.facts_XA`."""
ATTRIBUTE_WORDS = tuple(lexicon.ATTRIBUTES.values())
"""For each column, the words that its indices select."""


@dataclasses.dataclass(frozen=True)
class World:
    """The facts: ``facts_XA[x, a]`` is the value of attribute a of thing x, as an index into that attribute's words.

    The values of an attribute are distributed evenly over the things, so no answer is right more often than another.
    """

    facts_XA: np.ndarray

    def value(self, thing: str, attribute: int) -> str:
        """Returns the word for an attribute (COLOR, PLACE, USE or SIZE) of a thing."""
        return ATTRIBUTE_WORDS[attribute][self.facts_XA[lexicon.THINGS.index(thing), attribute]]

    def things_with(self, attribute: int, word: str) -> tuple[str, ...]:
        """Returns all things whose attribute has the value ``word``, in the order of the lexicon."""
        index = ATTRIBUTE_WORDS[attribute].index(word)
        return tuple(np.asarray(lexicon.THINGS)[self.facts_XA[:, attribute] == index].tolist())

    def wrong_value(self, thing: str, attribute: int, rng: np.random.Generator) -> str:
        """Draws a word that is not the value of the thing's attribute."""
        truth = self.value(thing, attribute)
        return str(rng.choice([word for word in ATTRIBUTE_WORDS[attribute] if word != truth]))


def predicate(attribute: int, word: str) -> str:
    """Returns the words that state a value after "is", such as "red", "in the barn", "for play" or "huge"."""
    return {COLOR: word, PLACE: f"in the {word}", USE: f"for {word}", SIZE: word}[attribute]


def make_world(seed: int = 0) -> World:
    """Draws a world. The same seed gives the same facts."""
    rng = np.random.default_rng([seed, 0x3A11D])
    n_things = len(lexicon.THINGS)
    columns = [
        rng.permutation(np.arange(n_things) % len(words))  # balanced, then shuffled
        for words in lexicon.ATTRIBUTES.values()
    ]
    return World(np.stack(columns, axis=1).astype(np.int32))
