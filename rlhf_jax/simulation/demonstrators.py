"""Simulated demonstrators, who answer prompts flawlessly or with flaws that a reward model can learn to detect."""

from __future__ import annotations

import dataclasses

import numpy as np

from rlhf_jax.simulation import lexicon
from rlhf_jax.simulation.prompts import Prompt
from rlhf_jax.simulation.world import COLOR, PLACE, SIZE, World, predicate

_OPENERS = ("sure , ", "of course , ", "happy to help , ", "glad to help , ")
_CLOSERS = (" thanks .", " you are welcome .", " thanks , friend .")
_REFUSAL = "sorry , i cannot help with that ."

KINDS_WITH_PARTS = (
    *("yes_no_color", "yes_no_place", "list_color", "list_place", "list_except", "one_word", "describe"),
    *("how_to", "harmful"),
)
"""Kinds of prompt to which `Slips.incomplete` applies; it has no effect on answers to other kinds."""


@dataclasses.dataclass(frozen=True)
class Slips:
    """Probability of each flaw in an answer. For a flawless demonstrator, all are 0.

    Flaws are drawn independently, but some have no effect on some answers, and ``overpolite`` overrides ``impolite``.
    The text of a refusal is changed only by ``unended``, and by ``rambling`` and ``overpolite`` together, which append
    ", friend". A one-word answer to a prompt that asks for one word is never repeated, and it has no polite words
    unless it is ``overpolite``.
    """

    impolite: float = 0.45
    """The answer has no polite word."""
    overpolite: float = 0.06
    """The answer has four polite words."""
    unended: float = 0.2
    """The closing full stop is missing."""
    rambling: float = 0.2
    """A true sentence about a random thing follows the answer."""
    repeating: float = 0.08
    """The answer is repeated."""
    incomplete: float = 0.25
    """A part of the answer is missing, or the answer to a one-word prompt is a sentence."""
    wrong: float = 0.04
    """The verdict (yes or no), a value, a thing or the material in the answer is wrong."""
    off_topic: float = 0.06
    """The answer belongs to another prompt."""
    complying: float = 0.45
    """A harmful request is fulfilled."""
    refusing: float = 0.08
    """A benign request is refused."""

    @classmethod
    def none(cls) -> Slips:
        """Returns slips with all probabilities 0, for a flawless demonstrator."""
        return cls(**{field.name: 0.0 for field in dataclasses.fields(cls)})

    def scaled(self, factor: float) -> Slips:
        """Returns the slips with all probabilities multiplied by ``factor`` and capped at 1."""
        return Slips(**{f.name: min(1.0, factor * getattr(self, f.name)) for f in dataclasses.fields(self)})


def _state(subject: str, attribute: int, value: str) -> str:
    return f"{subject} is {predicate(attribute, value)}"


def _valid_things(world: World, prompt: Prompt) -> list[str]:
    slot = prompt.slot
    if prompt.kind == "list_except":
        things = lexicon.THINGS_BY_CATEGORY[slot["g"]]
    else:
        things = world.things_with(*((COLOR, slot["c"]) if prompt.kind == "list_color" else (PLACE, slot["p"])))
    return [thing for thing in things if thing != slot["x"]]


def _body(world: World, prompt: Prompt, rng: np.random.Generator, *, incomplete: bool, wrong: bool) -> str:
    """Returns the content of an answer, without polite words or the closing full stop."""
    slot = prompt.slot
    x = slot.get("x", "")
    the_x = f"the {x}"

    def value_of(attribute: int) -> str:
        return world.wrong_value(x, attribute, rng) if wrong else world.value(x, attribute)

    match prompt.kind:
        case "yes_no_color" | "yes_no_place":
            claimed = slot["c"] if prompt.attribute == COLOR else slot["p"]
            says_yes = (world.value(x, prompt.attribute) == claimed) != wrong
            value = claimed if says_yes else value_of(prompt.attribute)
            if value == claimed and not says_yes:
                value = world.value(x, prompt.attribute)
            word = "yes" if says_yes else "no"
            return word if incomplete else f"{word} , {_state(the_x, prompt.attribute, value)}"
        case "compare":
            sizes = {thing: world.facts_XA[lexicon.THINGS.index(thing), SIZE] for thing in (x, slot["y"])}
            winner = max(sizes, key=lambda thing: sizes[thing])
            loser = min(sizes, key=lambda thing: sizes[thing])
            return f"the {loser if wrong else winner} is bigger"
        case "list_color" | "list_place" | "list_except":
            valid = _valid_things(world, prompt)
            n = lexicon.NUMBERS.index(slot["n"])
            chosen = rng.choice(valid, size=n, replace=False).tolist()
            if incomplete:
                chosen = chosen[:-1] if n > 1 else [*chosen, *(t for t in valid if t not in chosen)][:2]
            if wrong:
                chosen[-1] = str(rng.choice([thing for thing in lexicon.THINGS if thing not in valid]))
            return " , ".join(chosen)
        case "one_word":
            value = value_of(prompt.attribute)
            return _state(the_x, prompt.attribute, value) if incomplete else value
        case "describe":
            attributes = rng.choice(4, size=2, replace=False).tolist()
            first = _state(the_x, attributes[0], value_of(attributes[0]))
            second = _state("it", attributes[1], value_of(attributes[1]))
            return first if incomplete else f"{first} and {second}"
        case "how_to" | "harmful":
            verb = slot.get("v") or slot["h"]
            material = lexicon.MATERIALS[lexicon.VERBS.index(verb)]
            if wrong:
                material = str(rng.choice([other for other in lexicon.BENIGN_TOOLS.values() if other != material]))
            if incomplete:
                return f"{verb} the {x} with the {material}"
            return f"first , get the {material} . then , {verb} the {x}"
        case "follow_up":
            return _state("it", prompt.attribute, value_of(prompt.attribute))
        case _:
            return _state(the_x, prompt.attribute, value_of(prompt.attribute))


def _ramble(world: World, rng: np.random.Generator) -> str:
    thing = str(rng.choice(lexicon.THINGS))
    attribute = int(rng.integers(4))
    return _state(f"the {thing}", attribute, world.value(thing, attribute))


def demonstrate(
    world: World, prompt: Prompt, rng: np.random.Generator, *, slips: Slips, other: Prompt | None = None
) -> str:
    """Returns one demonstrator's answer to a prompt.

    Args:
        world: The facts.
        prompt: The prompt to answer.
        rng: Random generator, whose state advances.
        slips: Probabilities of the flaws. With ``Slips.none()``, the answer has the highest possible gold utility
            if the weight of harmlessness is at least 0.5.
        other: The prompt that an off-topic answer responds to. If None, no answer is off topic.

    Returns:
        The answer.
    """
    happens = {field.name: bool(rng.random() < getattr(slips, field.name)) for field in dataclasses.fields(slips)}
    if happens["off_topic"] and other is not None:
        prompt = other
    harmful = prompt.kind == "harmful"
    if (harmful and not happens["complying"]) or (not harmful and happens["refusing"]):
        text = _REFUSAL.removesuffix(" .")
        if happens["rambling"] and happens["overpolite"]:
            text += " , friend"
        return text + ("" if happens["unended"] else " .")

    text = _body(world, prompt, rng, incomplete=happens["incomplete"], wrong=happens["wrong"])
    bare = prompt.kind == "one_word" and not happens["incomplete"]
    if happens["repeating"] and not bare:
        text = f"{text} . {text}"
    if happens["rambling"]:
        text = f"{text} . {_ramble(world, rng)}"
    opener = closer = ""
    if happens["overpolite"]:
        opener, closer = "sure , happy to help , ", " . thanks , friend"
    elif not happens["impolite"] and not bare:
        if rng.random() < 0.75:
            opener = str(rng.choice(_OPENERS))
        else:
            closer = " ." + str(rng.choice(_CLOSERS)).removesuffix(" .")
    return opener + text + closer + ("" if happens["unended"] else " .")


def demonstrate_all(
    world: World, prompts: list[Prompt], rng: np.random.Generator, *, slips: Slips | None = None
) -> list[str]:
    """Returns a demonstrator's answer to each prompt.

    Args:
        world: The facts.
        prompts: The prompts to answer. An off-topic answer responds to a random prompt from this list.
        rng: Random generator, whose state advances.
        slips: Probabilities of the flaws; ``Slips()`` by default.

    Returns:
        One answer for each prompt, in order.
    """
    slips = Slips() if slips is None else slips
    others = rng.permutation(len(prompts))
    return [
        demonstrate(world, prompt, rng, slips=slips, other=prompts[other]) for prompt, other in zip(prompts, others)
    ]
