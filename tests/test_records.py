"""Records of every form, from every kind of file, into records, counts and token rows."""

import gzip
import json
import math
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from rlhf_jax.data import chat, dialogues, encoding, errors, files, reading, records, tokenizers

USER, BOT = "user", "assistant"
ASK = {"role": USER, "content": "why"}
SAY = {"role": BOT, "content": "so"}
WHY = (dialogues.Turn(USER, "why"),)


def write(path, rows):
    lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode()) if path.name.endswith(".gz") else lines.encode())
    return path


def any_share():
    return errors.DropCount(max_dropped=1.0)


def messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


# ------------------------------------------------------------------------------------------------------------- forms


def test_both_forms_of_a_demonstration():
    system = {"role": "system", "content": "Be short."}
    cases = [
        ({"prompt": "why", "response": "so"}, WHY),
        ({"prompt": "why", "completion": " so\n"}, WHY),
        ({"prompt": [ASK], "response": [SAY]}, WHY),
        ({"messages": [ASK, SAY]}, WHY),
        ({"messages": [system, ASK, SAY, ASK, SAY]}, None),
        ({"messages": {"role": [USER, BOT], "content": ["why", "so"]}}, WHY),  # a Parquet file of Hugging Face
        ({"prompt": "\n\nHuman: why\n\nAssistant:", "response": "so"}, WHY),
        ({"prompt": "\n\nHuman: why", "response": "so"}, WHY),
        ({"prompt": "why", "response": "so", "messages": None}, WHY),
    ]
    for fields, prompt in cases:
        record = records.parse_demonstration(fields)
        assert record.response.strip() == "so"
        assert prompt is None or record.prompt == prompt, fields
    assert records.parse_demonstration(cases[1][0]).response == " so\n"  # texts stay as they were written
    long = records.parse_demonstration(cases[4][0]).prompt
    assert [turn.role for turn in long] == ["system", USER, BOT, USER]


def test_every_form_of_a_pair_is_one_ranking():
    whole = "\n\nHuman: why\n\nAssistant: "
    cases = [
        {"prompt": "why", "chosen": "so", "rejected": "no"},
        {"prompt": [ASK], "chosen": [SAY], "rejected": messages((BOT, "no"))},
        {"chosen": [ASK, SAY], "rejected": messages((USER, "why"), (BOT, "no"))},
        {"prompt": "why", "chosen": [ASK, SAY], "rejected": messages((USER, "why"), (BOT, "no"))},
        {"chosen": whole + "so", "rejected": whole + "no"},
        {"prompt": "\n\nHuman: why\n\nAssistant:", "chosen": whole + "so", "rejected": whole + "no"},
        {"prompt": "why", "responses": ["so", "no"], "ranks": [1, 2]},
    ]
    for fields in cases:
        assert records.parse_ranking(fields) == records.Ranking(prompt=WHY, responses=("so", "no"), ranks=(1, 2)), (
            fields
        )


def test_ranks_come_from_scores_and_margins_from_the_scores_of_a_pair():
    fields = {"prompt": "why", "responses": ["a", "b", "c", "d"], "scores": [0.5, 2, -1.0, 2]}
    ranking = records.parse_ranking(fields)
    assert (ranking.ranks, ranking.scores) == ((2, 1, 3, 1), (0.5, 2.0, -1.0, 2.0))
    pair = {"prompt": "why", "chosen": "a", "rejected": "b"}
    scored = records.parse_ranking(pair | {"score_chosen": 8, "score_rejected": 5.5})
    assert (scored.scores, scored.margin) == ((8.0, 5.5), 2.5)
    assert records.parse_ranking(pair | {"margin": 1.5, "score_chosen": None}).margin == 1.5
    both = records.parse_ranking(fields | {"ranks": [2, 1.0, 7, 1]})
    assert both.ranks == (2, 1, 7, 1)


def test_what_else_a_record_says_is_metadata():
    fields = {
        "prompt": "why",
        "response": "so",
        "label": True,
        "annotator": "a7",
        "turn": 3,
        "sure": 0.5,
        "tags": ["x"],
        "none": None,
        "metadata": {"domain": "code", "deep": {}},
    }
    metadata = {"annotator": "a7", "turn": 3, "sure": 0.5, "domain": "code"}
    judged = records.parse_judged(fields)
    assert (judged.metadata, judged.good) == (metadata, True)
    assert records.parse_prompt(fields).metadata == metadata | {"label": True}
    assert records.parse_judged(fields | {"label": 0}).good is False


# ------------------------------------------------------------------------------------------------- flawed and broken


def k_way(**changes):
    return {"prompt": "why", "responses": ["a", "b", "c"], "ranks": [1, 2, 2]} | changes


RANKING_FLAWS = {
    "all tied": [k_way(ranks=[2, 2, 2]), k_way(ranks=None, scores=[1.5, 1.5, 1.5])],
    "fewer than two answers": [k_way(responses=["a"], ranks=[1]), k_way(responses=[], ranks=[])],
    "same answer twice": [
        k_way(responses=["a", "b", "a "]),
        {"prompt": "why", "chosen": "a", "rejected": "a"},
        {"chosen": "\n\nHuman: x\n\nAssistant: a", "rejected": "\n\nHuman: x\n\nAssistant: a"},
    ],
    "score is no finite number": [
        *(k_way(ranks=None, scores=[1, 2, bad]) for bad in (math.nan, math.inf, "3", None, True, 10**400)),
        {"prompt": "why", "chosen": "a", "rejected": "b", "margin": math.nan},
    ],
    "scores and answers differ in number": [k_way(scores=[1, 2])],
    "ranks and answers differ in number": [k_way(ranks=[1, 2]), k_way(ranks=[1, 2, 3, 4])],
    "rank is no whole number": [k_way(ranks=[1, 2, bad]) for bad in ("3", 1.5, None, True, math.nan, [3], 10**400)],
    "rank below 1": [k_way(ranks=[0, 1, 2]), k_way(ranks=[1, 2, -1])],
    "ranks and scores disagree": [
        k_way(scores=[1, 2, 3]),
        {"prompt": "why", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2},
    ],
    "margin below 0": [{"prompt": "why", "chosen": "a", "rejected": "b", "margin": -0.1}],
    "prompts differ": [
        {"chosen": [ASK, SAY], "rejected": messages((USER, "what"), (BOT, "no"))},
        {"prompt": "what", "chosen": [ASK, SAY], "rejected": messages((USER, "why"), (BOT, "no"))},
        {"chosen": "\n\nHuman: x\n\nAssistant: a", "rejected": "\n\nHuman: y\n\nAssistant: b"},
    ],
    "empty answer": [
        k_way(responses=["a", " \n", "c"]),
        {"prompt": "why", "chosen": "", "rejected": "a"},
        {"prompt": "why", "chosen": [], "rejected": [SAY]},
    ],
    "empty prompt": [k_way(prompt=" "), k_way(prompt=[])],
    "ends in a human turn": [{"chosen": [ASK, SAY, ASK], "rejected": [ASK, SAY]}],
    "an answer is null": [k_way(responses=["a", None, "c"])],
    "rejected is null": [{"prompt": "why", "chosen": "a", "rejected": None}],
}


@pytest.mark.parametrize("reason", RANKING_FLAWS)
def test_a_ranking_of_no_use_is_dropped_and_counted(tmp_path, reason):
    flawed = RANKING_FLAWS[reason]
    path = write(tmp_path / "rankings.jsonl", [k_way(), *flawed, k_way(prompt="when")])
    found, counts = reading.read_rankings(path, counts=any_share())
    assert counts.dropped == {reason: len(flawed)}
    assert [record.prompt[0].text for record in found] == ["why", "when"]
    assert found[-1].where == f"{path}, line {len(flawed) + 2}"
    with pytest.raises(errors.DataError, match=f"{reason} {len(flawed)}.*more than max_dropped = 1.0%"):
        reading.read_rankings(path)


def test_other_records_of_no_use_are_dropped_and_counted(tmp_path):
    rows = [
        {"prompt": "why", "response": " "},
        {"prompt": "", "response": "so"},
        {"messages": [SAY]},
        {"messages": [ASK, SAY, ASK]},
        {"messages": []},
        {"prompt": "why", "response": None},
        {"messages": [ASK, {"role": BOT, "content": None}]},
        {"prompt": "why", "response": "so"},
    ]
    found, counts = reading.read_demonstrations(write(tmp_path / "d.jsonl", rows), counts=any_share())
    assert len(found) == 1
    assert counts.dropped == {
        "empty answer": 2,
        "empty prompt": 2,
        "ends in a human turn": 1,
        "response is null": 1,
        "content is null": 1,
    }
    found, counts = reading.read_prompts(
        write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": []}]), counts=any_share()
    )
    assert (len(found), counts.dropped) == (1, {"empty prompt": 1})
    rows = [{"prompt": "a", "response": "b", "label": None}, {"prompt": "a", "response": "b", "label": True}]
    found, counts = reading.read_judged(write(tmp_path / "j.jsonl", rows), counts=any_share())
    assert (len(found), counts.dropped) == (1, {"label is null": 1})


RANK, SHOW, JUDGE, ASKED = (
    reading.read_rankings,
    reading.read_demonstrations,
    reading.read_judged,
    reading.read_prompts,
)
BROKEN = [
    (RANK, "{oops", "the line is not JSON"),
    (RANK, "[1]", "the line holds a list, not an object with chosen and rejected, or prompt, responses and ranks"),
    (RANK, {"prompt": "a"}, "the record has no 'chosen', and no 'responses' either"),
    (RANK, {"prompt": "a", "chosen": "b"}, "the record has no 'rejected', and no 'responses' either"),
    (RANK, {"prompt": "a", "responses": ["a", "b"]}, "the record has no 'ranks', and no 'scores' either"),
    (RANK, {"responses": ["a", "b"], "ranks": [1, 2]}, "the record has no 'prompt'"),
    (
        RANK,
        {"chosen": "a", "rejected": "b"},
        "the record has no 'prompt', and in 'chosen', the dialogue does not start",
    ),
    (RANK, k_way(responses="abc"), "'responses' is a str, not a list"),
    (RANK, k_way(ranks={"a": 1}), "'ranks' is a dict, not a list"),
    (RANK, k_way(responses=["a", 2, "c"]), "'responses' is a int, not a string"),
    (RANK, {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "big"}, "'margin' is a str, not a number"),
    (RANK, {"prompt": "a", "chosen": [SAY], "rejected": [3]}, "message 1 of 'rejected' is a int, not an object"),
    (SHOW, {"prompt": 3, "response": "a"}, "'prompt' is a int, not a string"),
    (SHOW, {"prompt": "a"}, "the record has no 'response', and no 'messages' either"),
    (SHOW, {"response": "a"}, "the record has no 'prompt'"),
    (SHOW, {"prompt": "a", "response": [ASK, SAY]}, "'response' holds 2 messages, not the answer alone"),
    (SHOW, {"messages": "why"}, "'messages' is a str, not a string or a list of messages"),
    (SHOW, {"messages": [{"role": USER}]}, "message 1 of 'messages' has no 'content'"),
    (SHOW, {"messages": [ASK, {"role": BOT, "content": ["x"]}]}, "content of message 2 of messages' is a list"),
    (SHOW, '{"prompt": "\\ud800", "response": "a"}', "'prompt' holds half a surrogate pair"),
    (JUDGE, {"prompt": "a", "response": "b"}, "the record has no 'label'"),
    (JUDGE, {"prompt": "a", "response": "b", "label": "good"}, "'label' is 'good', not true or false"),
    (ASKED, {"text": "a"}, "the record has no 'prompt'"),
]


@pytest.mark.parametrize("read, row, message", BROKEN, ids=[f"{i}" for i in range(len(BROKEN))])
def test_a_record_of_the_wrong_form_is_an_error_in_one_sentence_with_file_and_line(tmp_path, read, row, message):
    good = k_way() | {"response": "a", "label": False}
    path = write(tmp_path / "data.jsonl", [good, row, good])
    with pytest.raises(errors.DataError) as error:
        read(path, counts=any_share())
    assert str(error.value).startswith(f"{path}, line 2: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------------------- files

ROWS = [{"prompt": f"q{i}", "response": f"a{i}", "domain": "x"} for i in range(5)]


def same(path):
    found, _ = reading.read_demonstrations(path)
    assert [(r.prompt[0].text, r.response, r.metadata) for r in found] == [
        (f"q{i}", f"a{i}", {"domain": "x"}) for i in range(5)
    ]
    return found


def test_one_set_in_every_kind_of_file(tmp_path):
    for name in ("d.jsonl", "d.jsonl.gz", "d.json", "d.json.gz", "d.txt"):
        assert same(write(tmp_path / name, ROWS))[-1].where.endswith(f"{name}, line 5")
    array = json.dumps(ROWS, indent=1)
    (tmp_path / "a.json").write_text(array)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(array.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "d.parquet", row_group_size=2)
    for name, unit in (("a.json", "record"), ("a.json.gz", "record"), ("d.parquet", "row")):
        assert same(tmp_path / name)[-1].where.endswith(f"{name}, {unit} 5")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:2]), tmp_path / "part-0.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[2:]), tmp_path / "part-1.parquet")
    same(tmp_path / "part-*.parquet")
    same([tmp_path / "part-0.parquet", str(tmp_path / "part-1.parquet")])


def test_parquet_with_messages_and_null_columns(tmp_path):
    rows = [
        {"messages": [ASK, SAY], "prompt": None, "response": None},
        {"messages": None, "prompt": "why", "response": "so"},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    found, _ = reading.read_demonstrations(tmp_path / "d.parquet")
    assert found == [records.Demonstration(prompt=WHY, response="so")] * 2


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    def refused(path, message):
        with pytest.raises(errors.DataError, match=message) as error:
            reading.read_demonstrations(path)
        assert "\n" not in str(error.value)

    for name in ("d.jsonl", "d.json", "d.parquet"):
        refused(tmp_path / f"nowhere-{name}", f"nowhere-{name} does not exist")
        (tmp_path / name).mkdir()
        refused(tmp_path / name, f"{name} is a directory")
    refused(tmp_path / "no*.jsonl", r"no file fits .*no\*\.jsonl")
    refused([], "no file was given")
    for name, content in (("e.jsonl", b""), ("e.json", b"[]"), ("e.jsonl.gz", gzip.compress(b""))):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, f"{name} is empty")

    whole = json.dumps(ROWS, indent=1)
    (tmp_path / "cut.json").write_text(whole[: len(whole) // 2])
    refused(tmp_path / "cut.json", r"cut\.json: the file is not JSON \(.* in line \d+\)")
    (tmp_path / "mixed.json").write_text('[{"prompt": "a", "response": "b"}, 3]')
    refused(tmp_path / "mixed.json", r"mixed\.json, record 2: it is a int, not an object")
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[:-9])
    refused(tmp_path / "cut.jsonl.gz", r"cut\.jsonl\.gz, line \d: the gzip file is cut off here")

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "ok.parquet")
    content = (tmp_path / "ok.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    refused(tmp_path / "cut.parquet", r"cut\.parquet, row 1: the Parquet file cannot be read")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(tmp_path / "ok.parquet", r"needs pyarrow, which pip install 'rlhf_jax\[parquet\]' installs")


def test_the_reader_of_hh_rlhf_files_and_this_one_agree(tmp_path):
    prompt = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: tell me"
    rows = [
        {"chosen": f"{prompt}\n\nAssistant:{a}", "rejected": f"{prompt}\n\nAssistant:{b}"}
        for a, b in ((" good", " bad"), (" ", " bad"), (" same", " same"), (" yes\n\nHuman: so?", " no"), ("1", "2 "))
    ]
    path = write(tmp_path / "hh.jsonl.gz", rows)
    theirs, their_counts = dialogues.read_comparisons(path, counts=any_share())
    mine, my_counts = reading.read_rankings(path, counts=any_share())
    assert my_counts.dropped == their_counts.dropped
    assert [(r.prompt, r.responses, r.where) for r in mine] == [
        (c.prompt, (c.chosen, c.rejected), f"{path}, line {c.line}") for c in theirs
    ]
    assert files.source_name(path) == str(path)


# --------------------------------------------------------------------------------------------------------------- rows


@pytest.fixture(scope="module")
def fmt():
    return chat.chat_format(tokenizers.word_level([f"w{i}" for i in range(10)]))


def test_rows_of_every_kind_and_the_places_they_came_from(fmt):
    # Ids: pad 0, end 1, user 2, assistant 3, then w0 = 4 and so on.
    widths = {"prompt_width": 4, "response_width": 2}
    ask, long = (dialogues.Turn(USER, "w0"),), (dialogues.Turn(USER, "w0 w1 w2"),)
    counts = any_share()
    shown = [records.Judged(prompt=p, response="w5", good=g) for p, g in ((ask, False), (long, True), (ask, True))]
    rows, kept = encoding.demonstrations(fmt, shown, counts=counts, **widths)
    np.testing.assert_array_equal(kept, [0, 2])
    np.testing.assert_array_equal(rows.tokens_BL, [[2, 4, 1, 3, 9, 1]] * 2)
    np.testing.assert_array_equal(rows.loss_mask_BL, [[False] * 4 + [True] * 2] * 2)
    assert counts.dropped == {"prompt too long": 1}
    marked, kept = encoding.judged(fmt, shown, counts=counts, **widths)
    np.testing.assert_array_equal(marked.good_B, [False, True])
    np.testing.assert_array_equal(marked.tokens_BL, rows.tokens_BL)
    asked, kept = encoding.prompts(fmt, shown, prompt_width=6, counts=counts)
    np.testing.assert_array_equal(kept, [0, 1, 2])
    np.testing.assert_array_equal(asked.tokens_BP[:2], [[0, 0, 2, 4, 1, 3], [2, 4, 5, 6, 1, 3]])
    np.testing.assert_array_equal(asked.mask_BP[:2], [[False] * 2 + [True] * 4, [True] * 6])


def test_rows_of_rankings(fmt):
    ask = (dialogues.Turn(USER, "w0"),)
    found = [
        records.Ranking(prompt=ask, responses=("w1", "w2", "w3"), ranks=(2, 1, 2)),
        records.Ranking(prompt=ask, responses=("w1 w2 w3", "w1 w2 w4"), ranks=(1, 2)),  # the same within two tokens
        records.Ranking(prompt=ask, responses=("w1 w2 w3", "w1 w2 w4", "w5"), ranks=(1, 1, 2)),  # but these are tied
        records.Ranking(prompt=ask, responses=("w6", "w7"), ranks=(1, 2)),
    ]
    counts = any_share()
    rows, kept = encoding.rankings(fmt, found, prompt_width=4, response_width=2, counts=counts)
    np.testing.assert_array_equal(kept, [0, 2, 3])
    assert counts.dropped == {"same answer within the width": 1}
    assert counts.truncated == {"answer truncated": 2}
    np.testing.assert_array_equal(rows.ranks_BK, [[2, 1, 2], [1, 1, 2], [1, 2, 0]])
    np.testing.assert_array_equal(rows.where_BK, np.asarray(rows.ranks_BK) > 0)
    np.testing.assert_array_equal(rows.tokens_BKL[2, :2], [[2, 4, 1, 3, 10, 1], [2, 4, 1, 3, 11, 1]])
    wider, _ = encoding.rankings(fmt, found, prompt_width=4, response_width=2, counts=any_share(), answers=5)
    np.testing.assert_array_equal(wider.ranks_BK[:, 3:], np.zeros((3, 2)))
    np.testing.assert_array_equal(wider.tokens_BKL[:, :3], rows.tokens_BKL)
    with pytest.raises(errors.DataError, match="a prompt has 3 answers, more than the 2"):
        encoding.rankings(fmt, found, prompt_width=4, response_width=2, counts=any_share(), answers=2)
