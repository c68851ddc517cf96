"""A small world of things with attributes: what is true in it is drawn from a seed."""

from __future__ import annotations

import dataclasses

import numpy as np

from rlhf_jax.simulation import lexicon

COLOR, PLACE, USE, SIZE = range(4)
"""Columns of `World.facts_XA`."""


@dataclasses.dataclass(frozen=True)
class World:
    """The facts. ``facts_XA[x, a]`` is the value of attribute a of thing x, an index into that attribute's words.

    Every value of an attribute is held by equally many things, so that no answer is right more often than another.
    """

    facts_XA: np.ndarray

    def value(self, thing: str, attribute: int) -> str:
        """The word for an attribute (COLOR, PLACE, USE or SIZE) of a thing."""
        words = tuple(lexicon.ATTRIBUTES.values())[attribute]
        return words[self.facts_XA[lexicon.THINGS.index(thing), attribute]]

    def things_with(self, attribute: int, word: str) -> tuple[str, ...]:
        """All things whose attribute has this value, in the order of the lexicon."""
        index = tuple(lexicon.ATTRIBUTES.values())[attribute].index(word)
        return tuple(np.asarray(lexicon.THINGS)[self.facts_XA[:, attribute] == index].tolist())


def make_world(seed: int = 0) -> World:
    """Draw a world. The same seed gives the same facts."""
    rng = np.random.default_rng([seed, 0x3A11D])
    n_things = len(lexicon.THINGS)
    columns = [
        rng.permutation(np.arange(n_things) % len(words))  # balanced, then shuffled
        for words in lexicon.ATTRIBUTES.values()
    ]
    return World(np.stack(columns, axis=1).astype(np.int32))
