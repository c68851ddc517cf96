"""The comparison store: what is written is never lost, changed or doubled, and readers see the latest judgements."""

import collections
import dataclasses
import json
import math
import sqlite3
import subprocess
import sys
import threading
from unittest import mock

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from rlhf_jax.feedback import judgements, store, store_rows, store_schema
from rlhf_jax.feedback.judgements import Completion, Item, Judgement, Prompt


def prompt(text="Name a number.", **others):
    return Prompt(({"role": "user", "content": text},), **others)


def item(i=0, answers=("one", "two"), **others):
    return Item(prompt=prompt(f"Question {i}?"), completions=tuple(map(Completion, answers)), **others)


@pytest.fixture
def opened(tmp_path):
    with store.Store(tmp_path / "a.sqlite") as opened:
        for name in ("Ada", "Bo", "Cy"):
            opened.add_labeler(name)
        yield opened


TEXTS = (
    "quotes ' \" '' \"\" ` ; -- DROP TABLE items",
    "".join(map(chr, range(1, 32))) + "\x7f\x85\u2028",
    "\u202eright to left\u202c \u05d0\u05d1 \u2067x\u2069 \u200f",
    "👩‍👩‍👧 e\u0301 é \ufeff\U0010ffff",
    "line\r\nline\n\n\nHuman: no\n ",
)
NAME = "👩\u200d👧 O'Neil \"; -- e\u0301 \u05d0 \U00020000"
"""A valid name of a labeler or set."""


@pytest.mark.parametrize("text", TEXTS)
def test_every_field_is_read_as_it_was_written(tmp_path, text):
    written = Item(
        prompt=Prompt(
            ({"role": "system", "content": text}, {"role": "user", "content": text, "name": text}),
            text,
            text,
            ({"a": text},),
        ),
        completions=(
            Completion(text, "sft", {"temperature": 0.7, "top_p": None}),
            Completion(text + "b", text, extra={"tool_calls": [{"name": text}]}),
        ),
        metadata={text: text, "n": 3, "x": 0.1},
        expected=Judgement(strength=2, comment=text),
    )
    said = Judgement(strength=3, comment=text, seconds=2.5)
    with store.Store(tmp_path / "a b?#%.sqlite") as opened:
        opened.add_labeler(NAME)
        [key] = opened.add([written], set_name=NAME)
        opened.record(NAME, key, said, key=text, now=7.0)
    with store.Store(tmp_path / "a b?#%.sqlite", read_only=True) as opened:
        assert opened.items(NAME) == {key: written} and opened.item(key) == written and opened.sets() == [NAME]
        assert opened.latest(NAME) == [store.Recorded(1, NAME, key, said, 7.0)]
        assert opened.labelers() == [(NAME, "labeler", False)]
        with pytest.raises(store.StoreError, match="readonly"):
            opened.add([written], set_name="other")


def test_equal_contents_have_one_identifier(opened):
    first = opened.add([item(0), item(1), item(0)], set_name="a")
    again = opened.add([item(1), item(0)], set_name="a")
    assert first == [again[1], again[0], again[1]] and list(opened.items("a")) == first[:2]
    others = [item(0, ("two", "one")), item(0, metadata={"n": 1}), item(0, duplicate_of=first[0])]
    others += [
        item(0, expected=Judgement(tie=True)),
        Item(prompt=prompt("Question 0?", domain="x"), completions=item().completions),
    ]
    others += [Item(prompt=item().prompt, completions=(Completion("one", sampling={"seed": 1}), Completion("two")))]
    ids = [*opened.add(others, set_name="a"), *opened.add([item(0)], set_name="b")]
    assert len({*first, *ids}) == 2 + 7
    assert opened.sets() == ["a", "b"] and len(opened.items()) == 9 and list(opened.items("b")) == ids[-1:]
    with sqlite3.connect(opened.path) as db:
        assert db.execute("SELECT COUNT(*) FROM prompts").fetchone() == (3,)
        assert db.execute("SELECT COUNT(*) FROM completions").fetchone() == (7,)


def test_keys_keep_their_order_but_do_not_change_the_identifier(opened):
    tools = ({"name": "look", "at": 1}, {"at": 1, "name": "look"})
    items = [Item(prompt=prompt(tools=(each,)), completions=item().completions) for each in tools]
    first, second = opened.add(items, set_name="a")
    assert first == second and list(opened.item(first).prompt.tools[0]) == ["name", "at"]


def test_items_that_cannot_be_judged_add_nothing(opened):
    wrong = {
        "has 0 completions": item(answers=()),
        "has 10 completions": item(answers="abcdefghij"),
        "two equal completions": item(answers=("a", "b", "a")),
        "at least one message": Item(prompt=Prompt(()), completions=(Completion("a"),)),
        "has rating; it must have exactly one of ranks, unsure": item(answers="abc", expected=Judgement(rating=1)),
        "has no item 'x'": item(duplicate_of="x"),
    }
    for message, each in wrong.items():
        with pytest.raises(ValueError, match=message):
            opened.add([item(1), each], set_name="a")
    assert opened.items() == {}


def test_a_correction_is_a_new_row_and_rows_are_never_changed(opened):
    [key] = opened.add([item()], set_name="a")
    opened.record("Ada", key, Judgement(strength=2), key="1")
    opened.record("Bo", key, Judgement(unsure=True), key="1")
    opened.record("Ada", key, Judgement(strength=7), key="2")
    assert [(each.labeler, each.judgement) for each in opened.latest("a")] == [
        ("Bo", Judgement(unsure=True)),
        ("Ada", Judgement(strength=7)),
    ]
    assert [each.judgement.strength for each in opened.history()] == [2, None, 7] and opened.latest("b") == []
    opened.assign("Cy", set_name="a")
    with sqlite3.connect(opened.path) as db:
        for table in ("prompts", "completions", "items", "judgements", "assignments"):
            for change in (f"UPDATE {table} SET rowid = 100", f"DELETE FROM {table}"):
                with pytest.raises(sqlite3.IntegrityError, match=f"rows of {table} are never changed"):
                    db.execute(change)


def test_a_judgement_that_is_sent_twice_is_stored_once(opened):
    first, second = opened.add([item(0), item(1, "abcd")], set_name="a")
    assert opened.record("Ada", first, Judgement(strength=2), key="k", now=1.0) == 1
    assert opened.record("Ada", first, Judgement(strength=2), key="k", now=2.0) == 1
    assert opened.record("Bo", second, Judgement(ranks=(1, 2, 2, 1), seconds=1), key="k") == 2
    assert opened.record("Bo", second, Judgement(ranks=[1, 2, 2, 1], seconds=1.0), key="k") == 2
    assert opened.history()[0].time == 1.0 and len(opened.history()) == 2
    for key, said in ((first, Judgement(strength=3)), (second, Judgement(unsure=True))):
        with pytest.raises(store.StoreError, match="'Ada' has used the key 'k' for another judgement"):
            opened.record("Ada", key, said, key="k")


@pytest.mark.parametrize(
    ("answers", "said", "message"),
    [
        ("ab", Judgement(), "has no answer; it must have exactly one of strength, preference, tie, unsure"),
        ("ab", Judgement(strength=1, tie=True), "has strength, tie; it must have"),
        ("ab", Judgement(ranks=(1, 2)), "a judgement of a pair item has ranks"),
        ("ab", Judgement(strength=0), "strength is 0; it must be a whole number from 1 to 8"),
        ("ab", Judgement(strength=9), "strength is 9"),
        ("ab", Judgement(strength=True), "strength is True"),
        ("ab", Judgement(preference=math.nan), "preference is nan"),
        ("ab", Judgement(preference=1.5), "preference is 1.5"),
        ("ab", Judgement(tie=True, flags={"hallucination": True}), "pair item cannot have the flag 'hallucination'"),
        ("ab", Judgement(tie=True, seconds=-1.0), "seconds is -1.0"),
        ("abcd", Judgement(ranks=(1, 2, 3)), "they must be 4 whole numbers"),
        ("abcd", Judgement(ranks=(0, 1, 2, 3)), "they must be 4 whole numbers, at least 1"),
        ("abcd", Judgement(tie=True), "ranking item has tie; it must have exactly one of ranks, unsure"),
        ("a", Judgement(rating=8), "rating is 8; it must be a whole number from 1 to 7"),
        ("a", Judgement(rating=4, flags={"funny": True}), "cannot have the flag 'funny'"),
    ],
)
def test_judgements_that_do_not_fit_are_refused(opened, answers, said, message):
    [key] = opened.add([item(0, answers)], set_name="a")
    with pytest.raises(ValueError, match=message):
        opened.record("Ada", key, said, key="1")
    assert opened.history() == []


def test_ratings_keep_their_flags(opened):
    [key] = opened.add([item(0, "a")], set_name="a")
    said = Judgement(rating=7, flags={"hallucination": False, "expresses_opinion": True}, comment="ok")
    opened.record("Ada", key, said, key="1")
    assert opened.latest()[0].judgement == said and opened.item(key).kind == judgements.LIKERT


def test_judgements_of_the_shown_order_are_converted(opened):
    order = judgements.shown_order(5, 6)
    assert order == (1, 3, 4, 5, 2, 0), "the order of recorded assignments must not change between versions"
    said = Judgement(ranks=(1, 2, 3, 4, 5, 6), comment="x").in_item_order(order)
    assert said == Judgement(ranks=(6, 1, 5, 2, 3, 4), comment="x")
    for strength, converted in ((1, 8), (4, 5), (8, 1)):
        assert Judgement(strength=strength).in_item_order((1, 0)).strength == converted
        assert Judgement(strength=strength).in_item_order((0, 1)).strength == strength
    assert Judgement(preference=0.25).in_item_order((1, 0)).preference == 0.75
    assert Judgement(rating=3).in_item_order((0,)) == Judgement(rating=3)
    orders = collections.Counter(judgements.shown_order(seed, 2) for seed in range(1000))
    assert min(orders.values()) > 450


# -------------------------------------------------------------------------------------------------------- assignments


def judge(opened, name, assignment, now=0.0):
    opened.record(name, assignment.id, Judgement(tie=True), key=f"{name} {assignment.id}", now=now)


def test_items_with_the_fewest_judgements_come_first_and_never_twice(opened):
    ids = opened.add([item(i) for i in range(3)], set_name="a")
    opened.add([item(9)], set_name="b")
    for key in (ids[0], ids[0], ids[1]):
        opened.record("Cy" if key == ids[1] else "Bo", key, Judgement(strength=1), key=str(len(opened.history())))
    opened.record("Cy", ids[0], Judgement(unsure=True), key="last")
    seen = []
    while (found := opened.assign("Ada", set_name="a")) is not None:
        assert opened.assign("Ada", set_name="a") == found, "an open assignment is given again"
        assert found.item == opened.item(found.id) and sorted(found.order) == [0, 1]
        seen.append(found.id)
        judge(opened, "Ada", found)
    assert seen == [ids[2], ids[1], ids[0]]


def test_an_open_assignment_counts_until_it_expires(opened):
    first, second = sorted(opened.add([item(0), item(1)], set_name="a"))

    def assigned(name, now, **others):
        found = opened.assign(name, set_name="a", lease=10.0, now=now, **others)
        return found and (found.id, found.seed, found.expires)

    key, seed, expires = assigned("Ada", 0.0)
    assert (key, expires) == (first, 10.0) and 0 <= seed < 2**32
    assert assigned("Bo", 1.0, max_judgements=1)[0] == second
    assert assigned("Cy", 2.0, max_judgements=1) is None
    assert assigned("Cy", 9.0)[0] == first, "both have one open assignment"
    assert assigned("Ada", 9.9) == (key, seed, 10.0)
    assert assigned("Ada", 12.0)[0] == second, "the assignment of Bo expired, that of Cy did not"
    assert assigned("Ada", 23.0) == (first, seed, 33.0), "the shown order does not depend on when it is assigned"
    opened.record("Cy", first, Judgement(unsure=True), key="1")
    assert assigned("Bo", 24.0, max_judgements=1)[0] == second
    assert assigned("Cy", 25.0, max_judgements=1) is None


def test_hidden_duplicates_follow_their_originals_at_a_distance(opened):
    ids = opened.add([item(i) for i in range(40)], set_name="a")
    repeated = opened.add([item(i, duplicate_of=ids[i]) for i in range(8)], set_name="a")
    seen = []
    while (found := opened.assign("Ada", set_name="a")) is not None:
        left = opened.progress("Ada", set_name="a").left
        assert left == 48 - len(seen)
        seen.append(found.id)
        judge(opened, "Ada", found)
    assert sorted(seen) == sorted(ids + repeated)
    places = [(seen.index(ids[i]), seen.index(repeated[i])) for i in range(8)]
    for first, again in places:
        assert again - first > store.DUPLICATE_GAP or set(seen[again:]) <= set(repeated), "others come first"
    assert min(again for _, again in places) < 40, "duplicates are among the other items"
    for _ in range(3):
        found = opened.assign("Bo", set_name="a")
        assert found.id in ids, "Bo has judged no original, or just now"
        judge(opened, "Bo", found)


def test_gold_questions_are_among_the_other_items(opened):
    opened.add([item(i) for i in range(40)], set_name="a")
    gold = opened.add([item(i, expected=Judgement(strength=1)) for i in range(40, 50)], set_name="a")
    seen = []
    while (found := opened.assign("Ada", set_name="a")) is not None:
        seen.append(found.id)
        judge(opened, "Ada", found)
    assert 5 < sum(map(seen.index, gold)) / 10 < 44


# ----------------------------------------------------------------------------------------------------------- labelers


def test_tokens_are_recognised_until_they_are_revoked(opened, tmp_path):
    tokens = {name: opened.add_labeler(name, role="owner") for name in ("Di", "Ed")}
    assert opened.authenticate(tokens["Ed"]) == ("Ed", "owner", False)
    assert opened.authenticate(tokens["Di"]) == ("Di", "owner", False)
    assert opened.authenticate(tokens["Di"][:-1]) is None and opened.authenticate("") is None
    assert all(len(token) >= 43 for token in tokens.values())
    [key] = opened.add([item()], set_name="a")
    opened.record("Di", key, Judgement(tie=True), key="1")
    opened.revoke("Di")
    assert opened.authenticate(tokens["Di"]) is None and opened.authenticate(tokens["Ed"]) is not None
    assert opened.labelers()[-2:] == [("Di", "owner", True), ("Ed", "owner", False)] and len(opened.latest()) == 1
    for call in (
        lambda: opened.record("Di", key, Judgement(tie=True), key="2"),
        lambda: opened.assign("Di", set_name="a"),
    ):
        with pytest.raises(store.StoreError, match="the labeler 'Di' was revoked"):
            call()
    opened.close()
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"Di" in content and not any(token.encode() in content for token in tokens.values())


def test_a_new_token_replaces_the_old_one_and_keeps_the_judgements(opened):
    [key] = opened.add([item()], set_name="a")
    old = opened.add_labeler("Olga", role="owner")
    opened.record("Olga", key, Judgement(tie=True), key="1")
    with opened.transaction(write=True) as db:
        db.executemany(
            "INSERT INTO sessions SELECT name, number, 9e9 FROM labelers WHERE name = ?", [("Olga",), ("Ada",)]
        )
    opened.revoke("Olga")
    new = opened.renew("Olga")
    assert opened.authenticate(old) is None and opened.authenticate(new) == ("Olga", "owner", False)
    with opened.transaction() as db:
        assert [row["hash"] for row in db.execute("SELECT hash FROM sessions")] == ["Ada"]
    assert [each.labeler for each in opened.latest()] == ["Olga"]
    opened.record("Olga", key, Judgement(strength=1), key="2")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is empty"),
        ("\u3000\n", "is empty"),
        (" Di", "begins or ends with white space"),
        ("Di\n", "begins or ends with white space"),
        ("D\ni", "has a line break"),
        ("D\u2028i", "has a line break"),
        ("D\x1bi", "another character that is not shown"),
        ("D\u202ei", "another character that is not shown"),
        ("D\ud800i", "another character that is not shown"),
    ],
)
def test_names_that_are_shown_as_others_are_refused(opened, name, message):
    with pytest.raises(store.StoreError, match=f"the name of the labeler .* {message}"):
        opened.add_labeler(name)
    with pytest.raises(store.StoreError, match=f"the name of the set .* {message}"):
        opened.add([item()], set_name=name)
    assert len(opened.labelers()) == 3 and not opened.sets()


def test_wrong_labelers_and_items_are_named(opened):
    [key] = opened.add([item()], set_name="a")
    for message, call in {
        "has a labeler 'Ada' already": lambda: opened.add_labeler("Ada"),
        "the name of the labeler ' ' is empty": lambda: opened.add_labeler(" "),
        "the labeler 'Ed' is unknown": lambda: opened.renew("Ed"),
        "the roles are labeler and owner": lambda: opened.add_labeler("Di", role="boss"),
        "the labeler 'Di' is unknown": lambda: opened.record("Di", key, Judgement(tie=True), key="1"),
        "has no item 'x'": lambda: opened.record("Ada", "x", Judgement(tie=True), key="1"),
    }.items():
        with pytest.raises(store.StoreError, match=message):
            call()


# ------------------------------------------------------------------------------------------------------------ reading

SAID = st.one_of(
    st.integers(1, 8).map(lambda n: Judgement(strength=n)),
    st.just(Judgement(tie=True)),
    st.just(Judgement(unsure=True)),
)


@hypothesis.settings(max_examples=20)
@hypothesis.given(st.lists(st.tuples(st.sampled_from(("Ada", "Bo", "Cy")), st.integers(0, 3), SAID), max_size=30))
def test_latest_and_majority_agree_with_plain_python(tmp_path_factory, said):
    with store.Store(tmp_path_factory.mktemp("store") / "a.sqlite") as opened:
        for name in ("Ada", "Bo", "Cy"):
            opened.add_labeler(name)
        ids = opened.add([item(i) for i in range(4)], set_name="a")
        for n, (name, i, judgement) in enumerate(said):
            opened.record(name, ids[i], judgement, key=str(n))
        found, preferences = opened.latest("a"), opened.preferences("a")
    model = {(name, ids[i]): judgement for name, i, judgement in said}
    assert {(each.labeler, each.item): each.judgement for each in found} == model and len(found) == len(model)
    assert preferences.items == ids and preferences.labelers == sorted({name for name, _ in model})
    for key, share, label in zip(ids, preferences.share_N, preferences.label_N):
        first = second = ties = 0
        for (_, judged), judgement in model.items():
            if judged == key and not judgement.unsure:
                first += judgement.strength in (1, 2, 3, 4)
                second += judgement.strength in (5, 6, 7, 8)
                ties += judgement.tie
        if first + second + ties == 0:
            assert math.isnan(label) and math.isnan(share)
        else:
            assert label == (1.0 if first > second else 0.0 if second > first else 0.5)
            np.testing.assert_allclose(share, (first + ties / 2) / (first + second + ties))


def test_preferences_are_of_ordinary_pairs_and_keep_probabilities(opened):
    pair, ranking, rated, gold = opened.add(
        [item(0), item(1, "abcd"), item(2, "a"), item(3, expected=Judgement(strength=1))], set_name="a"
    )
    [duplicate] = opened.add([item(0, duplicate_of=pair)], set_name="a")
    for n, (name, key, said) in enumerate(
        [
            ("Bo", pair, Judgement(preference=0.75)),
            ("Ada", pair, Judgement(strength=8)),
            ("Ada", ranking, Judgement(ranks=(1, 2, 3, 4))),
            ("Ada", rated, Judgement(rating=1)),
            ("Ada", gold, Judgement(strength=1)),
            ("Cy", duplicate, Judgement(strength=1)),
        ]
    ):
        opened.record(name, key, said, key=str(n))
    found = opened.preferences("a")
    assert (found.items, found.labelers) == ([pair], ["Ada", "Bo"])
    np.testing.assert_array_equal(found.votes_NM, [[0.0, 0.75]])
    assert found.share_N.tolist() == [0.375] and found.label_N.tolist() == [0.0]
    assert opened.preferences("b").votes_NM.shape == (0, 0)


# ------------------------------------------------------------------------------------------------------ several users

WRITER = """
import json, os, random, signal, sys, time
from rlhf_jax.feedback import store
from rlhf_jax.feedback.judgements import Completion, Item, Judgement, Prompt

path, n_kills = sys.argv[1], int(sys.argv[2])
items = [Item(prompt=Prompt([{"role": "user", "content": str(i)}]), completions=[Completion("a"), Completion("b")])
         for i in range(3)]

def write(name, acknowledged, number=10**9):
    # Repeats the judgement in question, as a client does that received no answer, and continues.
    with store.Store(path) as opened:
        ids = opened.add(items, set_name="a")
        if name not in [each.name for each in opened.labelers()]:
            opened.add_labeler(name)
        start = sum(each.labeler == name for each in opened.history()) - 1
        for n in range(max(start, 0), number):
            opened.record(name, ids[n % 3], Judgement(strength=1 + n % 8), key=str(n))
            os.write(acknowledged, b"%d\\n" % n)

def forked(name, *number):
    reader, writer = os.pipe()
    if pid := os.fork():
        os.close(writer)
        return pid, os.fdopen(reader)
    try:
        write(name, writer, *number)
    finally:
        os._exit(0)

random.seed(0)
acknowledged = []
for _ in range(n_kills):
    pid, lines = forked("killed")
    acknowledged.append(int(lines.readline()))  # it has begun
    time.sleep(random.uniform(0, 0.03))
    os.kill(pid, signal.SIGKILL)
    acknowledged += map(int, lines)
    os.waitpid(pid, 0)
both = [forked(name, 40) for name in ("Ada", "Bo")]
counts = [len(list(lines)) for _, lines in both]
print(json.dumps([acknowledged, counts]))
"""


@pytest.mark.parametrize("n_kills", [10, 0])
def test_killed_and_simultaneous_writers_lose_and_double_nothing(tmp_path, n_kills):
    """Without kills, the two writers also create the store at the same time."""
    path = tmp_path / "a.sqlite"
    command = [sys.executable, "-W", "ignore", "-c", WRITER, str(path), str(n_kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    acknowledged, counts = json.loads(done.stdout)
    with store.Store(path) as opened:
        recorded = collections.defaultdict(list)
        for each in opened.history():
            recorded[each.labeler].append(each)
        items = list(opened.items("a"))
        assert opened._db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    assert counts == [40, 40] and len(items) == 3
    for name in ("Ada", "Bo", *["killed"] * bool(n_kills)):
        for n, each in enumerate(recorded[name]):
            assert (each.item, each.judgement) == (items[n % 3], Judgement(strength=1 + n % 8))
    assert [len(recorded[name]) for name in ("Ada", "Bo")] == [40, 40]
    n_killed = len(recorded["killed"])
    assert set(acknowledged) <= set(range(n_killed)) and n_killed <= len(set(acknowledged)) + 10
    assert len(acknowledged) >= n_kills


def test_threads_share_a_store(opened):
    ids = opened.add([item(i) for i in range(5)], set_name="a")

    def write(name):
        for n in range(20):
            opened.record(name, ids[n % 5], Judgement(strength=1 + n % 8), key=str(n))
            assert opened.latest("a")

    threads = [threading.Thread(target=write, args=(name,)) for name in ("Ada", "Bo", "Cy")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert collections.Counter(each.labeler for each in opened.history()) == {"Ada": 20, "Bo": 20, "Cy": 20}


def test_an_error_in_a_transaction_undoes_all_of_it(opened):
    with pytest.raises(KeyError), opened.transaction(write=True):
        opened.add([item()], set_name="a")
        opened.add_labeler("Di")
        raise KeyError
    assert opened.items() == {} and len(opened.labelers()) == 3
    opened.add([item()], set_name="a")


# -------------------------------------------------------------------------------------------------------------- files


def test_an_older_version_is_migrated_and_a_newer_one_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.sqlite"
    with store.Store(path) as opened:
        ids = opened.add([item()], set_name="a")
    with monkeypatch.context() as later:
        migration = ("ALTER TABLE items ADD COLUMN colour TEXT NOT NULL DEFAULT 'red'",)
        later.setattr(store_schema, "MIGRATIONS", (*store_schema.MIGRATIONS, migration))
        old = f"has tables of version {len(store_schema.MIGRATIONS) - 1}; open it for writing once to migrate it"
        with pytest.raises(store.StoreError, match=old):
            store.Store(path, read_only=True)
        with store.Store(path) as opened:
            assert list(opened.items()) == ids
            assert opened._db.execute("SELECT colour FROM items").fetchone()["colour"] == "red"
        with store.Store(path, read_only=True) as opened:
            assert list(opened.items()) == ids
    known = len(store_schema.MIGRATIONS)
    for read_only in (False, True):
        newer = rf"a\.sqlite has tables of version {known + 1}, .* only versions up to {known}"
        with pytest.raises(store.StoreError, match=newer):
            store.Store(path, read_only=read_only)


def test_a_store_of_the_first_version_assigns_as_before(tmp_path, monkeypatch):
    path = tmp_path / "a.sqlite"
    statements = store_schema.MIGRATIONS[0]
    with monkeypatch.context() as earlier:
        earlier.setattr(store_schema, "MIGRATIONS", (statements,))
        earlier.setattr(store_rows, "_salt", lambda db: [])
        with store.Store(path) as opened:
            ids = opened.add([item(0), item(1), item(2)], set_name="a")
            for name in ("Ada", "Ben"):
                opened.add_labeler(name)
            for i, name in enumerate(("Ada", "Ada", "Ben")):
                opened.record(name, ids[0], judgements.Judgement(strength=1), key=str(i))
            opened.record("Ada", ids[1], judgements.Judgement(strength=1), key="3")
    with store.Store(path) as opened:
        counts = {row["item"]: row["labelers"] for row in opened._db.execute("SELECT item, labelers FROM judged")}
        assert [counts[id] for id in ids] == [2, 1, 0]
        assert opened.add([item(0)], set_name="a") == ids[:1]
        found = opened.assign("Ben", set_name="a")
        assert found is not None and found.id == ids[2]


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(data=st.data())
def test_the_next_item_is_that_of_plain_python(tmp_path_factory, data):
    """Compares `Store.assign` with a search through all items, judgements and open assignments."""
    names, n = ("Ada", "Ben", "Cleo"), data.draw(st.integers(1, 6))
    same_identifiers = mock.patch.object(store_rows, "_salt", lambda db: [])
    with same_identifiers, store.Store(tmp_path_factory.mktemp("next") / "a.sqlite") as opened:
        ids = opened.add([item(i) for i in range(n)], set_name="a")
        originals = data.draw(st.lists(st.sampled_from(ids), unique=True, max_size=3))
        repeats = [dataclasses.replace(opened.item(each), duplicate_of=each) for each in originals]
        repeat_of = dict(zip(opened.add(repeats, set_name="a"), originals))
        for name in names:
            opened.add_labeler(name)
        done, leases = {name: [] for name in names}, {}
        most = data.draw(st.none() | st.integers(1, 3))
        for now in range(data.draw(st.integers(1, 14))):
            name = data.draw(st.sampled_from(names))
            held = {who: id for who, (id, end) in leases.items() if end > now and id not in done[who]}

            def asked(id, done=done, held=held):
                return sum(id in each for each in done.values()) + sum(each == id for each in held.values())

            left = [id for id in [*ids, *repeat_of] if id not in done[name]]
            left = [id for id in left if repeat_of.get(id, id) in done[name] or id not in repeat_of]
            left = [id for id in left if most is None or asked(id) < most]
            recent = done[name][-store.DUPLICATE_GAP :]
            left.sort(key=lambda id: (repeat_of.get(id) in recent, asked(id), id))
            expected = held.get(name, left[0] if left else None)
            found = opened.assign(name, set_name="a", lease=4, max_judgements=most, now=now)
            assert (None if found is None else found.id) == expected
            if found is not None:
                leases[name] = (found.id, found.expires)
                if data.draw(st.booleans()):
                    opened.record(name, found.id, judgements.Judgement(strength=1), key=str(now), now=now)
                    done[name].append(found.id)


def test_a_migration_that_fails_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.sqlite"
    with store.Store(path) as opened:
        ids = opened.add([item()], set_name="a")
    with monkeypatch.context() as later:
        migration = ("ALTER TABLE items ADD COLUMN colour TEXT", "ALTER TABLE no_table ADD COLUMN colour TEXT")
        later.setattr(store_schema, "MIGRATIONS", (*store_schema.MIGRATIONS, migration))
        with pytest.raises(store.StoreError, match="no such table: no_table"):
            store.Store(path)
    with store.Store(path) as opened:
        assert list(opened.items()) == ids
        assert "colour" not in opened._db.execute("SELECT * FROM items").fetchone().keys()  # noqa: SIM118


def test_other_files_are_refused_unchanged(tmp_path):
    with sqlite3.connect(tmp_path / "other.sqlite") as db:
        db.execute("CREATE TABLE pages (id)")
    (tmp_path / "text.jsonl").write_text('{"prompt": "a"}\n' * 100)
    (tmp_path / "folder").mkdir()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for name, message in {
        "other.sqlite": "is an SQLite database, but not a comparison store",
        "text.jsonl": "file is not a database",
        "folder": "cannot be opened as a comparison store",
    }.items():
        for read_only in (False, True):
            with pytest.raises(store.StoreError, match=message):
                store.Store(tmp_path / name, read_only=read_only)
    with pytest.raises(store.StoreError, match=r"none\.sqlite cannot be opened"):
        store.Store(tmp_path / "none.sqlite", read_only=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_reader_sees_one_state_while_another_process_writes(tmp_path):
    with store.Store(tmp_path / "a.sqlite") as writer, store.Store(tmp_path / "a.sqlite", read_only=True) as reader:
        with reader.transaction():
            assert reader.items() == {}
            writer.add([item()], set_name="a")
            assert reader.items() == {}
        assert len(reader.items()) == 1
