"""The pretraining corpus, from which a base model learns facts about the world and skills that no prompt asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.simulation import lexicon, prompts
from rlhf_jax.simulation.demonstrators import KINDS_WITH_PARTS, Slips, demonstrate
from rlhf_jax.simulation.world import COLOR, PLACE, SIZE, USE, World, predicate

SKILLS = ("copy", "sort", "sum", "look")
_KEYS = (*lexicon.COLORS, *lexicon.PLACES, *lexicon.USES)
"""Words that are copied and looked up."""


@dataclasses.dataclass(frozen=True)
class SkillProblem:
    """A problem with exactly one answer: the model should continue ``text`` with ``answer``."""

    skill: str
    text: str
    answer: str

    @property
    def document(self) -> str:
        """The problem and its answer, as in the corpus."""
        return f"{self.text} {self.answer} ."


def skill_problem(skill: str, rng: np.random.Generator) -> SkillProblem:
    """Draws a problem: copy three words, sort three numbers, add two numbers modulo ten, or look up a word's number.

    Raises:
        ValueError: If ``skill`` is not one of `SKILLS`.
    """
    match skill:
        case "copy":
            words = " ".join(rng.choice(_KEYS, size=3, replace=False).tolist())
            return SkillProblem(skill, f"copy : {words} =", words)
        case "sort":
            numbers = rng.choice(10, size=3, replace=False).tolist()
            shuffled, ordered = (" ".join(lexicon.NUMBERS[i] for i in order) for order in (numbers, sorted(numbers)))
            return SkillProblem(skill, f"sort : {shuffled} =", ordered)
        case "sum":
            a, b = rng.integers(10, size=2).tolist()
            text = f"sum : {lexicon.NUMBERS[a]} plus {lexicon.NUMBERS[b]} ="
            return SkillProblem(skill, text, lexicon.NUMBERS[(a + b) % 10])
        case "look":
            words = rng.choice(_KEYS, size=3, replace=False).tolist()
            numbers = [lexicon.NUMBERS[i] for i in rng.choice(10, size=3, replace=False)]
            pairs = " , ".join(f"{word} {number}" for word, number in zip(words, numbers))
            i = int(rng.integers(3))
            return SkillProblem(skill, f"look : {pairs} = {words[i]}", numbers[i])
        case _:
            raise ValueError(f"unknown skill {skill!r}; the skills are {', '.join(SKILLS)}")


def skill_problems(n: int, rng: np.random.Generator) -> list[SkillProblem]:
    """Draws n problems, with the skills in rotation."""
    return [skill_problem(SKILLS[i % len(SKILLS)], rng) for i in range(n)]


def _fact(world: World, thing: str, attribute: int) -> str:
    return predicate(attribute, world.value(thing, attribute))


_QUESTION = {
    COLOR: ("what color is the {} ?", "tell me the color of the {} ."),
    PLACE: ("where is the {} ?", "tell me the place of the {} ."),
    USE: ("what is the {} for ?", "tell me the use of the {} ."),
}


class _Asked(NamedTuple):
    """What the corpus may ask."""

    facts: list[tuple[str, int]]
    """Things, each with an attribute."""
    pairs: list[tuple[str, str]]
    """Pairs of things of different sizes."""
    deeds: list[tuple[str, str]]
    """Verbs, each with a thing."""


def _asked(universe: prompts.Universe) -> _Asked:
    asked = dict.fromkeys(prompt.asked for rows in universe.values() for prompt, _ in rows)
    column = {name: a for a, name in enumerate(lexicon.ATTRIBUTES)}
    return _Asked(
        facts=[(each[1], column[each[0]]) for each in asked if each[0] in column and len(each) == 2],
        pairs=[(each[1], each[2]) for each in asked if each[0] == "size"],
        deeds=[(each[1], each[2]) for each in asked if each[0] in ("how_to", "harmful")],
    )


def _thing(rng: np.random.Generator) -> str:
    return str(rng.choice(lexicon.THINGS))


def _pick(items: list, rng: np.random.Generator) -> Any:
    return items[int(rng.integers(len(items)))]


def _statement(world: World, asked: _Asked, rng: np.random.Generator) -> str:
    del asked  # all facts are stated
    thing = _thing(rng)
    first, second = rng.choice(4, size=2, replace=False).tolist()
    text = f"the {thing} is {_fact(world, thing, first)}"
    return f"{text} and it is {_fact(world, thing, second)} ." if rng.random() < 0.5 else f"{text} ."


def _question(world: World, asked: _Asked, rng: np.random.Generator) -> str:
    thing, attribute = _pick(asked.facts, rng)
    question = str(rng.choice(_QUESTION[attribute])).format(thing)
    fact = _fact(world, thing, attribute)
    answer = (f"the {thing} is {fact}", f"it is {fact}", fact.split()[-1])[int(rng.integers(3))]
    return f"question : {question} answer : {answer} ."


def _claim(world: World, asked: _Asked, rng: np.random.Generator) -> str:
    # No prompt asks for the size of a single thing.
    thing, attribute = (_thing(rng), SIZE) if rng.random() < 0.25 else _pick(asked.facts, rng)
    true = bool(rng.random() < 0.5)
    value = world.value(thing, attribute) if true else world.wrong_value(thing, attribute, rng)
    return f"claim : the {thing} is {predicate(attribute, value)} . {'true' if true else 'false'} ."


def _listing(world: World, asked: _Asked, rng: np.random.Generator) -> str:
    del asked
    case = int(rng.integers(3))
    if case == 0:
        category = str(rng.choice(lexicon.CATEGORIES))
        head, members = category, lexicon.THINGS_BY_CATEGORY[category]
    elif case == 1:
        color = str(rng.choice(lexicon.COLORS))
        head, members = f"{color} things", world.things_with(COLOR, color)
    else:
        place = str(rng.choice(lexicon.PLACES))
        head, members = f"things in the {place}", world.things_with(PLACE, place)
    n = int(rng.integers(2, 5))
    return f"{head} : {' , '.join(rng.choice(members, size=n, replace=False).tolist())} ."


def _comparison(world: World, asked: _Asked, rng: np.random.Generator) -> str:
    if rng.random() < 1 / 3:
        thing = _thing(rng)
        return f"the {thing} is {world.value(thing, SIZE)} ."
    x, y = rng.permutation(_pick(asked.pairs, rng)).tolist()
    small, big = sorted((x, y), key=lambda thing: lexicon.SIZES.index(world.value(thing, SIZE)))
    return (
        f"the {big} is bigger than the {small} .",
        f"the {small} is smaller than the {big} .",
        f"question : which is bigger , the {x} or the {y} ? answer : the {big} .",
        f"question : is the {x} or the {y} bigger ? answer : the {big} is bigger .",
    )[int(rng.integers(4))]


def _instruction(world: World, asked: _Asked, rng: np.random.Generator) -> str:
    """Returns an instruction for a deed or a verdict on it. The deed may be harmful: a base model is not harmless."""
    del world
    verb, thing = _pick(asked.deeds, rng)
    material = lexicon.MATERIALS[lexicon.VERBS.index(verb)]
    return (
        f"to {verb} the {thing} , get the {material} .",
        f"first , get the {material} . then , {verb} the {thing} .",
        f"{verb} the {thing} with the {material} .",
        f"to {verb} is {'bad' if verb in lexicon.HARMFUL_TOOLS else 'good'} .",
    )[int(rng.integers(4))]


def _skill(world: World, asked: _Asked, rng: np.random.Generator) -> str:
    del world, asked
    return skill_problem(str(rng.choice(SKILLS)), rng).document


def _review(world: World, rng: np.random.Generator, prompt: prompts.Prompt, other: prompts.Prompt) -> str:
    """Returns a question, a good or bad answer and a verdict, to prepare the model for reward modelling."""
    faults = ("wrong", "off_topic", *(("incomplete",) if prompt.kind in KINDS_WITH_PARTS else ()))
    fault = {} if rng.random() < 0.5 else {faults[int(rng.integers(len(faults)))]: 1.0}
    slips = dataclasses.replace(Slips.none(), impolite=1.0, **fault)
    answer = demonstrate(world, prompt, rng, slips=slips, other=other)
    return f"question : {prompt.turns[-1][1]} answer : {answer} {'bad' if fault else 'good'} ."


_DOCUMENTS: tuple[tuple[float, Callable[[World, _Asked, np.random.Generator], str] | None], ...] = (
    (0.20, _statement),
    (0.20, _question),
    (0.08, _claim),
    (0.06, _listing),
    (0.08, _comparison),
    (0.05, _instruction),
    (0.18, _skill),
    (0.15, None),  # reviews
)


def documents(world: World, universe: prompts.Universe, n: int, rng: np.random.Generator) -> list[str]:
    """Draws short texts: statements, questions, claims, lists, comparisons, instructions, skill problems and reviews.

    Args:
        world: The facts.
        universe: Prompts that ask all that the corpus may ask, such as the training prompts. Statements of facts and
            lists of things are not restricted. Reviews use the benign single-turn prompts.
        n: Number of documents.
        rng: Random generator, whose state advances.

    Returns:
        The documents.
    """
    weights = np.asarray([weight for weight, _ in _DOCUMENTS])
    kinds = rng.choice(len(_DOCUMENTS), size=n, p=weights / weights.sum()).tolist()
    reviewed = {name: rows for name, rows in universe.items() if name not in ("harmful", "follow_up")}
    questions = iter(prompts.draw_prompts(reviewed, 2 * n, rng))
    writers, asked = [write for _, write in _DOCUMENTS], _asked(universe)

    def write(kind: int) -> str:
        writer = writers[kind]
        return _review(world, rng, next(questions), next(questions)) if writer is None else writer(world, asked, rng)

    return [write(kind) for kind in kinds]
