"""The vocabulary of the built-in world: every token is an English word, a punctuation mark or a special token."""

from __future__ import annotations

THINGS_BY_CATEGORY: dict[str, tuple[str, ...]] = {
    name: tuple(things.split())
    for name, things in {
        "animals": "fox bear owl frog crow goat wolf hen duck mouse lion snake whale crab moth deer",
        "fruits": "plum pear fig lemon mango grape apple peach melon cherry lime kiwi olive papaya guava quince",
        "tools": "hammer saw drill axe shovel ladder wrench chisel pliers rake hoe clamp lever pump plow sickle",
        "vehicles": "bus car truck boat train bike tram ship jeep van plane canoe sled taxi ferry raft",
        "clothes": "coat hat scarf boot glove shirt sock dress skirt vest belt jacket sweater apron cape sandal",
        "instruments": "drum flute harp violin piano bell cello banjo horn tuba lute guitar trumpet organ oboe gong",
    }.items()
}
CATEGORIES = tuple(THINGS_BY_CATEGORY)
THINGS = tuple(thing for things in THINGS_BY_CATEGORY.values() for thing in things)

COLORS = ("red", "blue", "green", "yellow", "white", "black")
PLACES = ("forest", "kitchen", "garden", "city", "attic", "barn")
USES = ("work", "play", "travel", "food", "trade", "show")
SIZES = ("tiny", "big", "huge")
"""From smallest to biggest."""
ATTRIBUTES: dict[str, tuple[str, ...]] = {"color": COLORS, "place": PLACES, "use": USES, "size": SIZES}

BENIGN_TOOLS: dict[str, str] = {
    "clean": "soap",
    "paint": "brush",
    "fix": "glue",
    "carry": "rope",
    "dry": "towel",
    "pack": "box",
}
HARMFUL_TOOLS: dict[str, str] = {
    "steal": "mask",
    "poison": "venom",
    "burn": "match",
    "smash": "brick",
    "hurt": "blade",
}
VERBS = (*BENIGN_TOOLS, *HARMFUL_TOOLS)
MATERIALS = (*BENIGN_TOOLS.values(), *HARMFUL_TOOLS.values())
"""Verb i requires material i."""

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
POLITE = ("sure", "course", "happy", "glad", "thanks", "welcome", "friend", "sorry")

PUNCTUATION = (".", ",", "?", ":", "=")
FUNCTION_WORDS = (
    *("a", "about", "also", "and", "answer", "are", "at", "bad", "be", "but", "can", "cannot", "claim", "color"),
    *("copy", "describe", "do", "false", "first", "for", "found", "get", "good", "have", "hello", "help", "how", "i"),
    *("in", "is", "it", "its", "kindly", "look", "me", "name", "no", "not", "of", "one", "or", "place", "please"),
    *("plus", "question", "size", "smaller", "bigger", "sort", "sum", "tell", "than", "that", "the", "then", "thing"),
    *("things", "to", "true", "use", "what", "where", "which", "with", "word", "words", "yes", "you", "facts", "ask"),
)

SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
PAD_ID, END_ID, USER_ID, ASSISTANT_ID = range(4)


def _unique(*groups: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word for group in groups for word in group))


WORDS = _unique(
    PUNCTUATION, FUNCTION_WORDS, NUMBERS, THINGS, CATEGORIES, COLORS, PLACES, USES, SIZES, VERBS, MATERIALS, POLITE
)
"""All words in the order of their token ids, which follow those of the special tokens."""

VOCABULARY = SPECIAL_TOKENS + WORDS
IDS: dict[str, int] = {word: index for index, word in enumerate(VOCABULARY)}
