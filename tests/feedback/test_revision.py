"""Critiques and revisions: the requests, the rounds, the stored texts, the budget, and a model that writes."""

from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax import feedback, generation, lm, types
from rlhf_jax.feedback import asking, few_shot

PROMPTS = [f"question {i}" for i in range(5)]
RESPONSES = [f"reply {i}" for i in range(5)]


class FakeEditor:
    """Writes a critique "c" and a revision that appends "+" to the reply, and remembers the requests."""

    def __init__(self, write=None):
        self.requests, self.samples, self.write = [], [], write or self.append

    def __call__(self, requests, *, sample):
        self.samples.append(sample)
        for i, text in reversed(list(enumerate(requests))):
            self.requests.append(text)
            found = self.write(text)
            yield i, found if isinstance(found, Exception) else feedback.Text(found, tokens=2)

    @staticmethod
    def append(text):
        if text.endswith("Critique:"):
            return "c"
        return text.rsplit("Reply:\n", 1)[1].split("\n\n")[0] + "+"


def revise(editor, **options):
    options = {"name": "fake", "principles": feedback.HARMLESSNESS, "rounds": 3} | options
    return feedback.revise(PROMPTS, RESPONSES, editor, **options)


def test_there_are_16_different_principles():
    assert len(feedback.HARMLESSNESS) == 16
    for field in feedback.Principle._fields:
        assert len({getattr(each, field) for each in feedback.HARMLESSNESS}) == 16


def test_each_revision_starts_from_the_previous_one():
    editor = FakeEditor()
    found = revise(editor)
    for i, each in enumerate(found.revised_N):
        assert each.responses == (f"reply {i}", f"reply {i}+", f"reply {i}++", f"reply {i}+++")
        assert each.critiques == ("c", "c", "c") and len(each.principles) == 3
    assert (found.asked, found.tokens, found.errors) == (30, 60, {})
    assert found.complete(3) == list(range(5)) and found.complete(4) == []


def test_requests_have_the_sampled_principle_and_the_critique():
    editor = FakeEditor()
    found = revise(editor, rounds=1)
    numbers = feedback.sampled_principles(5, rounds=1, principles=16, seed=0)
    assert [each.principles for each in found.revised_N] == [(int(i),) for i in numbers[:, 0]]
    principle = feedback.HARMLESSNESS[numbers[2, 0]]
    critique = feedback.critique_request("question 2", "reply 2", principle)
    revision = feedback.revision_request("question 2", "reply 2", principle, critique="c")
    assert critique in editor.requests and revision in editor.requests
    assert principle.critique in critique and revision.startswith(f"{critique} c") and principle.revision in revision


def test_direct_revision_asks_for_no_critique():
    editor = FakeEditor()
    found = revise(editor, critique=False)
    assert found.asked == 15 and not any("Critique" in text for text in editor.requests)
    assert found.revised_N[0].critiques == () and found.revised_N[0].responses[-1] == "reply 0+++"


def test_the_principles_of_the_first_responses_do_not_depend_on_the_others():
    few, many = (feedback.sampled_principles(n, rounds=4, principles=16, seed=3) for n in (7, 100))
    np.testing.assert_array_equal(few, many[:7])
    assert len(np.unique(many)) == 16
    assert (feedback.sampled_principles(100, rounds=4, principles=16, seed=4) != many).any()


def test_examples_precede_each_request():
    editor = FakeEditor()
    revise(editor, rounds=1, examples=few_shot.REVISIONS)
    example = few_shot.REVISIONS[0]
    assert all(text.startswith(f"Conversation:\n{example.prompt}") for text in editor.requests)
    critiques = [text for text in editor.requests if text.endswith("Critique:")]
    assert len(critiques) == 5 and not any("Revision:" in text for text in critiques)
    assert all(example.revision in text for text in editor.requests if text not in critiques)


def test_a_text_ends_where_the_model_begins_the_next_example():
    found = revise(FakeEditor(lambda text: " good \n\n\nConversation:\nanother"), rounds=1)
    assert found.revised_N[0].responses[-1] == "good" and found.revised_N[0].critiques == ("good",)
    found = revise(FakeEditor(lambda text: "good\n\nRevision request: more"), rounds=1)
    assert found.revised_N[0].responses[-1] == "good"


def test_stored_texts_are_not_asked_for_again(tmp_path):
    first = revise(FakeEditor(), answers=tmp_path / "texts.jsonl")
    again = FakeEditor()
    second = revise(again, answers=tmp_path / "texts.jsonl")
    assert again.requests == [] and (second.asked, second.stored) == (0, 30)
    assert second.revised_N == first.revised_N
    assert revise(FakeEditor(), answers=tmp_path / "texts.jsonl", name="other").asked == 30


def test_equal_requests_are_made_once():
    editor = FakeEditor()
    principles = feedback.HARMLESSNESS[:1]
    found = feedback.revise(["q"] * 4, ["r"] * 4, editor, name="fake", principles=principles, rounds=2)
    assert len(editor.requests) == 4 and len({each.responses for each in found.revised_N}) == 1


def test_a_request_of_another_round_is_another_sample(tmp_path):
    editor = FakeEditor(lambda text: "reply 0")
    options = {"principles": feedback.HARMLESSNESS[:1], "rounds": 3, "critique": False, "answers": tmp_path / "texts"}
    found = feedback.revise(["q"], ["reply 0"], editor, name="fake", **options)
    assert len(set(editor.requests)) == 1 and editor.samples == [0, 1, 2]
    assert (found.asked, found.revised_N[0].responses) == (3, ("reply 0",) * 4)
    again = feedback.revise(["q"], ["reply 0"], editor, name="fake", **options)
    assert (again.asked, again.stored) == (0, 3) and len(editor.requests) == 3


@pytest.mark.parametrize("budget", [1, 7, 12])
def test_a_budget_stops_the_requests_and_the_rest_is_made_later(tmp_path, budget):
    whole, path = revise(FakeEditor()), tmp_path / "texts.jsonl"
    found = revise(FakeEditor(), answers=path, max_questions=budget, batch=4)
    assert found.asked == budget and len(found.complete(3)) < 5
    for _ in range(40):
        found = revise(FakeEditor(), answers=path, max_questions=budget, batch=4)
    assert found.revised_N == whole.revised_N and found.asked == 0


def test_failed_and_empty_texts_stop_only_their_own_response():
    def write(text):
        reply = text.rsplit("Reply:\n", 1)[1].split("\n\n")[0]
        if reply == "reply 1+":
            return ValueError("no")
        return "  \n" if reply == "reply 3" else FakeEditor.append(text)

    found = revise(FakeEditor(write))
    assert found.complete(3) == [0, 2, 4]
    assert found.revised_N[1].responses == ("reply 1", "reply 1+") and found.revised_N[3].responses == ("reply 3",)
    assert found.errors == {"ValueError: no": 1, "empty text": 1}


def test_a_file_of_another_kind_is_refused(tmp_path):
    revise(FakeEditor(), answers=tmp_path / "texts.jsonl")
    judge = type("Judge", (), {"name": "j", "__call__": lambda self, questions: []})()
    with pytest.raises(ValueError, match=r"texts.jsonl has answers of another kind"):
        feedback.label([feedback.Pair("q", "a", "b")], judge, principle="?", answers=tmp_path / "texts.jsonl")


@pytest.mark.parametrize("wrong", [{"principles": ()}, {"rounds": -1}, {"batch": 0}, {"max_questions": -1}])
def test_invalid_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match=r"principle|invalid"):
        revise(FakeEditor(), **wrong)


def test_a_principle_can_be_given_for_each_pair():
    asked = []

    class Judge:
        name = "judge"

        def __call__(self, questions):
            asked.extend(questions)
            yield from ((i, feedback.Answer(0.7)) for i in range(len(questions)))

    pairs = [feedback.Pair("q", "a", "b"), feedback.Pair("q", "a", "b")]
    labels = feedback.label(pairs, Judge(), principle=["Which is kinder?", "Which is safer?"])
    assert labels.asked == 4 and sum("kinder" in text for text in asked) == 2
    with pytest.raises(ValueError, match="zip"):
        feedback.label(pairs, Judge(), principle=["one"])


def test_a_model_writes_the_same_text_in_any_batch():
    cfg = lm.LMConfig.preset("tiny", vocab_size=40)
    params = lm.init(jax.random.key(0), cfg)
    sampling = generation.Sampling(max_new_tokens=6, stop_ids=(0,))
    writers = [
        feedback.ModelWriter(
            params,
            cfg=cfg,
            sampling=sampling,
            encode=lambda text: [1 + ord(c) % 39 for c in text],
            decode=lambda ids: " ".join(map(str, ids)),
            batch=batch,
            width_multiple=16,
        )
        for batch in (2, 3)
    ]
    requests = ["abc", "defgh", "a much longer request", "abd"]
    texts = [dict(writer(requests)) for writer in writers]
    assert [texts[0][i].text for i in range(4)] == [texts[1][i].text for i in range(4)]
    assert len({texts[0][i].text for i in range(4)}) > 1
    written = len(texts[0][0].text.split())
    assert texts[0][0].tokens in (3 + written, 3 + written + 1)  # with the stop token
    other = dict(writers[0](requests, sample=1))
    assert [other[i].text for i in range(4)] != [texts[0][i].text for i in range(4)]


def test_a_request_is_padded_to_the_same_width_whatever_is_written_with_it(monkeypatch):
    shapes = []

    def generate(params, rng_B, tokens_BP, mask_BP, **options):
        shapes.append(tokens_BP.shape)
        width_B1 = np.full((len(tokens_BP), 1), tokens_BP.shape[1])
        none = np.zeros(len(tokens_BP), int)
        tokens_BL = jax.numpy.concatenate([tokens_BP, width_B1], axis=1)
        arrays: Any = (tokens_BL, tokens_BL > 0, width_B1 > 0, width_B1 * 0.0, none + 1, none)
        return types.Rollout(*arrays)

    monkeypatch.setattr(generation, "generate", generate)
    options: Any = {"encode": lambda text: [1] * len(text), "decode": lambda ids: str(ids[0]), "width_multiple": 8}
    options |= {"cfg": lm.LMConfig.preset("tiny"), "sampling": generation.Sampling(max_new_tokens=1), "batch": 3}
    writer = feedback.ModelWriter({}, **options)
    requests = ["x" * length for length in (3, 20, 8, 9, 5, 1, 16)]
    whole = {requests[i]: text.text for i, text in writer(requests)}
    assert whole == {text: str(-(-len(text) // 8) * 8) for text in requests}
    assert {requests[1 + i]: text.text for i, text in writer(requests[1:4])} == {
        text: whole[text] for text in requests[1:4]
    }
    assert {shape[0] for shape in shapes} == {3}


def test_the_batches_of_a_width_have_all_rows_once():
    lengths = [3, 20, 8, 9, 5, 1, 16]
    batches = list(asking.batches_of_width(lengths, batch=3, multiple=8))
    assert batches == [(8, [0, 2, 4]), (8, [5]), (16, [3, 6]), (24, [1])]
