"""Files of labelling tools and of completions: what is read, what is counted, and which files are refused."""

import json

import pytest

from rlhf_jax.data import errors
from rlhf_jax.data.stores import annotated, comparison_import, completion_sets, labeling_tools
from rlhf_jax.feedback import store
from rlhf_jax.feedback.judgements import Judgement


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def read(tmp_path, content, **options):
    return comparison_import.read(write(tmp_path / "file.json", content), **options)


def said(record):
    return [(each.labeler, each.judgement) for each in record.said]


FIRST, SECOND, TIE = Judgement(preference=1.0), Judgement(preference=0.0), Judgement(tie=True)


# -------------------------------------------------------------------------------------------------------- Label Studio


def task(*results, data=None, **annotation):
    """Returns a task as Label Studio exports it, with one annotation of these results."""
    data = {"prompt": "Why?", "answer1": "So.", "answer2": "No."} if data is None else data
    about = {"id": 1, "completed_by": 3, "was_cancelled": False, "ground_truth": False, "lead_time": 4.288}
    about |= {"created_at": "2021-03-09T22:16:08.728353Z", "result": list(results)}
    return {"id": 5, "data": data, "annotations": [about | annotation], "predictions": [], "project": 83}


def pairwise(selected):
    return {"id": "x", "from_name": "comparison", "to_name": "comparison", "type": "pairwise"} | {
        "value": {"selected": selected}
    }


def test_annotations_of_label_studio_become_judgements(tmp_path):
    ranked = {"query": "Why?", "items": [{"id": n, "title": f"t{n}", "body": f"b{n}"} for n in ("x", "y", "z")]}
    tasks = [
        task(pairwise("left")),
        task(pairwise("right"), completed_by={"id": 7, "email": "ada@example.org"}, lead_time=None),
        task({"type": "choices", "value": {"choices": ["Tie"]}}, {"type": "textarea", "value": {"text": ["Hm."]}}),
        task({"type": "ranker", "value": {"ranker": ["z", "x", "y"]}}, data=ranked),
        task({"type": "rating", "value": {"rating": 6}}, data={"question": "Why?", "response": "So."}),
        task(pairwise("left"), data={"text1": "a", "text2": "b", "title": "Why?"}),
    ]
    found, counts = read(tmp_path, tasks)
    assert [said(each) for each in found] == [
        [("3", Judgement(preference=1.0, seconds=4.288))],
        [("ada@example.org", SECOND)],
        [("3", Judgement(tie=True, seconds=4.288))],
        [("3", Judgement(ranks=(2, 3, 1), seconds=4.288))],
        [("3", Judgement(rating=6, seconds=4.288))],
        [("3", Judgement(preference=1.0, seconds=4.288))],
    ]
    assert [each.text for each in found[3].completions] == ["b" + n for n in "xyz"]
    assert [each.text for each in found[5].completions] == ["a", "b"] and found[5].prompt[0].text == "Why?"
    assert found[0].said[0].time == 1615328168.728353 and not counts.noted
    single, _ = read(tmp_path, task(pairwise("left")))
    assert said(single[0]) == said(found[0])


def test_annotations_without_a_judgement_are_counted(tmp_path):
    both = task(pairwise("left"), completed_by=1)
    both["annotations"] += task(pairwise("right"), completed_by=2)["annotations"]
    both["annotations"] += task(was_cancelled=True)["annotations"] + task()["annotations"]
    found, counts = read(tmp_path, [both, {"data": both["data"] | {"prompt": "New?"}}])
    with store.Store(tmp_path / "a.sqlite") as opened:
        added = annotated.add(opened, found, set_name="a", counts=counts)
        assert added[1:] == (2, 2) and opened.preferences("a").votes_NM[0].tolist() == [1.0, 0.0]
        assert opened.preferences("a").labelers == ["1", "2"]
        assert annotated.add(opened, found, set_name="a", counts=errors.DropCount())[1:] == (0, 0)
    assert counts.noted == {"cancelled annotation not kept": 1, "annotation without a comparison not kept": 1}


LISTED = [{"id": 1, "body": "b"}, {"id": 2, "body": "c"}]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([task(pairwise("left")), task(pairwise("both"))], r"record 2: annotation 1: the selected answer is 'both'"),
        ([task(pairwise("left"), pairwise("right"))], "record 1: annotation 1: its results contradict"),
        ([task("x")], "record 1: annotation 1: its results must be objects"),
        ([task() | {"annotations": [17]}], "record 1: annotation 1: it must be an object with a list 'result'"),
        ([task() | {"annotations": 17}], "record 1: 'annotations' has type int; it must be a list"),
        ([task(), {"id": 3}], "record 2: the record has no object 'data'"),
        ([task(data={"prompt": "a", "first": "b"})], r"record 1: .* no answers, .* are 'prompt', 'first'"),
        ([task(data={"a": "a", "b": "b", "answer1": "x", "answer2": "y"})], "record 1: the record has no 'prompt'"),
        ([task(data={"prompt": 3, "answer1": "x", "answer2": "y"})], "record 1: 'prompt' has type int"),
        (
            [task(data={"prompt": "a", "answer1": ["x"], "answer2": "y"})],
            "record 1: message 1 of 'answer1' has type str",
        ),
        (
            [task({"type": "rating", "value": {"rating": 9}}, data={"prompt": "a", "answer": "b"})],
            "rating is 9; it must be a whole number from 1 to 7",
        ),
        (
            [
                task(
                    {"type": "ranker", "value": {"ranker": ["1"]}},
                    data={"q": "a", "l": LISTED},
                )
            ],
            r"the ranking \['1'\] does not have each of the answers \['1', '2'\] once",
        ),
    ],
)
def test_broken_tasks_are_refused(tmp_path, tasks, message):
    with pytest.raises(errors.DataError, match=rf"file\.json, {message}" if message.startswith("record") else message):
        read(tmp_path, tasks)


# ------------------------------------------------------------------------------------------------------------- Argilla


def nested(value=None, *, question="preference", fields=None, **response):
    """Returns a record as `Dataset.records.to_json` of Argilla writes it."""
    fields = {"prompt": "Why?", "response_1": "So.", "response_2": "No."} if fields is None else fields
    responses = {} if value is None else {question: [{"value": value, "user_id": "u1", **response}]}
    record = {"id": "r1", "fields": fields, "metadata": {"source": "x"}, "suggestions": {}, "responses": responses}
    return record | {"vectors": {}, "_server_id": "s1"}


THREE = {"prompt": "Why?", "reply_1": "a", "reply_2": "b", "reply_3": "c"}


def test_records_of_argilla_become_judgements(tmp_path):
    cases = [
        (nested("response_2"), SECOND),
        (nested("Response 1"), FIRST),
        (nested("B"), SECOND),
        (nested("1"), FIRST),
        (nested("tie"), TIE),
        (nested(["response_2", "response_1"]), SECOND),
        (nested([{"value": "response_1", "rank": 1}, {"value": "response_2", "rank": 1}]), TIE),
        (nested(["Reply 3", "Reply 1", "Reply 2"], fields=THREE), Judgement(ranks=(2, 3, 1))),
        (nested(4, fields={"instruction": "Why?", "output": "So."}), Judgement(rating=4)),
        (nested("left", fields={"text": "Why?", "answer left": "a", "answer right": "b"}), FIRST),
        (
            nested("A", fields={"chat": [{"role": "user", "content": "Why?"}], "answer_a": "a", "answer_b": "b"}),
            FIRST,
        ),
    ]
    found, counts = read(tmp_path, [record for record, _ in cases])
    assert [said(each) for each in found] == [[("u1", judgement)] for _, judgement in cases]
    assert all(each.prompt[0].text == "Why?" and each.metadata == {"source": "x"} for each in found)
    assert not counts.noted and not counts.unused


def test_flat_records_of_argilla_are_read_too(tmp_path):
    flat = {
        "id": "r1",
        "_server_id": "s1",
        "prompt": "Why?",
        "response_1": "So.",
        "response_2": "No.",
        "source": "x",
        "ranking.responses": [["response_2", "response_1"], ["response_1", "response_2"], ["response_1"]],
        "ranking.responses.users": ["u1", "u2", "u3"],
        "ranking.responses.status": ["submitted", None, "discarded"],
        "ranking.suggestion": ["response_1", "response_2"],
        "ranking.suggestion.score": None,
    }
    unlabelled = dict.fromkeys(flat) | {"id": "r2", "prompt": "How?", "response_1": "a", "response_2": "b"}
    found, counts = read(tmp_path, [flat, unlabelled])
    assert said(found[0]) == [("u1", SECOND), ("u2", FIRST)] and not found[1].said
    assert found[0].metadata == {"source": "x"} and found[0].notes == ("discarded response not kept",)
    exported, _ = read(tmp_path, [flat | {"rlhf_jax_order": "1 0"}])
    assert said(exported[0]) == [("u1", FIRST), ("u2", SECOND)] and texts(exported) == [["No.", "So."]]
    with pytest.raises(errors.DataError, match=r"record 1: the lists of 'ranking\.responses'.* differ in length"):
        read(tmp_path, [flat | {"ranking.responses.users": ["u1"]}])
    assert not counts.unused


def test_one_question_of_argilla_is_read(tmp_path):
    record = nested("response_1")
    record["responses"] |= {
        "safer": [{"value": "response_2", "user_id": "u1"}],
        "why": [{"value": "It is.", "user_id": "u1"}],
    }
    with pytest.raises(errors.DataError, match=r"record 1: several questions .* \('preference', 'safer'\); choose one"):
        read(tmp_path, [record])
    found, _ = read(tmp_path, [record], question="safer")
    assert said(found[0]) == [("u1", SECOND)]
    assert found[0].notes == ("response to 'preference' not kept", "response to 'why' not kept")
    with pytest.raises(errors.DataError, match="the question 'safer' has no effect"):
        read(tmp_path, [task()], question="safer")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (nested() | {"responses": ["x"]}, "record 1: 'responses' must be an object"),
        (nested() | {"responses": {"q": ["x"]}}, "record 1: the responses to 'q' must be objects"),
        (nested() | {"metadata": 3}, "record 1: 'metadata' has type int"),
        (nested(fields={"prompt": "a"}), "record 1: the record has no answers"),
        (nested(10, fields={"prompt": "a", "response": "b"}), "record 1: the rating is 10"),
    ],
)
def test_broken_records_of_argilla_are_refused(tmp_path, record, message):
    with pytest.raises(errors.DataError, match=rf"file\.json, {message}"):
        read(tmp_path, [record])


def test_labels_name_answers():
    names = ["answer1", "answer2", "answer3"]
    assert [labeling_tools.named_place(label, names) for label in ("Answer 2", "3", "a", "d", "x")] == [
        1,
        2,
        0,
        None,
        None,
    ]
    assert labeling_tools.named_judgement("1", names) is None
    assert labeling_tools.answer_names({"answer": 1, "prompt": 2, "text": 3}) == ["answer"]
    assert labeling_tools.answer_names({"response_b": 1, "response_a": 2, "answer": 3}) == ["response_a", "response_b"]


# --------------------------------------------------------------------------------------------------------- completions


def sample(index, number, text, **others):
    """Returns a line of sample.py."""
    line = {
        "prompt": [{"role": "user", "content": f"Question {index}?"}],
        "response": text,
        "tokens": 3,
        "stopped": True,
    }
    return line | {"logprob": -1.5, "index": index, "sample": number, "metadata": {"source": "x"}} | others


def texts(found):
    return [[each.text for each in record.completions] for record in found]


def test_samples_of_several_models_are_compared(tmp_path):
    lines = [[sample(i, n, f"{name}{i}{n}") for i in range(2) for n in range(2)] for name in "ab"]
    paths = [
        write(tmp_path / f"{n}.jsonl", "".join(json.dumps(line) + "\n" for line in part))
        for n, part in enumerate(lines)
    ]
    found, counts = comparison_import.read(paths)
    assert len(found) == 12 and texts(found)[:3] == [["a00", "a01"], ["a00", "b00"], ["a00", "b01"]]
    assert all(not each.said and each.metadata == {"source": "x"} for each in found) and not counts.unused
    drawn = [texts(comparison_import.read(paths, pairs_per_prompt=2, seed=seed)[0]) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] and len({str(each) for each in drawn}) > 1 and len(drawn[0]) == 4
    alone = texts(comparison_import.read(paths[0], form="ratings")[0])
    assert alone == [["a00"], ["a01"], ["a10"], ["a11"]]
    assert texts(comparison_import.read(paths, form="ranking")[0]) == [
        ["a00", "a01", "b00", "b01"],
        ["a10", "a11", "b10", "b11"],
    ]


def test_records_with_several_completions_say_who_wrote_them(tmp_path):
    records = [
        {
            "prompt": "Why?",
            "responses": ["a", {"text": "b", "policy": "sft", "sampling": {"top_p": 0.7}}],
            "n": 1,
        },
        {"prompt": "Why?", "response": "c", "model": "rl", "n": 1, "m": 2},
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": " a "}], "n": 1},
        {"prompt": "How?", "completions": [{"response": "d", "model": "rl"}]},
    ]
    found, counts = read(tmp_path, records, form="ranking")
    [record] = [annotated.with_defaults(each, domain="helpful", policy="base") for each in found]
    assert [(each.text, each.policy, each.sampling) for each in record.completions] == [
        ("a", "base", {}),
        ("b", "sft", {"top_p": 0.7}),
        ("c", "rl", {}),
    ]
    assert record.metadata == {"n": 1, "domain": "helpful"} and record.as_item().prompt.domain == "helpful"
    assert counts.noted == {
        "completion that repeats another of its prompt skipped": 1,
        "prompt with fewer than two completions skipped": 1,
    }


def test_a_file_has_records_with_and_without_labels(tmp_path):
    unlabelled = [{"prompt": "a", "responses": ["b", "c"]}, {"prompt": "d", "responses": ["e", "f"], "ranks": None}]
    labelled = [
        {"prompt": "g", "responses": ["h", "i", "j"], "ranks": [2, 1, 3]},
        {"prompt": "k", "chosen": "l", "rejected": "m", "responses": None},
        {"prompt": "n", "responses": ["o", "p"], "scores": [0.0, 1.0]},
    ]
    for lines in (unlabelled + labelled, labelled + unlabelled):
        found, counts = read(tmp_path, lines)
        assert texts(found) == [["i", "h", "j"], ["l", "m"], ["p", "o"], ["b", "c"], ["e", "f"]]
        assert [len(each.said) for each in found] == [1, 1, 1, 0, 0]
        assert counts.noted["record without a label in a file with labels"] == 2
    assert not read(tmp_path, unlabelled)[1].noted and not read(tmp_path, labelled)[1].noted
    for lines in ([unlabelled[0], {"prompt": "a"}], [labelled[0], {"prompt": "a"}], [unlabelled[0], {"chosen": "a"}]):
        with pytest.raises(errors.DataError, match="record 2: the record has n"):
            read(tmp_path, lines)


def test_completions_that_no_item_can_hold_are_refused(tmp_path):
    found, counts = read(tmp_path, [{"prompt": "a", "responses": list("abcdefghij")}], form="ranking")
    with store.Store(tmp_path / "a.sqlite") as opened:
        with pytest.raises(errors.DataError, match=r"file\.json, record 1: the record has 10 answers; .* at most 9"):
            annotated.add(opened, found, set_name="a", counts=counts)
        assert not opened.sets()
    for record, message in (
        ({"prompt": "a", "responses": [3]}, "record 1: 'responses' has type int"),
        ({"prompt": "a", "responses": [{"text": "b", "sampling": 3}]}, "record 1: 'sampling' has type int"),
        ({"prompt": "a", "responses": ["", "b"]}, "1 of 1 record was dropped"),
    ):
        with pytest.raises(errors.DataError, match=message):
            read(tmp_path, [record])
    with pytest.raises(errors.DataError, match="pairs per prompt have no effect"):
        read(tmp_path, [{"prompt": "a", "responses": ["b"]}], form="ratings", pairs_per_prompt=2)
    with pytest.raises(errors.DataError, match="have no effect: no file has completions alone"):
        read(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}], form="pairs")
    assert not completion_sets.recognises({"prompt": "a", "responses": ["b"], "ranks": [1]})


# ---------------------------------------------------------------------------------------------------------------- gold


def test_labels_become_the_answers_of_gold_questions(tmp_path):
    lines = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "responses": ["b", "c", "d"], "ranks": [2, 1, 1]},
    ]
    differing = task(pairwise("left"))
    differing["annotations"] += task(pairwise("right"))["annotations"]
    paths = [write(tmp_path / "a.json", lines), write(tmp_path / "b.json", [differing, task(), task(pairwise("left"))])]
    found, counts = comparison_import.read(paths)
    with store.Store(tmp_path / "a.sqlite") as opened:
        added = annotated.add(opened, found, set_name="a", gold=True, counts=counts)
        assert added[1:] == (3, 0) and not opened.history() and not opened.labelers()
        assert [each.expected for each in opened.items().values()] == [FIRST, Judgement(ranks=(1, 1, 2)), FIRST]
    assert counts.noted["record whose labels disagree skipped"] == counts.noted["record without a label skipped"] == 1


def test_a_later_judgement_is_not_replaced_by_the_same_file(tmp_path):
    found, counts = read(tmp_path, [task(pairwise("left"), lead_time=None)])
    with store.Store(tmp_path / "a.sqlite") as opened:
        [id], *_ = annotated.add(opened, found, set_name="a", counts=counts)
        opened.record("3", id, Judgement(strength=8), key="page")
        assert annotated.add(opened, found, set_name="a", counts=counts).judgements == 0
        assert [each.judgement for each in opened.latest()] == [Judgement(strength=8)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps([task(pairwise("left"))])[:-9], r"file\.json: the file is not JSON"),
        (json.dumps(nested("A"))[:-9], r"file\.json, line 1: the line is not JSON"),
        ("[3]", r"file\.json, record 1: the record has type int"),
        ("", r"file\.json is empty"),
        ('{"a": 1}', r"file\.json, line 1: the record has neither 'chosen' nor 'responses'; its fields are 'a'"),
    ],
)
def test_files_that_cannot_be_read_are_refused(tmp_path, content, message):
    with pytest.raises(errors.DataError, match=message):
        read(tmp_path, content)
