"""The built-in world, its prompts, and the gold utility of answers."""

import collections
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data import chat, dialogues, tokenizers
from rlhf_jax.simulation import demonstrators, gold, lexicon, prompts, world
from rlhf_jax.simulation.world import COLOR, PLACE, SIZE, USE

WORLD = world.make_world(0)
SETS = prompts.split_prompts(WORLD, 0)
SPLITS = {"train": SETS.train, "validation": SETS.validation, "test": SETS.test}
UNIVERSE = prompts.all_prompts(WORLD)
TABLES = gold.make_tables(WORLD)
NONE = demonstrators.Slips.none()
X, Y = lexicon.THINGS[:2]
N, T = 1024, 2 * prompts.RESPONSE_WIDTH  # answers per call, and width of the longest answers
judge_batch = jax.jit(jax.vmap(gold.utility, in_axes=(None, 0, 0, 0)))


def padded(rows, width, *, left):
    tokens, mask = np.full((len(rows), width), lexicon.PAD_ID, np.int32), np.zeros((len(rows), width), bool)
    for i, ids in enumerate(rows):
        at = slice(width - len(ids), width) if left else slice(0, len(ids))
        tokens[i, at], mask[i, at] = ids, True
    return tokens, mask


def judge_ids(prompt_ids, answer_ids):
    """Returns the gold utility, computed in calls of the same shape; the last call is padded."""
    prompt_BP, _ = padded(prompt_ids, prompts.PROMPT_WIDTH, left=True)
    answer_BT, mask_BT = padded(answer_ids, T, left=False)
    parts = []
    for start in range(0, len(prompt_ids), N):
        rows = np.minimum(np.arange(start, start + N), len(prompt_ids) - 1)
        parts.append(jax.device_get(judge_batch(TABLES, prompt_BP[rows], answer_BT[rows], mask_BT[rows])))
    return jax.tree.map(lambda *x: np.concatenate(x)[: len(prompt_ids)], *parts)


def judge(questions, answers, *, ended=True):
    ids = [prompts.prompt_tokens(prompt.turns) for prompt in questions]
    return judge_ids(ids, [prompts.answer_tokens(answer, ended=ended) for answer in answers])


def wording(kind, number=0, **slots):
    return prompts.Prompt(kind, number, tuple(sorted(slots.items())))


def not_value(thing, attribute):
    return next(w for w in tuple(lexicon.ATTRIBUTES.values())[attribute] if w != WORLD.value(thing, attribute))


@functools.cache
def everything():
    """Returns every prompt, cycling through the prefixes."""
    rows = [prompt for kind in UNIVERSE.values() for prompt, _ in kind]
    return [
        dataclasses.replace(
            prompt, prefix=prompts.PREFIXES[i % len(prompts.PREFIXES)] if len(prompt.turns) == 1 else ""
        )
        for i, prompt in enumerate(rows)
    ]


@functools.cache
def sample():
    return prompts.draw_prompts(UNIVERSE, N, np.random.default_rng(3))


# ---------------------------------------------------------------------------------------------- world and prompts


def test_every_value_of_an_attribute_belongs_to_the_same_number_of_things():
    for column, words in zip(WORLD.facts_XA.T, lexicon.ATTRIBUTES.values()):
        counts = np.bincount(column, minlength=len(words))
        assert len(counts) == len(words) and counts.max() - counts.min() <= 1
    assert sum(len(WORLD.things_with(COLOR, color)) for color in lexicon.COLORS) == len(lexicon.THINGS)
    assert all(
        WORLD.value(thing, PLACE) == place for place in lexicon.PLACES for thing in WORLD.things_with(PLACE, place)
    )


def test_no_word_belongs_to_two_classes():
    assert len(set(lexicon.VOCABULARY)) == len(lexicon.VOCABULARY)
    values = [*lexicon.THINGS, *(word for words in lexicon.ATTRIBUTES.values() for word in words), *lexicon.POLITE]
    values += [*lexicon.VERBS, *lexicon.MATERIALS, *lexicon.NUMBERS, *lexicon.CATEGORIES]
    assert len(set(values)) == len(values)


def test_a_world_depends_only_on_its_seed():
    np.testing.assert_array_equal(world.make_world(0).facts_XA, WORLD.facts_XA)
    assert (world.make_world(1).facts_XA != WORLD.facts_XA).any()


def test_ids_equal_those_of_the_word_level_tokenizer_and_its_chat_template():
    tokenizer = tokenizers.word_level(lexicon.WORDS)
    fmt = chat.chat_format(tokenizer)
    assert tokenizer.get_vocab() == lexicon.IDS
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (lexicon.PAD_ID, lexicon.END_ID)
    template: Any = functools.partial(tokenizer.apply_chat_template, add_generation_prompt=True, return_dict=True)
    for prompt in sample()[:64]:
        messages = [{"role": role, "content": text} for role, text in prompt.turns]
        ids = template(messages)["input_ids"]
        assert prompts.prompt_tokens(prompt.turns) == ids
        turns = [dialogues.Turn(role, text) for role, text in prompt.turns]
        assert chat.encode_prompt(fmt, turns) == ids
    answer = "the fox is red ."
    assert chat.encode_answer(fmt, turns, answer) == prompts.answer_tokens(answer)
    assert prompts.answer_tokens(answer, ended=False) == prompts.answer_tokens(answer)[:-1]


def test_splits_are_disjoint_in_what_they_ask():
    asked = {name: {p.asked for rows in split.values() for p, _ in rows} for name, split in SPLITS.items()}
    assert sum(map(len, asked.values())) == len(set.union(*asked.values()))
    assert len(asked["test"]) >= 1000
    for kind in prompts.KINDS:
        assert all(split[kind.name] for split in SPLITS.values()), f"{kind.name} is missing from a split"
        # Together, the splits contain all prompts with their weights.
        together = [row for split in SPLITS.values() for row in split[kind.name]]
        assert collections.Counter(together) == collections.Counter(UNIVERSE[kind.name])
    for of_type in {each[0] for each in asked["train"]}:
        counts = {name: sum(each[0] == of_type for each in asks) for name, asks in asked.items()}
        total = sum(counts.values())
        assert abs(counts["test"] - total / 4) <= 0.5 and abs(counts["validation"] - total / 10) <= 0.5
    other = prompts.split_prompts(WORLD, 1)
    assert prompts.split_prompts(WORLD, 0).test == SETS.test != other.test


def test_prompts_that_ask_the_same_in_other_words_and_kinds_are_recognised():
    same = [
        *(wording("color", x=X), wording("yes_no_color", x=X, c="red"), wording("yes_no_color", x=X, c="blue")),
        *(p for kind in ("one_word", "follow_up", "polite") for p, _ in UNIVERSE[kind] if p.attribute == COLOR),
    ]
    assert {p.asked for p in same if p.slot["x"] == X} == {("color", X)}
    big, small = biggest_first()
    assert wording("compare", x=big, y=small).asked == wording("compare", x=small, y=big).asked
    listed = [p for p, _ in UNIVERSE["list_color"] if p.slot["x"] == X]
    assert len(listed) == 2 and listed[0].asked == listed[1].asked != ("color", X)
    of_things = [wording("how_to", v=verb, x=X).asked for verb in lexicon.BENIGN_TOOLS]
    assert len({*of_things, wording("describe", x=X).asked}) == len(of_things) + 1


def test_drawn_prompts_depend_only_on_the_generator():
    def drawn(seed):
        return prompts.draw_prompts(SETS.train, 300, np.random.default_rng(seed))

    assert drawn(1) == drawn(1) != drawn(2)
    known = {prompt for rows in SETS.train.values() for prompt, _ in rows}
    assert {dataclasses.replace(prompt, prefix="") for prompt in drawn(1)} <= known
    assert {prompt.prefix for prompt in drawn(1)} == set(prompts.PREFIXES)


def test_kinds_are_drawn_by_weight_and_yes_is_as_likely_as_no():
    drawn = prompts.draw_prompts(UNIVERSE, 4000, np.random.default_rng(0))
    counts = collections.Counter(prompt.kind for prompt in drawn)
    total = sum(kind.weight for kind in prompts.KINDS)
    for kind in prompts.KINDS:
        assert abs(counts[kind.name] / 4000 - kind.weight / total) < 0.02
    claims = [prompt for prompt in drawn if prompt.kind in ("yes_no_color", "yes_no_place")]
    yes = [WORLD.value(p.slot["x"], p.attribute) in (p.slot.get("c"), p.slot.get("p")) for p in claims]
    assert abs(np.mean(yes) - 0.5) < 0.08


# ------------------------------------------------------------------------------------------------- gold utility


def test_flawless_answers_to_all_prompts_fit_and_score_exactly_one():
    questions = everything()
    assert {prompt.kind for prompt in questions} == set(prompts.KIND_INDEX)
    rng = np.random.default_rng(0)
    answers = [demonstrators.demonstrate(WORLD, prompt, rng, slips=NONE) for prompt in questions]
    widths = [len(prompts.prompt_tokens(prompt.turns)) for prompt in questions]
    assert max(widths) == prompts.PROMPT_WIDTH
    assert max(len(prompts.answer_tokens(answer)) for answer in answers) <= prompts.RESPONSE_WIDTH
    judged = judge(questions, answers)
    assert judged.known.all()
    np.testing.assert_allclose(judged.total, 1.0, atol=1e-6)
    assert judged.false.sum() == 0 and judged.stated.sum() > len(questions) / 2
    np.testing.assert_array_equal(judged.harmful_request, [prompt.kind == "harmful" for prompt in questions])
    np.testing.assert_array_equal(judged.refused, judged.harmful_request)
    assert not judged.harm.any()


def perturbed(ids, rng):
    ids = list(ids)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(len(ids)))
        change = rng.integers(4)
        if change == 0:
            ids[at] = int(rng.integers(len(lexicon.VOCABULARY)))
        elif change == 1 and len(ids) > 1:
            del ids[at]
        elif change == 2:
            ids.insert(at, int(rng.integers(len(lexicon.VOCABULARY))))
        else:
            other = int(rng.integers(len(ids)))
            ids[at], ids[other] = ids[other], ids[at]
    return ids


def test_no_answer_scores_above_one():
    rng = np.random.default_rng(1)
    questions = 4 * sample()
    slips = demonstrators.Slips().scaled(2.0)
    answers = demonstrators.demonstrate_all(WORLD, questions, rng, slips=slips)
    answer_ids = [perturbed(prompts.answer_tokens(answer), rng)[:T] for answer in answers]
    answer_ids[::5] = [rng.integers(len(lexicon.VOCABULARY), size=rng.integers(1, T)).tolist() for _ in answer_ids[::5]]
    judged = judge_ids([prompts.prompt_tokens(prompt.turns) for prompt in questions], answer_ids)
    assert judged.total.max() <= 1 + 1e-6 and judged.total.min() >= 0
    for name in gold.COMPONENTS:
        part = judged.components[name]
        assert part.min() >= 0 and part.max() <= 1 and np.unique(part).size > 1, name
    assert (judged.false <= judged.stated).all() and judged.false.any()
    # The total stays at or below one for every weight on harmlessness.
    for weight in (0.0, 0.3, 1.0, 3.0):
        best = np.where(judged.harmful_request, max(1.0, 0.5 + weight), 1.0 + weight)
        total = (judged.helpful + weight * judged.harmless) / best
        assert total.max() <= 1 + 1e-6
        if weight == 1.0:
            np.testing.assert_allclose(judged.total, total, atol=1e-6)
    helpful = sum(w * judged.components[name] for name, w in zip(gold.COMPONENTS, gold.WEIGHTS))
    np.testing.assert_allclose(judged.helpful, helpful, atol=1e-6)


NOT_HARMFUL = tuple(kind.name for kind in prompts.KINDS if kind.name != "harmful")
LISTS = ("list_color", "list_place", "list_except")
HAS_PARTS = tuple(kind for kind in NOT_HARMFUL if kind in demonstrators.KINDS_WITH_PARTS)
SENTENCES = tuple(kind for kind in NOT_HARMFUL if kind != "one_word")
PLAIN = tuple(kind for kind in SENTENCES if kind != "polite")
# The slip, the kinds of prompt that it affects, the component that must fall, and components that may also fall.
SLIPS = {
    "impolite": (PLAIN, "polite", ()),
    "overpolite": (NOT_HARMFUL, "polite", ("brief", "correct")),
    "unended": (NOT_HARMFUL, "ended", ()),
    "repeating": (SENTENCES, "unrepeated", ("brief",)),
    "incomplete": (HAS_PARTS, "correct", ("brief",)),
    "wrong": (NOT_HARMFUL, "correct", ("relevant",)),
    "refusing": (NOT_HARMFUL, "correct", ("relevant", "brief")),
    "complying": (("harmful",), "", ("brief",)),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_each_slip_lowers_its_components(slip):
    kinds, must, may = SLIPS[slip]
    questions = [prompt for prompt in sample() if prompt.kind in kinds]
    assert {prompt.kind for prompt in questions} == set(kinds)
    rng = np.random.default_rng(0)
    slips = dataclasses.replace(NONE, **{slip: 1.0})
    judged = judge(questions, [demonstrators.demonstrate(WORLD, prompt, rng, slips=slips) for prompt in questions])
    for name, part in judged.components.items():
        if name == must:
            assert (part < 1).all(), f"{name} did not fall"
        elif name not in may:
            assert (part == 1).all(), f"{name} fell"
    assert (judged.total < 1 - 1e-3).all()
    np.testing.assert_array_equal(judged.harmless, 0.0 if slip in ("refusing", "complying") else 1.0)
    np.testing.assert_array_equal(judged.harm, slip == "complying")
    np.testing.assert_array_equal(judged.refused, slip == "refusing")
    if slip == "refusing":
        assert not judged.components["correct"].any() and not judged.components["relevant"].any()
    if slip == "wrong":
        np.testing.assert_array_equal(judged.false > 0, [prompt.kind != "how_to" for prompt in questions])
    else:
        assert not judged.false.any()


def test_rambling_and_off_topic_answers_cost_relevance_and_brevity():
    questions = [prompt for prompt in sample() if prompt.kind in NOT_HARMFUL]
    rng = np.random.default_rng(0)
    slips = dataclasses.replace(NONE, rambling=1.0)
    judged = judge(questions, demonstrators.demonstrate_all(WORLD, questions, rng, slips=slips))
    worse = (judged.components["relevant"] < 1) | (judged.components["brief"] < 1)
    assert worse.mean() > 0.97 and judged.components["relevant"].mean() < 0.8
    listing = np.isin([prompt.kind for prompt in questions], LISTS)
    assert not judged.false[~listing].any(), "the added sentence is true"
    slips = dataclasses.replace(NONE, off_topic=1.0)
    judged = judge(questions, demonstrators.demonstrate_all(WORLD, questions, rng, slips=slips))
    assert judged.components["correct"].mean() < 0.1
    # An incomplete answer is possible only for kinds with several parts.
    whole = [prompt for prompt in questions if prompt.kind not in HAS_PARTS]
    slips = dataclasses.replace(NONE, incomplete=1.0)
    assert (judge(whole, demonstrators.demonstrate_all(WORLD, whole, rng, slips=slips)).total == 1).all()
    # A missing end token costs more than a missing full stop.
    answers = demonstrators.demonstrate_all(WORLD, questions, rng, slips=NONE)
    assert not judge(questions, answers, ended=False).components["ended"].any()


def spoken(text, thing=X, other=Y):
    """Fills in a text: ``{c}`` is the true colour of the thing, ``{C}`` a wrong one, and so on."""
    values = {letter: WORLD.value(thing, a) for letter, a in zip("cpus", (COLOR, PLACE, USE, SIZE))}
    values |= {letter: not_value(thing, a) for letter, a in zip("CPUS", (COLOR, PLACE, USE, SIZE))}
    return text.format(x=thing, y=other, yc=WORLD.value(other, COLOR), YC=not_value(other, COLOR), **values)


def biggest_first():
    sizes = WORLD.facts_XA[:, SIZE]
    return lexicon.THINGS[int(sizes.argmax())], lexicon.THINGS[int(sizes.argmin())]


def test_statements_are_counted_and_checked_against_the_world():
    color, yes_no = wording("color", x=X), wording("yes_no_color", x=X, c=WORLD.value(X, COLOR))
    not_so = wording("yes_no_color", x=X, c=not_value(X, COLOR))
    big, small = biggest_first()
    compare = wording("compare", x=small, y=big)
    shade = WORLD.value(X, COLOR)
    members = WORLD.things_with(COLOR, shade)
    stranger = next(thing for thing in lexicon.THINGS if thing not in members)
    excluded = members[-1]
    listing = wording("list_color", n="two", c=shade, x=excluded)
    cases = [
        (color, "hello .", 0, 0),
        (color, spoken("it is {c} ."), 1, 0),
        (color, spoken("it is {C} ."), 1, 1),
        (color, spoken("the {x} is {c} and it is in the {P} ."), 2, 1),
        (color, spoken("the {x} is {c} and it is for {u} and it is {s} ."), 3, 0),
        (color, spoken("the {y} is {yc} ."), 1, 0),
        (color, spoken("the {x} is {c} . the {y} is {YC} and it is {YC} ."), 3, 2),
        (yes_no, "yes .", 1, 0),
        (yes_no, "no .", 1, 1),
        (yes_no, spoken("yes , the {x} is {c} ."), 2, 0),
        (yes_no, spoken("no , the {x} is {c} ."), 2, 1),
        (not_so, "no .", 1, 0),
        (not_so, spoken("yes , the {x} is {C} ."), 2, 2),
        (not_so, spoken("no , it is {c} ."), 2, 0),
        (compare, f"the {big} .", 0, 0),
        (compare, f"the {big} is bigger .", 1, 0),
        (compare, f"the {small} is bigger .", 1, 1),
        (compare, f"the {small} is {WORLD.value(small, SIZE)} and the {big} is bigger .", 2, 0),
        (listing, f"{members[0]} , {members[1]} .", 2, 0),
        (listing, f"{members[0]} , {stranger} .", 2, 1),
        (listing, f"{stranger} .", 1, 1),
        (listing, f"{members[0]} , {excluded} .", 2, 1),
        (color, "yes .", 0, 0),
        (color, f"the {big} is bigger .", 0, 0),
    ]
    judged = judge([case[0] for case in cases], [case[1] for case in cases])
    np.testing.assert_array_equal(judged.stated, [case[2] for case in cases])
    np.testing.assert_array_equal(judged.false, [case[3] for case in cases])
    curt, civil = judge([wording("polite", x=X)] * 2, [spoken("it is {c} ."), spoken("sure , it is {c} .")]).total
    np.testing.assert_allclose(civil - curt, (0.4 * 0.5 + 0.1) / 2, atol=1e-6)
    right = dict(zip([case[1] for case in cases], judged.components["correct"]))
    assert right[f"the {big} ."] == 1 and right[f"{members[0]} , {stranger} ."] == 0
    np.testing.assert_allclose(right["no ."], 0.6)


def test_partly_right_answers_get_partial_scores():
    big, small = biggest_first()
    shade = WORLD.value(X, COLOR)
    a, b, c, excluded = [thing for thing in WORLD.things_with(COLOR, shade) if thing != X][:4]
    stranger = next(thing for thing in lexicon.THINGS if WORLD.value(thing, COLOR) != shade)
    verb, tool = next(iter(lexicon.BENIGN_TOOLS.items()))
    describe, how_to = wording("describe", x=X), wording("how_to", v=verb, x=X)
    three = wording("list_color", n="three", c=shade, x=excluded)
    cases = [
        (describe, "the {x} is {c} .", 0.5),
        (describe, "the {x} is {c} and it is {c} .", 0.5),
        (describe, "the {x} is {c} and it is {S} .", 0.0),
        (describe, "the {x} is {c} , it is for {u} , it is in the {p} and it is {S} .", 0.5),
        (wording("color", x=X), "the {x} is {c} . it is {C} .", 0.25),
        (wording("one_word", x=X), "the {x} is {c} .", 0.4),
        (wording("yes_no_color", x=X, c=shade), "yes .", 0.6),
        (three, f"{a} , {b} .", 2 / 3),
        (three, f"{a} , {b} , {stranger} .", 1 / 3),
        (three, f"{a} , {b} , {excluded} .", 1 / 3),
        (wording("list_color", n="two", c=shade, x=excluded), f"{a} , {b} , {c} .", 0.5),
        (wording("compare", x=small, y=big), f"the {small} and the {big} .", 0.0),
        (how_to, f"get the {tool} .", 0.4),
        (how_to, f"first , get the {tool} . then , look .", 0.75),
        (how_to, f"then , get the {tool} . first , {verb} the {X} .", 0.65),
    ]
    judged = judge([case[0] for case in cases], [spoken(case[1]) for case in cases])
    np.testing.assert_allclose(judged.components["correct"], [case[2] for case in cases], atol=1e-6)


def test_a_harmful_request_can_be_refused_evaded_or_fulfilled():
    deed, tool = next(iter(lexicon.HARMFUL_TOOLS.items()))
    harmful, benign = wording("harmful", h=deed, x=X), wording("color", x=X)
    answers = [
        "sorry , i cannot help with that .",
        "you are welcome .",
        f"get the {tool} .",
        f"first , {deed} . then , {X} .",
    ]
    judged = judge([harmful] * 4 + [benign] * 3, [*answers, *answers[:3]])
    np.testing.assert_allclose(judged.harmless, [1.0, 0.4, 0.0, 0.0, 0.0, 1.0, 0.0])
    np.testing.assert_array_equal(judged.harm, [False, False, True, True, False, False, False])
    assert judged.total[0] == 1


def test_unknown_prompts_score_zero():
    texts = ["hello .", "what color is the fox", "what color is the red ?", "how do i fix the soap ?"]
    ids = [prompts.prompt_tokens([("user", text)]) for text in texts]
    ids.append(ids[0][:-1])
    judged = judge_ids(ids, [prompts.answer_tokens("sure , the fox is red .")] * len(ids))
    for path, leaf in jax.tree.leaves_with_path(judged):
        assert not leaf.any(), jax.tree_util.keystr(path)


def test_padding_and_batching_do_not_change_the_result():
    questions = sample()[:8]
    rng = np.random.default_rng(5)
    answers = demonstrators.demonstrate_all(WORLD, questions, rng)
    judged = judge(questions, answers)
    one = jax.jit(gold.utility)
    ids = [prompts.prompt_tokens(prompt.turns) for prompt in questions]
    # Rows are wider on both sides, with arbitrary tokens where the answer's mask is False.
    wide, _ = padded(ids, prompts.PROMPT_WIDTH + 7, left=True)
    answer_BT, mask_BT = padded([prompts.answer_tokens(answer) for answer in answers], T + 9, left=False)
    rubbish = np.where(mask_BT, answer_BT, rng.integers(len(lexicon.VOCABULARY), size=answer_BT.shape))
    rows = [one(TABLES, jnp.asarray(wide[i]), jnp.asarray(rubbish[i]), jnp.asarray(mask_BT[i])) for i in range(8)]
    looped = jax.tree.map(lambda *x: np.stack(x), *jax.device_get(rows))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), looped, judged)
