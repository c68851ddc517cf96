"""Forms of records in published data sets: other field names, system texts, histories, weights and lists of answers."""

import json

import pytest

from rlhf_jax.data import dialogues, errors, readers, records

ASK, SAY = {"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}
NO = {"role": "assistant", "content": "no"}
WHY = (dialogues.Turn("user", "why"),)
BRIEF = dialogues.Turn("system", "Be brief.")


def read(tmp_path, reader, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return reader(path, counts=errors.DropCount(max_dropped=1.0))


@pytest.mark.parametrize(
    "fields",
    [
        {"instruction": "why", "input": "", "output": "so"},  # Alpaca
        {"instruction": "why", "context": "", "response": "so", "category": "qa"},  # Dolly
        {"question": "why", "answer": "so"},
        {"query": "why", "response": "so"},  # MetaMath
        {"prompt": "why", "response": "so", "answer": "42"},
        {"conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "so"}]},
        {"conversation": [ASK, SAY]},
        {"messages": [{"from": "user", "value": "why"}, {"from": "assistant", "value": "so"}]},
        {"conversations": {"from": ["human", "gpt"], "value": ["why", "so"]}},
    ],
)
def test_every_published_form_of_a_demonstration_is_the_same_record(fields):
    record = records.parse_demonstration(fields)
    assert (record.prompt, record.response, record.unused) == (WHY, "so", ())
    assert set(record.metadata) <= {"category", "answer"}


@pytest.mark.parametrize(
    "fields",
    [
        {"question": "why", "chosen": "so", "rejected": "no"},
        {"conversations": [{"from": "human", "value": "why"}], "chosen": SAY, "rejected": NO},
        {"messages": [ASK], "chosen": [SAY], "rejected": {"from": "gpt", "value": "no"}},
        {"prompt": "why", "chosen": ["so"], "rejected": ["no"]},
        {"prompt": "why", "chosen": [[SAY]], "rejected": [[NO]]},
        {"prompt": "why", "responses": [[SAY], NO], "ranks": [1, 2]},
    ],
)
def test_every_published_form_of_a_pair_is_the_same_record(fields):
    assert records.parse_ranking(fields) == records.Ranking(prompt=WHY, responses=("so", "no"), ranks=(1, 2))


def test_share_gpt_names_roles_and_calls():
    call = {"name": "f", "arguments": {"n": 3}}
    names = ("system", "human", "function_call", "observation", "gpt", "user", "tool")
    values = ("Be brief.", "why", json.dumps(call), "3", "so", "what", "4")
    prompt = records.parse_prompt({"conversations": [{"from": n, "value": v} for n, v in zip(names, values)]}).prompt
    roles = ["system", "user", "assistant", "tool", "assistant", "user", "tool"]
    assert [turn.role for turn in prompt] == roles
    assert prompt[2] == dialogues.Turn("assistant", "", {"tool_calls": [{"type": "function", "function": call}]})
    for message, reason in (
        (
            {"from": "Ann", "value": "why"},
            "message 1 of 'conversations' is from 'Ann'; it must be from one of human, user",
        ),
        ({"from": "function_call", "value": "f(3)"}, "is a function_call, but not an object with a name, as JSON"),
        ({"from": "human"}, "message 1 of 'conversations' has no 'value'"),
    ):
        with pytest.raises(errors.DataError, match=reason):
            records.parse_prompt({"conversations": [message]})


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_text_becomes_the_first_turn(key):
    whole = "\n\nHuman: why\n\nAssistant: "
    for fields in (
        {"prompt": "why", "chosen": "so", "rejected": "no"},
        {"prompt": [{"role": "system", "content": "Be brief."}, ASK], "chosen": "so", "rejected": "no"},
        {"chosen": [ASK, SAY], "rejected": [ASK, NO]},
        {"prompt": "why", "chosen": [ASK, SAY], "rejected": [ASK, NO]},
        {"chosen": whole + "so", "rejected": whole + "no"},
        {"prompt": "why", "responses": ["so", "no"], "ranks": [1, 2]},
    ):
        ranking = records.parse_ranking(fields | {key: "Be brief."})
        assert (ranking.prompt, ranking.metadata, ranking.unused) == ((BRIEF, *WHY), {}, ())
        if "system" not in str(fields):
            assert records.parse_ranking(fields | {key: ""}).prompt == WHY
    assert records.parse_demonstration({"messages": [ASK, SAY], key: "Be brief."}).prompt == (BRIEF, *WHY)
    with pytest.raises(errors.UnusableRecord, match="system texts differ"):
        records.parse_demonstration({"messages": [{"role": "system", "content": "Rhyme."}, ASK, SAY], key: "Be brief."})
    with pytest.raises(errors.DataError, match=f"'{key}' has type list; it must be a string"):
        records.parse_prompt({"prompt": "why", key: ["Be brief."]})


def test_a_history_comes_between_the_system_text_and_the_question():
    earlier = (dialogues.Turn("user", "what"), dialogues.Turn("assistant", "that"))
    messages = [{"role": turn.role, "content": turn.text} for turn in earlier]
    for history in ([["what", "that"]], messages):
        for prompt in ("why", [ASK]):
            fields = {"prompt": prompt, "history": history, "system": "Be brief."}
            assert records.parse_prompt(fields).prompt == (BRIEF, *earlier, *WHY)
    assert records.parse_prompt({"prompt": "why", "history": []}).prompt == WHY
    with pytest.raises(errors.DataError, match=r"'history' must be a list of .* pairs or of messages; convert it"):
        records.parse_prompt({"prompt": "why", "history": "what? that."})
    with pytest.raises(errors.DataError, match="'history', but 'prompt' is a conversation too; keep one of them"):
        records.parse_prompt({"prompt": [ASK, SAY, ASK], "history": [["what", "that"]]})


@pytest.mark.parametrize("name", ["input", "context"])
@pytest.mark.parametrize("key", ["prompt", "instruction"])
def test_a_second_text_of_a_prompt_is_refused_with_what_to_do(name, key):
    message = (
        f"the record has '{name}' beside '{key}': join both texts in '{key}', as the model is to read them, or rename"
    )
    with pytest.raises(errors.DataError, match=message):
        records.parse_demonstration({key: "Translate:", name: "cheese", "response": "fromage"})
    with pytest.raises(errors.DataError, match=message):
        records.parse_ranking({key: "Translate:", name: ["cheese"], "chosen": "fromage", "rejected": "cheese"})


def test_images_beside_a_prompt_drop_the_record(tmp_path):
    rows = [
        {"prompt": "why", "image": {"path": "a.png"}},
        {"prompt": "why", "images": []},
        {"prompt": "why", "image": "a"},
    ]
    parsed, counts = read(tmp_path, readers.read_prompts, *rows)
    assert (len(parsed), counts.dropped) == (2, {"image beside the prompt": 1})
    _, counts = read(tmp_path, readers.read_demonstrations, {"messages": [ASK, SAY], "images": [{"path": "a.png"}]})
    assert counts.dropped == {"images beside the prompt": 1}


def test_fields_with_text_that_are_not_used_are_named_once(tmp_path):
    rows = [
        {"prompt": "why", "response": "so", "domain": "x", "note": "a long note", "thema": "沒有空格"},
        {"prompt": "why", "response": "so", "note": "word", "tags": ["a b"], "metadata": {"note": "a long note"}},
        {"messages": [ASK, SAY], "output": "another answer", "scores": [1, 2], "note": None},
        {"prompt": "why", "response": ""},
    ]
    parsed, counts = read(tmp_path, readers.read_demonstrations, *rows)
    assert [record.unused for record in parsed] == [("note", "thema"), ("tags",), ("output",)]
    assert counts.report() == (
        "dropped 1 (empty answer 1), truncated 0, "
        "fields with text that are not used: 'note' 1, 'output' 1, 'tags' 1, 'thema' 1"
    )
    # A message list that only repeats a pair, as in UltraFeedback, is not used.
    pair = {"prompt": "why", "chosen": [ASK, SAY], "rejected": [ASK, NO], "messages": [ASK, {**SAY, "content": "a b"}]}
    assert records.parse_ranking(pair).unused == ("messages",)


def test_weights_of_turns_are_obeyed(tmp_path):
    def row(first, last):
        return {"messages": [ASK, {**SAY, "weight": first}, ASK, {**SAY, "weight": last}]}

    parsed, counts = read(tmp_path, readers.read_demonstrations, row(0, 1), row(1, 0), row(0.0, True))
    assert counts.dropped == {"the weight of the answer is 0": 1}
    assert [record.response for record in parsed] == ["so", "so"]
    assert [record.prompt[1].extra for record in parsed] == [{"weight": 0}, {"weight": 0.0}]
    with pytest.raises(errors.DataError, match=r"the weight of message 2 of messages is 0\.5; it must be 0 or 1"):
        records.parse_demonstration(row(0.5, 1))


def test_several_chosen_and_rejected_answers_are_one_ranking():
    fields = {"prompt": "why", "chosen": ["so"], "rejected": ["no", "maybe", "never"], "subset": "Math"}
    expected = records.Ranking(
        prompt=WHY, responses=("so", "no", "maybe", "never"), ranks=(1, 2, 2, 2), metadata={"subset": "Math"}
    )
    assert records.parse_ranking(fields) == expected
    assert records.parse_ranking(fields | {"chosen": "so"}) == expected
    assert records.parse_ranking(fields | {"chosen": SAY, "rejected": [[NO], "maybe", "never"]}) == expected
    several = records.parse_ranking(fields | {"chosen": ["so", "thus"], "rejected": "no"})
    assert (several.responses, several.ranks) == (("so", "thus", "no"), (1, 1, 2))
    scored = records.parse_ranking(fields | {"score_chosen": 5, "score_rejected": [1, 5, 3]})
    assert (scored.responses, scored.ranks, scored.scores) == (
        ("so", "maybe", "no", "never"),
        (1, 1, 2, 2),
        (5.0, 5.0, 1.0, 3.0),
    )
    for change, reason in (
        ({"score_chosen": 5, "score_rejected": [1, 3]}, "scores and answers differ in number"),
        ({"score_chosen": 2, "score_rejected": [1, 3, 1]}, "ranks and scores disagree"),
        ({"rejected": ["no", "so"]}, "same answer twice"),
        ({"rejected": ["no", " "]}, "empty answer"),
        ({"margin": 1.0}, "margin of more than two answers"),
    ):
        with pytest.raises(errors.UnusableRecord, match=reason):
            records.parse_ranking(fields | change)


def test_equal_scores_are_a_tie_in_every_form():
    for fields in (
        {"chosen": "so", "rejected": "no", "score_chosen": 5.0, "score_rejected": 5},
        {"chosen": ["so"], "rejected": ["no", "maybe"], "score_chosen": [5], "score_rejected": [5, 5]},
        {"chosen": "so", "rejected": "no", "chosen_rating": 5.0, "rejected_rating": 5.0},
        {"chosen": "so", "rejected": "no", "chosen-rating": 5.0, "rejected-rating": 5.0},
        {"chosen": "so", "rejected": "no", "chosen_score": 5, "rejected_score": 5},
        {"responses": ["so", "no"], "scores": [5, 5.0]},
        {"responses": ["so", "no"], "scores": [5, 5], "ranks": [1, 2]},
    ):
        with pytest.raises(errors.UnusableRecord, match="all answers tied"):
            records.parse_ranking({"prompt": "why"} | fields)
    ranking = records.parse_ranking(
        {"prompt": "why", "responses": ["a", "b", "c"], "scores": [1, 5, 5], "ranks": [3, 2, 1]}
    )
    assert (ranking.responses, ranking.ranks, ranking.scores) == (("b", "c", "a"), (1, 1, 3), (5.0, 5.0, 1.0))
    pair = {"prompt": "why", "chosen": "so", "rejected": "no"}
    assert records.parse_ranking(pair | {"chosen_score": 5, "rejected_score": 2}).margin == 3.0
    named = pair | {"chosen_score": "high", "rejected_score": "low"}
    assert records.parse_ranking(named).metadata == {"chosen_score": "high", "rejected_score": "low"}


def test_a_binarised_ultrafeedback_record_is_read():
    fields = {
        "prompt": "why",
        "prompt_id": "0af3",
        "chosen": [ASK, SAY],
        "rejected": [ASK, NO],
        "messages": [ASK, SAY],
        "score_chosen": 8.5,
        "score_rejected": 6.0,
    }
    assert records.parse_ranking(fields) == records.Ranking(
        prompt=WHY, responses=("so", "no"), ranks=(1, 2), scores=(8.5, 6.0), margin=2.5, metadata={"prompt_id": "0af3"}
    )


def test_an_unknown_form_is_an_error_that_names_its_fields(tmp_path):
    rows = {
        readers.read_rankings: {"history": "why", "human_ref_A": "so", "human_ref_B": "no", "labels": 1},
        readers.read_demonstrations: {"text": "why so"},
    }
    for reader, row in rows.items():
        names = ", ".join(map(repr, row))
        with pytest.raises(
            errors.DataError, match=f"its fields are {names}: rename or convert them to one of the forms"
        ):
            read(tmp_path, reader, row)
