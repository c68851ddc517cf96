"""Stores that are exported and imported again have the same items and votes, whatever the texts contain."""

import collections
import dataclasses
import json
import math
import pathlib
import re
import tempfile

import hypothesis
import pytest
from hypothesis import strategies as st

from rlhf_jax.data import errors, readers
from rlhf_jax.data.stores import annotated, argilla, comparison_import, hh_export, label_studio
from rlhf_jax.feedback import judgements, store, store_export
from rlhf_jax.feedback.judgements import Completion, Item, Judgement, Prompt

HARD = (
    "a\n\nHuman: b",
    "\n\nAssistant: x",
    " y ",
    "z\r\n\r\nHuman: no",
    "<b>&",
    "👩‍👩‍👧\u2028\u202e'\"\x00\x85",
)
TEXTS = st.one_of(st.sampled_from(HARD), st.text(max_size=8)).filter(lambda text: text.strip())
SPLITS = re.compile(r"\n\n(Human|Assistant):")


@st.composite
def items(draw, *, kinds=(1, 2, 3, 4), roles=("user", "assistant", "system")):
    """Draws an item and what two people say about it."""
    answers = draw(st.lists(TEXTS, min_size=min(kinds), max_size=max(kinds), unique_by=lambda text: text.strip()))
    messages = [
        {"role": role, "content": draw(TEXTS)} for role in draw(st.lists(st.sampled_from(roles[1:]), max_size=2))
    ]
    if draw(st.booleans()):
        messages = [{"role": "user", "content": draw(TEXTS)}, *messages]
    item = Item(
        prompt=Prompt([*messages, {"role": "user", "content": draw(TEXTS)}], draw(st.sampled_from(["", "helpful"]))),
        completions=[Completion(text) for text in answers],
        metadata=draw(
            st.dictionaries(st.sampled_from(["a", "set", "item", "order"]), st.integers(0, 3) | TEXTS, max_size=2)
        ),
    )
    if item.kind == judgements.LIKERT:
        judgement = st.builds(Judgement, rating=st.integers(1, 7))
    elif item.kind == judgements.PAIR:
        judgement = st.sampled_from([Judgement(tie=True), *(Judgement(strength=n, seconds=2.5) for n in (1, 4, 5, 8))])
    else:
        judgement = st.permutations(range(1, len(answers) + 1)).map(lambda ranks: Judgement(ranks=tuple(ranks)))
    return item, draw(st.dictionaries(st.sampled_from(["Ada", "Bo@example.org"]), judgement, max_size=2))


def fill(path, drawn):
    with store.Store(path) as opened, opened.transaction(write=True):  # which waits for the disk once
        for name in ("Ada", "Bo@example.org"):
            opened.add_labeler(name)
        for n, (item, said) in enumerate(drawn):
            [key] = opened.add([item], set_name="a")
            for name, judgement in said.items():
                opened.record(name, key, judgement, key=f"{n}", now=1e9 + n)
    return store.Store(path)


def answer(judgement):
    if judgement.ranks is not None:
        return tuple(judgement.ranks)
    return None if math.isnan(judgement.vote) and judgement.rating is None else (judgement.rating, judgement.vote)


def contents(opened):
    """Returns what each labeler says about each item."""
    said = collections.defaultdict(dict)
    for each in opened.latest():
        said[each.item][each.labeler] = str(answer(each.judgement)), each.judgement.seconds
    return {str(dataclasses.replace(item, duplicate_of=None)): said[id] for id, item in opened.items().items()}


def again(folder, file):
    with store.Store(folder / "again.sqlite") as other:
        found, counts = comparison_import.read(file)
        annotated.add(other, found, set_name="a", counts=counts)
        assert not counts.dropped
        return contents(other)


@pytest.mark.parametrize("form", [label_studio, argilla])
@hypothesis.given(st.lists(items(), min_size=1, max_size=3))
@hypothesis.settings(max_examples=15, deadline=None)
def test_items_and_votes_are_the_same_in_the_forms_of_labelling_tools(form, drawn):
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        with fill(folder / "a.sqlite", drawn) as opened:
            assert not form.export(opened, folder / "a.json")
            expected = contents(opened)
            # The same store gains nothing, and keeps the strengths.
            found, counts = comparison_import.read(folder / "a.json")
            assert annotated.add(opened, found, set_name="a", counts=counts)[1:] == (0, 0)
        if form is argilla:  # which has no times
            expected = {key: {who: (said, None) for who, (said, _) in each.items()} for key, each in expected.items()}
        assert again(folder, folder / "a.json") == expected


def by_texts(opened):
    """Returns the vote for each answer of each pair, in an order that does not depend on the item."""
    found, _ = readers.read_rankings(opened)
    return sorted((str(each.prompt), each.responses, each.metadata.get("preference", 1.0)) for each in found)


@hypothesis.given(st.lists(items(kinds=(2,)), min_size=1, max_size=3))
@hypothesis.settings(max_examples=15, deadline=None)
def test_comparisons_are_the_same_as_lines(drawn):
    drawn = [
        (item, said) for item, said in drawn if said and sum(each.vote for each in said.values()) / len(said) != 0.5
    ]
    hypothesis.assume(drawn)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        with fill(folder / "a.sqlite", drawn) as opened:
            store_export.export(opened, folder / "a.jsonl")
            store_export.export_preferences(opened, folder / "b.jsonl")
            expected = by_texts(opened.path)
            again(folder, folder / "a.jsonl")
            assert by_texts(folder / "again.sqlite") == expected
            hard = sorted((prompt, answers, 1.0) for prompt, answers, _ in expected)
            assert by_texts(folder / "b.jsonl") == hard


def plain(text):
    return text.replace("\r\n", "\n").strip()


@hypothesis.given(st.lists(items(kinds=(2,), roles=("user", "assistant")), min_size=1, max_size=3))
@hypothesis.settings(max_examples=20, deadline=None)
def test_dialogues_have_the_texts_or_are_counted(drawn):
    drawn = [(item, {"Ada": Judgement(strength=1)}) for item, _ in drawn]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        with fill(folder / "a.sqlite", drawn) as opened:
            held, changed = [], 0
            for item in opened.items().values():
                texts = [*(each["content"] for each in item.prompt.messages), *(each.text for each in item.completions)]
                once = [plain(text) for text in texts]
                fits = all(once) and once[-1] != once[-2] and once == [plain(text) for text in once]
                if fits and not any(map(SPLITS.search, once)) and item.prompt.messages[0]["role"] == "user":
                    held.append(once)
                    changed += once != texts
            try:
                counts = hh_export.export(opened, folder / "hh.jsonl")
            except store.StoreError as error:
                assert not held and "no comparison for this form" in str(error)
                return
            assert counts[hh_export.CHANGED] == changed
            assert sum(counts.values()) - changed == len(opened.items()) - len(held)
        found, _ = readers.read_rankings(folder / "hh.jsonl")
        assert [[*(turn.text for turn in each.prompt), *each.responses] for each in found] == held
        again(folder, folder / "hh.jsonl")
        assert len(by_texts(folder / "again.sqlite")) == len({str(each) for each in held})


ASK = {"role": "user", "content": "Which?"}
CALL = {"tool_calls": [{"type": "function", "function": {"name": "look"}}]}


@pytest.fixture
def mixed(tmp_path):
    """Yields a store with items and judgements that not all forms can hold."""
    called = Item(
        prompt=Prompt([{"role": "system", "content": "Be brief."}, ASK], tools=[{"name": "look"}]),
        completions=[Completion("", "sft", extra=CALL), Completion("no", "sft")],
    )
    pair = Item(prompt=Prompt([ASK]), completions=[Completion("one", "sft"), Completion("two", "rl")])
    tied = Item(prompt=Prompt([ASK]), completions=[Completion(text) for text in "abc"])
    with store.Store(tmp_path / "mixed.sqlite") as opened:
        opened.add_labeler("Ada")
        first, second, third = opened.add([called, pair, tied], set_name="a")
        gold = Item(prompt=Prompt([ASK]), completions=pair.completions, expected=Judgement(tie=True))
        opened.add([Item(prompt=Prompt([ASK]), completions=pair.completions, duplicate_of=second), gold], set_name="a")
        opened.record("Ada", first, Judgement(strength=2, comment="Calls.", seconds=3.0), key="1", now=5.0)
        opened.record("Ada", second, Judgement(preference=0.75), key="2", now=6.0)
        opened.record("Ada", third, Judgement(ranks=(1, 1, 2)), key="3", now=7.0)
        yield opened


CHECKS = {"gold question skipped": 1, "hidden duplicate skipped": 1}


def test_tasks_for_label_studio_hold_everything_but_policies(mixed, tmp_path):
    counts = label_studio.export(mixed, tmp_path / "tasks.json")
    assert counts == CHECKS | {
        "preference other than 0, 0.5 and 1 not written": 1,
        "ranking with ties not written": 1,
    }
    tasks = json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8"))
    assert [len(task["annotations"]) for task in tasks] == [1, 0, 0]
    data = tasks[0]["data"]
    shown = data["order"].index(0)  # place of the item's first completion, which Ada prefers
    assert data["prompt"] == "system: Be brief.\n\nuser: Which?" and "look" in data[f"answer{shown + 1}"]
    assert "sft" not in json.dumps(tasks)
    assert tasks[0]["annotations"][0] == {
        "result": [
            {"id": "1", "from_name": "comparison", "to_name": "comparison", "type": "pairwise"}
            | {"value": {"selected": "right" if shown else "left"}}
        ],
        "was_cancelled": False,
        "completed_by": {"email": "Ada"},
        "created_at": "1970-01-01T00:00:05+00:00",
        "lead_time": 3.0,
    }
    assert [each["id"] for each in tasks[2]["data"]["answers"]] == ["answer1", "answer2", "answer3"]
    # A task that is labelled elsewhere belongs to its item, with its policies.
    tasks[1]["annotations"] = [tasks[0]["annotations"][0] | {"completed_by": 7}]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    found, read = comparison_import.read(tmp_path / "tasks.json")
    added = annotated.add(mixed, found, set_name="a", counts=read)
    assert (added.items, added.judgements) == (0, 1) and added.ids == list(mixed.items())[:3]
    first = tasks[1]["data"]["order"].index(0) == shown
    assert mixed.latest()[-1][1:] == ("7", added.ids[1], Judgement(preference=float(first), seconds=3.0), 5.0)
    with store.Store(tmp_path / "other.sqlite") as other:
        annotated.add(other, found, set_name="a", counts=read)
        [first, *_] = other.items().values()
        assert first.prompt == mixed.item(added.ids[0]).prompt and first.completions[0] == Completion("", extra=CALL)


def test_records_for_argilla_hold_texts_alone(mixed, tmp_path):
    counts = argilla.export(mixed, tmp_path / "records.json")
    assert counts["item with tools, or a message with more than a text, skipped"] == 1
    first, second = json.loads((tmp_path / "records.json").read_text(encoding="utf-8"))
    texts = [["one", "two"][int(i)] for i in first["metadata"]["rlhf_jax_order"].split()]
    assert first["fields"] == {"prompt": "Which?", "response_1": texts[0], "response_2": texts[1]}
    first["metadata"]["rlhf_jax_order"] = "0 0"
    (tmp_path / "records.json").write_text(json.dumps([first]))
    with pytest.raises(errors.DataError, match=r"record 1: 'order' is \[0, 0\]; it must have each number from 0 to 1"):
        comparison_import.read(tmp_path / "records.json")
    assert first["responses"] == second["responses"] == {} and "sft" not in json.dumps(first)


def test_dialogues_leave_out_what_they_cannot_hold(mixed, tmp_path):
    counts = hh_export.export(mixed, tmp_path / "hh.jsonl")
    assert counts == CHECKS | {"pair skipped: tools, or a turn with more than a text": 1}
    lines = [json.loads(line) for line in (tmp_path / "hh.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "chosen": "\n\nHuman: Which?\n\nAssistant: one",
        "rejected": "\n\nHuman: Which?\n\nAssistant: two",
    }
    assert len(lines) == 3  # and two pairs of the ranking


def test_lines_of_judgements_have_every_row(mixed, tmp_path):
    first, *_ = mixed.items()
    mixed.record("Ada", first, Judgement(unsure=True), key="later", now=8.0)
    store_export.export_judgements(mixed, tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["number"] for row in rows] == [1, 2, 3, 4] and [row["latest"] for row in rows] == [
        False,
        True,
        True,
        True,
    ]
    about = {"number": 1, "labeler": "Ada", "item": first, "set": "a", "kind": "pair", "time": 5.0, "latest": False}
    empty = {"preference": None, "ranks": None, "rating": None, "flags": {}, "tie": False, "unsure": False}
    said = {"strength": 2, "comment": "Calls.", "seconds": 3.0, "duplicate_of": None, "gold": False}
    completions = [each.extra | {"text": each.text, "policy": each.policy} for each in mixed.item(first).completions]
    shown = {"prompt": list(mixed.item(first).prompt.messages), "completions": completions}
    assert rows[0] == about | empty | said | shown
    with (
        store.Store(tmp_path / "empty.sqlite") as empty,
        pytest.raises(store.StoreError, match="no judgement to export"),
    ):
        store_export.export_judgements(empty, tmp_path / "none.jsonl")


@pytest.mark.parametrize("form", [label_studio, argilla])
def test_stores_without_items_are_not_exported(form, tmp_path):
    with store.Store(tmp_path / "empty.sqlite") as empty, pytest.raises(store.StoreError, match="no item to export"):
        form.export(empty, tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()


def test_a_revoked_labeler_keeps_a_file_from_being_added(mixed, tmp_path):
    mixed.revoke("Ada")
    lines = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    (tmp_path / "a.jsonl").write_text(json.dumps(lines))
    found, counts = comparison_import.read(tmp_path / "a.jsonl")
    before = list(mixed.items())
    with pytest.raises(store.StoreError, match="'Ada' was revoked"):
        annotated.add(mixed, found, set_name="a", labeler="Ada", counts=counts)
    assert list(mixed.items()) == before and isinstance(counts, errors.DropCount)
