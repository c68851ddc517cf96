"""Dialogues in the hh-rlhf format, dialogue files, and counts of dropped records."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest

from rlhf_jax.data import dialogues, errors, readers, records

PROMPT = "\n\nHuman: hi there\n\nAssistant: hello\n\nHuman: tell me"


def record(chosen=" good", rejected=" bad", *, prompt=PROMPT, other_prompt=None):
    other_prompt = prompt if other_prompt is None else other_prompt
    return {"chosen": f"{prompt}\n\nAssistant:{chosen}", "rejected": f"{other_prompt}\n\nAssistant:{rejected}"}


def write(path, records):
    text = "".join(json.dumps(r) + "\n" if isinstance(r, dict) else r + "\n" for r in records)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def any_share():
    return errors.DropCount(max_dropped=1.0)


# ---------------------------------------------------------------------------------------------------- dialogues


def test_a_dialogue_is_parsed_into_turns_and_split_at_the_last_assistant_turn():
    turns = dialogues.parse_dialogue(PROMPT + "\n\nAssistant: sure, here")
    assert [(turn.role, turn.text) for turn in turns] == [
        ("user", "hi there"),
        ("assistant", "hello"),
        ("user", "tell me"),
        ("assistant", "sure, here"),
    ]
    prompt, answer = dialogues.split_answer(turns)
    assert prompt == turns[:3]
    assert answer == "sure, here"


@pytest.mark.parametrize(
    "text",
    [
        "he said Human: no",
        "one\nHuman: two",
        "one\n\nhuman: two",
        "one\n\n Human: two",
        "one\n\nHumans: two",
        "Assistant: who?",
        "one\n\ntwo\n\n\n- three",
    ],
)
def test_a_name_inside_a_paragraph_is_text(text):
    turns = dialogues.parse_dialogue(f"\n\nHuman: {text}\n\nAssistant: {text}")
    assert turns == (dialogues.Turn("user", text), dialogues.Turn("assistant", text))


def test_white_space_around_a_turn_is_removed_and_inside_it_is_kept():
    turns = dialogues.parse_dialogue("\n\nHuman:   a  b\n\n\n\nAssistant:c \n d \t\n")
    assert turns == (dialogues.Turn("user", "a  b"), dialogues.Turn("assistant", "c \n d"))


def test_consecutive_turns_of_one_role_are_kept():
    text = "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c\n\nHuman: d\n\nAssistant: e"
    turns = dialogues.parse_dialogue(text)
    assert [turn.role for turn in turns] == ["user", "assistant", "assistant", "user", "assistant"]
    assert dialogues.format_dialogue(turns) == text


def test_split_answer_needs_an_assistant_turn_at_the_end():
    with pytest.raises(errors.DataError, match="does not end in an assistant turn"):
        dialogues.split_answer((dialogues.Turn("user", "a"),))
    with pytest.raises(errors.DataError, match="does not end in an assistant turn"):
        dialogues.split_answer(())


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_plain_and_compressed_files_are_read(tmp_path, name):
    path = write(tmp_path / name, [record(), record(" yes \n", " no")])
    comparisons, counts = readers.read_rankings(path)
    prompt = dialogues.parse_dialogue(PROMPT + "\n\nAssistant: x")[:-1]
    assert comparisons == [
        records.Ranking(prompt=prompt, responses=("good", "bad"), ranks=(1, 2)),
        records.Ranking(prompt=prompt, responses=("yes", "no"), ranks=(1, 2)),
    ]
    assert [comparison.location for comparison in comparisons] == [f"{path}, line 1", f"{path}, line 2"]
    assert counts.dropped == {}
    with pytest.raises(AttributeError):
        comparisons[0].location = "line 3"  # pyright: ignore[reportAttributeAccessIssue]


def test_unusable_records_are_counted_by_reason_and_the_others_keep_their_line_numbers(tmp_path):
    path = write(
        tmp_path / "pairs.jsonl",
        [
            record(" ", " bad"),
            record(),
            record(" good", ""),
            record(other_prompt="\n\nHuman: something else"),
            record(" same", " same "),
            record(" good\n\nHuman: and then?", " bad"),
            # With a second assistant turn on one side only, the split at the last turn makes the prompts differ.
            record(" good\n\nAssistant: more", " bad"),
            record(),
        ],
    )
    comparisons, counts = readers.read_rankings(path, counts=any_share())
    assert [comparison.location for comparison in comparisons] == [f"{path}, line {n}" for n in (2, 8)]
    assert counts.dropped == {
        "empty answer": 2,
        "prompts differ": 2,
        "same answer twice": 1,
        "does not end in an assistant turn": 1,
    }
    assert counts.report() == (
        "dropped 6 (does not end in an assistant turn 1, empty answer 2, prompts differ 2, same answer twice 1), "
        "truncated 0"
    )


def test_too_many_unusable_records_are_an_error_that_names_the_counts(tmp_path):
    path = write(tmp_path / "pairs.jsonl", [record(" ", " bad")] + [record()] * 98)
    with pytest.raises(errors.DataError) as error:
        readers.read_rankings(path)
    assert str(error.value) == (
        f"{path}: 1 of 99 records was dropped (empty answer 1), which is 1.0%, more than max_dropped = 1.0%; "
        "correct these records or raise the limit"
    )
    write(path, [record(" ", " bad")] + [record()] * 99)
    assert len(readers.read_rankings(path)[0]) == 99


GOOD = json.dumps(record())
BROKEN_LINES = {
    "not json": ("{oops", r"the line is not JSON \(Expecting property name"),
    "blank": ("", r"the line is not JSON \(Expecting value\)"),
    "too deep": ("[" * 200_000, "the line is not JSON .*nested too deeply"),
    "a list": ("[1, 2]", "the line has type list; it must be an object with chosen and rejected"),
    "no rejected": (json.dumps({"chosen": record()["chosen"]}), "the record has neither 'rejected' nor 'responses'"),
    "no chosen": ('{"rejected": "a"}', "the record has neither 'chosen' nor 'responses'"),
    "a number": ('{"prompt": "a", "chosen": 3, "rejected": "a"}', "'chosen' has type int; it must be a string"),
    "no answer": (
        json.dumps({"chosen": PROMPT + "\n\nAssistant: a", "rejected": "\n\nHuman: hi"}),
        "in 'rejected', the dialogue has no assistant turn",
    ),
    "assistant first": (
        json.dumps({"chosen": "\n\nAssistant: hi", "rejected": ""}),
        "the record has no 'prompt'",
    ),
    "text first": (
        json.dumps({"chosen": "Note" + PROMPT + "\n\nAssistant: a", "rejected": ""}),
        "the record has no 'prompt'",
    ),
    "no dialogue": (json.dumps({"chosen": "just text", "rejected": ""}), "the record has no 'prompt'"),
}


@pytest.mark.parametrize("case", BROKEN_LINES)
def test_a_broken_line_raises_a_one_sentence_error_with_file_and_line(tmp_path, case):
    line, message = BROKEN_LINES[case]
    path = write(tmp_path / "pairs.jsonl", [GOOD, GOOD, line, GOOD])
    with pytest.raises(errors.DataError, match=message) as error:
        readers.read_rankings(path, counts=any_share())
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is None


def test_a_missing_file_a_directory_and_an_empty_file_are_errors(tmp_path):
    with pytest.raises(errors.DataError, match=r"nowhere\.jsonl does not exist"):
        readers.read_rankings(tmp_path / "nowhere.jsonl")
    with pytest.raises(errors.DataError, match="is a directory"):
        readers.read_rankings(tmp_path)
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(errors.DataError, match=r"empty\.jsonl is empty"):
        readers.read_rankings(str(tmp_path / "empty.jsonl"))
    (tmp_path / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(errors.DataError, match=r"empty\.jsonl\.gz is empty"):
        readers.read_rankings(tmp_path / "empty.jsonl.gz")


def test_truncated_and_damaged_gzip_files_are_errors(tmp_path):
    rng = np.random.default_rng(0)
    noise = ["".join(map(chr, rng.integers(97, 123, 200))) for _ in range(400)]
    whole = gzip.compress("".join(json.dumps(record(f" {word}")) + "\n" for word in noise).encode())
    path = tmp_path / "pairs.jsonl.gz"

    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(errors.DataError, match=r"pairs\.jsonl\.gz, line \d+: the gzip file is truncated here") as error:
        readers.read_rankings(path)
    assert 100 < int(str(error.value).split("line ")[1].split(":")[0]) < 300

    path.write_bytes(whole[:-4])
    with pytest.raises(errors.DataError, match=r"line 401: the gzip file is truncated here"):
        readers.read_rankings(path)

    # Overwrite the first block of the stream, after the 18 bytes of the header.
    path.write_bytes(whole[:18] + b"\xff" * 200 + whole[218:])
    with pytest.raises(errors.DataError, match=r"line \d+: the gzip file is damaged"):
        readers.read_rankings(path)

    path.write_text(GOOD)  # a browser may have decompressed the file without changing its name
    assert len(readers.read_rankings(path)[0]) == 1


# ------------------------------------------------------------------------------------------------------- counts


def test_each_stage_is_checked_against_the_limit_separately():
    counts = errors.DropCount(max_dropped=0.5)
    first = counts.stage()
    first.drop("a")
    counts.add(first, records=2, source="first")
    second = counts.stage()
    second.drop("a")
    second.drop("b")
    with pytest.raises(
        errors.DataError, match=r"second: 2 of 3 records were dropped \(a 1, b 1\), which is 66\.7%, more than"
    ):
        counts.add(second, records=3, source="second")
    assert counts.dropped == {"a": 2, "b": 1}


def test_truncated_records_have_a_separate_limit_that_is_off_by_default():
    counts = errors.DropCount()
    counts.truncate("cut")
    counts.check(1, source="here")
    strict = errors.DropCount(max_truncated=0.0)
    strict.truncate("cut")
    with pytest.raises(errors.DataError, match=r"1 of 10 records was truncated .*more than max_truncated = 0"):
        strict.check(10, source="here")
    with pytest.raises(ValueError, match="max_dropped must be a share from 0 to 1, got 2"):
        errors.DropCount(max_dropped=2)


# ------------------------------------------------------------------------------------------------------- imports


def test_the_data_modules_do_not_import_transformers():
    code = (
        "import sys; from rlhf_jax.data import batching, dialogues, errors, tokenizers, padding; "
        "assert 'transformers' not in sys.modules, 'transformers was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
