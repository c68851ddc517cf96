"""Parsing of messages with tool calls and other keys, of contents in parts, and of tools."""

import json

import pytest

from rlhf_jax.data import chat, dialogues, errors, readers, records

CALL = [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]
OTHER_CALL = [{**CALL[0], "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
ASK = {"role": "user", "content": "Is it warm?"}
LOOK = {"role": "assistant", "content": "Let me look.", "tool_calls": CALL}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "31 C"}
YES, NO = ({"role": "assistant", "content": text} for text in ("Yes.", "No."))


def read(tmp_path, reader, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return reader(path, counts=errors.DropCount(max_dropped=1.0))


@pytest.mark.parametrize("content", ["", None, "missing"])
def test_a_call_without_text_is_kept_in_a_context_and_as_an_answer(tmp_path, content):
    call = {"role": "assistant", "content": content, "tool_calls": CALL}
    if content == "missing":
        del call["content"]
    turn = dialogues.Turn("assistant", "", {"tool_calls": CALL})
    (ranking,), _ = read(
        tmp_path, readers.read_rankings, {"chosen": [ASK, call, RESULT, YES], "rejected": [ASK, call, RESULT, NO]}
    )
    assert ranking.prompt[1:] == (turn, dialogues.Turn("tool", "31 C", {"tool_call_id": "c1"}))
    assert ranking.responses == ("Yes.", "No.")
    (demonstration,), _ = read(tmp_path, readers.read_demonstrations, {"messages": [ASK, call], "tools": TOOLS})
    assert (demonstration.response, demonstration.tools) == (turn, tuple(TOOLS))
    (ranking,), _ = read(tmp_path, readers.read_rankings, {"prompt": [ASK], "chosen": call, "rejected": "No."})
    assert ranking.responses == (turn, "No.")


def test_a_tool_may_return_nothing():
    call = {"role": "assistant", "content": "", "tool_calls": CALL}
    prompt = records.parse_prompt({"prompt": [ASK, call, {"role": "tool", "content": ""}]}).prompt
    assert [turn.role for turn in prompt] == ["user", "assistant", "tool"]


def test_answers_that_differ_in_a_call_or_a_thought_alone_are_two_answers():
    for chosen, rejected in (
        (LOOK, {**LOOK, "tool_calls": OTHER_CALL}),
        (LOOK, {"role": "assistant", "content": "Let me look."}),
        ({**YES, "reasoning_content": "31 C is warm."}, {**YES, "reasoning_content": "31 C is cold."}),
    ):
        ranking = records.parse_ranking({"chosen": [ASK, chosen], "rejected": [ASK, rejected]})
        assert [chat.messages([dialogues.answer_turn(each)]) for each in ranking.responses] == [[chosen], [rejected]]
        for texts in ([chosen, rejected], [[chosen], [rejected]]):
            assert records.parse_ranking({"prompt": [ASK], "responses": texts, "ranks": [1, 2]}) == ranking
    with pytest.raises(errors.UnusableRecord, match="same answer twice"):
        records.parse_ranking({"chosen": [ASK, LOOK], "rejected": [ASK, LOOK]})


def test_contexts_that_differ_in_a_call_are_different_prompts_and_other_keys_are_not_compared():
    def pair(**changes):
        return {"chosen": [ASK, LOOK, RESULT, YES], "rejected": [ASK, {**LOOK, **changes}, RESULT, NO]}

    assert records.parse_ranking(pair(time=3)).responses == ("Yes.", "No.")
    with pytest.raises(errors.UnusableRecord, match="prompts differ"):
        records.parse_ranking(pair(tool_calls=OTHER_CALL))


def test_messages_keep_all_keys_but_the_null_ones():
    (turn,) = records.parse_prompt({"prompt": [{**ASK, "name": "Ann", "tool_calls": None}]}).prompt
    assert turn == dialogues.Turn("user", "Is it warm?", {"name": "Ann"})
    assert chat.messages([turn]) == [{**ASK, "name": "Ann"}]
    assert hash(turn) == hash(dialogues.Turn("user", "Is it warm?"))


def test_a_content_in_parts_of_text_is_joined_and_other_parts_drop_the_record(tmp_path):
    def parts(*texts):
        return [{"type": "text", "text": text} for text in texts]

    rows = [
        {"messages": [{**ASK, "content": parts("Is it ", "warm?")}, {**YES, "content": parts("Yes.")}]},
        {"prompt": "Is it warm?", "response": [{**YES, "content": parts("Yes.")}]},
        {"messages": [{**ASK, "content": [*parts("Is it warm?"), {"type": "image_url", "image_url": {}}]}, YES]},
    ]
    parsed, counts = read(tmp_path, readers.read_demonstrations, *rows)
    expected = records.Demonstration(prompt=(dialogues.Turn("user", "Is it warm?"),), response="Yes.")
    assert parsed == [expected, expected]
    assert counts.dropped == {"content has a part of type 'image_url'": 1}


def test_tools_are_a_list_or_its_json_and_anything_else_is_refused():
    fields = {"prompt": "Is it warm?"}
    for tools in (TOOLS, json.dumps(TOOLS), [json.dumps(tool) for tool in TOOLS]):
        record = records.parse_prompt(fields | {"tools": tools})
        assert (record.tools, record.metadata) == (tuple(TOOLS), {})
    for tools in (None, [], "", "[]", "null"):
        assert records.parse_prompt(fields | {"tools": tools}).tools == ()
    for tools in ("weather", ["weather"], [3], 3, {"name": "weather"}):
        with pytest.raises(errors.DataError, match="'tools' must be a list of objects that describe functions"):
            records.parse_prompt(fields | {"tools": tools})


def test_the_text_of_an_answer_contains_its_calls():
    assert dialogues.answer_text("Yes.") == "Yes."
    turn = dialogues.Turn("assistant", "Let me look.", {"tool_calls": CALL, "model": "m"})
    assert dialogues.answer_text(turn) == "Let me look.\n" + json.dumps(CALL)
