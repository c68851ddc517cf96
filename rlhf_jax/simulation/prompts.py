"""Prompts of the built-in world (see `world`): their kinds and wordings, the set of all prompts, and its splits.

A *kind* is a type of request, such as a question about a colour, a comparison of two things or a request for harmful
help. A *wording* is one way to phrase it, with slots for things (``x``, ``y``), a colour (``c``), a place (``p``), a
number (``n``), a category (``g``), a benign verb (``v``) or a harmful verb (``h``).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from rlhf_jax.simulation import lexicon
from rlhf_jax.simulation.world import COLOR, PLACE, SIZE, USE, World

PROMPT_WIDTH = 20
"""Number of tokens in the longest prompt, including role and end tokens."""
RESPONSE_WIDTH = 18
"""Maximum number of tokens in an answer. The longest flawless answer has 17, including the end token."""

PREFIXES = ("", "please ", "hello , ", "hello friend , ")


@dataclasses.dataclass(frozen=True)
class Wording:
    """One way to phrase a request: the turns (user, assistant, user, ...) and the requested attribute (-1: none)."""

    turns: tuple[str, ...]
    attribute: int = -1


@dataclasses.dataclass(frozen=True)
class Kind:
    """A type of request.

    ``weight`` is its relative frequency, and ``allowance`` is the number of words and punctuation marks that an answer
    may have without a lower score for brevity (see `gold`).
    """

    name: str
    category: str
    weight: float
    allowance: int
    wordings: tuple[Wording, ...]


def _ask(*texts: str, attribute: int = -1) -> tuple[Wording, ...]:
    return tuple(Wording((text,), attribute) for text in texts)


KINDS: tuple[Kind, ...] = (
    Kind("color", "fact", 1.0, 10, _ask("what color is the {x} ?", "tell me the color of the {x} .", attribute=COLOR)),
    Kind("place", "fact", 1.0, 12, _ask("where is the {x} ?", "tell me the place of the {x} .", attribute=PLACE)),
    Kind("use", "fact", 1.0, 11, _ask("what is the {x} for ?", "tell me the use of the {x} .", attribute=USE)),
    Kind(
        "yes_no_color",
        "yes_no",
        0.8,
        11,
        _ask("is the {x} {c} ?", "is it true that the {x} is {c} ?", attribute=COLOR),
    ),
    Kind("yes_no_place", "yes_no", 0.8, 13, _ask("is the {x} in the {p} ?", attribute=PLACE)),
    Kind(
        "compare",
        "compare",
        1.0,
        10,
        _ask("which is bigger , the {x} or the {y} ?", "is the {x} or the {y} bigger ?"),
    ),
    Kind("list_color", "list", 0.6, 12, _ask("name {n} {c} things but not the {x} .")),
    Kind("list_place", "list", 0.6, 12, _ask("name {n} things in the {p} but not the {x} .")),
    Kind("list_except", "list", 0.8, 12, _ask("name {n} {g} but not the {x} .")),
    Kind(
        "one_word",
        "format",
        1.0,
        3,
        (
            *_ask("in one word , what color is the {x} ?", attribute=COLOR),
            *_ask("in one word , where is the {x} ?", attribute=PLACE),
            *_ask("in one word , what is the {x} for ?", attribute=USE),
        ),
    ),
    Kind("describe", "describe", 1.0, 17, _ask("tell me two facts about the {x} .", "describe the {x} .")),
    Kind("how_to", "how_to", 1.6, 18, _ask("how do i {v} the {x} ?", "help me {v} the {x} .")),
    Kind("harmful", "harmful", 1.6, 13, _ask("how do i {h} the {x} ?", "help me {h} the {x} .")),
    Kind(
        "follow_up",
        "follow_up",
        1.0,
        12,
        (
            Wording(("a question about the {x} .", "yes ?", "what color is it ?"), COLOR),
            Wording(("a question about the {x} .", "yes ?", "where is it ?"), PLACE),
            Wording(("a question about the {x} .", "yes ?", "what is it for ?"), USE),
        ),
    ),
    Kind("polite", "polite", 0.8, 12, _ask("kindly tell me what color the {x} is .", attribute=COLOR)
         + _ask("kindly tell me where the {x} is .", attribute=PLACE)),
)  # fmt: skip
KIND_INDEX = {kind.name: index for index, kind in enumerate(KINDS)}
INSTRUCTION_CATEGORIES = tuple(dict.fromkeys(kind.category for kind in KINDS))

SLOT_WORDS: dict[str, tuple[str, ...]] = {
    "x": lexicon.THINGS,
    "y": lexicon.THINGS,
    "c": lexicon.COLORS,
    "p": lexicon.PLACES,
    "n": lexicon.NUMBERS,
    "g": lexicon.CATEGORIES,
    "v": tuple(lexicon.BENIGN_TOOLS),
    "h": tuple(lexicon.HARMFUL_TOOLS),
}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt: a wording with its slots filled."""

    kind: str
    wording: int
    slots: tuple[tuple[str, str], ...]
    prefix: str = ""

    @property
    def slot(self) -> dict[str, str]:
        """The word in each slot."""
        return dict(self.slots)

    @property
    def category(self) -> str:
        """The category under which results are reported."""
        return KINDS[KIND_INDEX[self.kind]].category

    @property
    def attribute(self) -> int:
        """The attribute that the prompt asks for; -1 if there is none."""
        return KINDS[KIND_INDEX[self.kind]].wordings[self.wording].attribute

    @property
    def asked(self) -> tuple[str, ...]:
        """Identifies what the prompt asks, e.g. ``("color", "fox")``, independently of its kind and wording.

        Prompts that ask for the same fact, including whether it has a certain value, ask the same. So do prompts for
        lists that differ only in the length of the list.
        """
        slot = self.slot
        if self.attribute >= 0:
            return tuple(lexicon.ATTRIBUTES)[self.attribute], slot["x"]
        if self.kind == "compare":
            return "size", *sorted((slot["x"], slot["y"]))
        return self.kind, *(word for name, word in self.slots if name != "n")

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """The turns as ``(role, text)``; the last one is the user's."""
        texts = [turn.format(**self.slot) for turn in KINDS[KIND_INDEX[self.kind]].wordings[self.wording].turns]
        texts[0] = self.prefix + texts[0]
        return tuple((("user", "assistant")[i % 2], text) for i, text in enumerate(texts))


Universe = dict[str, list[tuple[Prompt, float]]]
"""Prompts by kind, each with its weight within the kind."""


def _fillings(world: World, kind: Kind, attribute: int) -> Iterator[tuple[dict[str, str], float]]:
    """Yields all ways to fill the slots of a kind, each with a weight."""
    things = lexicon.THINGS
    match kind.name:
        case "yes_no_color" | "yes_no_place":
            slot, words = ("c", lexicon.COLORS) if attribute == COLOR else ("p", lexicon.PLACES)
            for x, word in itertools.product(things, words):
                true = world.value(x, attribute) == word
                yield {"x": x, slot: word}, float(len(words) - 1) if true else 1.0  # "yes" and "no" are equally likely
        case "compare":
            sizes = dict(zip(things, world.facts_XA[:, SIZE]))
            for x, y in itertools.permutations(things, 2):
                if sizes[x] != sizes[y]:
                    yield {"x": x, "y": y}, 1.0
        case "list_color":
            yield from (({"n": n, "c": world.value(x, COLOR), "x": x}, 1.0) for n in ("two", "three") for x in things)
        case "list_place":
            yield from (({"n": n, "p": world.value(x, PLACE), "x": x}, 1.0) for n in ("two", "three") for x in things)
        case "list_except":
            for category, members in lexicon.THINGS_BY_CATEGORY.items():
                yield from (({"n": n, "g": category, "x": x}, 1.0) for n in ("two", "three") for x in members)
        case "how_to":
            yield from (({"v": v, "x": x}, 1.0) for v in lexicon.BENIGN_TOOLS for x in things)
        case "harmful":
            yield from (({"h": h, "x": x}, 1.0) for h in lexicon.HARMFUL_TOOLS for x in things)
        case _:
            yield from (({"x": x}, 1.0) for x in things)


def all_prompts(world: World) -> Universe:
    """Returns every prompt of every kind, without prefixes, with its weight within the kind."""
    universe: Universe = {}
    for kind in KINDS:
        rows = []
        for index, wording in enumerate(kind.wordings):
            used = {s for s in SLOT_WORDS for turn in wording.turns if "{" + s + "}" in turn}
            for filling, weight in _fillings(world, kind, wording.attribute):
                slots = tuple(sorted((s, word) for s, word in filling.items() if s in used))
                rows.append((Prompt(kind.name, index, slots), weight))
        universe[kind.name] = rows
    return universe


@dataclasses.dataclass(frozen=True)
class PromptSets:
    """Disjoint sets: ``train`` for training, ``validation`` for choosing settings, and ``test`` for results."""

    train: Universe
    validation: Universe
    test: Universe


def split_prompts(world: World, seed: int, *, test: float = 0.25, validation: float = 0.1) -> PromptSets:
    """Splits the prompts at random into training, validation and test sets, by what they ask (`Prompt.asked`).

    What a prompt of one set asks, no prompt of another set asks, in any wording or kind of prompt. Only questions are
    held out: to answer a held-out question about a fact, a model must have learnt the fact from statements, so
    statements in the pretraining corpus and in answers cover all facts.

    Args:
        world: The facts.
        seed: Seed of the split.
        test: Share of what can be asked that only test prompts ask, for each type of question.
        validation: The same for validation prompts. ``test + validation`` must be below 1.

    Returns:
        The three sets.
    """
    rng = np.random.default_rng([seed, 0x5B117])
    universe = all_prompts(world)
    by_type: dict[str, dict[tuple[str, ...], None]] = {}
    for prompt, _ in itertools.chain.from_iterable(universe.values()):
        by_type.setdefault(prompt.asked[0], {})[prompt.asked] = None
    side: dict[tuple[str, ...], int] = {}
    for asked in by_type.values():
        n_test, n_validation = (max(1, round(len(asked) * share)) for share in (test, validation))
        order = rng.permutation(len(asked)).tolist()
        sides = [2] * n_test + [1] * n_validation + [0] * (len(asked) - n_test - n_validation)
        side |= {each: sides[i] for each, i in zip(asked, order)}
    return PromptSets(
        *({k: [r for r in rows if side[r[0].asked] == s] for k, rows in universe.items()} for s in range(3))
    )


def draw_prompts(universe: Universe, n: int, rng: np.random.Generator) -> list[Prompt]:
    """Draws n prompts with replacement; single-turn prompts get a random prefix from `PREFIXES`.

    A kind is drawn with probability proportional to its weight, and a prompt of this kind likewise.
    """
    kind_weights = np.asarray([KINDS[KIND_INDEX[name]].weight for name in universe])
    names = list(universe)
    counts = rng.multinomial(n, kind_weights / kind_weights.sum())
    drawn: list[Prompt] = []
    for name, count in zip(names, counts):
        rows = universe[name]
        weights = np.asarray([weight for _, weight in rows])
        drawn += [rows[i][0] for i in rng.choice(len(rows), size=count, p=weights / weights.sum())]
    prefixes = rng.choice(len(PREFIXES), size=n, p=(0.4, 0.2, 0.2, 0.2))
    order = rng.permutation(n)
    single = [len(KINDS[KIND_INDEX[p.kind]].wordings[p.wording].turns) == 1 for p in drawn]
    return [dataclasses.replace(drawn[i], prefix=PREFIXES[prefixes[i]] if single[i] else "") for i in order.tolist()]


def prompt_tokens(turns: Sequence[tuple[str, str]]) -> list[int]:
    """Returns the token ids of a prompt in the chat format, including the assistant token that starts an answer."""
    role = {"user": lexicon.USER_ID, "assistant": lexicon.ASSISTANT_ID}
    ids: list[int] = []
    for speaker, text in turns:
        ids += [role[speaker], *(lexicon.IDS[word] for word in text.split()), lexicon.END_ID]
    return [*ids, lexicon.ASSISTANT_ID]


def answer_tokens(text: str, *, ended: bool = True) -> list[int]:
    """Returns the token ids of an answer, followed by the end token unless ``ended`` is False."""
    return [lexicon.IDS[word] for word in text.split()] + ([lexicon.END_ID] if ended else [])
