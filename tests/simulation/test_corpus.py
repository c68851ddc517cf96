"""The pretraining corpus: true statements, correct verdicts, and exact skill problems."""

import collections
import re

import jax
import numpy as np
import pytest

from rlhf_jax.data import padding, plain_text, tokenizers
from rlhf_jax.simulation import corpus, gold, lexicon, prompts, world
from rlhf_jax.simulation.world import COLOR, PLACE, SIZE

WORLD = world.make_world(0)
ASKED = prompts.split_prompts(WORLD, 0).train
DOCUMENTS = corpus.documents(WORLD, ASKED, 8000, np.random.default_rng(0))
ATTRIBUTE = {word: a for a, words in enumerate(lexicon.ATTRIBUTES.values()) for word in words}
REVIEWS = [text for text in DOCUMENTS if re.fullmatch(r"question : .* (good|bad) \.", text)]
CLAIMS = [text for text in DOCUMENTS if text.startswith("claim :")]
LISTS = [
    text for text in DOCUMENTS if re.match(rf"(things in the \w+|\w+ things|{'|'.join(lexicon.CATEGORIES)}) :", text)
]
SKILL_TEXTS = [text for text in DOCUMENTS if text.split()[0] in corpus.SKILLS]
FACTS = sorted(set(DOCUMENTS) - {*REVIEWS, *CLAIMS, *LISTS, *SKILL_TEXTS})


def size(thing):
    return int(WORLD.facts_XA[lexicon.THINGS.index(thing), SIZE])


def statements(text):
    """Yields pairs of a thing and an attribute word, which describes the last thing named before it."""
    thing = None
    for word in text.split():
        if word in lexicon.THINGS:
            thing = word
        elif word in ATTRIBUTE:
            assert thing is not None, text
            yield thing, word


def test_documents_use_the_vocabulary_and_depend_only_on_the_generator():
    assert {word for text in DOCUMENTS for word in text.split()} <= set(lexicon.WORDS)
    assert all(text.endswith(" .") for text in DOCUMENTS)
    tokenizer = tokenizers.word_level(lexicon.WORDS)
    ids = plain_text.encode_texts(tokenizer, DOCUMENTS[:100])
    assert ids == [[lexicon.IDS[word] for word in text.split()] for text in DOCUMENTS[:100]]
    assert corpus.documents(WORLD, ASKED, 50, np.random.default_rng(1)) != DOCUMENTS[:50]
    again = corpus.documents(WORLD, ASKED, len(DOCUMENTS), np.random.default_rng(0))
    assert again == DOCUMENTS


def test_every_statement_of_fact_is_true():
    stated = [(text, thing, word) for text in FACTS for thing, word in statements(text)]
    assert len(stated) > 500
    for text, thing, word in stated:
        assert WORLD.value(thing, ATTRIBUTE[word]) == word, text
    things = {(thing, ATTRIBUTE[word]) for _, thing, word in stated}
    assert len(things) == WORLD.facts_XA.size, "every fact occurs in a document"


def test_only_what_the_given_prompts_ask_is_asked():
    sets = prompts.split_prompts(WORLD, 0)
    allowed, held_out = (
        {p.asked for rows in universe.values() for p, _ in rows} for universe in (sets.train, sets.test)
    )
    for text in CLAIMS:
        ((thing, word),) = statements(text)
        assert ATTRIBUTE[word] == SIZE or (tuple(lexicon.ATTRIBUTES)[ATTRIBUTE[word]], thing) in allowed, text
    seen = collections.Counter()
    for text in FACTS:
        things = [word for word in text.split() if word in lexicon.THINGS]
        if match := re.search(r"\bthan\b|\bor the\b", text):
            assert ("size", *sorted(things[:2])) in allowed, text
            seen[match.group()] += 1
        verb = next((word for word in text.split() if word in lexicon.VERBS), "")
        if verb and things:
            kind = "how_to" if verb in lexicon.BENIGN_TOOLS else "harmful"
            assert (kind, verb, things[0]) in allowed, text
            seen[kind] += 1
    assert seen.keys() == {"than", "or the", "how_to", "harmful"}
    # No question of the corpus is a test prompt, up to courtesy.
    questions = {prompt.turns[-1][1] for rows in sets.test.values() for prompt, _ in rows if len(prompt.turns) == 1}
    assert len(questions) > 1000
    for text in DOCUMENTS:
        if text.startswith("question : "):
            question = text.removeprefix("question : ").partition(" answer : ")[0]
            assert re.sub(r"^(please|hello ,|hello friend ,) ", "", question) not in questions, text
    assert not allowed & held_out


def test_comparisons_are_right():
    counts = collections.Counter()
    for text in FACTS:
        if match := re.fullmatch(r"the (\w+) is (bigger|smaller) than the (\w+) \.", text):
            x, relation, y = match.groups()
            assert (size(x) > size(y)) == (relation == "bigger") and size(x) != size(y), text
            counts[relation] += 1
        elif match := re.search(r"the (\w+) or the (\w+) (?:bigger )?\? answer : the (\w+)", text):
            x, y, answer = match.groups()
            assert answer == max(x, y, key=size) and size(x) != size(y), text
            counts["question"] += 1
    assert counts.keys() == {"bigger", "smaller", "question"}


def test_lists_contain_the_things_that_their_heading_names():
    assert len(LISTS) > 100
    for text in LISTS:
        head, _, listed = text.removesuffix(" .").partition(" : ")
        things = listed.split(" , ")
        if head in lexicon.CATEGORIES:
            members = lexicon.THINGS_BY_CATEGORY[head]
        elif head.startswith("things in the "):
            members = WORLD.things_with(PLACE, head.split()[-1])
        else:
            members = WORLD.things_with(COLOR, head.split()[0])
        assert len(set(things)) == len(things) >= 2 and set(things) <= set(members), text


def test_verdicts_on_claims_are_right():
    verdicts = collections.Counter()
    for text in CLAIMS:
        ((thing, word),) = statements(text)
        verdict = text.split()[-2]
        assert (WORLD.value(thing, ATTRIBUTE[word]) == word) == (verdict == "true"), text
        verdicts[verdict] += 1
    assert abs(verdicts["true"] / len(CLAIMS) - 0.5) < 0.1


def test_verdicts_on_reviewed_answers_agree_with_gold():
    of_question = {prompt.turns[-1][1]: prompt for rows in ASKED.values() for prompt, _ in rows}
    questions, answers, verdicts = [], [], []
    for text in REVIEWS:
        match = re.fullmatch(r"question : (.*) answer : (.*) (good|bad) \.", text)
        assert match is not None
        question, answer, verdict = match.groups()
        question = re.sub(r"^(please|hello ,|hello friend ,) ", "", question)
        questions.append(prompts.prompt_tokens(of_question[question].turns))
        answers.append(prompts.answer_tokens(answer))
        verdicts.append(verdict == "good")
    width = max(map(len, answers))
    prompt_BP, _ = padding.pad_prompts(questions, width=prompts.PROMPT_WIDTH, pad_id=lexicon.PAD_ID)
    answer_BT = np.array([ids + [lexicon.PAD_ID] * (width - len(ids)) for ids in answers])
    mask_BT = np.arange(width)[None, :] < np.array([[len(ids)] for ids in answers])
    judged = jax.jit(jax.vmap(gold.utility, in_axes=(None, 0, 0, 0)))(
        gold.make_tables(WORLD), prompt_BP, answer_BT, mask_BT
    )
    assert judged.known.all()
    correct, good = np.asarray(judged.components["correct"]), np.array(verdicts)
    # Reviewed answers are never polite, even if the prompt asks for politeness; "good" refers to the content.
    assert (correct[good] >= 0.6 - 1e-6).all() and (judged.false[good] == 0).all()
    # An answer to another prompt can be right by chance.
    assert np.mean(correct[~good] == 1) < 0.03, "flawless answers are called bad"
    assert abs(good.mean() - 0.5) < 0.08


@pytest.mark.parametrize("skill", corpus.SKILLS)
def test_skill_problems_have_exact_answers(skill):
    rng = np.random.default_rng(0)
    answers = set()
    for _ in range(300):
        problem = corpus.skill_problem(skill, rng)
        words = problem.text.split()
        assert (problem.skill, words[0], problem.document) == (skill, skill, f"{problem.text} {problem.answer} .")
        number = {word: i for i, word in enumerate(lexicon.NUMBERS)}
        if skill == "copy":
            expected = problem.text.removeprefix("copy : ").removesuffix(" =")
        elif skill == "sort":
            expected = " ".join(
                sorted(problem.text.removeprefix("sort : ").removesuffix(" =").split(), key=lexicon.NUMBERS.index)
            )
        elif skill == "sum":
            expected = lexicon.NUMBERS[(number[words[2]] + number[words[4]]) % 10]
        else:
            pairs, _, key = problem.text.removeprefix("look : ").partition(" = ")
            expected = dict(pair.split() for pair in pairs.split(" , "))[key]
        assert problem.answer == expected
        answers.add(problem.answer)
    assert len(answers) >= 10 - 1


def test_skills_rotate_and_an_unknown_skill_is_an_error():
    rng = np.random.default_rng(0)
    assert [p.skill for p in corpus.skill_problems(7, rng)] == [corpus.SKILLS[i % len(corpus.SKILLS)] for i in range(7)]
    assert {text.split()[0] for text in SKILL_TEXTS} == set(corpus.SKILLS)
    with pytest.raises(ValueError, match="juggle"):
        corpus.skill_problem("juggle", rng)
