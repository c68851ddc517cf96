"""Comparison stores as preference data: the same records as JSON lines, and files that are written and imported."""

import json
import sqlite3

import jax
import numpy as np
import pytest

from rlhf_jax.data import dialogues, errors, readers, records, sources
from rlhf_jax.data.stores import comparison_import
from rlhf_jax.feedback import store, store_export
from rlhf_jax.feedback.judgements import Completion, Item, Judgement, Prompt

ASK = {"role": "user", "content": "Name a number\u2028 \u202e\u2067'\"👩‍👩‍👧."}
CALL = {"tool_calls": [{"type": "function", "function": {"name": "look"}}]}
SKIPPED = {
    "rating of one completion skipped": 1,
    "item without a judgement skipped": 2,
    "tied item skipped": 2,
    "gold question skipped": 1,
    "hidden duplicate skipped": 1,
}


def item(*answers, **others):
    return Item(prompt=Prompt((ASK,), "helpful"), completions=tuple(map(Completion, answers)), **others)


@pytest.fixture
def filled(tmp_path):
    """Yields a store, and the lines that its comparisons are by hand."""
    with store.Store(tmp_path / "mine.db") as opened:
        for name in ("Ada", "Bo", "Cy"):
            opened.add_labeler(name)
        calls = Item(
            prompt=Prompt((ASK,), tools=({"name": "look"},)), completions=(Completion("", extra=CALL), Completion("no"))
        )
        first = opened.add([item("one", "two", metadata={"subset": "easy"}), item("three", "four")], set_name="round 1")
        ranked, tied, rated, gold, copy = opened.add(
            [
                item("a", "b", "c", "d"),
                item("e", "f", "g", "h"),
                item("i"),
                item("j", "k", expected=Judgement(strength=1)),
                item("one", "two", duplicate_of=first[0]),
            ],
            set_name="round 1",
        )
        tie, unsure, alone, called = opened.add(
            [item("l", "m"), item("n", "o"), item("p", "q"), calls], set_name="round 2"
        )
        for name, key, said in (
            ("Ada", first[0], Judgement(strength=1)),
            ("Ada", first[0], Judgement(strength=7)),
            ("Bo", first[0], Judgement(strength=5)),
            ("Cy", first[0], Judgement(unsure=True)),
            ("Ada", first[1], Judgement(strength=4)),
            ("Bo", first[1], Judgement(tie=True)),
            ("Cy", first[1], Judgement(strength=1)),
            ("Ada", ranked, Judgement(ranks=(2, 1, 9, 1))),
            ("Bo", ranked, Judgement(ranks=(1, 2, 4, 3))),
            ("Ada", tied, Judgement(ranks=(1, 2, 3, 4))),
            ("Bo", tied, Judgement(ranks=(4, 3, 2, 1))),
            ("Ada", rated, Judgement(rating=7)),
            ("Ada", gold, Judgement(strength=1)),
            ("Ada", copy, Judgement(strength=1)),
            ("Ada", tie, Judgement(strength=1)),
            ("Bo", tie, Judgement(strength=8)),
            ("Ada", unsure, Judgement(unsure=True)),
            ("Ada", called, Judgement(preference=0.75)),
        ):
            opened.record(name, key, said, key=str(len(opened.history())))
        shared = {"set": "round 1", "domain": "helpful"}
        # Comparisons lost less won, by Ada and Bo: a 1 - 3, b -2 - 1, c 3 + 3, d -2 + 1.
        lines = [
            {
                "chosen": "two",
                "rejected": "one",
                "metadata": shared | {"item": first[0], "labelers": 2, "subset": "easy"},
            },
            {"chosen": "three", "rejected": "four", "preference": 2.5 / 3}
            | {"metadata": shared | {"item": first[1], "labelers": 3}},
            {"responses": ["a", "b", "c", "d"], "ranks": [2, 1, 4, 3]}
            | {"metadata": shared | {"item": ranked, "labelers": 2}},
            {
                "chosen": [{"role": "assistant", "content": "", **CALL}],
                "rejected": [{"role": "assistant", "content": "no"}],
            }
            | {"preference": 0.75, "tools": [{"name": "look"}]}
            | {"metadata": {"set": "round 2", "item": called, "labelers": 1}},
        ]
        yield opened, [{"prompt": [ASK]} | line for line in lines], alone


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_store_is_read_as_the_equal_json_lines(filled, tmp_path):
    opened, lines, alone = filled
    expected, _ = readers.read_rankings(write(tmp_path / "b.jsonl", lines))
    found, counts = readers.read_rankings(opened.path)
    assert found == expected and len(found) == 4
    assert counts.noted == SKIPPED and not counts.dropped and not counts.unused
    assert found[0].location == f"{opened.path}, item {lines[0]['metadata']['item']}"
    assert [each.metadata.get("preference") for each in found] == [None, 2.5 / 3, None, 0.75]
    # A judgement that is recorded while the store is open is read.
    opened.record("Ada", alone, Judgement(strength=8), key="late")
    again, _ = readers.read_rankings([opened.path, tmp_path / "b.jsonl"])
    assert [each.responses for each in again[3:5]] == [("q", "p"), found[3].responses] and again[5:] == expected
    prompts, _ = readers.read_prompts(opened.path)
    assert {each.prompt for each in prompts} == {(dialogues.Turn("user", ASK["content"]),)}


def test_a_store_is_encoded_as_the_equal_json_lines(filled, tmp_path):
    from rlhf_jax.data import chat, encoding, tokenizers

    opened, lines, _ = filled
    fmt = chat.chat_format(tokenizers.train_bpe(list(map(str, lines)), vocab_size=300))
    rows = [
        encoding.encode_rankings(
            fmt, readers.read_rankings(path)[0][:3], prompt_width=200, response_width=9, counts=lenient()
        )
        for path in (opened.path, write(tmp_path / "b.jsonl", lines))
    ]
    assert rows[0][0].ranks_BK.shape == (3, 4) and rows[0][1].tolist() == rows[1][1].tolist() == [0, 1, 2]
    jax.tree.map(np.testing.assert_array_equal, rows[0][0], rows[1][0])


def lenient():
    return errors.DropCount(max_dropped=1.0)


def test_exports_are_read_as_the_store_and_imported_as_it_was(filled, tmp_path):
    opened, _, _ = filled
    skipped = store_export.export(opened, tmp_path / "all.jsonl")
    assert skipped == SKIPPED
    expected, _ = readers.read_rankings(opened.path)
    assert readers.read_rankings(tmp_path / "all.jsonl")[0] == expected
    store_export.export(opened, tmp_path / "second.jsonl", set_name="round 2")
    assert readers.read_rankings(tmp_path / "second.jsonl")[0] == expected[3:]
    with pytest.raises(store.StoreError, match=r"mine\.db has no comparison to export \(it has no item\)"):
        store_export.export(opened, tmp_path / "none.jsonl", set_name="round 3")
    assert not (tmp_path / "none.jsonl").exists()

    with store.Store(tmp_path / "other.sqlite") as other:
        for _ in range(2):
            ids, counts = comparison_import.import_pairs(other, tmp_path / "all.jsonl", set_name="round 1")
            assert list(other.items()) == ids and len(other.history()) == 4 and not counts.noted
        assert other.labelers() == [("import", "labeler", False)]
        again, _ = readers.read_rankings(other.path)
    for mine, theirs in zip(again, expected, strict=True):
        assert (mine.prompt, mine.responses, mine.ranks, mine.tools) == (
            theirs.prompt,
            theirs.responses,
            theirs.ranks,
            theirs.tools,
        )
        for name in ("preference", "domain", "subset"):
            assert mine.metadata.get(name) == theirs.metadata.get(name)


def test_exports_for_hugging_face_have_message_lists(filled, tmp_path):
    opened, _, _ = filled
    assert store_export.export_preferences(opened, tmp_path / "hf.jsonl") == SKIPPED
    lines = [json.loads(line) for line in (tmp_path / "hf.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    answers = [
        ("two", "one"),
        ("three", "four"),
        *[("b", "a"), ("b", "d"), ("b", "c"), ("a", "d"), ("a", "c"), ("d", "c")],
    ]
    assert lines[:-1] == [
        {"prompt": [ASK]}
        | {k: [{"role": "assistant", "content": text}] for k, text in zip(("chosen", "rejected"), pair)}
        for pair in answers
    ]
    assert lines[-1]["chosen"] == [{"role": "assistant", "content": ""} | CALL] and lines[-1]["tools"]
    found, _ = readers.read_rankings(tmp_path / "hf.jsonl")
    assert [each.responses for each in found[:-1]] == answers
    with store.Store(tmp_path / "other.sqlite") as other:
        ids, _ = comparison_import.import_pairs(other, tmp_path / "hf.jsonl", set_name="a", labeler="crowd")
        assert len(ids) == 9 and {each.labeler for each in other.latest()} == {"crowd"}
        assert [each.responses for each in readers.read_rankings(other.path)[0][:-1]] == answers


def test_imports_count_what_they_do_not_keep(tmp_path):
    line = {"prompt": "a", "chosen": "b", "rejected": "c", "set": "test", "n": 2}
    lines = [line, line, line | {"n": 3, "margin": 0.5}, line | {"chosen": "c", "rejected": "b", "preference": 0.25}]
    with store.Store(tmp_path / "a.sqlite") as opened:
        ids, counts = comparison_import.import_pairs(opened, write(tmp_path / "a.jsonl", lines), set_name="x")
        assert counts.noted == {"scores or margin not kept": 1, "record that repeats another not kept": 1}
        assert ids[0] == ids[1] and len(opened.items()) == len(opened.history()) == 3
        assert opened.item(ids[0]).metadata == {"set": "test", "n": 2}
        assert opened.preferences("x").label_N.tolist() == [1.0, 1.0, 0.0]
        many = {"prompt": "a", "responses": list("abcdefghij"), "ranks": list(range(1, 11))}
        with pytest.raises(errors.DataError, match=r"b\.jsonl, line 1: the record has 10 answers; .* at most 9"):
            comparison_import.import_pairs(opened, write(tmp_path / "b.jsonl", [many]), set_name="y")
        assert opened.sets() == ["x"] and len(opened.labelers()) == 1


def test_stores_that_cannot_be_read_are_data_errors(tmp_path):
    with store.Store(tmp_path / "empty.sqlite"):
        pass
    with sqlite3.connect(tmp_path / "other.jsonl") as db:
        db.execute("CREATE TABLE pages (id)")
    (tmp_path / "cut.sqlite").write_bytes((tmp_path / "empty.sqlite").read_bytes()[:5000])
    for name, message in {
        "empty.sqlite": "is empty",
        "other.jsonl": "is an SQLite database, but not a comparison store",
        "cut.sqlite": r"cut\.sqlite",
    }.items():
        with pytest.raises(errors.DataError, match=message):
            readers.read_rankings(tmp_path / name)


def test_raw_records_of_skipped_items_have_their_answers(filled):
    opened, _, _ = filled
    raw = [each for each in sources.raw_records(opened.path) if each.skipped == "rating of one completion skipped"]
    assert [each.fields["responses"] for each in raw] == [["i"]]
    assert all(records.parse_prompt(each.fields).prompt for each in raw)
