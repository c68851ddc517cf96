"""Parsing of all record formats, reading with counts of dropped records, and encoding into token rows."""
# pyright: reportAttributeAccessIssue=false

import dataclasses
import gzip
import json
import math
from typing import Any

import numpy as np
import pytest

from rlhf_jax.data import chat, dialogues, encoding, errors, padding, readers, records, tokenizers

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


# ----------------------------------------------------------------------------------------------------------- formats


def test_every_format_of_a_demonstration_is_parsed():
    system = {"role": "system", "content": "Be short."}
    cases = [
        ({"prompt": "why", "response": "so"}, WHY),
        ({"prompt": "why", "completion": " so\n"}, WHY),
        ({"prompt": [ASK], "response": [SAY]}, WHY),
        ({"messages": [ASK, SAY]}, WHY),
        ({"messages": [system, ASK, SAY, ASK, SAY]}, None),
        ({"messages": {"role": [USER, BOT], "content": ["why", "so"]}}, WHY),  # as in the Parquet files of Hugging Face
        ({"prompt": "\n\nHuman: why\n\nAssistant:", "response": "so"}, WHY),
        ({"prompt": "\n\nHuman: why", "response": "so"}, WHY),
        ({"prompt": "why", "response": "so", "messages": None}, WHY),
    ]
    for fields, prompt in cases:
        record = records.parse_demonstration(fields)
        assert record.response.strip() == "so"
        assert prompt is None or record.prompt == prompt, fields
    assert records.parse_demonstration(cases[1][0]).response == " so\n"  # responses are not stripped
    long = records.parse_demonstration(cases[4][0]).prompt
    assert [turn.role for turn in long] == ["system", USER, BOT, USER]


def test_every_format_of_a_pair_is_parsed_as_the_same_ranking():
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


def test_scores_determine_ranks_and_the_margin_of_a_pair():
    fields = {"prompt": "why", "responses": ["a", "b", "c", "d"], "scores": [0.5, 2, -1.0, 2]}
    ranking = records.parse_ranking(fields)
    # The best answer is first, ties keep their order, and each answer keeps its score.
    assert ranking.responses == ("b", "d", "a", "c")
    assert (ranking.ranks, ranking.scores, ranking.margin) == ((1, 1, 2, 3), (2.0, 2.0, 0.5, -1.0), None)
    pair = {"prompt": "why", "chosen": "a", "rejected": "b"}
    scored = records.parse_ranking(pair | {"score_chosen": 8, "score_rejected": 5.5})
    assert (scored.scores, scored.margin) == ((8.0, 5.5), 2.5)
    assert records.parse_ranking(pair | {"margin": 1.5, "score_chosen": None}).margin == 1.5
    both = records.parse_ranking(fields | {"ranks": [2, 1.0, 7, 1]})
    assert both.ranks == (1, 1, 2, 7)
    turned = {"prompt": "why", "responses": ["bad", "good"]}
    for extra, margin in (({"ranks": [2, 1], "margin": 3}, 3.0), ({"scores": [0.5, 2]}, 1.5)):
        ranking = records.parse_ranking(turned | extra)
        assert (ranking.responses, ranking.ranks, ranking.margin) == (("good", "bad"), (1, 2), margin)
    # A margin may differ from the scores by rounding.
    assert records.parse_ranking(turned | {"scores": [1.0, 2.5], "margin": 1.51}).margin == 1.51


def test_equal_answers_may_share_a_rank():
    assert records.parse_ranking(k_way(responses=["a", "b", "b "])).responses == ("a", "b", "b ")


def test_other_fields_become_metadata():
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
    assert records.parse_prompt(fields).metadata == metadata | {"label": True, "response": "so"}
    assert records.parse_judged(fields | {"label": 0}).good is False
    # Fields that belong to another kind of record or another format are metadata.
    fields = {"prompt": "why", "metadata": "v1", "margin": 0.5, "score_chosen": math.nan}
    assert records.parse_demonstration(fields | {"response": "so"}).metadata == {"metadata": "v1", "margin": 0.5}
    ranking = records.parse_ranking(k_way(response="so", score_chosen=3, metadata="v1"))
    assert ranking.metadata == {"metadata": "v1", "response": "so", "score_chosen": 3}


def test_two_formats_in_one_record_must_agree():
    messages = {"messages": [ASK, SAY, ASK, SAY]}
    whole = records.parse_demonstration(messages)
    assert records.parse_demonstration(messages | {"prompt": "why \n", "response": "so"}) == whole
    for other, reason in (({"prompt": "what"}, "prompts differ"), ({"response": "no"}, "answers differ")):
        with pytest.raises(errors.UnusableRecord, match=reason):
            records.parse_demonstration(messages | other)


def test_white_space_in_the_hh_format_is_normalised():
    prompt = "\r\n\r\nHuman: why\r\n\r\nAssistant:"
    expected = records.Ranking(prompt=WHY, responses=("so", "no"), ranks=(1, 2))
    for repeated in (prompt, "why\n", " why", None):
        assert (
            records.parse_ranking({"prompt": repeated, "chosen": prompt + " so", "rejected": prompt + " no"})
            == expected
        )
    assert records.parse_prompt({"prompt": prompt}).prompt == WHY


# ------------------------------------------------------------------------------------ unusable and malformed records


def k_way(**changes):
    return {"prompt": "why", "responses": ["a", "b", "c"], "ranks": [1, 2, 2]} | changes


HH = "\n\nHuman: why\n\nAssistant: so"
RANKING_FLAWS = {
    "all answers tied": [k_way(ranks=[2, 2, 2]), k_way(ranks=None, scores=[1.5, 1.5, 1.5])],
    "fewer than two answers": [k_way(responses=["a"], ranks=[1]), k_way(responses=[], ranks=[])],
    "same answer twice": [
        k_way(responses=["a", "b", "a "]),
        {"prompt": "why", "responses": ["a", "a "], "scores": [1, 2]},
        {"prompt": "why", "chosen": "a", "rejected": "a"},
        {"chosen": "\n\nHuman: x\n\nAssistant: a", "rejected": "\n\nHuman: x\n\nAssistant: a"},
    ],
    "score is not a finite number": [
        *(k_way(ranks=None, scores=[1, 2, bad]) for bad in (math.nan, math.inf, "3", None, True, 10**400)),
        {"prompt": "why", "chosen": "a", "rejected": "b", "margin": math.nan},
        {"prompt": "why", "responses": ["a", "b"], "scores": [-1.7e308, 1.7e308]},
    ],
    "scores and answers differ in number": [k_way(scores=[1, 2])],
    "ranks and answers differ in number": [k_way(ranks=[1, 2]), k_way(ranks=[1, 2, 3, 4])],
    "rank is not a whole number": [k_way(ranks=[1, 2, bad]) for bad in ("3", 1.5, None, True, math.nan, [3], 10**400)],
    "rank below 1": [k_way(ranks=[0, 1, 2]), k_way(ranks=[1, 2, -1])],
    "ranks and scores disagree": [
        k_way(scores=[1, 2, 3]),
        {"prompt": "why", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2},
    ],
    "margin of more than two answers": [k_way(margin=1.0)],
    "margin and scores disagree": [
        {"prompt": "why", "responses": ["a", "b"], "scores": [1, 2], "margin": 0.5},
        {"prompt": "why", "chosen": "a", "rejected": "b", "score_chosen": 3, "score_rejected": 1, "margin": 3},
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
    "empty prompt": [
        k_way(prompt=" "),
        k_way(prompt=[]),
        k_way(prompt=messages(("system", "Be short."))),
        k_way(prompt=[ASK, SAY, *messages((USER, " "))]),
        k_way(prompt="\n\nHuman:\n\nAssistant:"),
        {"chosen": "\n\nHuman:\n\nAssistant: a", "rejected": "\n\nHuman:\n\nAssistant: b"},
    ],
    "prompt ends in an assistant turn": [
        k_way(prompt=[ASK, SAY]),
        k_way(prompt="\n\nHuman: why\n\nAssistant: so"),
        {"chosen": [ASK, SAY, SAY], "rejected": [ASK, SAY, *messages((BOT, "no"))]},
        {"chosen": HH + "\n\nAssistant: a", "rejected": HH + "\n\nAssistant: b"},
    ],
    "prompt is null": [{"prompt": None, "chosen": "a", "rejected": "b"}],
    "does not end in an assistant turn": [{"chosen": [ASK, SAY, ASK], "rejected": [ASK, SAY]}],
    "an answer is null": [k_way(responses=["a", None, "c"])],
    "rejected is null": [{"prompt": "why", "chosen": "a", "rejected": None}],
}


@pytest.mark.parametrize("reason", RANKING_FLAWS)
def test_an_unusable_ranking_is_dropped_and_counted(tmp_path, reason):
    flawed = RANKING_FLAWS[reason]
    path = write(tmp_path / "rankings.jsonl", [k_way(), *flawed, k_way(prompt="when")])
    parsed, counts = readers.read_rankings(path, counts=any_share())
    assert counts.dropped == {reason: len(flawed)}
    assert [record.prompt[0].text for record in parsed] == ["why", "when"]
    assert parsed[-1].location == f"{path}, line {len(flawed) + 2}"
    with pytest.raises(errors.DataError, match=f"{reason} {len(flawed)}.*more than max_dropped = 1.0%"):
        readers.read_rankings(path)


def test_other_unusable_records_are_dropped_and_counted(tmp_path):
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
    parsed, counts = readers.read_demonstrations(write(tmp_path / "d.jsonl", rows), counts=any_share())
    assert len(parsed) == 1
    assert counts.dropped == {
        "empty answer": 2,
        "empty prompt": 2,
        "does not end in an assistant turn": 1,
        "response is null": 1,
        "content is null": 1,
    }
    parsed, counts = readers.read_prompts(
        write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": []}]), counts=any_share()
    )
    assert (len(parsed), counts.dropped) == (1, {"empty prompt": 1})
    rows = [{"prompt": "a", "response": "b", "label": None}, {"prompt": "a", "response": "b", "label": True}]
    parsed, counts = readers.read_judged(write(tmp_path / "j.jsonl", rows), counts=any_share())
    assert (len(parsed), counts.dropped) == (1, {"label is null": 1})


RANKINGS, DEMONSTRATIONS, JUDGED, PROMPTS = (
    readers.read_rankings,
    readers.read_demonstrations,
    readers.read_judged,
    readers.read_prompts,
)
BROKEN = [
    (RANKINGS, "{oops", "the line is not JSON"),
    (RANKINGS, "[1]", "the line has type list; it must be an object with chosen and rejected, or prompt, responses"),
    (RANKINGS, {"prompt": "a"}, "the record has neither 'chosen' nor 'responses'"),
    (RANKINGS, {"prompt": "a", "chosen": "b"}, "the record has neither 'rejected' nor 'responses'"),
    (RANKINGS, {"prompt": "a", "responses": ["a", "b"]}, "the record has neither 'ranks' nor 'scores'"),
    (RANKINGS, {"responses": ["a", "b"], "ranks": [1, 2]}, "the record has no 'prompt'"),
    (RANKINGS, {"chosen": "a", "rejected": "b"}, "the record has no 'prompt'"),
    (RANKINGS, k_way(chosen="a"), "the record mixes two forms: it has both 'responses' and 'chosen'"),
    (
        DEMONSTRATIONS,
        {"prompt": "a", "response": "b", "completion": "c"},
        "mixes two forms: it has both 'response' and 'completion'",
    ),
    (DEMONSTRATIONS, {"messages": {"role": [USER, BOT], "content": ["a"]}}, "'messages' has 2 roles and 1 contents"),
    (RANKINGS, k_way(responses="abc"), "'responses' has type str; it must be a list"),
    (RANKINGS, k_way(ranks={"a": 1}), "'ranks' has type dict; it must be a list"),
    (RANKINGS, k_way(responses=["a", 2, "c"]), "'responses' has type int; it must be a string"),
    (
        RANKINGS,
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "big"},
        "'margin' has type str; it must be a number",
    ),
    (
        RANKINGS,
        {"prompt": "a", "chosen": [SAY], "rejected": [3]},
        "message 1 of 'rejected' has type int; it must be an object",
    ),
    (DEMONSTRATIONS, {"prompt": 3, "response": "a"}, "'prompt' has type int; it must be a string"),
    (DEMONSTRATIONS, {"prompt": "a"}, "the record has neither 'response' nor 'messages'"),
    (DEMONSTRATIONS, {"response": "a"}, "the record has no 'prompt'"),
    (
        DEMONSTRATIONS,
        {"prompt": "a", "response": [ASK, SAY]},
        "'response' contains 2 messages; it must contain only the answer",
    ),
    (DEMONSTRATIONS, {"messages": "why"}, "'messages' has type str; it must be a list of messages"),
    (DEMONSTRATIONS, {"messages": [{"role": USER}]}, "message 1 of 'messages' has no 'content'"),
    (
        DEMONSTRATIONS,
        {"messages": [ASK, {"role": BOT, "content": ["x"]}]},
        "content of message 2 of messages' has type list",
    ),
    (JUDGED, {"prompt": "a", "response": "b"}, "the record has no 'label'"),
    (JUDGED, {"prompt": "a", "response": "b", "label": "good"}, "'label' is 'good'; it must be true or false"),
    (PROMPTS, {"text": "a"}, "the record has no 'prompt'"),
]


@pytest.mark.parametrize("read, row, message", BROKEN, ids=[f"{i}" for i in range(len(BROKEN))])
def test_a_malformed_record_raises_a_one_sentence_error_with_file_and_line(tmp_path, read, row, message):
    good = k_way() | {"response": "a", "label": False}
    path = write(tmp_path / "data.jsonl", [good, row, good])
    with pytest.raises(errors.DataError) as error:
        read(path, counts=any_share())
    assert str(error.value).startswith(f"{path}, line 2: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------------- token rows


@pytest.fixture(scope="module")
def fmt():
    return chat.chat_format(tokenizers.word_level([f"w{i}" for i in range(10)]))


def test_prompts_are_read_from_conversations_and_pairs():
    ask, say = {"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}
    for fields in (
        {"messages": [ask, say]},
        {"messages": [ask]},
        {"chosen": [ask, say], "rejected": [ask, {**say, "content": "no"}]},
        {"prompt": "why", "chosen": "so", "rejected": "no"},
    ):
        assert records.parse_prompt(fields).prompt == WHY, fields
    with pytest.raises(errors.UnusableRecord, match="prompt ends in an assistant turn"):
        records.parse_prompt({"prompt": [ask, say]})


def test_records_are_encoded_with_the_indices_they_came_from(fmt):
    # Ids: pad 0, end 1, user 2, assistant 3, then w0 = 4 and so on.
    widths = {"prompt_width": 4, "response_width": 2}
    ask, long = (dialogues.Turn(USER, "w0"),), (dialogues.Turn(USER, "w0 w1 w2"),)
    counts = any_share()
    judged = [records.Judged(prompt=p, response="w5", good=g) for p, g in ((ask, False), (long, True), (ask, True))]
    rows, kept = encoding.encode_demonstrations(fmt, judged, counts=counts, **widths)
    np.testing.assert_array_equal(kept, [0, 2])
    np.testing.assert_array_equal(rows.tokens_BL, [[2, 4, 1, 3, 9, 1]] * 2)
    np.testing.assert_array_equal(rows.loss_mask_BL, [[False] * 4 + [True] * 2] * 2)
    assert counts.dropped == {"prompt too long": 1}
    judged_rows, kept = encoding.encode_judged(fmt, judged, counts=counts, **widths)
    np.testing.assert_array_equal(judged_rows.good_BK, [[False], [True]])
    np.testing.assert_array_equal(judged_rows.tokens_BKL[:, 0], rows.tokens_BL)
    np.testing.assert_array_equal(judged_rows.answer_BKC, np.ones((2, 1, 2), bool))
    prompt_rows, kept = encoding.encode_prompts(fmt, judged, prompt_width=6, counts=counts)
    np.testing.assert_array_equal(kept, [0, 1, 2])
    np.testing.assert_array_equal(prompt_rows.tokens_BP[:2], [[0, 0, 2, 4, 1, 3], [2, 4, 5, 6, 1, 3]])
    np.testing.assert_array_equal(prompt_rows.mask_BP[:2], [[False] * 2 + [True] * 4, [True] * 6])


def test_rankings_are_encoded(fmt):
    ask = (dialogues.Turn(USER, "w0"),)
    parsed = [
        records.Ranking(prompt=ask, responses=("w1", "w2", "w3"), ranks=(2, 1, 2)),
        records.Ranking(prompt=ask, responses=("w1 w2 w3", "w1 w2 w4"), ranks=(1, 2)),  # equal after truncation
        # equal after truncation, but tied
        records.Ranking(prompt=ask, responses=("w1 w2 w3", "w1 w2 w4", "w5"), ranks=(1, 1, 2)),
        records.Ranking(prompt=ask, responses=("w6", "w7"), ranks=(1, 2)),
    ]
    counts = any_share()
    rows, kept = encoding.encode_rankings(fmt, parsed, prompt_width=4, response_width=2, counts=counts)
    np.testing.assert_array_equal(kept, [0, 2, 3])
    assert counts.dropped == {"same answer within the width": 1}
    assert counts.truncated == {"answer truncated": 2}
    np.testing.assert_array_equal(rows.ranks_BK, [[2, 1, 2], [1, 1, 2], [1, 2, 0]])
    np.testing.assert_array_equal(rows.where_BK, np.asarray(rows.ranks_BK) > 0)
    np.testing.assert_array_equal(rows.tokens_BKL[2, :2], [[2, 4, 1, 3, 10, 1], [2, 4, 1, 3, 11, 1]])
    wider, _ = encoding.encode_rankings(
        fmt, parsed, prompt_width=4, response_width=2, counts=any_share(), max_answers=5
    )
    np.testing.assert_array_equal(wider.ranks_BK[:, 3:], np.zeros((3, 2)))
    np.testing.assert_array_equal(wider.tokens_BKL[:, :3], rows.tokens_BKL)
    for room, name in ((2, "record 1"), (0, "record 1")):
        with pytest.raises(errors.DataError, match=f"^{name}: the record has 3 answers, more than .* = {room}"):
            encoding.encode_rankings(
                fmt, parsed, prompt_width=4, response_width=2, counts=any_share(), max_answers=room
            )
    named = dataclasses.replace(parsed[0], location="x.jsonl, line 7")
    with pytest.raises(errors.DataError, match=r"^x\.jsonl, line 7: the record has 3 answers"):
        encoding.encode_rankings(
            fmt, [parsed[3], named], prompt_width=4, response_width=2, counts=any_share(), max_answers=2
        )
    bare: Any = dict(prompt_width=2, response_width=2, pad_id=0, counts=any_share())
    with pytest.raises(errors.DataError, match="more than max_answers = 0"):
        padding.ranking_rows([[3]], [[[5], [6]]], [[1, 2]], max_answers=0, **bare)
